/* SPDX-License-Identifier: GPL-2.0 */
/* Programs that read the clock once in each hook of the receive path: no exact wait can be had for less. */
static inline int read_clock(void) {
  u64 now_ns = bpf_ktime_get_ns();
  asm volatile("" : "+r"(now_ns));
  return 0;
}
int probe(u64 *ctx) { return read_clock(); }
int adjust(u64 *ctx) { return read_clock(); }
int destroy(u64 *ctx) { return 0; }
int process_exec(u64 *ctx) { return 0; }
int process_exit(u64 *ctx) { return 0; }
