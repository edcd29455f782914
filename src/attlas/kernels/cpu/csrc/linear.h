// The dense steps of a layer for one instruction set. DENSE_TABLE names the table.
#include "gemm.h"
#include "linear_api.h"
#include "codes.h"

namespace {
#ifdef __AVX512BF16__
typedef Bf16 HalfMode;
#else
typedef Fp32 HalfMode;
#endif

#define BY_DTYPE(DTYPE, FN, ...)                          \
  switch (DTYPE) {                                        \
    case ATTLAS_F32: return FN<Fp32, float>(__VA_ARGS__); \
    case ATTLAS_F16: return FN<Fp32, f16>(__VA_ARGS__);   \
    default: return FN<HalfMode, bf16>(__VA_ARGS__);      \
  }

// ---- packed weights: panels of PANEL outputs, for each input (each pair of inputs, for the bf16 dot product) the weights of all of them ----
// Cell: what one lane holds. Half-precision weights stay in half precision; without the dot product they are widened as they are loaded.
template <class M, class T> struct Weights {
  typedef T Cell;
  INL static V get(const Cell* p) { return load_as_f32(p); }
  INL static Cell cell(const T* row, int64_t k, int64_t) { return row[k]; }
  INL static Cell none() { Cell c; memset(&c, 0, sizeof c); return c; }
};
#ifdef __AVX512BF16__
template <> struct Weights<Bf16, bf16> {
  typedef float Cell;
  INL static V get(const Cell* p) { return load(p); }
  INL static Cell cell(const bf16* row, int64_t k, int64_t in) {
    uint32_t w = row[2 * k].bits | (2 * k + 1 < in ? (uint32_t)row[2 * k + 1].bits << 16 : 0);
    float f;
    memcpy(&f, &w, 4);
    return f;
  }
  INL static Cell none() { return 0.0f; }
};
#endif

template <class M, class T> int64_t linear_bytes_of(const AttlasLinear* a) {
  return (a->out + PANEL - 1) / PANEL * PANEL * words<M>((int)a->in) * (int64_t)sizeof(typename Weights<M, T>::Cell);
}

template <class M, class T> void pack_of(const LinearPlan* p, int64_t panel, char*) {
  typedef Weights<M, T> W;
  const AttlasLinear* a = p->a;
  int64_t depth = words<M>((int)a->in);
  typename W::Cell* dst = (typename W::Cell*)a->y + panel * depth * PANEL;
  const T* src = (const T*)a->weight;
  for (int64_t j = 0; j < PANEL; j++) {
    int64_t o = panel * PANEL + j;
    for (int64_t k = 0; k < depth; k++) dst[k * PANEL + j] = o < a->out ? W::cell(src + o * a->x_row, k, a->in) : W::none();
  }
}

// What a row group fetches while it computes: its share of the panel that comes next, `step` bytes for each step along the sum. The weights of
// a model come from memory once per call, and would otherwise be waited for by the first row group of each panel.
struct Ahead {
  const char* at;
  int64_t step;
};

// Steps along the sum that are added up by themselves: one long sum of single steps would round about twice as badly.
constexpr int kRun = 128;

// R rows times one panel. x: words, `ld` apart.
template <class M, class T, int R>
void linear_tile(const float* x, int64_t ld, const typename Weights<M, T>::Cell* w, int depth, const T* bias, T* y, int64_t y_row, int columns, Ahead next) {
  typedef Weights<M, T> W;
  V c[R][2], total[R][2];
  for (int k0 = 0; k0 < depth; k0 += kRun) {
#pragma GCC unroll 8
    for (int i = 0; i < R; i++) c[i][0] = c[i][1] = zero();
    int end = k0 + kRun < depth ? k0 + kRun : depth;
    for (int k = k0; k < end; k++) {
      V b0 = W::get(w), b1 = W::get(w + VL);
      _mm_prefetch(next.at, _MM_HINT_T1);
      if (next.step > 64) _mm_prefetch(next.at + 64, _MM_HINT_T1);
      next.at += next.step;
#pragma GCC unroll 8
      for (int i = 0; i < R; i++) {
        V a = set1(x[i * ld + k]);
        c[i][0] = M::mac(c[i][0], a, b0), c[i][1] = M::mac(c[i][1], a, b1);
      }
      w += PANEL;
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; i++)
#pragma GCC unroll 2
      for (int j = 0; j < 2; j++) total[i][j] = k0 ? add(total[i][j], c[i][j]) : c[i][j];
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; i++)
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
      int n = columns - j * VL;
      if (n <= 0) continue;
      V r = total[i][j];
      if (bias) r = add(r, load_as_f32(bias + j * VL, n));
      store_from_f32(y + i * y_row + j * VL, r, n);
    }
}

template <class M, class T>
void linear_rows(int rows, const float* x, int64_t ld, const typename Weights<M, T>::Cell* w, int depth, const T* bias, T* y, int64_t y_row, int columns, Ahead next) {
#define ROWS(R) \
  case R: return linear_tile<M, T, R>(x, ld, w, depth, bias, y, y_row, columns, next);
  switch (rows) {
    ROWS(1) ROWS(2) ROWS(3)
#ifdef __AVX512F__
    ROWS(4) ROWS(5) ROWS(6) ROWS(7)
    default: return linear_tile<M, T, 8>(x, ld, w, depth, bias, y, y_row, columns, next);
#else
    default: return linear_tile<M, T, 4>(x, ld, w, depth, bias, y, y_row, columns, next);
#endif
  }
#undef ROWS
}

// Whether rows of x can be read as words where they lie
template <class M, class T> INL bool in_words(const AttlasLinear* a) { return sizeof(T) * M::PER == 4 && a->in % M::PER == 0 && a->x_row % M::PER == 0; }

template <class M, class T> size_t linear_scratch_of(const LinearPlan* p) {
  return in_words<M, T>(p->a) ? 0 : p->rows_per_task * round_up(words<M>((int)p->a->in), VL) * 4;
}

template <class M, class T> void linear_of(const LinearPlan* p, int64_t task, char* scratch) {
  typedef typename Weights<M, T>::Cell Cell;
  const AttlasLinear* a = p->a;
  int64_t r0 = task / p->column_tasks * p->rows_per_task, p0 = task % p->column_tasks * p->panels_per_task;
  int64_t rows = a->rows - r0 < p->rows_per_task ? a->rows - r0 : p->rows_per_task;
  int64_t p1 = p0 + p->panels_per_task < p->panels ? p0 + p->panels_per_task : p->panels;
  int depth = words<M>((int)a->in);
  const float* x;
  int64_t ld;
  if (in_words<M, T>(a)) {
    x = (const float*)((const T*)a->x + r0 * a->x_row), ld = a->x_row / M::PER;
  } else {
    ld = round_up(depth, VL), x = (const float*)scratch;
    for (int64_t i = 0; i < rows; i++) {
      const T* row = (const T*)a->x + (r0 + i) * a->x_row;
      pack_rows<M, T>(&row, 1, (int)a->in, (float*)scratch + i * ld, ld);
    }
  }
  for (int64_t panel = p0; panel < p1; panel++) {
    int64_t o = panel * PANEL;
    int columns = a->out - o < PANEL ? (int)(a->out - o) : PANEL;
    const Cell* w = (const Cell*)a->weight + panel * depth * PANEL;
    int64_t row_groups = (rows + MR - 1) / MR, step = PANEL * (int64_t)sizeof(Cell) / row_groups;
    const char* next = (const char*)(w + depth * PANEL);
    for (int64_t i = 0; i < rows; i += MR)
      linear_rows<M, T>(rows - i < MR ? (int)(rows - i) : MR, x + i * ld, ld, w, depth, a->bias ? (const T*)a->bias + o : nullptr,
                        (T*)a->y + (r0 + i) * a->y_row + o, a->y_row, columns, {next + i / MR * step * depth, step});
  }
}

template <class M, class T> void norm_of(const AttlasNorm* a, int64_t row, char*) {
  T* x = (T*)a->x + row * a->dim;
  const T* r = a->residual ? (const T*)a->residual + row * a->dim : nullptr;
  const T* w = (const T*)a->weight;
  T* y = (T*)a->y + row * a->dim;
  V sum = zero();
  for (int64_t d = 0; d < a->dim; d += VL) {
    int n = a->dim - d < VL ? (int)(a->dim - d) : VL;
    V t = load_as_f32(x + d, n);
    if (r) {
      store_from_f32(x + d, add(t, load_as_f32(r + d, n)), n);
      t = load_as_f32(x + d, n);  // as it is stored
    }
    sum = fma(t, t, sum);
  }
  V inv = set1((float)(1.0 / sqrt((double)hsum(sum) / (double)a->dim + a->eps))), offset = set1((float)a->offset);
  for (int64_t d = 0; d < a->dim; d += VL) {
    int n = a->dim - d < VL ? (int)(a->dim - d) : VL;
    store_from_f32(y + d, mul(mul(load_as_f32(x + d, n), inv), add(load_as_f32(w + d, n), offset)), n);
  }
}

template <class M, class T> void gate_of(const AttlasGate* a, int64_t row, char*) {
  const T *g = (const T*)a->x + row * 2 * a->dim, *u = g + a->dim;
  T* y = (T*)a->y + row * a->dim;
  for (int64_t d = 0; d < a->dim; d += VL) {
    int n = a->dim - d < VL ? (int)(a->dim - d) : VL;
    V x = load_as_f32(g + d, n);
    V low = max(set1(-80.0f), x);  // silu below is less than 1e-33; NaN stays
    V e = exp2v(mul(low, set1(-kLog2e)));
    store_from_f32(y + d, mul(div(x, add(set1(1.0f), e)), load_as_f32(u + d, n)), n);
  }
}

template <class T> INL float one(const T* p) {
  float t[VL];
  store(t, load_as_f32(p, 1));
  return t[0];
}
template <class T> INL void put_one(T* p, float x) { store_from_f32(p, set1(x), 1); }

template <class T> void turn(T* dst, const T* src, int64_t turned, int64_t interleaved, const float* cos, const float* sin) {
  int64_t half = turned / 2;
  if (interleaved) {
    for (int64_t i = 0; i < half; i++) {
      float x = one(src + 2 * i), y = one(src + 2 * i + 1);
      put_one(dst + 2 * i, x * cos[i] - y * sin[i]), put_one(dst + 2 * i + 1, y * cos[i] + x * sin[i]);
    }
    return;
  }
  for (int64_t i = 0; i < half; i += VL) {
    int n = half - i < VL ? (int)(half - i) : VL;
    V x = load_as_f32(src + i, n), y = load_as_f32(src + half + i, n), c = load_as_f32(cos + i, n), s = load_as_f32(sin + i, n);
    V xs = mul(x, s), ys = mul(y, s);
    store_from_f32(dst + i, sub(mul(x, c), ys), n), store_from_f32(dst + half + i, add(mul(y, c), xs), n);
  }
}

template <class C, class T> void put_row(const AttlasRotate* a, const T* x, void* codes, float* scales, int64_t slot, float top) {
  for (int64_t h = 0; h < a->kv_heads; h++) put_codes((C*)codes + (slot * a->kv_heads + h) * a->dim, scales + slot * a->kv_heads + h, x + h * a->dim, a->dim, top);
}
template <class C, class T> void put_both(const AttlasRotate* a, T* k, int64_t row, float top, const float* cos, const float* sin) {
  for (int64_t h = 0; h < a->kv_heads; h++) turn(k + h * a->dim, k + h * a->dim, a->turned, a->interleaved, cos, sin);
  put_row<C>(a, k, a->k, a->k_scale, a->slots[row], top);
  put_row<C>(a, k + a->kv_heads * a->dim, a->v, a->v_scale, a->slots[row], top);
}

template <class M, class T> void rotate_of(const AttlasRotate* a, int64_t row, char*) {
  T* q = (T*)a->x + row * (a->heads + 2 * a->kv_heads) * a->dim;
  T *k = q + a->heads * a->dim, *v = k + a->kv_heads * a->dim;
  T *to_k = (T*)a->k + a->slots[row] * a->kv_heads * a->dim, *to_v = (T*)a->v + a->slots[row] * a->kv_heads * a->dim;
  const float *cos = a->cos + row * a->turned / 2, *sin = a->sin + row * a->turned / 2;
  for (int64_t h = 0; h < a->heads; h++) turn(q + h * a->dim, q + h * a->dim, a->turned, a->interleaved, cos, sin);
  if (a->kv_dtype == ATTLAS_I8) return put_both<i8>(a, k, row, 127.0f, cos, sin);
  if (a->kv_dtype == ATTLAS_E4M3) return put_both<e4m3>(a, k, row, 448.0f, cos, sin);
  memcpy(to_k, k, a->kv_heads * a->dim * sizeof(T));
  memcpy(to_v, v, a->kv_heads * a->dim * sizeof(T));
  for (int64_t h = 0; h < a->kv_heads; h++) turn(to_k + h * a->dim, k + h * a->dim, a->turned, a->interleaved, cos, sin);
}

int64_t run_bytes(const AttlasLinear* a) { BY_DTYPE(a->dtype, linear_bytes_of, a) }
void run_pack(const LinearPlan* p, int64_t t, char* s) { BY_DTYPE(p->a->dtype, pack_of, p, t, s) }
size_t run_scratch(const LinearPlan* p) { BY_DTYPE(p->a->dtype, linear_scratch_of, p) }
void run_linear(const LinearPlan* p, int64_t t, char* s) { BY_DTYPE(p->a->dtype, linear_of, p, t, s) }
void run_norm(const AttlasNorm* a, int64_t t, char* s) { BY_DTYPE(a->dtype, norm_of, a, t, s) }
void run_gate(const AttlasGate* a, int64_t t, char* s) { BY_DTYPE(a->dtype, gate_of, a, t, s) }
void run_rotate(const AttlasRotate* a, int64_t t, char* s) { BY_DTYPE(a->dtype, rotate_of, a, t, s) }
}  // namespace

extern "C" const DenseTable DENSE_TABLE = {PANEL, run_bytes, run_pack, run_scratch, run_linear, run_norm, run_gate, run_rotate};
