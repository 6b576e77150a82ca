/* SPDX-License-Identifier: GPL-2.0 */
/* What waits behind a gap in the sequence: runs of equal segments, sorted, in chunks of the pool.
 *
 * The stack's word is rcv_nxt: when it has moved past a run at the next hook, the run became readable with the segment
 * that closed the gap. What rcv_nxt stopped at, the stack no longer has: tcp_ofo_queue() would have moved it along.
 */

static inline u32 run_start(struct entry *run) { return run->end - run->count * run->length; }

/* Makes room at position `at` of a chunk with n < CHUNK runs. */
static inline void shift_up(struct chunk *c, u32 at) {
  struct entry carried = {};
  for (u32 i = 0; i < CHUNK; i++) { KEEP(i);
    if (i < at) continue;
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
    for (u32 i = 0; i < CHUNK; i++) { KEEP(i);
      if (i >= c->n || !after(start, run_start(&c->e[i & (CHUNK - 1)]))) break;
      position = i + 1;
    }
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
    shift_up(c, position);
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

/* Moves what rcv_nxt has passed to the queue. Returns 1 if another chunk may have more. */
static inline int gap_release(struct books *b, struct queue *q, u32 rcv_nxt) {
  u32 number = q->gap_first, taken = 0, duplicate = 0, dropped = 0;
  struct chunk *c = chunk_at(number);
  if (!c) return 0;
  for (u32 i = 0; i < CHUNK; i++) { KEEP(i);
    if (i >= c->n) break;
    struct entry *run = &c->e[i & (CHUNK - 1)];
    u32 start = run_start(run), length = run->length, passed = run->count, covered = 0;
    if (after(start, rcv_nxt) || !length) break;
    if (after(run->end, rcv_nxt)) passed = (rcv_nxt - start) / length;
    if (after(q->last_end, start)) covered = (q->last_end - start) / length;
    if (covered > passed) covered = passed;
    duplicate += covered;
    if (passed != covered)
      push(b, q, start + passed * length, passed - covered, length, q->in_order_at_ns);
    run->count -= passed;
    if (run->count) { /* rcv_nxt stopped here: the stack dropped this one */
      dropped++;
      run->count--;
      q->gapped--;
    }
    q->gapped -= passed;
    if (run->count) break;
    taken++;
  }
  ADD(b->duplicate, duplicate);
  ADD(b->dropped, dropped);
  q->gap_runs -= taken;
  u32 left = c->n - taken;
  if (!left) {
    u32 next = c->next;
    give_chunk(number);
    q->gap_first = next;
    if (!q->gap_runs) q->cold &= ~COLD_GAP;
    return q->gap_runs != 0;
  }
  if (taken) {
    for (u32 i = 0; i < CHUNK; i++) { KEEP(i);
      c->e[i] = c->e[(i + taken) & (CHUNK - 1)];
    }
    c->n = left;
  }
  return 0;
}

/* Learns from rcv_nxt what the stack did since the last hook. Returns 1 if there is more than one program can do. */
static inline int reconcile(struct books *b, struct queue *q, void *tp, u32 rcv_nxt) {
  if (q->cold & COLD_ASIDE) {
    q->cold &= ~COLD_ASIDE;
    /* tcp_data_queue_ofo() counts what it keeps */
    if (load_u32(tp, OFF_tcp_sock_rcv_ooopack) == q->aside_ooopack) ADD(b->dropped, 1);
    else gap_insert(b, q, q->aside_start, q->aside_end);
  }
  if (after(q->last_end, rcv_nxt)) drop_youngest(b, q, rcv_nxt);
  if ((q->cold & COLD_GAP) && gap_release(b, q, rcv_nxt)) return 1;
  if (after(rcv_nxt, q->last_end)) push(b, q, rcv_nxt, 0, rcv_nxt - q->last_end, 0);
  return 0;
}
