// The C interface of the CPU attention core. Every tensor is a pointer plus strides counted in elements; the last dimension has stride 1.
#pragma once
#include <stdint.h>

enum { ATTLAS_F32 = 0, ATTLAS_BF16 = 1, ATTLAS_F16 = 2, ATTLAS_I8 = 3, ATTLAS_E4M3 = 4 };
enum { ATTLAS_MOD_ALIBI = 1, ATTLAS_MOD_BIAS = 2, ATTLAS_MOD_SOFTCAP = 3 };
enum { ATTLAS_MAX_BLOCK = 256, ATTLAS_MAX_DIM = 1024, ATTLAS_MAX_MODS = 4 };

#pragma GCC visibility push(default)
extern "C" {

typedef struct {
  int64_t batch, row, head;  // strides of [B, T, H, D], in elements
} AttlasStride;

// Forward and backward over a BlockMap. row_ptr == NULL stands for "every key allowed".
typedef struct {
  int64_t dtype, batch, heads, kv_heads, q_len, k_len, dim, dim_v;
  int64_t threads, isa;  // isa 0 = best of this machine
  // BlockMap: row_ptr [map_batch * map_heads * nq + 1], cols / tile_ids [nnz], tiles [n, block_q, block_k / 8]
  int64_t map_batch, map_heads, block_q, block_k;
  const int64_t* row_ptr;
  const int32_t* cols;
  const int32_t* tile_ids;
  const uint8_t* tiles;
  // the transposed map (key-block rows), backward only; same tiles
  const int64_t* col_ptr;
  const int32_t* rows;
  const int32_t* row_tile_ids;
  const void *q, *k, *v, *out;
  void* out_w;
  AttlasStride sq, sk, sv, so;
  float* lse;  // [B, Tq, H] contiguous, natural log
  // score modifications, applied in order to scale * q.k
  double scale, softcap;
  int64_t num_mods;
  int64_t mods[ATTLAS_MAX_MODS];
  const float* alibi;  // [H]
  const float* bias;
  int64_t bias_batch, bias_head, bias_row;  // strides, the key stride is 1
  const int32_t *q_pos, *k_pos;             // [Tq], [Tk], ALiBi only
  const float* sink;                        // [H] logits in the denominator
  // backward
  const void* dout;
  AttlasStride sdo;
  const float* dlse;  // [B, Tq, H] or NULL
  float* delta;       // [B, Tq, H] scratch: rowsum(dout * out) - dlse
  float* dq_lanes;    // workspace: attlas_cpu_backward_workspace floats; with 1 lane and fp32, dq itself will do
  int64_t lanes;      // 1 ... 64
  void *dq, *dk, *dv;  // contiguous [B, T, H, D]
  float* dbias;        // [B, H, Tq, Tk] zero-filled or NULL
} AttlasAttention;

// Decode: `q_len` newest tokens of each sequence over its cache. Query t of sequence b stands at absolute position lengths[b] - q_len + t.
typedef struct {
  int64_t dtype, batch, heads, kv_heads, q_len, dim, dim_v;
  int64_t threads, isa;
  const void *q, *k, *v;
  void* out;
  AttlasStride sq, sk, sv, so;  // sk.batch / sv.batch: stride of a batch row, or of a page when block_table is given
  float* lse;                   // [B, Tq, H]
  const int32_t* block_table;   // [B, max_blocks] or NULL
  int64_t max_blocks, page_size;
  const int64_t* lengths;  // [B] tokens in each cache
  double scale, softcap;
  int64_t causal;                   // 0: every query sees every key of its sequence
  int64_t window_left, num_sinks;   // window_left < 0: no window; the first num_sinks keys stay visible
  const float *alibi, *sink;        // [H] or NULL
  int64_t split;                    // keys of one split, a multiple of 128
  float* partial;                   // workspace: attlas_cpu_decode_workspace floats
  int64_t kv_dtype;                 // ATTLAS_I8 or ATTLAS_E4M3: k and v are 8-bit numbers, to be multiplied by the scales; else as dtype
  const float *k_scale, *v_scale;   // one for each token and head; strides as of k and v, without the last dimension
  AttlasStride sks, svs;
} AttlasDecode;

int attlas_cpu_abi(void);
// Share work out among the team of this GOMP_parallel (null: among threads of our own).
void attlas_cpu_use_openmp(void* gomp_parallel);
const char* attlas_cpu_isa(void);               // best instruction set of this machine: "avx512_bf16", "avx512", "avx2" or "none"
int attlas_cpu_attention_forward(const AttlasAttention*);
int64_t attlas_cpu_backward_workspace(const AttlasAttention*);
int attlas_cpu_attention_backward(const AttlasAttention*);
int64_t attlas_cpu_decode_workspace(const AttlasDecode*);
int attlas_cpu_decode(const AttlasDecode*);
}
#pragma GCC visibility pop
