/* SPDX-License-Identifier: GPL-2.0 */
/* How the programs reach the kernel: offsets from BTF (-DOFF_struct_field), and the two flavours.
 *
 * TYPED: BTF-typed tracepoints (tp_btf). The verifier knows the pointers, so fields are plain loads, and sockets whose
 * slot of an array is taken have their state in storage of their own. Otherwise raw tracepoints: fields are copied, and the
 * array is all there is.
 */

/* First in every loop: clang drops a counter where another condition ends the loop too, and the verifier then sees no end. */
#define KEEP(i) asm volatile("" : "+r"(i))
/* index & mask, done where it is used: 5.10 forgets the bounds that arithmetic gave a number. */
static inline u32 masked(u32 index, u32 mask) {
  KEEP(index);
  return index & mask;
}

/* An atomic addition with no result: clang would now and then make it one with, which 5.10 does not have. */
#define ADD(counter, n) do { \
    if (sizeof(counter) == 8) asm volatile("lock *(u64 *)%0 += %1" : "+m"(counter) : "r"((u64)(n))); \
    else asm volatile("lock *(u32 *)%0 += %1" : "+m"(counter) : "r"((u64)(n))); \
  } while (0)
/* The same for a counter that belongs to one hook on one CPU. From 6.1 a program never interrupts itself, and a plain
 * addition will do. */
#if SELF_INTERRUPTING
#define COUNT(counter, n) ADD(counter, n)
#else
#define COUNT(counter, n) ((counter) += (n))
#endif
/* The same for a histogram, which several CPUs may share. */
#if SHARED_COPIES
#define OBSERVE(counter, n) ADD(counter, n)
#else
#define OBSERVE(counter, n) COUNT(counter, n)
#endif
#define unlikely(x) __builtin_expect(!!(x), 0)

#define MAX_WINDOW (1u << 30) /* RFC 7323, section 2.3: no more can be unread */
#define AF_INET 2
#define AF_INET6 10
#define RCV_SHUTDOWN 1 /* in sk_shutdown */
#define SEND_SHUTDOWN 2
#define TCPHDR_FIN 1 /* in tcp_skb_cb.tcp_flags: end_seq counts a FIN as a byte */
#define FASTREUSE_CONNECT 255 /* inet_bind_bucket.fastreuse is -1 where connect() chose the port (inet_hash_connect) */

static inline u32 copy_u32(void *base, int offset) {
  u32 value = 0;
  bpf_probe_read_kernel(&value, sizeof(value), (char *)base + offset);
  return value;
}

static inline u64 copy_u64(void *base, int offset) {
  u64 value = 0;
  bpf_probe_read_kernel(&value, sizeof(value), (char *)base + offset);
  return value;
}

static inline void *copy_pointer(void *base, int offset) { return (void *)copy_u64(base, offset); }

struct span_of_bytes { u32 start, end; }; /* [start, end) in sequence numbers */

#if TYPED
static inline u32 load_u32(void *base, int offset) { return *(volatile u32 *)((char *)base + offset); }
static inline u16 load_u16(void *base, int offset) { return *(volatile u16 *)((char *)base + offset); }
static inline u8 load_u8(void *base, int offset) { return *(volatile u8 *)((char *)base + offset); }
#ifdef RDONLY_CAST /* the kfunc bpf_rdonly_cast(), from 6.2: the verifier makes a move of it, so it costs no call */
static void *(*rdonly_cast)(void *pointer, u32 type_id) = (void *)RDONLY_CAST; /* the loader puts the kfunc in its place */
static inline void *tcp_sock_of(void *sk) { return rdonly_cast(sk, TCP_SOCK_ID); }
#else
static inline void *tcp_sock_of(void *sk) { return bpf_skc_to_tcp_sock(sk); }
#endif
static inline struct span_of_bytes data_of(void *skb) {
  u32 flags = load_u32(skb, OFF_sk_buff_cb + OFF_tcp_skb_cb_tcp_flags);
  struct span_of_bytes data = {.start = load_u32(skb, OFF_sk_buff_cb + OFF_tcp_skb_cb_seq)};
  data.end = load_u32(skb, OFF_sk_buff_cb + OFF_tcp_skb_cb_end_seq) - (flags & TCPHDR_FIN);
  return data;
}
#else
static inline u32 load_u32(void *base, int offset) { return copy_u32(base, offset); }
static inline u16 load_u16(void *base, int offset) { return copy_u32(base, offset); }
static inline u8 load_u8(void *base, int offset) { return copy_u32(base, offset); }
static inline void *tcp_sock_of(void *sk) { return sk; }
static inline struct span_of_bytes data_of(void *skb) {
  u32 cb[4] = {}; /* one copy for all three: tcp_skb_cb has them in its first 16 bytes, which the loader checks */
  bpf_probe_read_kernel(&cb, sizeof(cb), (char *)skb + OFF_sk_buff_cb);
  struct span_of_bytes data = {.start = cb[OFF_tcp_skb_cb_seq / 4]};
  data.end = cb[OFF_tcp_skb_cb_end_seq / 4] - (cb[OFF_tcp_skb_cb_tcp_flags / 4] & TCPHDR_FIN);
  return data;
}
#endif

/* Is sequence number a after b? They wrap: RFC 9293, section 3.4. */
static inline int after(u32 a, u32 b) { return (s32)(a - b) > 0; }

/* 1 if a < b, else 0, of numbers whose difference fits 63 bits; no branch, and no sign mask: 6.18 forks on those as well. */
static inline u64 is_less(u64 a, u64 b) {
  u64 difference = a - b;
  KEEP(difference); /* or clang makes a branch of it; LLVM 19 of what is made of the result, too */
  u64 less = difference >> 63;
  KEEP(less);
  return less;
}
