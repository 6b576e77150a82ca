/* SPDX-License-Identifier: GPL-2.0 */
/* Whose histogram: from the reader and the socket to a series, remembered with the socket until the process changes. */

/* What a remembered series depends on: the process; with -t, the thread. */
#ifdef FILTER_TID
#define READER(pid_tgid) ((u32)(pid_tgid))
#else
#define READER(pid_tgid) ((u32)((pid_tgid) >> 32))
#endif

static inline u32 *epoch_of(u32 tgid) {
  u32 slot = tgid & (EPOCHS - 1);
  return epochs.lookup(&slot);
}

static inline enum outcome outcome_for(u64 pid_tgid) {
  if ((u32)(pid_tgid >> 32) == OWN_TGID) return OWN;
#ifdef ONLY_SERVED
  u32 tgid = pid_tgid >> 32;
  if (!served.lookup(&tgid)) return FILTERED;
#endif
#ifdef FILTER_PID
  if ((u32)(pid_tgid >> 32) != FILTER_PID) return FILTERED;
#endif
#ifdef FILTER_TID
  if ((u32)pid_tgid != FILTER_TID) return FILTERED;
#endif
  return OBSERVED;
}

static inline struct process_key process_of(void *task, u32 tgid) {
  void *leader = copy_pointer(task, OFF_task_struct_group_leader);
  struct process_key process = {
      .start_ns = copy_u64(leader, OFF_task_struct_start_time),
      .tgid = tgid,
      .exec_id = copy_u32(task, OFF_task_struct_self_exec_id), /* threads inherit the leader's */
  };
  return process;
}

/* A port that connect() chose has a bind bucket of its own kind; a listener's children share the listener's bucket.
 * It holds for connections older than this program, but not for closed ones: they have no bucket. A client that binds its
 * own port looks like a server. */
static inline u8 role_of(void *sk) {
  void *bucket = copy_pointer(sk, OFF_inet_connection_sock_icsk_bind_hash);
  u8 fastreuse = 0;
  bpf_probe_read_kernel(&fastreuse, 1, (char *)bucket + OFF_inet_bind_bucket_fastreuse);
  return fastreuse == FASTREUSE_CONNECT ? ROLE_CLIENT : ROLE_SERVER;
}

/* Copies an address, 16 bytes; returns the family, AF_INET for an IPv4 peer of an IPv6 socket (::ffff:0:0/96). */
static inline u16 addresses_of(void *sk, u8 *local, u8 *remote) {
  u16 family = copy_u32(sk, OFF_sock_common_skc_family);
  if (family == AF_INET6) {
    u32 prefix[3] = {};
    bpf_probe_read_kernel(prefix, sizeof(prefix), (char *)sk + OFF_sock_common_skc_v6_daddr);
    if (prefix[0] || prefix[1] || prefix[2] != bpf_htonl(0xffff)) {
      bpf_probe_read_kernel(local, 16, (char *)sk + OFF_sock_common_skc_v6_rcv_saddr);
      bpf_probe_read_kernel(remote, 16, (char *)sk + OFF_sock_common_skc_v6_daddr);
      return AF_INET6;
    }
  }
  bpf_probe_read_kernel(local, 4, (char *)sk + OFF_sock_common_skc_rcv_saddr);
  bpf_probe_read_kernel(remote, 4, (char *)sk + OFF_sock_common_skc_daddr);
  return AF_INET;
}

/* skc_num is 0 once the connection is closed, and unread data may outlive that. */
static inline u16 local_port_of(void *tp) { return bpf_ntohs((u16)copy_u32(tp, OFF_inet_sock_inet_sport)); }
static inline u16 remote_port_of(void *sk) { return bpf_ntohs((u16)copy_u32(sk, OFF_sock_common_skc_dport)); }

static inline void name_series(u32 number, void *task) {
  struct identity *who = identities.lookup(&number);
  if (!who) return;
  void *exe_file = copy_pointer(copy_pointer(task, OFF_task_struct_mm), OFF_mm_struct_exe_file);
  void *dentry = copy_pointer(exe_file, OFF_file_f_path + OFF_path_dentry);
  who->cgroup_id = bpf_get_current_cgroup_id();
  who->executable[0] = 0; /* kernel threads have none */
  bpf_probe_read_kernel_str(who->executable, sizeof(who->executable), copy_pointer(dentry, OFF_dentry_d_name + OFF_qstr_name));
  bpf_probe_read_kernel_str(who->comm, sizeof(who->comm),
                            (char *)copy_pointer(task, OFF_task_struct_group_leader) + OFF_task_struct_comm);
}

/* The series of this reader on this socket, made if need be. OVERFLOW when a map is full. */
static inline u32 series_for(void *sk, void *tp, u8 role, u32 tgid) {
  void *task = (void *)bpf_get_current_task();
  u8 local[16] = {}, remote[16] = {};
  struct series_key key = {.process = process_of(task, tgid), .role = role};
  key.family = addresses_of(sk, local, remote);
  key.port = key.role == ROLE_CLIENT ? remote_port_of(sk) : local_port_of(tp);
#ifdef KEY_ADDRESS
  __builtin_memcpy(key.address, key.role == ROLE_CLIENT ? remote : local, 16);
#endif
  u32 *known = series.lookup(&key), fresh = OVERFLOW;
  if (known) return *known;
  u64 alive = 0;
  struct process_key process = key.process;
  processes.insert(&process, &alive);
  if (!processes.lookup(&process) || free_series.pop(&fresh)) return OVERFLOW;
  name_series(fresh, task);
  series.insert(&key, &fresh);
  known = series.lookup(&key);
  if (known && *known == fresh) return fresh;
  free_series.push(&fresh, 0); /* the map is full, or another CPU was first */
  return known ? *known : OVERFLOW;
}

#define IS_ROW(longest_ns) (ROWS && (longest_ns) >= MIN_NS)
#if SERVE
static inline int allows(struct allowance *a, u64 now_ns, u64 most) {
  if ((s64)(now_ns - a->second_ns) >= 1000000000) {
    a->second_ns = now_ns;
    a->told = 0;
  }
  return a->told++ < most;
}

static inline int is_due(struct served *s, u64 now_ns) {
  u64 earliest_ns = now_ns - SERVED_SAVED_NS;
  if ((s64)(s->due_ns - earliest_ns) < 0) s->due_ns = earliest_ns;
  if ((s64)(s->due_ns - now_ns) > 0) return 0;
  s->due_ns += s->pause_ns;
  return 1;
}

/* Under a flood, too, what is really slow is heard of. */
static inline int stands_out(struct served *s, u64 wait_ns, u64 now_ns) {
  if ((s64)(now_ns - s->halved_ns) >= (s64)SERVED_HALVING_NS) {
    s->halved_ns = now_ns;
    s->slowest_ns /= 2;
  }
  return wait_ns / 2 >= s->slowest_ns;
}

static inline int is_told(struct served *s, u64 wait_ns, u64 now_ns) {
  int out = stands_out(s, wait_ns, now_ns);
  if (!is_due(s, now_ns) && !out) return 0;
  if (s->slowest_ns < wait_ns) s->slowest_ns = wait_ns;
  return 1;
}

/* Who is to hear of a pickup of this process. */
static inline u32 audience_of(u32 tgid, struct queue *q) {
  int zero = 0;
  u32 kinds = IS_ROW(q->longest_ns) ? KIND_ROW : 0;
  struct served *s = served.lookup(&tgid);
  struct allowance *all = served_all.lookup(&zero);
  if (!s || !all || q->longest_ns < s->from_ns) return kinds;
  if (is_told(s, q->longest_ns, q->picked_ns) && allows(all, q->picked_ns, SERVED_ALL)) return kinds | KIND_SERVED;
  ADD(s->untold, 1);
  return kinds;
}

static inline u64 told_from(u32 tgid) {
  struct served *s = served.lookup(&tgid);
  return s ? s->from_ns : ~0ULL;
}
#define IS_TOLD(q, longest_ns) ((longest_ns) >= (q)->told_ns)
#else
static inline u32 audience_of(u32 tgid, struct queue *q) { return IS_ROW(q->longest_ns) ? KIND_ROW : 0; }
#define IS_TOLD(q, longest_ns) 0
#endif

static inline void remember_reader(struct books *b, void *sk, void *tp, struct queue *q, u64 pid_tgid) {
  u32 tgid = pid_tgid >> 32, *epoch = epoch_of(tgid);
  q->epoch = epoch ? *(volatile u32 *)epoch : 0; /* before the look-up: what changes meanwhile is seen at the next pickup */
  q->outcome = outcome_for(pid_tgid);
#if SERVE
  q->told_ns = told_from(tgid);
#endif
  q->series = q->outcome == OBSERVED ? series_for(sk, tp, q->role, tgid) : SINK;
  if (q->series == OVERFLOW) ADD(b->series_overflowed, 1);
  /* Others are not remembered: the short path counts what is observed, and a place in the map may become free. */
  q->reader = q->series == OVERFLOW || q->series == SINK ? 0 : READER(pid_tgid);
}

/* A process is no more what it was: sockets look their series up again, and user space may retire the old ones. Whoever
 * asked to be served is gone with it: another program, or another process of that number, has to ask itself. */
static inline void process_gone(struct process_key process) {
#if SERVE
  served.delete(&process.tgid);
#endif
  u64 *gone_ns = processes.lookup(&process), now = bpf_ktime_get_ns();
  if (!gone_ns) return;
  u32 *epoch = epoch_of(process.tgid);
  struct books *b = books_of_cpu();
  if (epoch) ADD(*epoch, 1);
  *gone_ns = now;
  if (b) ADD(b->processes_gone, 1);
}

/* When the interval began, its side in the lowest bit. User space sets the beginning of the next one ahead. */
static inline u64 interval_began_ns(void) {
  int zero = 0;
  struct interval *running = interval.lookup(&zero);
  return running ? *(volatile u64 *)&running->began_ns : 0;
}

/* The side of the interval that a time belongs to. */
static inline u32 side_at(u64 now_ns) {
  u64 began_ns = interval_began_ns();
  return (began_ns ^ is_less(now_ns, began_ns)) & 1;
}

static inline struct histogram *histogram_of(struct books *b, u32 side, u32 number) {
  number += (side * COPIES + b->copy) * MAX_SERIES;
  return histograms.lookup(&number);
}

/* The shortest wait of a row that user space still wants of a side. */
static inline u64 rows_from_ns(u32 side) {
  int zero = 0;
  struct interval *running = interval.lookup(&zero);
  return running ? *(volatile u64 *)&running->rows_from_ns[side & 1] : 0;
}

/* How many upper bounds are below `ns`: bisection without a branch, over a table padded with the largest number. */
static inline u32 bucket_of(struct bounds *table, u64 ns) {
  u32 bucket = 0;
#pragma unroll
  for (u32 step = BUCKETS / 2; step; step /= 2)
    bucket += ((s64)(table->upper_ns[masked(bucket + step - 1, BUCKETS - 1)] - ns) >> 63) & step;
  return masked(bucket, BUCKETS - 1);
}

/* The same for the short path, where most waits are in the bucket of the one before on this CPU. */
static inline u32 bucket_near(struct books *b, u64 ns) {
  if (unlikely(SELF_INTERRUPTING || ns - b->bucket_from_ns >= b->bucket_width_ns)) {
    int zero = 0;
    struct bounds *table = bounds.lookup(&zero);
    if (!table) return 0;
    u32 bucket = bucket_of(table, ns);
    if (SELF_INTERRUPTING) return bucket;
    b->bucket = bucket;
    b->bucket_from_ns = bucket ? table->upper_ns[(bucket - 1) & 255] + 1 : 0;
    b->bucket_width_ns = table->upper_ns[bucket & 255] + 1 - b->bucket_from_ns;
  }
  return b->bucket & (BUCKETS - 1);
}
