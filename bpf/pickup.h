/* SPDX-License-Identifier: GPL-2.0 */
/* A pickup: a reader's copied_seq has moved, which completes every entry that ends at or before it. */

struct sink { /* where its waits go */
  struct histogram *h;
  struct bounds *table;
};

static inline struct first *first_of(u32 bucket) {
  int zero = 0;
  struct firsts *firsts_of_cpu = firsts.lookup(&zero);
  return firsts_of_cpu ? &firsts_of_cpu->of_bucket[bucket & 255] : 0;
}

/* The first wait of a bucket in this interval and on these CPUs: its histogram was zero when the interval began. Returns 1. */
static inline u32 note_first(u64 picked_ns, u32 bucket, u64 wait_ns) {
  struct first *f = first_of(bucket);
  if (!f) return 0;
  f->pickup_ns = picked_ns;
  f->wait_ns = wait_ns;
  return 1;
}

/* An entry that is done as a whole. */
static inline void complete(struct entry *e, struct queue *q, struct sink *to) {
  u32 count = e->count, length = e->length;
  q->undescribed += e->hole;
  if (unlikely(!count)) return;
  u64 wait_ns = q->picked_ns - e->at_ns;
  if (wait_ns > q->longest_ns) q->longest_ns = wait_ns;
  u32 bucket = bucket_of(to->table, wait_ns);
  if (EXEMPLARS && unlikely(!to->h->bucket[bucket])) q->firsts |= note_first(q->picked_ns, bucket, wait_ns);
  OBSERVE(to->h->bucket[bucket], count);
  q->sum_ns += wait_ns * count;
  q->segments += count;
  q->bytes += count * length;
}

/* complete() without a branch: the verifier follows both ways of each one, for every entry of a long loop. */
static inline void complete_in_bulk(struct entry *e, struct queue *q, struct sink *to, struct firsts *noted) {
  u64 count = e->count, length = e->length, wait_ns = q->picked_ns - e->at_ns, counted = is_less(0, count);
  u64 longest_ns = q->longest_ns;
  u32 bucket = bucket_of(to->table, wait_ns);
  q->undescribed += e->hole;
  q->longest_ns = longest_ns + (wait_ns - longest_ns) * (is_less(longest_ns, wait_ns) & counted);
#if EXEMPLARS
  u64 fresh = is_less(to->h->bucket[bucket], 1) & counted;
  struct first *f = &noted->of_bucket[bucket];
  u64 pickup_ns = f->pickup_ns, first_ns = f->wait_ns;
  f->pickup_ns = pickup_ns + (q->picked_ns - pickup_ns) * fresh;
  f->wait_ns = first_ns + (wait_ns - first_ns) * fresh;
  q->firsts |= fresh;
#else
  KEEP(bucket); /* or clang makes branches of what they are made of, and the verifier gives up */
  KEEP(counted);
#endif
  OBSERVE(to->h->bucket[bucket], count);
  q->sum_ns += wait_ns * count;
  q->segments += count;
  q->bytes += count * length;
}

/* An entry that copied_seq is inside of: the bytes of its hole and the segments that it has passed. */
static inline void complete_part(struct entry *e, u32 copied, struct queue *q, struct sink *to) {
  u32 length = e->length, left = e->end - copied, described = e->count * length;
  struct entry done = {.at_ns = e->at_ns, .length = length};
  if (left < described + e->hole) {
    u32 hole_left = left > described ? left - described : 0;
    done.hole = e->hole - hole_left;
    e->hole = hole_left;
  }
  if (length && left < described) done.count = e->count - (left + length - 1) / length;
  e->count -= done.count;
  complete(&done, q, to);
}

/* What has ended of the ring. */
static inline void complete_ring(u32 copied, struct queue *q, struct sink *to) {
  for (u32 i = 0; i < INLINE; i++) { KEEP(i);
    struct entry *e = &q->e[q->head & (INLINE - 1)];
    if (!q->n || after(e->end, copied)) break;
    complete(e, q, to);
    q->head++;
    q->n--;
  }
}

static inline void begin_pickup(struct queue *q) {
  q->picked_ns = bpf_ktime_get_ns();
  q->side = side_at(q->picked_ns);
  q->longest_ns = q->sum_ns = 0;
  q->segments = q->bytes = q->undescribed = q->firsts = 0;
}

static inline void end_pickup(struct books *b, struct queue *q, struct sink *to) {
  if (unlikely(q->undescribed)) ADD(b->undescribed_bytes, q->undescribed);
  if (!q->segments) return;
  OBSERVE(to->h->sum_ns, q->sum_ns);
  if (q->outcome == OBSERVED) COUNT(b->observed, q->segments);
  else if (q->outcome == OWN) ADD(b->own, q->segments);
  else ADD(b->filtered, q->segments);
}

/* Is there somebody to tell of a pickup that begins no bucket? Counts a row that is withheld. */
static inline int worth_telling(struct books *b, struct queue *q, u64 longest_ns, u32 side) {
  if (IS_TOLD(q, longest_ns)) return 1;
  if (!IS_ROW(longest_ns)) return 0;
  if (longest_ns >= rows_from_ns(side)) return 1;
  COUNT(b->rows_withheld, 1);
  return 0;
}

/* Is there something to tell user space? */
static inline int notable(struct books *b, struct queue *q) {
  if (q->outcome != OBSERVED || !q->segments) return 0;
  return q->firsts || worth_telling(b, q, q->longest_ns, q->side);
}

#if SERVE
static inline u32 own_tid(void) {
  void *pid = copy_pointer((void *)bpf_get_current_task(), OFF_task_struct_thread_pid);
  u32 upid_bytes = 2 * sizeof(void *), level = copy_u32(pid, OFF_pid_level);
  return copy_u32((char *)pid + level * upid_bytes, OFF_pid_numbers + OFF_upid_nr);
}
#endif

/* What all events of a pickup have in common. */
static inline void describe(void *sk, void *tp, struct queue *q, struct event *e) {
  u64 pid_tgid = bpf_get_current_pid_tgid();
  e->picked_ns = q->picked_ns;
  e->tgid = pid_tgid >> 32;
  e->tid = pid_tgid;
#if SERVE
  e->own_tid = own_tid();
#endif
  e->series = q->series;
  e->side = q->side;
  e->segments = q->segments;
  e->bytes = q->bytes;
  e->local_port = local_port_of(tp);
  e->remote_port = remote_port_of(sk);
  e->role = q->role;
  e->family = addresses_of(sk, e->local_address, e->remote_address);
  bpf_get_current_comm(e->comm, sizeof(e->comm));
}

static inline void emit(struct books *b, struct event *e, u32 bucket, u64 wait_ns, u32 kind) {
  e->bucket = bucket;
  e->wait_ns = wait_ns;
  e->kind = kind;
  /* The reader polls on a timer. One wakeup as the buffer passes half: the window is wide enough for a few CPUs. And one
   * for a process that is to hear of its own wait, soon. */
  u64 used = bpf_ringbuf_query(EVENTS, BPF_RB_AVAIL_DATA), half = RING_BYTES / 2;
  u64 wakeup = used >= half && used < half + 4 * sizeof(*e) || kind & KIND_SERVED ? BPF_RB_FORCE_WAKEUP : BPF_RB_NO_WAKEUP;
  if (bpf_ringbuf_output(EVENTS, e, sizeof(*e), wakeup)) ADD(b->events_lost, 1);
}
