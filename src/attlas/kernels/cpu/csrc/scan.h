// The linear recurrence of one (batch row, head), in runs of at most 64 tokens.
//
// Inside a run, decay is counted from its first token (G_0 = 0), so q e^G and k e^-G are bounded by the decay across the run; a run ends where
// that passes kRange. So nothing over- or underflows, and no pair is dropped, however strong the decay is (runs then get short).
// With q' = q e^G scale and k' = k e^-G: out = tril(q' k'^T) v + q' S and S <- e^end (S + k'^T v), where S already bears the first token's decay.
#pragma once
#include "scan_api.h"
#include "simd.h"

namespace {

constexpr int kRun = 64;         // longest run; checkpoints stand every kRun tokens, and no run crosses one
constexpr float kRange = 40.0f;  // natural log
constexpr int kFetch = 16;       // rows asked for before each of four products

#ifdef __AVX512F__
constexpr int TR = 6, TV = 4;  // rows and vectors of a register tile
#else
constexpr int TR = 4, TV = 2;
#endif

// e^(hi + lo) to about one unit in the last place: the rounding of hi * log2(e) is put back
INL V exp_sum(V hi, V lo) {
  V p = mul(hi, set1(kLog2e)), rest = fma(hi, set1(kLog2e), sub(zero(), p));
  rest = fma(hi, set1(1.92596303e-8f), fma(lo, set1(kLog2e), rest));
  V e = exp2v(p);
  return fma(mul(e, set1(kLn2)), rest, e);
}

// C[R][NV * VL] (+)= sum over k < depth of A[i * ars + k * acs] B[k * ldb + j]
template <int R, int NV>
INL void scan_tile(const float* A, int64_t ars, int64_t acs, const float* B, int64_t ldb, float* C, int64_t ldc, int depth, bool add_to) {
  V c[R][NV];
#pragma GCC unroll 8
  for (int i = 0; i < R; i++)
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) c[i][j] = add_to ? load(C + i * ldc + j * VL) : zero();
  for (int k = 0; k < depth; k++) {
    V b[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) b[j] = load(B + k * ldb + j * VL);
#pragma GCC unroll 8
    for (int i = 0; i < R; i++) {
      V a = set1(A[i * ars + k * acs]);
#pragma GCC unroll 4
      for (int j = 0; j < NV; j++) c[i][j] = fma(a, b[j], c[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; i++)
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) store(C + i * ldc + j * VL, c[i][j]);
}

template <int R>
__attribute__((noinline)) void scan_rows(const float* A, int64_t ars, int64_t acs, const float* B, int64_t ldb, float* C, int64_t ldc, int vectors, int depth,
                                         bool add_to) {
  int j = 0;
  for (; j + TV <= vectors; j += TV) scan_tile<R, TV>(A, ars, acs, B + j * VL, ldb, C + j * VL, ldc, depth, add_to);
  if (TV > 2)
    for (; j + 2 <= vectors; j += 2) scan_tile<R, 2>(A, ars, acs, B + j * VL, ldb, C + j * VL, ldc, depth, add_to);
  for (; j < vectors; j++) scan_tile<R, 1>(A, ars, acs, B + j * VL, ldb, C + j * VL, ldc, depth, add_to);
}

enum Shape { SQUARE, LOWER_OUT, LOWER_A, UPPER_A };  // which part of a triangular matrix is used

// C[m][n] (+)= A B, n a multiple of VL.
//   LOWER_OUT: only C[i][j <= i] is needed.  LOWER_A: A[i][k > i] is 0.  UPPER_A: A[i][k < i] is 0.
void scan_gemm(int m, int n, int depth, const float* A, int64_t ars, int64_t acs, const float* B, int64_t ldb, float* C, int64_t ldc, bool add_to,
               Shape shape = SQUARE) {
  for (int i = 0; i < m;) {
    int r = m - i >= TR ? TR : m - i >= 2 ? 2 : 1;
    int vectors = n / VL, first = 0, last = depth;
    if (shape == LOWER_OUT) vectors = imin(vectors, (i + r + VL - 1) / VL);
    if (shape == LOWER_A) last = imin(depth, i + r);
    if (shape == UPPER_A) first = i;
    const float *a = A + i * ars + first * acs, *b = B + first * ldb;
    float* c = C + i * ldc;
    if (r == TR) scan_rows<TR>(a, ars, acs, b, ldb, c, ldc, vectors, last - first, add_to);
    else if (r == 2) scan_rows<2>(a, ars, acs, b, ldb, c, ldc, vectors, last - first, add_to);
    else scan_rows<1>(a, ars, acs, b, ldb, c, ldc, vectors, last - first, add_to);
    i += r;
  }
}

// dst[c][r] = src[r][c] for r < rows (columns rows ... ld_dst - 1 of dst become 0), c < cols; both multiples of VL in storage
void scan_transpose(const float* src, int64_t lds, int rows, int cols, float* dst, int64_t ldd) {
  for (int r0 = 0; r0 < ldd; r0 += VL)
    for (int c0 = 0; c0 < cols; c0 += VL) {
      V x[VL];
      for (int i = 0; i < VL; i++) x[i] = r0 + i < rows ? load(src + (r0 + i) * lds + c0) : zero();
      transpose(x);
      for (int i = 0; i < VL; i++) store(dst + (c0 + i) * ldd + r0, x[i]);
    }
}

struct ScanBuffers {
  int K, V, kp, vp;  // dims, and rounded up to whole vectors
  float *q, *kh, *v, *o, *A, *T1, *T2, *S, *up, *down, *G, *G_low, *first, *end;
  // backward
  float *dS, *dq, *dkh, *dA, *runs;
  int* bounds;

  static size_t plan(const AttlasScan* a, int backward, char* base, ScanBuffers* s) {
    size_t at = 0;
    auto take = [&](size_t floats) {
      float* p = base ? (float*)(base + at) : nullptr;
      at += (floats * 4 + 63) & ~(size_t)63;
      return p;
    };
    ScanBuffers b;
    b.K = (int)a->dim_k, b.V = (int)a->dim_v, b.kp = (int)round_up(b.K, VL), b.vp = (int)round_up(b.V, VL);
    size_t side = (size_t)(b.kp > b.vp ? b.kp : b.vp);
    b.q = take(kRun * b.kp), b.kh = take(kRun * b.kp), b.v = take(kRun * b.vp), b.o = take(kRun * b.vp);
    b.A = take(kRun * kRun), b.T1 = take(side * (side > kRun ? side : kRun)), b.T2 = take(side * (side > kRun ? side : kRun));
    b.S = take((size_t)b.kp * b.vp), b.up = take(kRun * b.kp), b.down = take(kRun * b.kp), b.G = take(kRun * b.kp), b.G_low = take(kRun * b.kp), b.first = take(b.kp), b.end = take(b.kp);
    if (backward) {
      b.dS = take((size_t)b.kp * b.vp), b.dq = take(kRun * b.kp), b.dkh = take(kRun * b.kp), b.dA = take(kRun * kRun);
      b.runs = take((size_t)kRun * b.kp * b.vp), b.bounds = (int*)take(kRun + 1);
    }
    if (s) *s = b;
    return at;
  }
};

struct ScanHead {
  const AttlasScan* a;
  ScanBuffers s;
  int64_t b, h;

  INL const float* at(const float* p, const AttlasStride& st, int64_t t) const { return p + b * st.batch + t * st.row + h * st.head; }
  INL int64_t flat(int64_t t, int64_t width) const { return ((b * a->length + t) * a->heads + h) * width; }  // contiguous [B, T, H, width]

  // The rows of one head lie far apart, so the hardware does not see which come next: they are asked for while the run before them is computed.
  int64_t next_row = 0, end_row = 0;
  template <int WRITE>
  INL static void ask(const float* row, int n) {
    for (int d = 0; d < n; d += 16) __builtin_prefetch(row + d, WRITE, 2);
  }
  void fetch(int rows, bool backward) {
    for (; rows > 0 && next_row < end_row; rows--, next_row++) {
      ask<0>(at(a->q, a->sq, next_row), s.K), ask<0>(at(a->k, a->sk, next_row), s.K), ask<0>(at(a->v, a->sv, next_row), s.V);
      if (a->decay_dim) ask<0>(at(a->g, a->sg, next_row), (int)a->decay_dim);
      if (!backward) {
        ask<1>(a->out + flat(next_row, s.V), s.V);
        continue;
      }
      ask<0>(at(a->dout, a->sdo, next_row), s.V);
      ask<1>(a->dq + flat(next_row, s.K), s.K), ask<1>(a->dk + flat(next_row, s.K), s.K), ask<1>(a->dv + flat(next_row, s.V), s.V);
      if (a->decay_dim) ask<1>(a->dg + flat(next_row, a->decay_dim), (int)a->decay_dim);
    }
  }

  static void copy_row(const float* src, int n, int np, float* dst) {
    for (int d = 0; d < np; d += VL) store(dst + d, d < n ? load_as_f32(src + d, n - d) : zero());
  }

  bool per_token() const { return a->decay_dim == 1; }

  // Loads the decay of a run that starts at t: G (from the run's first token, as high + low) and e^G, e^-G, `end` = e^(G of the last token),
  // `first` = e^(the first token's own). Per token these are one number a token. Returns the run's length.
  int decay(int64_t t, int limit) {
    if (!a->decay_dim) return limit;
    int n = per_token() ? sum_per_token(t, limit) : sum_per_channel(t, limit);
    int rows = per_token() ? 1 : n, width = per_token() ? kRun : s.kp;
    for (int at = 0; at < rows * width; at += VL) {
      V up = exp_sum(load(s.G + at), load(s.G_low + at));
      store(s.up + at, up);
      store(s.down + at, div(set1(1.0f), up));
    }
    V own = exp_sum(set1(s.first[0]), zero());
    for (int d = 0; d < s.kp; d += VL) {
      store(s.end + d, per_token() ? set1(s.up[n - 1]) : load(s.up + (n - 1) * s.kp + d));
      store(s.first + d, per_token() ? own : exp_sum(load(s.first + d), zero()));
    }
    return n;
  }

  int sum_per_token(int64_t t, int limit) {
    double total = 0;
    memset(s.G, 0, sizeof(float) * kRun), memset(s.G_low, 0, sizeof(float) * kRun);
    s.first[0] = *at(a->g, a->sg, t);
    int n = 1;
    for (; n < limit; n++) {
      total += (double)*at(a->g, a->sg, t + n);
      if (total < -kRange) break;
      s.G[n] = (float)total, s.G_low[n] = (float)(total - (double)s.G[n]);
    }
    return n;
  }

  int sum_per_channel(int64_t t, int limit) {
    copy_row(at(a->g, a->sg, t), s.K, s.kp, s.first);
    memset(s.G, 0, sizeof(float) * s.kp), memset(s.G_low, 0, sizeof(float) * s.kp);
    int n = 1;
    for (; n < limit; n++) {
      const float* g = at(a->g, a->sg, t + n);
      const float *before = s.G + (n - 1) * s.kp, *before_low = s.G_low + (n - 1) * s.kp;
      float *now = s.G + n * s.kp, *now_low = s.G_low + n * s.kp;
      V farthest = zero();
      for (int d = 0; d < s.kp; d += VL) {  // the exact rounding error of high + step goes to low
        V high = load(before + d), step = d < s.K ? load_as_f32(g + d, s.K - d) : zero(), sum = add(high, step), part = sub(sum, high);
        V lost = add(sub(high, sub(sum, part)), sub(step, part));
        store(now + d, sum);
        store(now_low + d, add(load(before_low + d), lost));
        farthest = max(farthest, abs(sum));
      }
      if (hmax(farthest) > kRange) break;
    }
    return n;
  }

  // q e^G scale, k e^-G, v
  void load_run(int64_t t, int n) {
    const V scale = set1((float)a->scale);
    for (int i = 0; i < n; i++) {
      const float *q = at(a->q, a->sq, t + i), *k = at(a->k, a->sk, t + i);
      V up = per_token() ? set1(s.up[i]) : set1(1.0f), down = per_token() ? set1(s.down[i]) : set1(1.0f);
      for (int d = 0; d < s.kp; d += VL) {
        if (a->decay_dim > 1) up = load(s.up + i * s.kp + d), down = load(s.down + i * s.kp + d);
        V here = d < s.K ? load_as_f32(q + d, s.K - d) : zero(), there = d < s.K ? load_as_f32(k + d, s.K - d) : zero();
        store(s.q + i * s.kp + d, mul(mul(here, scale), up));
        store(s.kh + i * s.kp + d, mul(there, down));
      }
      copy_row(at(a->v, a->sv, t + i), s.V, s.vp, s.v + i * s.vp);
    }
  }

  static void scale_rows(float* m, int rows, int ld, const float* by) {
    for (int r = 0; r < rows; r++) {
      V f = set1(by[r]);
      for (int d = 0; d < ld; d += VL) store(m + r * ld + d, mul(load(m + r * ld + d), f));
    }
  }

  void scores(int n) {  // A = lower triangle of q kh^T, zeros above
    scan_transpose(s.kh, s.kp, n, s.kp, s.T1, kRun);
    scan_gemm(n, kRun, s.K, s.q, s.kp, 1, s.T1, kRun, s.A, kRun, false, LOWER_OUT);
    clear_above(s.A, n);
  }
  static void clear_above(float* A, int n) {
    for (int i = 0; i < n; i++)
      for (int j = i + 1; j < kRun; j++) A[i * kRun + j] = 0.0f;
  }

  void advance(int n) {  // S (already scaled by `first`) -> e^end (S + k'^T v)
    scan_gemm(s.K, s.vp, n, s.kh, 1, s.kp, s.v, s.vp, s.S, s.vp, true);
    if (a->decay_dim) scale_rows(s.S, s.K, s.vp, s.end);
  }

  void load_state(const float* from, float* to) {
    memset(to, 0, sizeof(float) * s.kp * s.vp);
    if (from)
      for (int r = 0; r < s.K; r++) memcpy(to + r * s.vp, from + ((b * a->heads + h) * s.K + r) * s.V, sizeof(float) * s.V);
  }
  void store_state(const float* from, float* to) {
    for (int r = 0; r < s.K; r++) memcpy(to + ((b * a->heads + h) * s.K + r) * s.V, from + r * s.vp, sizeof(float) * s.V);
  }
  float* checkpoint(int64_t segment) {
    int64_t segments = (a->length + kRun - 1) / kRun;
    return a->checkpoints + ((b * a->heads + h) * segments + segment) * s.kp * s.vp;
  }

  void forward() {
    load_state(a->state_in, s.S);
    for (int64_t t = 0; t < a->length;) {
      int to_checkpoint = kRun - (int)(t % kRun), left = a->length - t < to_checkpoint ? (int)(a->length - t) : to_checkpoint;
      if (a->checkpoints && t % kRun == 0) memcpy(checkpoint(t / kRun), s.S, sizeof(float) * s.kp * s.vp);
      int n = decay(t, left);
      load_run(t, n);
      if (a->decay_dim) scale_rows(s.S, s.K, s.vp, s.first);
      next_row = t + n, end_row = next_row + kRun < a->length ? next_row + kRun : a->length;
      fetch(kFetch, false);
      scores(n);
      fetch(kFetch, false);
      scan_gemm(n, s.vp, n, s.A, kRun, 1, s.v, s.vp, s.o, s.vp, false, LOWER_A);
      fetch(kFetch, false);
      scan_gemm(n, s.vp, s.K, s.q, s.kp, 1, s.S, s.vp, s.o, s.vp, true);
      fetch(kRun, false);
      for (int i = 0; i < n; i++)
        for (int d = 0; d < s.V; d += VL) store_from_f32(a->out + flat(t + i, s.V) + d, load(s.o + i * s.vp + d), s.V - d);
      advance(n);
      t += n;
    }
    store_state(s.S, a->state_out);
  }

  void backward() {
    load_state(a->dstate_out, s.dS);
    int64_t segments = (a->length + kRun - 1) / kRun;
    for (int64_t segment = segments - 1; segment >= 0; segment--) {
      int64_t t0 = segment * kRun, end = t0 + kRun < a->length ? t0 + kRun : a->length;
      memcpy(s.S, checkpoint(segment), sizeof(float) * s.kp * s.vp);
      int count = 0;
      s.bounds[0] = 0;
      for (int64_t t = t0; t < end;) {  // the state at the start of every run of the segment
        memcpy(s.runs + (size_t)count * s.kp * s.vp, s.S, sizeof(float) * s.kp * s.vp);
        int n = decay(t, (int)(end - t));
        if (t + n < end) {
          load_run(t, n);
          if (a->decay_dim) scale_rows(s.S, s.K, s.vp, s.first);
          advance(n);
        }
        t += n;
        s.bounds[++count] = (int)(t - t0);
      }
      for (int r = count - 1; r >= 0; r--) {
        memcpy(s.S, s.runs + (size_t)r * s.kp * s.vp, sizeof(float) * s.kp * s.vp);
        if (r < count - 1) decay(t0 + s.bounds[r], s.bounds[r + 1] - s.bounds[r]);  // the last one's is still there
        backward_run(t0 + s.bounds[r], s.bounds[r + 1] - s.bounds[r]);
      }
    }
    store_state(s.dS, a->dstate_in);
  }

  void backward_run(int64_t t, int n) {
    load_run(t, n);
    if (a->decay_dim) scale_rows(s.S, s.K, s.vp, s.first);
    scores(n);
    for (int i = 0; i < n; i++) copy_row(at(a->dout, a->sdo, t + i), s.V, s.vp, s.o + i * s.vp);
    end_row = t, next_row = t > kRun ? t - kRun : 0;
    fetch(kFetch, true);
    scan_transpose(s.v, s.vp, n, s.vp, s.T1, kRun);
    scan_gemm(n, kRun, s.V, s.o, s.vp, 1, s.T1, kRun, s.dA, kRun, false, LOWER_OUT);
    clear_above(s.dA, n);
    scan_transpose(s.S, s.vp, s.kp, s.vp, s.T1, s.kp);
    scan_gemm(n, s.kp, s.V, s.o, s.vp, 1, s.T1, s.kp, s.dq, s.kp, false);
    fetch(kFetch, true);
    scan_gemm(n, s.kp, n, s.dA, kRun, 1, s.kh, s.kp, s.dq, s.kp, true, LOWER_A);
    if (a->decay_dim) scale_rows(s.dS, s.K, s.vp, s.end);
    scan_transpose(s.dS, s.vp, s.kp, s.vp, s.T2, s.kp);
    scan_gemm(n, s.kp, s.V, s.v, s.vp, 1, s.T2, s.kp, s.dkh, s.kp, false);
    if (a->decay_dim) end_decay(n);
    fetch(kFetch, true);
    scan_gemm(n, s.kp, n, s.dA, 1, kRun, s.q, s.kp, s.dkh, s.kp, true, UPPER_A);
    // dv = A^T dout + k' dS, into the place of v once v is not needed any more
    scan_gemm(n, s.vp, n, s.A, 1, kRun, s.o, s.vp, s.v, s.vp, false, UPPER_A);
    fetch(kRun, true);
    scan_gemm(n, s.vp, s.K, s.kh, s.kp, 1, s.dS, s.vp, s.v, s.vp, true);
    for (int i = 0; i < n; i++)
      for (int d = 0; d < s.V; d += VL) store_from_f32(a->dv + flat(t + i, s.V) + d, load(s.v + i * s.vp + d), s.V - d);
    write_qk(t, n);
    if (a->decay_dim) write_decay(t, n);
    // dS <- first * (end * dS + q'^T dout)
    scan_gemm(s.K, s.vp, n, s.q, 1, s.kp, s.o, s.vp, s.dS, s.vp, true);
    if (a->decay_dim) {
      own_decay(t);
      scale_rows(s.dS, s.K, s.vp, s.first);
    }
  }

  void write_qk(int64_t t, int n) {
    const V scale = set1((float)a->scale);
    for (int i = 0; i < n; i++) {
      V up = per_token() ? set1(s.up[i]) : set1(1.0f), down = per_token() ? set1(s.down[i]) : set1(1.0f);
      for (int d = 0; d < s.K; d += VL) {
        int at = i * s.kp + d;
        if (a->decay_dim > 1) up = load(s.up + at), down = load(s.down + at);
        store_from_f32(a->dq + flat(t + i, s.K) + d, mul(mul(load(s.dq + at), scale), up), s.K - d);
        store_from_f32(a->dk + flat(t + i, s.K) + d, mul(load(s.dkh + at), down), s.K - d);
      }
    }
  }

  // sum over v of S[d][v] dS[d][v]
  float state_product(int d) const {
    V sum = zero();
    for (int j = 0; j < s.vp; j += VL) sum = fma(load(s.S + d * s.vp + j), load(s.dS + d * s.vp + j), sum);
    return hsum(sum);
  }

  // Gradient of the run's end, per channel, into s.G_low: e^end scales the state and what the run wrote to it. Here dS bears e^end already.
  void end_decay(int n) {
    for (int d = 0; d < s.kp; d += VL) {
      V sum = zero();
      for (int i = 0; i < n; i++) sum = fma(load(s.kh + i * s.kp + d), load(s.dkh + i * s.kp + d), sum);
      store(s.G_low + d, sum);
    }
    for (int d = 0; d < s.K; d++) s.G_low[d] += state_product(d);
  }

  // Gradient of the decay of tokens 1 ... n - 1 of the run: that of token i is in every G from i on, so it is a sum from the end.
  void write_decay(int64_t t, int n) {
    const int K = s.K;
    double total[ATTLAS_MAX_DIM], sum = 0;
    for (int d = 0; d < K; d++) total[d] = (double)s.G_low[d], sum += total[d];
    for (int i = n - 1; i >= 1; i--) {
      const float *q = s.q + i * s.kp, *dq = s.dq + i * s.kp, *kh = s.kh + i * s.kp, *dkh = s.dkh + i * s.kp;
      if (per_token()) {
        V x = zero(), y = zero();
        for (int d = 0; d < s.kp; d += VL) x = fma(load(q + d), load(dq + d), x), y = fma(load(kh + d), load(dkh + d), y);
        sum += (double)hsum(x) - (double)hsum(y);
        a->dg[flat(t + i, 1)] = (float)sum;
        continue;
      }
      float* dg = a->dg + flat(t + i, K);
      for (int d = 0; d < K; d++) {
        total[d] += (double)(q[d] * dq[d]) - (double)(kh[d] * dkh[d]);
        dg[d] = (float)total[d];
      }
    }
  }

  void own_decay(int64_t t) {  // of the first token: it scales the whole state; dS is here the gradient of the scaled state
    int wide = per_token() ? 1 : s.K;
    double sum = 0;
    for (int d = 0; d < s.K; d++) {
      float x = state_product(d);
      if (wide > 1) a->dg[flat(t, wide) + d] = x;
      sum += x;
    }
    if (wide == 1) a->dg[flat(t, 1)] = (float)sum;
  }
};

size_t scan_scratch(const AttlasScan* a, int backward) { return ScanBuffers::plan(a, backward, nullptr, nullptr); }

void scan_forward_task(const AttlasScan* a, int64_t task, char* scratch) {
  ScanHead head{a, {}, task / a->heads, task % a->heads};
  ScanBuffers::plan(a, 0, scratch, &head.s);
  head.forward();
}
void scan_backward_task(const AttlasScan* a, int64_t task, char* scratch) {
  ScanHead head{a, {}, task / a->heads, task % a->heads};
  ScanBuffers::plan(a, 1, scratch, &head.s);
  head.backward();
}

}  // namespace

extern "C" const ScanTable SCAN_TABLE = {scan_scratch, scan_forward_task, scan_backward_task};
