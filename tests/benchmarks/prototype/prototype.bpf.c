/* SPDX-License-Identifier: GPL-2.0 */
/* The prototype of the exact accounting, loaded by hold.py: what the product's cost is compared with. It exports nothing, and
 * knows no events, exemplars, filters, holes in what it saw, reused pids or retired series.
 *
 * TYPED: BTF-typed tracepoints and socket storage (kernels from 5.11 with BTF). Otherwise raw tracepoints and a hash. */
#define INLINE 8          /* entries that sit with the socket (power of two) */
#define CHUNK 64          /* entries of a chunk of the shared pool */
#define GAP 64            /* segments that may wait behind a gap, per socket */
#define BUCKETS 24
/* First in every loop: clang would drop the counter where another condition also ends the loop, and the verifier would see no end. */
#define KEEP(i) asm volatile("" : "+r"(i))

struct entry { u64 at; u32 end, count; };
struct queue {
  u32 head, n;            /* inline ring */
  u32 spill_head, spill_tail;   /* absolute positions in the chunks */
  u32 last_end, gapped;   /* end of the youngest entry; segments waiting behind a gap */
  u32 series, tgid;       /* remembered: whose histogram */
  struct entry e[INLINE];
};
struct chunk { struct entry e[CHUNK]; };
struct chunk_key { u64 sk; u32 number, pad; };
struct aside { u32 start, end, count; };
struct gap { u32 n; struct aside a[GAP]; };
struct series_key { u32 tgid; u16 port, family; u8 role, pad[3]; };
struct histogram { u64 count, sum, bucket[BUCKETS]; };
/* One writer each: softirqs interrupt the reader's program on its own CPU, and nothing here is atomic. */
struct books { u64 received, duplicate, dropped, untracked, merged, entered, observed, unread; };

#if TYPED
BPF_SK_STORAGE(queues, struct queue);
#else
BPF_HASH(queues, u64, struct queue, 65536);
BPF_PERCPU_ARRAY(zero_queue, struct queue, 1);
#endif
BPF_TABLE("hash", struct chunk_key, struct chunk, chunks, 2048);
BPF_HASH(gaps, u64, struct gap, 1024);
BPF_PERCPU_ARRAY(zero_chunk, struct chunk, 1);
BPF_PERCPU_ARRAY(zero_gap, struct gap, 1);
BPF_PERCPU_ARRAY(books, struct books, 1);
BPF_HASH(series, struct series_key, u32, 2048);
BPF_QUEUE(free_series, u32, 2048);
BPF_PROG_ARRAY(tails, 1);
BPF_PERCPU_ARRAY(histograms, struct histogram, 2048);

static inline u32 word(void *base, int off) { u32 v = 0; bpf_probe_read_kernel(&v, 4, (char *)base + off); return v; }
static inline void *ptr(void *base, int off) { void *v = 0; bpf_probe_read_kernel(&v, 8, (char *)base + off); return v; }
#if TYPED   /* the verifier knows the pointers: fields are plain loads */
static inline u32 field(void *base, int off) { return *(volatile u32 *)((char *)base + off); }
static inline void *tcp_sock_of(void *sk) { return bpf_skc_to_tcp_sock(sk); }
static inline struct queue *queue_of(void *sk) { return queues.sk_storage_get(sk, 0, 0); }
static inline struct queue *new_queue(void *sk) { return queues.sk_storage_get(sk, 0, BPF_SK_STORAGE_GET_F_CREATE); }
static inline void forget(void *sk) { }
#else
static inline u32 field(void *base, int off) { return word(base, off); }
static inline void *tcp_sock_of(void *sk) { return sk; }
static inline struct queue *queue_of(void *sk) { u64 id = (u64)sk; return queues.lookup(&id); }
static inline struct queue *new_queue(void *sk) {
  u64 id = (u64)sk;
  int zero = 0;
  struct queue *z = zero_queue.lookup(&zero);
  if (!z) return 0;
  queues.insert(&id, z);
  return queues.lookup(&id);
}
static inline void forget(void *sk) { u64 id = (u64)sk; queues.delete(&id); }
#endif
static inline int after(u32 a, u32 b) { return (s32)(a - b) > 0; }

static inline u32 bucket_of(u64 ns) { BOUNDS return BUCKETS - 1; }

/* Appends an entry; the queue is inline first, then in chunks until those are drained. */
static inline void push(struct books *b, u64 sk, struct queue *q, u32 end, u32 count, u64 at) {
  q->last_end = end;
  if (q->n < INLINE && q->spill_head == q->spill_tail) {
    struct entry *e = &q->e[(q->head + q->n) & (INLINE - 1)];
    e->at = at; e->end = end; e->count = count;
    q->n++;
    return;
  }
  struct chunk_key k = {.sk = sk, .number = q->spill_tail / CHUNK};
  struct chunk *c = chunks.lookup(&k);
  if (!c) {
    int zero = 0;
    struct chunk *z = zero_chunk.lookup(&zero);
    if (!z) return;
    chunks.insert(&k, z);
    c = chunks.lookup(&k);
  }
  if (c) {
    struct entry *e = &c->e[q->spill_tail & (CHUNK - 1)];
    e->at = at; e->end = end; e->count = count;
    q->spill_tail++;
    return;
  }
  /* the pool is empty: the youngest entry grows */
  b->merged += count;
  struct entry *e = &q->e[(q->head + q->n - 1) & (INLINE - 1)];
  if (q->spill_head != q->spill_tail) {
    k.number = (q->spill_tail - 1) / CHUNK;
    c = chunks.lookup(&k);
    if (!c) return;
    e = &c->e[(q->spill_tail - 1) & (CHUNK - 1)];
  }
  e->end = end; e->count += count;
}

/* Takes the youngest entry back: the stack threw it away. */
static inline void pop_youngest(struct books *b, u64 sk, struct queue *q, u32 rcv_nxt) {
  struct entry *e = 0;
  if (q->spill_head != q->spill_tail) {
    struct chunk_key k = {.sk = sk, .number = (q->spill_tail - 1) / CHUNK};
    struct chunk *c = chunks.lookup(&k);
    if (c) { e = &c->e[(q->spill_tail - 1) & (CHUNK - 1)]; q->spill_tail--; }
  } else if (q->n) {
    q->n--;
    e = &q->e[(q->head + q->n) & (INLINE - 1)];
  }
  q->last_end = rcv_nxt;
  if (e) { b->dropped += e->count; b->entered -= e->count; }
}

static inline void set_aside(struct books *b, u64 sk, struct queue *q, u32 start, u32 end) {
  int zero = 0;
  struct gap *g = gaps.lookup(&sk);
  if (!g) {
    struct gap *z = zero_gap.lookup(&zero);
    if (!z) return;
    gaps.insert(&sk, z);
    g = gaps.lookup(&sk);
    if (!g) { b->untracked += 1; return; }
  }
  u32 n = g->n;
  if (n >= GAP - 1) { b->untracked += 1; return; }
  for (u32 i = 0; i < GAP - 1; i++) { KEEP(i);
    if (i >= n) break;
    if (g->a[i].start == start && g->a[i].end == end) { b->duplicate += 1; return; }
  }
  struct aside carried = {.start = start, .end = end, .count = 1};
  for (u32 i = 0; i < GAP; i++) { KEEP(i);  /* sorted by start: each later one moves up */
    if (i >= n) { g->a[i] = carried; break; }
    if (after(g->a[i].start, carried.start)) { struct aside a = g->a[i]; g->a[i] = carried; carried = a; }
  }
  g->n = n + 1;
  q->gapped = n + 1;
  b->entered += 1;
}

/* A segment up to `end` is in order: what waited behind it becomes readable now. */
static inline void close_gap(struct books *b, u64 sk, struct queue *q, u32 end, u64 now) {
  struct gap *g = gaps.lookup(&sk);
  if (!g) return;
  u32 taken = 0;
  for (u32 i = 0; i < GAP; i++) { KEEP(i);
    if (i >= g->n) break;
    struct aside *a = &g->a[i];
    if (after(a->start, end)) break;
    if (after(a->end, end)) { end = a->end; push(b, sk, q, end, a->count, now); }
    else { b->duplicate += a->count; b->entered -= a->count; }
    taken++;
  }
  if (!taken) return;
  u32 left = g->n - taken;
  for (u32 i = 0; i < GAP; i++) { KEEP(i);
    g->a[i] = g->a[(i + taken) & (GAP - 1)];
  }
  g->n = left;
  q->gapped = left;
  if (!left) gaps.delete(&sk);
}

int probe(u64 *ctx) {
  void *sk = (void *)ctx[0], *skb = (void *)ctx[1];
  u64 id = (u64)sk;
#if TYPED
  u32 seq = field(skb, OFF_sk_buff_cb), end = field(skb, OFF_sk_buff_cb + 4) - (field(skb, OFF_sk_buff_cb + 12) & 1);
#else
  u32 cb[4];
  bpf_probe_read_kernel(&cb, 16, (char *)skb + OFF_sk_buff_cb);
  u32 seq = cb[0], end = cb[1] - (cb[3] & 1);
#endif
  if (end == seq) return 0;
  int zero = 0;
  struct books *b = books.lookup(&zero);
  if (!b) return 0;
  void *tp = tcp_sock_of(sk);
  if (!tp) return 0;
  u32 rcv_nxt = field(tp, OFF_tcp_sock_rcv_nxt);
  b->received += 1;
  if (!after(end, rcv_nxt)) { b->duplicate += 1; return 0; }
  struct queue *q = queue_of(sk);
  if (!q) {
    q = new_queue(sk);
    if (!q) { b->untracked += 1; return 0; }
    q->last_end = rcv_nxt;
  }
  if (after(q->last_end, rcv_nxt)) pop_youngest(b, id, q, rcv_nxt);
  if (after(seq, rcv_nxt)) { set_aside(b, id, q, seq, end); return 0; }
  u64 now = bpf_ktime_get_ns();
  push(b, id, q, end, 1, now);
  b->entered += 1;
  if (q->gapped) close_gap(b, id, q, end, now);
  return 0;
}

static inline void identify(char *sk, struct queue *q, u32 tgid) {
  struct series_key k = {.tgid = tgid, .family = word(sk, OFF_sock_common_skc_family)};
  u8 fastreuse = word(ptr(sk, OFF_inet_connection_sock_icsk_bind_hash), OFF_inet_bind_bucket_fastreuse);
  k.role = fastreuse == 255;
  k.port = k.role ? __builtin_bswap16(word(sk, OFF_sock_common_skc_dport)) : word(sk, OFF_sock_common_skc_num);
  u32 *known = series.lookup(&k), mine = 0;    /* 0: the overflow series */
  if (!known && !free_series.pop(&mine)) {
    series.insert(&k, &mine);
    known = series.lookup(&k);
    if (!known || *known != mine) free_series.push(&mine, 0);   /* the map is full, or another CPU was first */
  }
  q->series = known ? *known : 0;
  q->tgid = tgid;
}

static inline void observe(struct histogram *h, u64 now, struct entry *e) {
  u64 wait = now - e->at;
  h->count += e->count; h->sum += wait * e->count;
  u32 b = bucket_of(wait);
  if (b < BUCKETS) h->bucket[b] += e->count;
}

int adjust(u64 *ctx) {
  void *sk = (void *)ctx[0];
  u64 id = (u64)sk;
  struct queue *q = queue_of(sk);
  if (!q || !(q->n | (q->spill_head ^ q->spill_tail))) return 0;
  void *tp = tcp_sock_of(sk);
  if (!tp) return 0;
  u32 copied = field(tp, OFF_tcp_sock_copied_seq);
  int zero = 0;
  struct books *b = books.lookup(&zero);
  if (!b) return 0;
  u64 now = bpf_ktime_get_ns();
  u32 tgid = bpf_get_current_pid_tgid() >> 32;
  if (q->tgid != tgid) identify(sk, q, tgid);
  u32 index = q->series;
  struct histogram *h = histograms.lookup(&index);
  if (!h) return 0;
  u64 done = 0;
  for (int i = 0; i < INLINE; i++) { KEEP(i);
    if (!q->n) break;
    struct entry *e = &q->e[q->head & (INLINE - 1)];
    if (after(e->end, copied)) break;
    observe(h, now, e);
    done += e->count;
    q->head++; q->n--;
  }
  b->observed += done;

  if (!q->n && q->spill_head != q->spill_tail) tails.call(ctx, 0);
  return 0;
}

/* Completes the entries of one chunk, and goes on with the next one as long as whole chunks are done. */
int drain(u64 *ctx) {
  void *sk = (void *)ctx[0];
  u64 id = (u64)sk;
  struct queue *q = queue_of(sk);
  if (!q) return 0;
  int zero = 0;
  struct books *b = books.lookup(&zero);
  if (!b) return 0;
  struct chunk_key k = {.sk = id, .number = q->spill_head / CHUNK};
  struct chunk *c = chunks.lookup(&k);
  if (!c) return 0;
  u32 copied = word(sk, OFF_tcp_sock_copied_seq), index = q->series;
  struct histogram *h = histograms.lookup(&index);
  if (!h) return 0;
  u64 now = bpf_ktime_get_ns(), done = 0;
  for (u32 i = 0; i < CHUNK; i++) { KEEP(i);
    u32 at = q->spill_head;
    struct entry *e = &c->e[at & (CHUNK - 1)];
    if (at == q->spill_tail || after(e->end, copied)) break;
    observe(h, now, e);
    done += e->count;
    q->spill_head = at + 1;
    if (!((at + 1) & (CHUNK - 1))) break;
  }
  b->observed += done;

  int whole = q->spill_head / CHUNK != k.number;
  if (whole || q->spill_head == q->spill_tail) chunks.delete(&k);
  if (q->spill_head == q->spill_tail) return 0;
  if (whole) tails.call(ctx, 0);
  return 0;
}

int destroy(u64 *ctx) {
  void *sk = (void *)ctx[0];
  u64 id = (u64)sk;
  struct queue *q = queue_of(sk);
  if (!q) return 0;
  int zero = 0;
  struct books *b = books.lookup(&zero);
  if (!b) return 0;
  u64 left = 0;
  for (int i = 0; i < INLINE; i++) { KEEP(i); if (i >= q->n) break; left += q->e[(q->head + i) & (INLINE - 1)].count; }
  for (int i = 0; i < 2048; i++) { KEEP(i);
    if (q->spill_head == q->spill_tail) break;
    struct chunk_key k = {.sk = id, .number = q->spill_head / CHUNK};
    u32 next = (k.number + 1) * CHUNK;
    if (after(next, q->spill_tail)) next = q->spill_tail;
    left += next - q->spill_head;
    q->spill_head = next;
    chunks.delete(&k);
  }
  struct gap *g = gaps.lookup(&id);
  if (g) { left += g->n; gaps.delete(&id); }
  b->unread += left;
  forget(sk);
  return 0;
}
