/* SPDX-License-Identifier: GPL-2.0 */
/* Everything that the programs remember. otel_tcppktlat/probe/layout.py declares the same for user space. */

#define INLINE 8    /* entries that sit with the socket (power of two) */
#define CHUNK 64    /* entries of a chunk of the shared pool (power of two) */
#define GAP_CHUNKS 64 /* that one socket may hold behind gaps; only the first and the last may be less than half full */
#define GAP_RUNS ((GAP_CHUNKS - 2) * CHUNK / 2)
#define RELEASE_CHUNKS 4 /* that one program moves to the queue; 16 of them do all of a socket */
/* Sockets whose state is in the array. In the typed flavour that is for speed, and the others have storage of their own. */
#if TYPED && MAX_SOCKETS > 1024
#define SLOTS 1024
#else
#define SLOTS MAX_SOCKETS
#endif
#define SLOTS_TRIED 16 /* for the queue of a socket, before it goes untracked */
#define EPOCHS 4096 /* slots of process epochs (power of two) */

/* Segments that may be read and have not been: `count` of `length` bytes each, the last of which ends before `end`.
 * Before them may be a hole: bytes that no tracepoint showed. length 0: segments merged when the pool was empty.
 * Behind a gap the same record is a run of equal segments, with no arrival time. */
struct entry {
  u64 at_ns;
  u32 end, count, length, hole;
};

struct chunk {
  struct entry e[CHUNK];
  u32 next, n; /* n: entries in use, of chunks that hold what waits behind a gap */
};

/* One socket. The socket lock serialises all hooks of a socket, so nothing here is atomic. */
struct queue {
  /* 64 bytes: what the short paths touch as long as one segment waits. */
  u64 owner;    /* the socket that this slot of the array is in use for, or 0: id_of() */
  u32 last_end; /* end of the youngest entry: rcv_nxt, as long as the stack keeps what it was given */
  u32 cold;     /* COLD_*: why the short path must not touch this socket */
  u32 head, n;  /* ring of entries with the socket; older than all that spilled */
  u32 reader, epoch, series; /* whose histogram, remembered from the last pickup; reader: READER() */
  u16 outcome, role;         /* OBSERVED, OWN or FILTERED; ROLE_* */
  struct entry e[INLINE];    /* the first one is in these 64 bytes, too */
  u64 told_ns; /* from this wait on, user space hears of a pickup of this reader; with SERVE */
  u32 spill_head, spill_tail;   /* positions in the chain of chunks, from the beginning of its first one */
  u32 first_chunk, last_chunk;  /* of that chain */
  u32 spilled, base;            /* segments in it; initial sequence number of the connection */
  u32 gap_first, gap_last;      /* chunks of runs behind a gap, by sequence; valid while gap_runs is not 0 */
  u32 gap_runs, gapped;         /* runs there, and their segments */
  u32 aside_start, aside_end, aside_ooopack; /* the last segment behind a gap, until the stack took or dropped it */
  u32 at;             /* a position in a chunk; here, and not in a register, so that the verifier need not follow it */
  u64 in_order_at_ns; /* arrival of the segment that may have closed the gap */
  u64 picked_ns, longest_ns, sum_ns; /* the pickup that is being worked on; here for the same reason */
  u32 segments, bytes, undescribed, firsts;
  u64 side; /* of the histograms */
};

/* A socket in an array. There the first 64 bytes are a cache line: arrays have some bytes of their own before the first slot. */
#define LINE 64
#define BEFORE (TYPED * (-OFF_bpf_array_value & (LINE - 1)))
struct slot {
  u8 before[BEFORE];
  struct queue q;
  u8 behind[-(BEFORE + sizeof(struct queue)) & (LINE - 1)];
};
#define COLD_SPILL 1
#define COLD_GAP 2
#define COLD_ASIDE 4
#define COLD_MIXED 8 /* the ring holds an entry that is not just one segment */

/* The books: what became of every segment. Per CPU. `received` and `observed` belong to one hook each; the others are added
 * to atomically, because softirqs interrupt readers; rows_withheld is of the same hook as `observed`.
 * What is still queued: `received` less the nine counts that follow it. */
struct books {
  u64 copy; /* which of the histograms' copies is this CPU's; set by the loader */
  u64 bucket_from_ns, bucket_width_ns, bucket; /* the bucket of the last wait on the short path: the next is often in it, too */
  u64 received;
  u64 observed, own, filtered, duplicate, dropped, unread;
  u64 untracked_socket, untracked_pool, untracked_mptcp;
  u64 merged, undescribed_bytes, events_lost, rows_withheld, sockets_opened, sockets_closed, processes_gone, series_overflowed;
};
enum outcome { OBSERVED, OWN, FILTERED };

/* Who reads, and as what. start_ns and exec_id tell a reused pid and an exec apart. */
struct process_key {
  u64 start_ns;
  u32 tgid, exec_id;
};
struct series_key {
  struct process_key process;
  u16 port, family; /* host byte order; AF_* */
  u8 role, unused[3];
  u8 address[16]; /* zero unless asked for; IPv4 in the first four */
};
#define ROLE_SERVER 0
#define ROLE_CLIENT 1

struct identity {
  u64 cgroup_id;
  char comm[16], executable[64];
};

/* One series on one set of CPUs. There are two sides: one is filled in an interval, while user space reads and zeroes the
 * other. A pickup belongs to an interval by its time. */
struct histogram {
  u64 sum_ns;
  u32 bucket[BUCKETS];
};
/* The running interval, or the next one. A pickup that waited less than `rows_from_ns` of its side can become no span any
 * more, as slower ones have taken the budget: it is counted as withheld, and user space does not hear of it. */
struct interval {
  u64 began_ns; /* when it begins or has begun; its lowest bit says which side it fills */
  u64 rows_from_ns[2];
};
#define OVERFLOW 0 /* series for what exceeds the map */
#define SINK 1     /* series for what is not to be shown: own, filtered */

struct event {
  u64 picked_ns, wait_ns;
  u32 tgid, tid;
  u32 series, side;
  u32 segments, bytes;
  u16 local_port, remote_port, family;
  u8 bucket, kind;
  u8 role, unused[3];
  u32 own_tid; /* tid as the thread's own pid namespace has it; with SERVE */
  u8 local_address[16], remote_address[16];
  char comm[16];
};
#define KIND_EXEMPLAR 1
#define KIND_ROW 2
#define KIND_SERVED 4

/* How many events there were in the second that began at second_ns. CPUs may race for it: a few more or less. */
struct allowance { u64 second_ns, told; };
/* A process that hears of its own pickups from this wait on: one each pause_ns, on average, and what is twice as slow as
 * slowest_ns in any case; `untold`: all the others. CPUs may race here, too. */
struct served {
  u64 from_ns, pause_ns;
  u64 due_ns;                /* the next one is due then, on average; it falls behind by SERVED_SAVED_NS at most */
  u64 slowest_ns, halved_ns; /* of those that it heard of, halved now and then, the last time at halved_ns */
  u64 untold;
};
#define SERVED_SAVED_NS 10000000000ULL
#define SERVED_HALVING_NS 1000000000ULL

/* The first wait of each bucket in one pickup, until they become events. One array per CPU: `pickup_ns`, its time,
 * tells whose it is. */
struct first { u64 pickup_ns, wait_ns; };
struct firsts { struct first of_bucket[256]; };
struct bounds { u64 upper_ns[256]; };

/* No hash: a look-up in an array costs no call, and touches one cache line. SLOTS: a power of two. */
BPF_ARRAY(slots, struct slot, SLOTS);
BPF_HASH(slots_taken, u32, u64, SLOTS); /* the socket of each slot that is in use */
/* Sockets that found their slot taken: */
#if TYPED
BPF_SK_STORAGE(queues_elsewhere, struct queue);
#else
BPF_HASH(slots_elsewhere, u64, u32, SLOTS); /* these have another slot */
#endif
BPF_ARRAY(chunks, struct chunk, MAX_CHUNKS);
BPF_QUEUE(free_chunks, u32, MAX_CHUNKS);
BPF_PERCPU_ARRAY(books, struct books, 1);
BPF_HASH(processes, struct process_key, u64, MAX_SERIES); /* when it went, or 0 */
BPF_ARRAY(epochs, u32, EPOCHS);                           /* by tgid: grows when one of those processes execs or ends */
BPF_HASH(series, struct series_key, u32, MAX_SERIES);
BPF_QUEUE(free_series, u32, MAX_SERIES);
BPF_ARRAY(identities, struct identity, MAX_SERIES);
/* By side, copy and number: CPUs that count in different copies do not share cache lines. */
BPF_ARRAY(histograms, struct histogram, 2 * COPIES * MAX_SERIES);
BPF_ARRAY(interval, struct interval, 1);
BPF_ARRAY_OF_MAPS(barrier, "interval", 1); /* an update waits for the programs that run: maybe_wait_bpf_programs() */
BPF_ARRAY(bounds, struct bounds, 1);
BPF_PERCPU_ARRAY(firsts, struct firsts, 1);
#if SERVE
BPF_HASH(served, u32, struct served, SERVE); /* by tgid */
BPF_ARRAY(served_all, struct allowance, 1);
#endif
/* The ring buffer of events. The loader makes it: bcc 0.26 has no bpf_ringbuf_query() for its own. */
#define EVENTS ((void *)bpf_pseudo_fd(1 /* BPF_PSEUDO_MAP_FD */, EVENTS_FD))
BPF_PROG_ARRAY(probe_tails, 2);
BPF_PROG_ARRAY(adjust_tails, 5);
BPF_PROG_ARRAY(destroy_tails, 1);
#define TAIL_PROBE_SLOW 0
#define TAIL_RECONNECT 1
#define TAIL_ADJUST_SLOW 0
#define TAIL_DRAIN 1
#define TAIL_EMIT 2
#define TAIL_RENEW 3
#define TAIL_DRAIN_ELSEWHERE 4
#define TAIL_DISCARD 0
