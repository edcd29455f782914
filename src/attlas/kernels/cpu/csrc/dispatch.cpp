// The exported functions: choose the instruction set, cut the work into tasks, run them.
#include <cpuid.h>

#include <vector>
#include "kernels.h"
#include "pool.h"

namespace {

enum { ISA_AUTO = 0, ISA_AVX2 = 1, ISA_AVX512 = 2, ISA_AVX512_BF16 = 3 };

int best_isa() {
  static const int best = [] {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return -1;
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 29 & 1)) return -1;  // f16c
    bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd");
    if (!wide) return (int)ISA_AVX2;
    return __builtin_cpu_supports("avx512bf16") ? (int)ISA_AVX512_BF16 : (int)ISA_AVX512;
  }();
  return best;
}

const KernelTable* table(int64_t isa) {
  int best = best_isa();
  if (best < 0 || isa > best) return nullptr;
  switch (isa == ISA_AUTO ? best : (int)isa) {
    case ISA_AVX2: return &attlas_kernels_avx2;
    case ISA_AVX512: return &attlas_kernels_avx512;
    default: return &attlas_kernels_avx512_bf16;
  }
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t clamp(int64_t x, int64_t lo, int64_t hi) { return x < lo ? lo : x > hi ? hi : x; }

struct ForwardJob {
  ForwardPlan plan;
  const KernelTable* t;
};
void forward_step(const void* c, int64_t task, char* scratch) {
  auto* j = static_cast<const ForwardJob*>(c);
  j->t->forward_task(&j->plan, task, scratch);
}
struct BackwardJob {
  BackwardPlan plan;
  const KernelTable* t;
  std::vector<int64_t> piece, pieces;
  std::vector<int32_t> first_chunk;
  int64_t rows;  // of all pieces
};
void delta_step(const void* c, int64_t task, char*) {
  auto* j = static_cast<const BackwardJob*>(c);
  j->t->delta_task(&j->plan, task);
}
void backward_step(const void* c, int64_t task, char* scratch) {
  auto* j = static_cast<const BackwardJob*>(c);
  j->t->backward_task(&j->plan, task, scratch);
}
void reduce_step(const void* c, int64_t task, char*) {
  auto* j = static_cast<const BackwardJob*>(c);
  j->t->reduce_task(&j->plan, task);
}

struct DecodeJob {
  DecodePlan plan;
  const KernelTable* t;
};
void decode_step(const void* c, int64_t task, char* scratch) {
  auto* j = static_cast<const DecodeJob*>(c);
  j->t->decode_task(&j->plan, task, scratch);
}
void merge_step(const void* c, int64_t task, char*) {
  auto* j = static_cast<const DecodeJob*>(c);
  j->t->decode_merge_task(&j->plan, task);
}

DecodePlan decode_plan(const AttlasDecode* a) {
  DecodePlan p;
  p.a = a;
  int64_t longest = 0;
  for (int64_t b = 0; b < a->batch; b++) longest = a->lengths[b] > longest ? a->lengths[b] : longest;
  p.max_splits = ceil_div(longest < 1 ? 1 : longest, a->split);
  p.rows = a->q_len * (a->heads / a->kv_heads);
  p.dim_v_padded = ceil_div(a->dim_v, 16) * 16;
  int64_t state = (p.rows + 8) * (a->dim + p.dim_v_padded + 20) * 4;  // bytes of one kv head
  int64_t by_cache = clamp(300000 / state, 1, a->kv_heads);
  int64_t spread = a->batch * p.max_splits * a->kv_heads / (8 * (a->threads < 1 ? 1 : a->threads));
  p.heads_per_task = clamp(by_cache < spread ? by_cache : spread, 1, a->kv_heads);
  p.head_tasks = ceil_div(a->kv_heads, p.heads_per_task);
  p.num_tasks = a->batch * p.max_splits * p.head_tasks;
  return p;
}

// The shapes of backward, and where each lane keeps its part of dq. False: out of memory.
bool plan_backward(const AttlasAttention* a, BackwardJob* j) try {
  BackwardPlan& p = j->plan;
  p.a = a;
  p.num_q_blocks = ceil_div(a->q_len, a->block_q), p.num_k_blocks = ceil_div(a->k_len, a->block_k);
  p.blocks_per_chunk = clamp(500000 / (a->block_k * (3 * a->dim + 2 * a->dim_v) * 4), 1, 4);
  p.num_tasks = a->batch * a->kv_heads * a->lanes;
  int64_t nq = p.num_q_blocks, maps = a->map_batch * a->map_heads;
  j->piece.assign(maps * a->lanes * nq, -1), j->first_chunk.resize(maps * a->lanes * nq);
  std::vector<int64_t> held(maps, 0);
  for (int64_t m = 0; m < maps; m++)
    for (int64_t kb = 0; kb < p.num_k_blocks; kb++) {
      int64_t chunk = kb / p.blocks_per_chunk, lane = (m * a->lanes + chunk % a->lanes) * nq, row = m * p.num_k_blocks + kb;
      for (int64_t i = a->row_ptr ? a->col_ptr[row] : 0; i < (a->row_ptr ? a->col_ptr[row + 1] : nq); i++) {
        int64_t qb = a->row_ptr ? a->rows[i] : i, left = a->q_len - qb * a->block_q;
        if (j->piece[lane + qb] >= 0) continue;
        j->piece[lane + qb] = held[m], j->first_chunk[lane + qb] = static_cast<int32_t>(chunk);
        held[m] += left < a->block_q ? left : a->block_q;
      }
    }
  j->rows = 0;
  for (int64_t b = 0; b < a->batch; b++)
    for (int64_t h = 0; h < a->heads; h++) {
      j->pieces.push_back(j->rows);
      j->rows += held[(a->map_batch == 1 ? 0 : b) * a->map_heads + (a->map_heads == 1 ? 0 : h)];
    }
  p.piece = j->piece.data(), p.pieces = j->pieces.data(), p.first_chunk = j->first_chunk.data();
  return true;
} catch (const std::bad_alloc&) {
  return false;
}

bool sizes_fit(const AttlasAttention* a) {
  return a->block_q >= 1 && a->block_q <= ATTLAS_MAX_BLOCK && a->block_k >= 32 && a->block_k <= ATTLAS_MAX_BLOCK && a->block_k % 32 == 0 && a->dim >= 1 &&
         a->dim <= ATTLAS_MAX_DIM && a->dim_v >= 1 && a->dim_v <= ATTLAS_MAX_DIM && a->kv_heads >= 1 && a->heads % a->kv_heads == 0;
}

}  // namespace

extern "C" {

int attlas_cpu_abi(void) { return 4; }

void attlas_cpu_use_openmp(void* gomp_parallel) { attlas::use_openmp(gomp_parallel); }

const char* attlas_cpu_isa(void) {
  switch (best_isa()) {
    case ISA_AVX2: return "avx2";
    case ISA_AVX512: return "avx512";
    case ISA_AVX512_BF16: return "avx512_bf16";
    default: return "none";
  }
}

// Return codes: 0 done, 1 instruction set not available, 2 out of memory, 3 sizes outside what the kernels hold
int attlas_cpu_attention_forward(const AttlasAttention* a) {
  const KernelTable* t = table(a->isa);
  if (!t) return 1;
  if (!sizes_fit(a)) return 3;
  ForwardJob j;
  j.t = t, j.plan.a = a;
  j.plan.num_q_blocks = ceil_div(a->q_len, a->block_q);
  int64_t units = j.plan.num_q_blocks * (a->heads / a->kv_heads), unit_bytes = a->block_q * (a->dim + a->dim_v) * 4;
  int64_t by_cache = clamp(400000 / unit_bytes, 1, 8), spread = a->batch * a->kv_heads * units / (8 * (a->threads < 1 ? 1 : a->threads));
  j.plan.units_per_task = clamp(by_cache < spread ? by_cache : spread, 1, 8);
  j.plan.tasks_per_kv_head = ceil_div(units, j.plan.units_per_task);
  j.plan.num_tasks = j.plan.tasks_per_kv_head * a->batch * a->kv_heads;
  return attlas::parallel_for(j.plan.num_tasks, a->threads, t->forward_scratch(&j.plan), forward_step, &j) ? 0 : 2;
}

int64_t attlas_cpu_backward_workspace(const AttlasAttention* a) {
  BackwardJob j;
  return sizes_fit(a) && a->lanes >= 1 && a->lanes <= 64 && plan_backward(a, &j) ? j.rows * a->dim : 0;
}

int attlas_cpu_attention_backward(const AttlasAttention* a) {
  const KernelTable* t = table(a->isa);
  if (!t) return 1;
  if (!sizes_fit(a) || a->lanes < 1 || a->lanes > 64) return 3;
  BackwardJob j;
  j.t = t;
  if (!plan_backward(a, &j)) return 2;
  int64_t rows = a->batch * j.plan.num_q_blocks;
  if (!attlas::parallel_for(rows, a->threads, 0, delta_step, &j)) return 2;
  if (!attlas::parallel_for(j.plan.num_tasks, a->threads, t->backward_scratch(&j.plan), backward_step, &j)) return 2;
  return attlas::parallel_for(rows, a->threads, 0, reduce_step, &j) ? 0 : 2;
}

int64_t attlas_cpu_decode_workspace(const AttlasDecode* a) {
  DecodePlan p = decode_plan(a);
  return a->batch * a->q_len * a->heads * p.max_splits * (p.dim_v_padded + 16);
}

int attlas_cpu_decode(const AttlasDecode* a) {
  const KernelTable* t = table(a->isa);
  if (!t) return 1;
  if (a->dim < 1 || a->dim > ATTLAS_MAX_DIM || a->dim_v < 1 || a->dim_v > ATTLAS_MAX_DIM || a->split < 128 || a->split % 128 || a->kv_heads < 1 ||
      a->heads % a->kv_heads)
    return 3;
  DecodeJob j;
  j.t = t, j.plan = decode_plan(a);
  if (!attlas::parallel_for(j.plan.num_tasks, a->threads, t->decode_scratch(&j.plan), decode_step, &j)) return 2;
  return attlas::parallel_for(a->batch * a->q_len, a->threads, 0, merge_step, &j) ? 0 : 2;
}
}
