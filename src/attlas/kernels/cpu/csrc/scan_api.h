// The C interface of the linear recurrence. Tensors are pointers plus strides counted in elements; the last dimension has stride 1.
#pragma once
#include <stddef.h>

#include "api.h"

#pragma GCC visibility push(default)
extern "C" {

// S_t = Diag(exp(g_t)) S_{t-1} + k_t v_t^T,  out_t = scale S_t^T q_t, all in fp32.
typedef struct {
  int64_t batch, heads, length, dim_k, dim_v;
  int64_t decay_dim;  // 0: no decay, 1: one g per token and head, dim_k: one per channel
  int64_t threads, isa;
  double scale;
  const float *q, *k, *v, *g;
  AttlasStride sq, sk, sv, sg;
  const float* state_in;  // [B, H, K, V] contiguous
  float* state_out;       // likewise
  float* out;             // [B, T, H, V] contiguous
  float* checkpoints;     // [B, H, ceil(T / 64), attlas_cpu_scan_state floats]; NULL: not kept
  // backward; gradients are contiguous and shaped like their tensors
  const float* dout;
  AttlasStride sdo;
  const float* dstate_out;  // [B, H, K, V] or NULL
  float *dq, *dk, *dv, *dg, *dstate_in;
} AttlasScan;

int64_t attlas_cpu_scan_state(const AttlasScan*);  // floats of one checkpoint
int attlas_cpu_scan_forward(const AttlasScan*);
int attlas_cpu_scan_backward(const AttlasScan*);
}
#pragma GCC visibility pop

struct ScanTable {
  size_t (*scratch)(const AttlasScan*, int backward);
  void (*forward_task)(const AttlasScan*, int64_t task, char* scratch);
  void (*backward_task)(const AttlasScan*, int64_t task, char* scratch);
};
extern "C" {
extern const ScanTable attlas_scan_avx2, attlas_scan_avx512;
}
