/* SPDX-License-Identifier: GPL-2.0 */
/* The readable queue of a socket: what may be read, oldest first. A few entries sit with the socket, the rest in chunks. */

static inline struct books *books_of_cpu(void) {
  int zero = 0;
  return books.lookup(&zero);
}

/* A number that no other socket has, and not 0. */
static inline u64 id_of(void *sk) {
#if TYPED /* the verifier calculates with no pointer, but for the difference of two: to an address that never changes */
  int zero = 0;
  u64 id = (u64)sk - (u64)interval.lookup(&zero);
  KEEP(id);
  return id;
#else
  return (u64)sk;
#endif
}

static inline u32 slot_of(u64 id) { return (id * 0x9E3779B97F4A7C15ULL >> 32) & (SLOTS - 1); }

/* What is in a slot, if it is this socket's. */
static inline struct queue *queue_in(u32 number, u64 id) {
  struct slot *slot = slots.lookup(&number);
  return slot && slot->q.owner == id ? &slot->q : 0;
}

/* A slot for this socket, if nobody has it. */
static inline struct queue *take_slot(u32 number, u64 id) {
  if (slots_taken.insert(&number, &id)) {
    u64 *owner = slots_taken.lookup(&number);
    if (!owner || *owner != id) return 0; /* else one that it could not give back: see give_slot() */
  }
  struct slot *slot = slots.lookup(&number);
  if (!slot) return 0;
  __builtin_memset(&slot->q, 0, sizeof(slot->q));
  slot->q.owner = id;
  return &slot->q;
}

/* A hash refuses a deletion in an interrupt of another one (EBUSY): the slot is lost until a socket has that address again. */
static inline void give_slot(struct queue *q, u32 number) {
  q->owner = 0;
  slots_taken.delete(&number);
}

#if TYPED
static inline struct queue *queue_elsewhere(void *sk, u64 id) { return queues_elsewhere.sk_storage_get(sk, 0, 0); }
static inline struct queue *create_elsewhere(void *sk, u64 id) {
  return queues_elsewhere.sk_storage_get(sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
}
static inline void forget_elsewhere(u64 id) {} /* the kernel frees it with the socket */
#else
static inline struct queue *queue_elsewhere(void *sk, u64 id) {
  u32 *number = slots_elsewhere.lookup(&id);
  return number ? queue_in(*number, id) : 0;
}
static inline struct queue *create_elsewhere(void *sk, u64 id) {
  for (u32 i = 1; i < SLOTS_TRIED; i++) { KEEP(i);
    u32 number = (slot_of(id) + i) & (SLOTS - 1);
    struct queue *q = take_slot(number, id);
    if (!q) continue;
    if (!slots_elsewhere.update(&id, &number)) return q;
    give_slot(q, number);
    return 0;
  }
  return 0;
}
static inline void forget_elsewhere(u64 id) {
  u32 *found = slots_elsewhere.lookup(&id);
  if (!found) return;
  u32 number = *found;
  struct queue *q = queue_in(number, id);
  if (q) give_slot(q, number);
  slots_elsewhere.delete(&id);
}
#endif

static inline struct queue *queue_of(void *sk) {
  u64 id = id_of(sk);
  struct queue *q = queue_in(slot_of(id), id);
  return q ? q : queue_elsewhere(sk, id);
}

static inline struct queue *create_queue(void *sk) {
  u64 id = id_of(sk);
  struct queue *q = take_slot(slot_of(id), id);
  return q ? q : create_elsewhere(sk, id);
}

static inline void forget_queue(void *sk) {
  u64 id = id_of(sk);
  u32 number = slot_of(id);
  struct queue *q = queue_in(number, id);
  if (q) give_slot(q, number);
  else forget_elsewhere(id);
}

static inline struct chunk *chunk_at(u32 number) { return chunks.lookup(&number); }

static inline struct chunk *take_chunk(u32 *number) {
  if (free_chunks.pop(number)) return 0;
  return chunk_at(*number);
}

static inline void give_chunk(u32 number) { free_chunks.push(&number, 0); }

/* The chunk that the next spilled entry goes to, or 0 when the pool is empty. */
static inline struct chunk *chunk_for_push(struct queue *q) {
  if (q->spill_tail & (CHUNK - 1)) return chunk_at(q->last_chunk);
  u32 number = 0;
  struct chunk *fresh = take_chunk(&number);
  if (!fresh) return 0;
  if (q->spill_head == q->spill_tail) {
    q->first_chunk = number;
  } else {
    struct chunk *last = chunk_at(q->last_chunk);
    if (last) last->next = number;
  }
  q->last_chunk = number;
  return fresh;
}

static inline struct entry *youngest(struct queue *q) {
  if (q->spill_head == q->spill_tail) return &q->e[(q->head + q->n - 1) & (INLINE - 1)];
  struct chunk *last = chunk_at(q->last_chunk);
  return last ? &last->e[(q->spill_tail - 1) & (CHUNK - 1)] : 0;
}

/* With an empty pool, more segments and a hole join the youngest entry: their wait is rounded up, and counted as such. */
static inline void merge(struct books *b, struct queue *q, struct entry more) {
  struct entry *e = youngest(q);
  if (!e) return;
  ADD(b->merged, more.count);
  if (!e->count) e->at_ns = more.at_ns;
  e->end = more.end;
  e->count += more.count;
  e->hole += more.hole;
  e->length = 0;
  if (q->spill_head == q->spill_tail) q->cold |= COLD_MIXED;
  else q->spilled += more.count;
}

static inline void push(struct books *b, struct queue *q, struct entry fresh) {
  q->last_end = fresh.end;
  if (q->spill_head == q->spill_tail && q->n < INLINE) {
    q->e[(q->head + q->n) & (INLINE - 1)] = fresh;
    q->n++;
    if (fresh.count != 1 || fresh.hole) q->cold |= COLD_MIXED;
    return;
  }
  struct chunk *c = chunk_for_push(q);
  if (!c) {
    merge(b, q, fresh);
    return;
  }
  c->e[q->spill_tail & (CHUNK - 1)] = fresh;
  q->spill_tail++;
  q->spilled += fresh.count;
  q->cold |= COLD_SPILL;
}

/* The stack threw the youngest segment away after tcp_probe: rcv_nxt did not move past it. */
static inline void drop_youngest(struct books *b, struct queue *q, u32 rcv_nxt) {
  q->last_end = rcv_nxt;
  int spilled = q->spill_head != q->spill_tail;
  if (!spilled && !q->n) return;
  struct entry *e = youngest(q);
  if (!e || !e->count) return;
  ADD(b->dropped, 1);
  if (spilled) q->spilled--;
  if (e->count > 1 || e->hole) { /* merged: only its last segment is gone */
    e->count--;
    e->end = rcv_nxt;
  } else if (!spilled) {
    q->n--;
  } else if (q->spill_tail - q->spill_head > 1 && (q->spill_tail - 1) & (CHUNK - 1)) {
    q->spill_tail--;
  } else { /* the only one of its chunk stays, as an entry of nothing */
    e->count = e->length = 0;
    e->end = rcv_nxt;
  }
}

/* The socket's entries that are left, and its chunks, as unread. More than 128 chunks: returns 1, call again. */
static inline int discard(struct books *b, struct queue *q) {
  u32 unread = 0;
  for (u32 i = 0; i < INLINE; i++) { KEEP(i);
    if (i < q->n) unread += q->e[(q->head + i) & (INLINE - 1)].count;
  }
  q->n = 0;
  if (q->spill_head != q->spill_tail) {
    unread += q->spilled;
    q->spilled = 0;
    u32 number = q->first_chunk, left = ((q->spill_tail - 1) / CHUNK) - (q->spill_head / CHUNK) + 1;
    for (u32 i = 0; i < 128; i++) { KEEP(i);
      if (!left) break;
      struct chunk *c = chunk_at(number);
      if (!c) break;
      u32 next = c->next;
      give_chunk(number);
      number = next;
      left--;
    }
    q->first_chunk = number;
    q->spill_head = 0;
    q->spill_tail = left * CHUNK;
  }
  if (q->gap_runs) {
    u32 number = q->gap_first;
    for (u32 i = 0; i < GAP_CHUNKS; i++) { KEEP(i);
      struct chunk *c = chunk_at(number);
      if (!c) break;
      u32 next = c->next, last = number == q->gap_last;
      give_chunk(number);
      number = next;
      if (last) break;
    }
    q->gap_runs = 0;
  }
  unread += q->gapped + !!(q->cold & COLD_ASIDE);
  q->gapped = 0;
  q->cold = 0;
  ADD(b->unread, unread);
  return q->spill_head != q->spill_tail;
}
