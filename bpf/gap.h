/* SPDX-License-Identifier: GPL-2.0 */
/* What waits behind a gap in the sequence: runs of equal segments, sorted, in chunks of the pool.
 *
 * The stack's word is rcv_nxt: when it has moved past a run at the next hook, the run became readable with the segment
 * that closed the gap. What rcv_nxt stopped at, the stack no longer has: tcp_ofo_queue() would have moved it along.
 */

static inline u32 run_start(struct entry *run) { return run->end - run->count * run->length; }

/* The number of runs of a chunk that begin before `start`: bisection without a branch. */
static inline u32 runs_before(struct chunk *c, u32 start) {
  u32 position = 0;
#pragma unroll
  for (u32 step = CHUNK / 2; step; step /= 2) {
    u32 probed = masked(position + step - 1, CHUNK - 1);
    s32 in_use = (s32)(probed - c->n) >> 31, before = (s32)(run_start(&c->e[probed & (CHUNK - 1)]) - start) >> 31;
    position += step & in_use & before;
  }
  u32 last = masked(position, CHUNK - 1);
  return position + ((position < c->n) & after(start, run_start(&c->e[last])));
}

/* Makes room at position q->at of a chunk with n < CHUNK runs. */
static inline void shift_up(struct queue *q, struct chunk *c) {
  struct entry carried = {};
  for (u32 i = 0; i < CHUNK; i++) { KEEP(i);
    if (i < q->at) continue;
    if (i > c->n) break;
    struct entry here = c->e[i & (CHUNK - 1)];
    c->e[i & (CHUNK - 1)] = carried;
    carried = here;
  }
}

/* A full chunk gives its upper half to a new one behind it. */
static inline int split(struct queue *q, struct chunk *c, u32 number) {
  u32 fresh = 0;
  struct chunk *upper = take_chunk(&fresh);
  if (!upper) return -1;
  for (u32 i = 0; i < CHUNK / 2; i++) { KEEP(i);
    upper->e[i & (CHUNK / 2 - 1)] = c->e[(i & (CHUNK / 2 - 1)) + CHUNK / 2];
  }
  upper->n = c->n = CHUNK / 2;
  upper->next = c->next;
  c->next = fresh;
  if (q->gap_last == number) q->gap_last = fresh;
  return 0;
}

/* Keeps a segment that the stack has taken behind the gap. */
static inline void gap_insert(struct books *b, struct queue *q, u32 start, u32 end) {
  u32 length = end - start, number = q->gap_last, position = 0;
  struct chunk *c = 0;
  if (q->gap_runs >= GAP_RUNS) goto untracked;
  if (!q->gap_runs) {
    c = take_chunk(&number);
    if (!c) goto untracked;
    c->n = 0;
    q->gap_first = q->gap_last = number;
  } else {
    c = chunk_at(number);
    if (!c) goto untracked;
    if (!after(start, run_start(&c->e[0]))) { /* before the last chunk: look through them */
      number = q->gap_first;
      c = chunk_at(number);
      for (u32 i = 0; i < GAP_CHUNKS; i++) { KEEP(i);
        if (!c || number == q->gap_last) break;
        u32 next_number = c->next;
        struct chunk *next = chunk_at(next_number);
        if (!next || !after(start, run_start(&next->e[0]))) break;
        number = next_number;
        c = next;
      }
      if (!c) goto untracked;
    }
    if (c->n >= CHUNK) {
      struct entry *last = &c->e[CHUNK - 1];
      if (number == q->gap_last && !after(last->end, start) && (last->end != start || last->length != length)) {
        u32 fresh = 0; /* in sequence: a new chunk, and this one stays full */
        struct chunk *behind = take_chunk(&fresh);
        if (!behind) goto untracked;
        behind->n = 0;
        c->next = fresh;
        q->gap_last = number = fresh;
        c = behind;
      } else if (last->end != start || last->length != length) {
        if (split(q, c, number)) goto untracked;
        u32 upper_number = c->next;
        struct chunk *upper = chunk_at(upper_number);
        if (upper && after(start, run_start(&upper->e[0]))) c = upper;
      }
    }
    q->at = runs_before(c, start);
    position = q->at;
    if (position) {
      struct entry *before = &c->e[(position - 1) & (CHUNK - 1)];
      if (!after(end, before->end)) goto duplicate;
      if (before->end == start && before->length == length) {
        before->count++;
        before->end = end;
        goto kept;
      }
    }
    if (position < c->n) {
      struct entry *behind = &c->e[position & (CHUNK - 1)];
      if (run_start(behind) == start && !after(end, behind->end)) goto duplicate;
      if (run_start(behind) == end && behind->length == length) {
        behind->count++;
        goto kept;
      }
    }
    if (c->n >= CHUNK) goto untracked;
    shift_up(q, c);
  }
  struct entry *run = &c->e[position & (CHUNK - 1)];
  run->end = end;
  run->count = 1;
  run->length = length;
  c->n++;
  q->gap_runs++;
kept:
  q->gapped++;
  q->cold |= COLD_GAP;
  return;
duplicate:
  ADD(b->duplicate, 1);
  return;
untracked:
  ADD(b->untracked_pool, 1);
}

/* Moves to the queue what rcv_nxt has passed of a run. Returns 1 if that is all of it. */
static inline int release_run(struct books *b, struct queue *q, struct entry *run, u32 rcv_nxt) {
  u32 start = run_start(run);
  if (after(start, rcv_nxt)) return 0;
  u64 length = run->length, count = run->count, passed = (rcv_nxt - start) / length;
  s64 ahead = (s32)(start - q->last_end); /* a hole; or, less than 0, what the queue covers already */
  u64 overlaps = is_less(ahead, 0), covered = -ahead * overlaps / length;
  passed = count + (passed - count) * is_less(passed, count);
  covered = passed + (covered - passed) * is_less(covered, passed);
  ADD(b->duplicate, covered);
  q->gapped -= passed;
  run->count = count - passed;
  if (passed != covered) {
    struct entry fresh = {
        .at_ns = q->in_order_at_ns,
        .end = start + passed * length,
        .count = passed - covered,
        .length = length,
        .hole = ahead * (1 - overlaps),
    };
    push(b, q, fresh);
  }
  if (!run->count) return 1;
  ADD(b->dropped, 1); /* rcv_nxt stopped here */
  q->gapped--;
  run->count--;
  return !run->count;
}

/* Moves what rcv_nxt has passed to the queue. Returns 1 if there may be more than one program can do. */
static inline int gap_release(struct books *b, struct queue *q, u32 rcv_nxt) {
  for (u32 round = 0; round < RELEASE_CHUNKS; round++) { KEEP(round);
    u32 number = q->gap_first;
    struct chunk *c = chunk_at(number);
    if (!c) return 0;
    q->at = 0;
    for (u32 i = 0; i < CHUNK; i++) { KEEP(i);
      if (i >= c->n || !release_run(b, q, &c->e[i & (CHUNK - 1)], rcv_nxt)) break;
      q->at = i + 1;
    }
    u32 taken = q->at;
    if (!taken) return 0;
    q->gap_runs -= taken;
    c->n -= taken;
    if (c->n) {
      for (u32 i = 0; i < CHUNK; i++) { KEEP(i);
        c->e[i] = c->e[(i + taken) & (CHUNK - 1)];
      }
      return 0;
    }
    q->gap_first = c->next;
    give_chunk(number);
    if (!q->gap_runs) {
      q->cold &= ~COLD_GAP;
      return 0;
    }
  }
  return 1;
}

/* The last segment behind a gap is settled: the stack has dropped it (tcp_data_queue_ofo() counts what it keeps), or not. */
static inline int aside_dropped(struct books *b, struct queue *q, void *tp) {
  q->cold &= ~COLD_ASIDE;
  if (load_u32(tp, OFF_tcp_sock_rcv_ooopack) != q->aside_ooopack) return 0;
  ADD(b->dropped, 1);
  return 1;
}

/* Learns from rcv_nxt what the stack did since the last hook. Returns 1 if there is more than one program can do. */
static inline int reconcile(struct books *b, struct queue *q, void *sk, void *tp, u32 rcv_nxt) {
  if ((q->cold & COLD_ASIDE) && !aside_dropped(b, q, tp)) gap_insert(b, q, q->aside_start, q->aside_end);
  if (after(q->last_end, rcv_nxt)) drop_youngest(b, q, rcv_nxt);
  if ((q->cold & COLD_GAP) && gap_release(b, q, rcv_nxt)) return 1;
  if (after(rcv_nxt, q->last_end)) {
    u32 fin = load_u8(sk, OFF_sock_sk_shutdown) & RCV_SHUTDOWN; /* a FIN has a sequence number */
    struct entry unseen = {.end = rcv_nxt - fin, .hole = rcv_nxt - fin - q->last_end};
    if (unseen.hole) push(b, q, unseen);
  }
  return 0;
}
