// The C interface of the dense steps of a layer: linear maps with packed weights, norms, gates, rotary positions. Tensors are pointers plus row
// strides counted in elements; the last dimension has stride 1. An output row is a function of its own input row, to the bit: how many rows
// there are, and on which thread they run, changes nothing.
#pragma once
#include <stddef.h>

#include "api.h"

#pragma GCC visibility push(default)
extern "C" {

// y = x W^T + bias. x [rows, in], W [out, in] (packed by attlas_cpu_linear_pack for the same isa), bias [out] or NULL, y [rows, out].
// Sums run over the inputs in ascending order in fp32 (bf16 on machines with its dot product: pairs of inputs in ascending order), in runs of
// 128 steps whose sums are added in order.
typedef struct {
  int64_t dtype, rows, in, out, threads, isa;
  const void* x;
  int64_t x_row;
  const void* weight;  // for pack: W, with row stride x_row
  const void* bias;
  void* y;  // for pack: the packed weights
  int64_t y_row;
} AttlasLinear;

// x += residual (where given), then y = x / sqrt(mean(x^2) + eps) * (offset + weight); x [rows, dim] contiguous rows of stride `dim`.
typedef struct {
  int64_t dtype, rows, dim, threads, isa;
  double eps, offset;
  void* x;
  const void *residual, *weight;
  void* y;
} AttlasNorm;

// y = silu(x[:, :dim]) * x[:, dim:]; x [rows, 2 dim], y [rows, dim]
typedef struct {
  int64_t dtype, rows, dim, threads, isa;
  const void* x;
  void* y;
} AttlasGate;

// x [rows, (heads + 2 kv_heads) dim] = q, k, v of each token. Turns q in place and k (the first `turned` channels of each head), and writes k
// and v to slots[row] of the cache [slots, kv_heads, dim]. cos, sin [rows, turned / 2] fp32; turned = 0: no rotation.
// kv_dtype ATTLAS_I8 or ATTLAS_E4M3: the cache holds 8-bit numbers and scales [slots, kv_heads]; k is turned in place, too.
typedef struct {
  int64_t dtype, rows, heads, kv_heads, dim, turned, interleaved, threads, isa;
  void* x;
  const float *cos, *sin;
  void *k, *v;
  const int64_t* slots;
  int64_t kv_dtype;
  float *k_scale, *v_scale;
} AttlasRotate;

// One step of a program: the function and its arguments.
enum { ATTLAS_OP_LINEAR = 0, ATTLAS_OP_NORM = 1, ATTLAS_OP_GATE = 2, ATTLAS_OP_ROTATE = 3, ATTLAS_OP_DECODE = 4 };
typedef struct {
  int64_t op;
  const void* args;
} AttlasOp;

int attlas_cpu_program(const AttlasOp*, int64_t count);  // runs the steps in order; the first code that is not 0 ends it
int64_t attlas_cpu_linear_bytes(const AttlasLinear*);  // of the packed weights
int attlas_cpu_linear_pack(const AttlasLinear*);
int attlas_cpu_linear(const AttlasLinear*);
int attlas_cpu_norm(const AttlasNorm*);
int attlas_cpu_gate(const AttlasGate*);
int attlas_cpu_rotate(const AttlasRotate*);
}
#pragma GCC visibility pop

struct LinearPlan {
  const AttlasLinear* a;
  int64_t panels, panels_per_task, rows_per_task, column_tasks;
};
struct DenseTable {
  int64_t panel;  // outputs of one panel
  int64_t (*linear_bytes)(const AttlasLinear*);
  void (*pack_task)(const LinearPlan*, int64_t task, char* scratch);
  size_t (*linear_scratch)(const LinearPlan*);
  void (*linear_task)(const LinearPlan*, int64_t task, char* scratch);
  void (*norm_row)(const AttlasNorm*, int64_t row, char* scratch);
  void (*gate_row)(const AttlasGate*, int64_t row, char* scratch);
  void (*rotate_row)(const AttlasRotate*, int64_t row, char* scratch);
};
extern "C" {
extern const DenseTable attlas_dense_avx2, attlas_dense_avx512, attlas_dense_avx512_bf16;
}
