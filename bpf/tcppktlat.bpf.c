/* SPDX-License-Identifier: GPL-2.0 */
/* The programs, one per hook. The short paths come first in each pair; whatever is rare is tail-called, so that they stay
 * small. A hook's tail-called programs run as part of it: under the same socket lock and the same RCU read section.
 *
 *   tcp_probe              a segment has arrived                       probe, probe_slow, reconnect
 *   tcp_rcv_space_adjust   a reader has copied bytes                   adjust, adjust_slow, drain, drain_elsewhere, emit_events,
 *                                                                      renew
 *   tcp_destroy_sock       the socket goes                             destroy
 *   sched_process_exec, sched_process_exit                             process_exec, process_exit
 */

static inline int port_filtered(void *sk, void *tp) {
#ifdef FILTER_LPORT
  if (load_u16(tp, OFF_inet_sock_inet_sport) != bpf_htons(FILTER_LPORT)) return 1;
#endif
#ifdef FILTER_RPORT
  if (load_u16(sk, OFF_sock_common_skc_dport) != bpf_htons(FILTER_RPORT)) return 1;
#endif
  return 0;
}

static inline u32 connection_base(void *tp, u32 rcv_nxt) { return rcv_nxt - load_u32(tp, OFF_tcp_sock_bytes_received); }

/* First sight of a socket. What lies unread in it already, nobody saw arrive. */
static inline struct queue *begin_queue(struct books *b, void *sk, void *tp, u32 rcv_nxt) {
  struct queue *q = create_queue(sk);
  if (!q) return 0;
  ADD(b->sockets_opened, 1);
  q->base = connection_base(tp, rcv_nxt);
  q->last_end = load_u32(tp, OFF_tcp_sock_copied_seq);
  q->role = role_of(sk);
  return q;
}

/* tcp_probe, called by tcp_rcv_established() before it checks anything: a segment in sequence, on a socket that reads. */
int probe(u64 *ctx) {
  void *sk = (void *)ctx[0];
  struct span_of_bytes data = data_of((void *)ctx[1]);
  if (data.end == data.start) return 0;
  struct books *b = books_of_cpu();
  void *tp = tcp_sock_of(sk);
  if (!b || !tp || port_filtered(sk, tp)) return 0;
  COUNT(b->received, 1);
  u32 rcv_nxt = load_u32(tp, OFF_tcp_sock_rcv_nxt);
  struct queue *q = queue_of(sk);
  if (unlikely(!q || q->cold || q->n >= INLINE || q->last_end != rcv_nxt || data.start != rcv_nxt)) {
    probe_tails.call(ctx, TAIL_PROBE_SLOW);
    ADD(b->untracked_pool, 1); /* not reached */
    return 0;
  }
  struct entry *e = &q->e[(q->head + q->n) & (INLINE - 1)];
  e->at_ns = bpf_ktime_get_ns();
  e->end = data.end;
  e->count = 1;
  e->length = data.end - data.start;
  e->hole = 0;
  q->last_end = data.end;
  q->n++;
  return 0;
}

/* Any segment, on a socket in any state. */
int probe_slow(u64 *ctx) {
  void *sk = (void *)ctx[0];
  struct span_of_bytes data = data_of((void *)ctx[1]);
  struct books *b = books_of_cpu();
  void *tp = tcp_sock_of(sk);
  if (!b || !tp) return 0;
  u32 rcv_nxt = load_u32(tp, OFF_tcp_sock_rcv_nxt);
  struct queue *q = queue_of(sk);
  if (!q) {
#ifdef OFF_tcp_sock_is_mptcp
    if (load_u8(tp, OFF_tcp_sock_is_mptcp)) { /* its data is read from the MPTCP socket */
      ADD(b->untracked_mptcp, 1);
      return 0;
    }
#endif
    q = begin_queue(b, sk, tp, rcv_nxt);
    if (!q) {
      ADD(b->untracked_socket, 1);
      return 0;
    }
  }
  if (q->last_end != rcv_nxt && connection_base(tp, rcv_nxt) != q->base) {
    probe_tails.call(ctx, TAIL_RECONNECT);
    return 0;
  }
  if (reconcile(b, q, sk, tp, rcv_nxt)) probe_tails.call(ctx, TAIL_PROBE_SLOW);
  if (!after(data.end, rcv_nxt)) {
    ADD(b->duplicate, 1);
    return 0;
  }
  if (after(data.start, rcv_nxt)) { /* behind a gap, if the stack takes it: the next hook knows */
    q->aside_start = data.start;
    q->aside_end = data.end;
    q->aside_ooopack = load_u32(tp, OFF_tcp_sock_rcv_ooopack);
    q->cold |= COLD_ASIDE;
    return 0;
  }
  q->in_order_at_ns = bpf_ktime_get_ns();
  struct entry fresh = {.at_ns = q->in_order_at_ns, .end = data.end, .count = 1, .length = data.end - rcv_nxt};
  push(b, q, fresh);
  return 0;
}

/* The socket was disconnected (tcp_disconnect() threw its queue away) and connected anew. Returns 1 if there is more. */
static inline int start_anew(void *sk) {
  struct books *b = books_of_cpu();
  struct queue *q = queue_of(sk);
  void *tp = tcp_sock_of(sk);
  if (!b || !q || !tp) return 0;
  if (discard(b, q)) return 1;
  q->last_end = q->base = connection_base(tp, load_u32(tp, OFF_tcp_sock_rcv_nxt));
  q->role = role_of(sk);
  q->reader = 0;
  return 0;
}

int reconnect(u64 *ctx) {
  if (start_anew((void *)ctx[0])) probe_tails.call(ctx, TAIL_RECONNECT);
  probe_tails.call(ctx, TAIL_PROBE_SLOW);
  return 0;
}

int renew(u64 *ctx) {
  if (start_anew((void *)ctx[0])) adjust_tails.call(ctx, TAIL_RENEW);
  adjust_tails.call(ctx, TAIL_ADJUST_SLOW);
  return 0;
}

/* tcp_rcv_space_adjust: the reader that is known, and one whole segment, on a socket with nothing but whole segments in its ring.
 *
 * All that does not need the time comes before the clock: reading it waits for the loads that are under way. */
int adjust(u64 *ctx) {
  void *sk = (void *)ctx[0];
  void *tp = tcp_sock_of(sk);
  if (!tp || port_filtered(sk, tp)) return 0;
  u32 copied = load_u32(tp, OFF_tcp_sock_copied_seq);
  struct queue *q = queue_of(sk);
  if (unlikely(!q || q->cold || q->last_end - copied > MAX_WINDOW)) goto slow;
  struct entry *e = &q->e[q->head & (INLINE - 1)];
  if (!q->n || after(e->end, copied)) return 0; /* a peek, or part of a segment */
  if (q->n > 1 && !after(q->e[(q->head + 1) & (INLINE - 1)].end, copied)) goto slow;
  u64 pid_tgid = bpf_get_current_pid_tgid();
  u32 *epoch = epoch_of(pid_tgid >> 32);
  if (unlikely(q->reader != READER(pid_tgid) || !epoch || q->epoch != *epoch)) goto slow;
  struct books *b = books_of_cpu();
  if (!b) return 0;
  u64 began_ns = interval_began_ns();
  u32 side = began_ns & 1;
  struct histogram *h = histogram_of(b, side, q->series);
  u64 now_ns = bpf_ktime_get_ns();
  if (unlikely(is_less(now_ns, began_ns))) h = histogram_of(b, side ^= 1, q->series);
  if (!h) return 0;
  u64 wait_ns = now_ns - e->at_ns;
  u32 bucket = bucket_near(b, wait_ns), first = EXEMPLARS && !h->bucket[bucket];
  if (unlikely(first)) note_first(now_ns, bucket, wait_ns);
  OBSERVE(h->bucket[bucket], 1);
  OBSERVE(h->sum_ns, wait_ns);
  COUNT(b->observed, 1);
  q->head = q->n > 1 ? q->head + 1 : 0; /* empty, it begins anew: always the same cache lines */
  q->n--;
  if (unlikely(first) || worth_telling(b, q, wait_ns, side)) {
    q->side = side;
    q->picked_ns = now_ns;
    q->longest_ns = wait_ns;
    q->segments = 1;
    q->bytes = e->length;
    q->firsts = first;
    adjust_tails.call(ctx, TAIL_EMIT);
  }
  return 0;
slow:
  adjust_tails.call(ctx, TAIL_ADJUST_SLOW);
  return 0;
}

/* Any pickup. */
int adjust_slow(u64 *ctx) {
  void *sk = (void *)ctx[0];
  struct books *b = books_of_cpu();
  struct queue *q = queue_of(sk);
  void *tp = tcp_sock_of(sk);
  int zero = 0;
  struct sink to = {.table = bounds.lookup(&zero)};
  if (!b || !tp || !to.table) return 0;
  u32 copied = load_u32(tp, OFF_tcp_sock_copied_seq), rcv_nxt = load_u32(tp, OFF_tcp_sock_rcv_nxt);
  if (!q) { /* nothing of what it read passed tcp_probe: it came after the socket's own FIN, or before this program */
    q = begin_queue(b, sk, tp, rcv_nxt);
    if (!q) return 0;
    if (load_u8(sk, OFF_sock_sk_shutdown) & SEND_SHUTDOWN) q->last_end = q->base;
  }
  if (q->last_end != rcv_nxt && connection_base(tp, rcv_nxt) != q->base) {
    adjust_tails.call(ctx, TAIL_RENEW);
    return 0;
  }
  if (reconcile(b, q, sk, tp, rcv_nxt)) adjust_tails.call(ctx, TAIL_ADJUST_SLOW);
  u64 pid_tgid = bpf_get_current_pid_tgid();
  u32 *epoch = epoch_of(pid_tgid >> 32);
  if (q->reader != READER(pid_tgid) || !epoch || q->epoch != *epoch) remember_reader(b, sk, tp, q, pid_tgid);
  begin_pickup(q);
  to.h = histogram_of(b, q->side, q->series);
  if (!to.h) return 0;
  complete_ring(copied, q, &to);
  if (q->n) complete_part(&q->e[q->head & (INLINE - 1)], copied, q, &to);
  else q->cold &= ~COLD_MIXED;
  if (!q->n && q->spill_head != q->spill_tail) adjust_tails.call(ctx, TAIL_DRAIN);
  end_pickup(b, q, &to);
  if (notable(b, q)) adjust_tails.call(ctx, TAIL_EMIT);
  return 0;
}

/* Completes entries of chunks, and goes on, as `again`, as long as whole chunks are done. */
static inline int drain_queue(u64 *ctx, struct queue *q, int again) {
  void *sk = (void *)ctx[0];
  struct books *b = books_of_cpu();
  void *tp = tcp_sock_of(sk);
  int zero = 0;
  struct sink to = {.table = bounds.lookup(&zero)};
  if (!b || !q || !tp || !to.table) return 0;
  to.h = histogram_of(b, q->side, q->series);
  if (!to.h) return 0;
  u32 copied = load_u32(tp, OFF_tcp_sock_copied_seq), more = 1;
  struct firsts *noted = firsts.lookup(&zero);
  u32 segments = q->segments;
  if (!noted) return 0;
  for (u32 round = 0; round < DRAIN_CHUNKS; round++) { KEEP(round);
    u32 number = q->first_chunk, limit = CHUNK;
    struct chunk *c = chunk_at(number);
    if (!c) break;
    if (limit > q->spill_tail) limit = q->spill_tail;
    for (u32 i = 0; i < CHUNK; i++) { KEEP(i);
      u32 position = q->spill_head; /* in the map, not in a register: the verifier need not follow it */
      struct entry *e = &c->e[position & (CHUNK - 1)];
      u64 unread = (u64)(s64)(s32)(copied - e->end) >> 63;
      if (is_less(0, limit - position) & ~unread) {
        complete_in_bulk(e, q, &to, noted);
        q->spill_head = position + 1;
      } else break;
    }
    if (q->spill_head != limit) { /* copied_seq ends here */
      complete_part(&c->e[q->spill_head & (CHUNK - 1)], copied, q, &to);
      more = 0;
      break;
    }
    q->first_chunk = c->next;
    give_chunk(number);
    if (limit == q->spill_tail) { /* all read: a healthy reader is back to the ring */
      q->spill_head = q->spill_tail = more = 0;
      q->cold &= ~COLD_SPILL;
      break;
    }
    q->spill_head = 0;
    q->spill_tail -= CHUNK;
  }
  q->spilled -= q->segments - segments;
  if (more) adjust_tails.call(ctx, again);
  end_pickup(b, q, &to);
  if (notable(b, q)) adjust_tails.call(ctx, TAIL_EMIT);
  return 0;
}

#if TYPED /* the verifier follows each kind of memory by itself, and both are too much for one program */
int drain(u64 *ctx) {
  u64 id = id_of((void *)ctx[0]);
  struct queue *q = queue_in(slot_of(id), id);
  if (q) return drain_queue(ctx, q, TAIL_DRAIN);
  adjust_tails.call(ctx, TAIL_DRAIN_ELSEWHERE);
  return 0;
}

int drain_elsewhere(u64 *ctx) {
  void *sk = (void *)ctx[0];
  return drain_queue(ctx, queue_elsewhere(sk, id_of(sk)), TAIL_DRAIN_ELSEWHERE);
}
#else
int drain(u64 *ctx) { return drain_queue(ctx, queue_of((void *)ctx[0]), TAIL_DRAIN); }
#endif

/* What user space should hear of a pickup: its longest wait, if anybody wants that, and the first wait of each bucket. */
int emit_events(u64 *ctx) {
  void *sk = (void *)ctx[0];
  struct books *b = books_of_cpu();
  struct queue *q = queue_of(sk);
  int zero = 0;
  struct bounds *table = bounds.lookup(&zero);
  struct firsts *f = firsts.lookup(&zero);
  void *tp = tcp_sock_of(sk);
  if (!b || !q || !table || !f || !tp) return 0;
  u32 audience = audience_of(bpf_get_current_pid_tgid() >> 32, q), bucket = bucket_of(table, q->longest_ns);
  if (audience == KIND_ROW && q->longest_ns < rows_from_ns(q->side)) { /* if an exemplar goes to user space, it says so, too */
    if (!EXEMPLARS || !q->firsts || f->of_bucket[bucket].pickup_ns != q->picked_ns) {
      COUNT(b->rows_withheld, 1);
      audience = 0;
    }
  }
  if (!audience && !q->firsts) return 0;
  struct event e = {};
  describe(sk, tp, q, &e);
  q->at = audience << 16 | (audience ? bucket : 256);
  for (u32 i = 0; i < BUCKETS; i++) { KEEP(i);
    struct first *first = &f->of_bucket[i & 255];
    u64 row = i == (q->at & 0xffff), wait_ns = first->wait_ns;
    u32 kind = EXEMPLARS && q->firsts && first->pickup_ns == q->picked_ns ? KIND_EXEMPLAR : 0;
    if (kind | row) emit(b, &e, i, row ? q->longest_ns : wait_ns, kind | row * (q->at >> 16));
  }
  return 0;
}

/* tcp_destroy_sock: what was not read by now never will be. */
int destroy(u64 *ctx) {
  void *sk = (void *)ctx[0];
  struct books *b = books_of_cpu();
  struct queue *q = queue_of(sk);
  void *tp = tcp_sock_of(sk);
  if (!b || !q || !tp) return 0;
  u32 rcv_nxt = load_u32(tp, OFF_tcp_sock_rcv_nxt);
  if (connection_base(tp, rcv_nxt) == q->base) { /* else tcp_disconnect() was here */
    if (q->cold & COLD_ASIDE && !aside_dropped(b, q, tp)) q->gapped++;
    if (after(q->last_end, rcv_nxt)) drop_youngest(b, q, rcv_nxt);
  }
  if (discard(b, q)) destroy_tails.call(ctx, TAIL_DISCARD);
  ADD(b->sockets_closed, 1);
  forget_queue(sk);
  return 0;
}

int process_exec(u64 *ctx) { /* (task, old_pid, bprm), after begin_new_exec() has counted self_exec_id up */
  void *task = (void *)ctx[0];
  struct process_key process = process_of(task, copy_u32(task, OFF_task_struct_tgid));
  process.exec_id--;
  process_gone(process);
  return 0;
}

int process_exit(u64 *ctx) { /* (task), for each thread, after do_exit() has counted signal->live down */
  void *task = (void *)ctx[0];
  if (copy_u32(copy_pointer(task, OFF_task_struct_signal), OFF_signal_struct_live)) return 0;
  process_gone(process_of(task, copy_u32(task, OFF_task_struct_tgid)));
  return 0;
}
