// What one instruction set offers to the scheduler: tasks that run on one thread each and touch only their own outputs.
#pragma once
#include <stddef.h>
#include "api.h"

struct ForwardPlan {
  const AttlasAttention* a;
  int64_t num_q_blocks, units_per_task, tasks_per_kv_head, num_tasks;
};
struct BackwardPlan {
  const AttlasAttention* a;
  int64_t num_q_blocks, num_k_blocks, blocks_per_chunk, num_tasks;
  // Which query blocks a lane adds to, [map rows, lanes, num_q_blocks]: the row of its piece of dq among those of one head (-1: none), and
  // the chunk that comes there first. pieces [batch * heads]: first row of those of a head.
  const int64_t *piece, *pieces;
  const int32_t* first_chunk;
};
struct DecodePlan {
  const AttlasDecode* a;
  int64_t max_splits, heads_per_task, head_tasks, num_tasks, rows, dim_v_padded;
};

struct KernelTable {
  size_t (*forward_scratch)(const ForwardPlan*);
  void (*forward_task)(const ForwardPlan*, int64_t task, char* scratch);
  size_t (*backward_scratch)(const BackwardPlan*);
  void (*delta_task)(const BackwardPlan*, int64_t task);
  void (*backward_task)(const BackwardPlan*, int64_t task, char* scratch);
  void (*reduce_task)(const BackwardPlan*, int64_t task);
  size_t (*decode_scratch)(const DecodePlan*);
  void (*decode_task)(const DecodePlan*, int64_t task, char* scratch);
  void (*decode_merge_task)(const DecodePlan*, int64_t task);
};

extern "C" {
extern const KernelTable attlas_kernels_avx2, attlas_kernels_avx512, attlas_kernels_avx512_bf16;
}
