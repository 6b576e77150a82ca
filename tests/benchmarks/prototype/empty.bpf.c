/* SPDX-License-Identifier: GPL-2.0 */
/* Programs that do nothing: what being there costs. */
int probe(u64 *ctx) { return 0; }
int adjust(u64 *ctx) { return 0; }
int destroy(u64 *ctx) { return 0; }
int process_exec(u64 *ctx) { return 0; }
int process_exit(u64 *ctx) { return 0; }
