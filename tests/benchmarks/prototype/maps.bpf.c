/* SPDX-License-Identifier: GPL-2.0 */
/* Where the histograms of series might live: one of these maps, chosen with -DKIND_*, and one observation a pickup. All of
 * them go to the same series, as those of one busy process do. */
#define SERIES 10240
#define COPIES 2
#define BUCKETS 32
#define BPF_F_NO_PREALLOC 1

struct histogram {
  u64 sum_ns;
  u32 bucket[BUCKETS];
};
struct key { /* as long as the product's */
  u64 series, unused[4];
};

#if KIND_array_of_copies || KIND_shared_array
BPF_ARRAY(histograms, struct histogram, SERIES * COPIES);
#elif KIND_per_cpu_array
BPF_PERCPU_ARRAY(histograms, struct histogram, SERIES);
#elif KIND_hash
BPF_HASH(histograms, struct key, struct histogram, SERIES);
#elif KIND_hash_not_preallocated
BPF_F_TABLE("hash", struct key, struct histogram, histograms, SERIES, BPF_F_NO_PREALLOC);
#elif KIND_per_cpu_hash
BPF_TABLE("percpu_hash", struct key, struct histogram, histograms, SERIES);
#endif

static inline struct histogram *histogram_of(u64 series) {
#if KIND_array_of_copies
  u32 number = series + (bpf_get_smp_processor_id() & (COPIES - 1)) * SERIES;
#elif KIND_shared_array || KIND_per_cpu_array
  u32 number = series;
#else
  struct key number = {.series = series};
#endif
  struct histogram *found = histograms.lookup(&number);
#if KIND_hash || KIND_hash_not_preallocated || KIND_per_cpu_hash
  if (!found) {
    struct histogram empty = {};
    histograms.insert(&number, &empty);
  }
#endif
  return found;
}

#if KIND_array_of_copies || KIND_per_cpu_array || KIND_per_cpu_hash
#define ADD(counter, n) ((counter) += (n))
#else
#define ADD(counter, n) __sync_fetch_and_add(&(counter), n)
#endif

int adjust(u64 *ctx) {
  struct histogram *h = histogram_of(7);
  if (!h) return 0;
  ADD(h->bucket[3], 1);
  ADD(h->sum_ns, 1000);
  return 0;
}
int probe(u64 *ctx) { return 0; }
int destroy(u64 *ctx) { return 0; }
int process_exec(u64 *ctx) { return 0; }
int process_exit(u64 *ctx) { return 0; }
