// Matrix products of one row group (at most MR rows) with packed panels, and the packing itself.
// Everything is counted in 32-bit words: a word is one float (FP32) or two consecutive bf16 along the summed dimension (BF16), so both modes
// share every address computation and differ in one instruction.
#pragma once
#include "simd.h"

namespace {

struct Fp32 {
  static constexpr int PER = 1;  // elements per word along the summed dimension
  INL static V mac(V acc, V a, V b) { return fma(a, b, acc); }
  INL static V exp2(V x) { return exp2v(x); }
};
#ifdef __AVX512BF16__
struct Bf16 {
  static constexpr int PER = 2;
  INL static V mac(V acc, V a, V b) { return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b); }
  INL static V exp2(V x) { return exp2_bf16(x); }
};
#endif

enum Init { FRESH, ACCUMULATE, RESCALE };

// C[i][j] = init + sum_k A[i * ars + k * acs] B[k * PANEL + j];  RESCALE multiplies the old C[i] by alpha[i]
template <class M, int R, int NV, int INIT>
INL void tile(const float* A, int64_t ars, int64_t acs, const float* B, float* C, int64_t ldc, int depth, const float* alpha) {
  V c[R][NV];
#pragma GCC unroll 8
  for (int i = 0; i < R; i++)
#pragma GCC unroll 2
    for (int j = 0; j < NV; j++)
      c[i][j] = INIT == FRESH ? zero() : INIT == ACCUMULATE ? load(C + i * ldc + j * VL) : mul(load(C + i * ldc + j * VL), set1(alpha[i]));
  for (int k = 0; k < depth; k++) {
    V b[NV];
#pragma GCC unroll 2
    for (int j = 0; j < NV; j++) b[j] = load(B + j * VL);
#pragma GCC unroll 8
    for (int i = 0; i < R; i++) {
      V a = set1(A[i * ars]);
#pragma GCC unroll 2
      for (int j = 0; j < NV; j++) c[i][j] = M::mac(c[i][j], a, b[j]);
    }
    A += acs, B += PANEL;
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; i++)
#pragma GCC unroll 2
    for (int j = 0; j < NV; j++) store(C + i * ldc + j * VL, c[i][j]);
}

// C[:, v0 * VL : v1 * VL] for R rows. B: panels of PANEL columns, `panel_words` apart, rows `k0 ...` of the summed dimension.
template <class M, int R, int INIT>
__attribute__((noinline)) void rows_times_panels(const float* A, int64_t ars, int64_t acs, const float* B, int64_t panel_words, float* C, int64_t ldc, int v0,
                                                 int v1, int k0, int depth, const float* alpha) {
  for (int v = v0; v < v1;) {
    const float* b = B + (v >> 1) * panel_words + (int64_t)k0 * PANEL;
    if ((v & 1) || v + 1 == v1) {
      tile<M, R, 1, INIT>(A, ars, acs, b + (v & 1) * VL, C + v * VL, ldc, depth, alpha);
      v++;
    } else {
      tile<M, R, 2, INIT>(A, ars, acs, b, C + v * VL, ldc, depth, alpha);
      v += 2;
    }
  }
}

template <class M, int INIT>
INL void gemm(int rows, const float* A, int64_t ars, int64_t acs, const float* B, int64_t panel_words, float* C, int64_t ldc, int v0, int v1, int k0, int depth,
              const float* alpha = nullptr) {
#if defined(__AVX512F__)
  if (rows > 4) return rows_times_panels<M, 8, INIT>(A, ars, acs, B, panel_words, C, ldc, v0, v1, k0, depth, alpha);
#endif
  if (rows > 2) return rows_times_panels<M, 4, INIT>(A, ars, acs, B, panel_words, C, ldc, v0, v1, k0, depth, alpha);
  if (rows > 1) return rows_times_panels<M, 2, INIT>(A, ars, acs, B, panel_words, C, ldc, v0, v1, k0, depth, alpha);
  return rows_times_panels<M, 1, INIT>(A, ars, acs, B, panel_words, C, ldc, v0, v1, k0, depth, alpha);
}

// ---- words of one tensor row -------------------------------------------------------------------------------------------------------------
// VL words starting at word w of a row of `dim` elements; zeros past the end
template <class M, class T> struct Words {
  INL static V get(const T* row, int w, int dim) { return load_as_f32(row + w, dim - w); }
};
#ifdef __AVX512BF16__
template <> struct Words<Bf16, bf16> {
  INL static V get(const bf16* row, int w, int dim) {
    int left = dim - 2 * w;
    if (left >= 32) return _mm512_castsi512_ps(_mm512_loadu_si512(row + 2 * w));
    return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16((__mmask32)((1u << left) - 1), row + 2 * w));
  }
};
#endif
template <class M> INL int words(int n) { return (n + M::PER - 1) / M::PER; }

// A operand: rows as they are, `ld` words each
template <class M, class T> void pack_rows(const T* const* rows, int n, int dim, float* dst, int64_t ld) {
  int w = words<M>(dim);
  for (int i = 0; i < n; i++)
    for (int j = 0; j < w; j += VL) store(dst + i * ld + j, Words<M, T>::get(rows[i], j, dim));  // ld is a multiple of VL
}

// B operand whose columns are the rows of the tensor (keys of Q K^T): panel p holds words [d][PANEL]. Columns n .. round_up(n, VL) become 0.
template <class M, class T> void pack_transposed(const T* const* rows, int n, int dim, float* dst) {
  int w = words<M>(dim);
  for (int c = 0; c < n; c += VL) {
    float* panel = dst + (int64_t)(c / PANEL) * w * PANEL + (c % PANEL);
    for (int d = 0; d < w; d += VL) {
      V r[VL];
      if (c + VL <= n) {
#pragma GCC unroll 16
        for (int i = 0; i < VL; i++) r[i] = Words<M, T>::get(rows[c + i], d, dim);
      } else {
        for (int i = 0; i < VL; i++) r[i] = c + i < n ? Words<M, T>::get(rows[c + i], d, dim) : zero();
      }
      transpose(r);
      if (d + VL <= w) {
#pragma GCC unroll 16
        for (int i = 0; i < VL; i++) store(panel + (d + i) * PANEL, r[i]);
      } else {
        for (int i = 0; i < w - d; i++) store(panel + (d + i) * PANEL, r[i]);
      }
    }
  }
}

// B operand whose summed dimension runs over the rows of the tensor (values of P V): panel p holds words [row / PER][PANEL].
// `capacity` rows are laid out (a multiple of PER); rows n .. round_up(n, PER) become 0. Returns true if an inf or NaN was seen.
template <class M, class T> struct PackNatural {
  static bool run(const T* const* rows, int n, int dim, int64_t capacity, float* dst) {
    V seen = zero();
    for (int d = 0; d < dim; d += VL) {
      float* panel = dst + (int64_t)(d / PANEL) * capacity * PANEL + (d % PANEL);
      for (int i = 0; i < n; i++) {
        V x = load_as_f32(rows[i] + d, dim - d);
        seen = fma(x, zero(), seen);  // 0, or NaN for ever
        store(panel + (int64_t)i * PANEL, x);
      }
    }
    float s = hsum(seen);
    return !(s == 0.0f);
  }
};
#ifdef __AVX512BF16__
template <> struct PackNatural<Bf16, bf16> {
  INL static __m512i load16(const bf16* row, int left) {
    __m256i h = left >= 16 ? _mm256_loadu_si256((const __m256i*)row) : _mm256_maskz_loadu_epi16((__mmask16)((1u << left) - 1), row);
    return _mm512_cvtepu16_epi32(h);
  }
  static bool run(const bf16* const* rows, int n, int dim, int64_t capacity, float* dst) {
    __mmask32 seen = 0;
    const __m512i exponent = _mm512_set1_epi16(0x7f80);
    for (int d = 0; d < dim; d += VL) {
      float* panel = dst + (int64_t)(d / PANEL) * (capacity / 2) * PANEL + (d % PANEL);
      for (int i = 0; i < n; i += 2) {
        __m512i x = load16(rows[i] + d, dim - d);
        if (i + 1 < n) x = _mm512_or_si512(x, _mm512_slli_epi32(load16(rows[i + 1] + d, dim - d), 16));
        seen |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(x, exponent), exponent);
        _mm512_storeu_si512(panel + (int64_t)(i / 2) * PANEL, x);
      }
    }
    return seen != 0;
  }
};
#endif
template <class M, class T> INL bool pack_natural(const T* const* rows, int n, int dim, int64_t capacity, float* dst) {
  return PackNatural<M, T>::run(rows, n, dim, capacity, dst);
}

// element (row, column) of a natural pack, as a float
template <class M> INL float natural_at(const float* pack, int64_t capacity, int row, int col) {
  const float* p = pack + (int64_t)(col / PANEL) * (capacity / M::PER) * PANEL + (int64_t)(row / M::PER) * PANEL + col % PANEL;
  if (M::PER == 1) return *p;
  uint32_t w, f;
  memcpy(&w, p, 4);
  f = row & 1 ? w & 0xffff0000u : w << 16;
  float r;
  memcpy(&r, &f, 4);
  return r;
}

// S row (fp32) -> words along the row (A operand of the next product); in place for FP32
template <class M> INL void store_words(float* row, int v, V x) { store(row + v * VL, x); }
#ifdef __AVX512BF16__
template <> INL void store_words<Bf16>(float* row, int v, V x) { _mm256_storeu_si256((__m256i*)((uint16_t*)row + v * VL), (__m256i)_mm512_cvtneps_pbh(x)); }
// words along the column: two rows interleaved
INL V pair_words(V lo, V hi) {
  __m512i a = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(lo)), b = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(hi));
  return _mm512_castsi512_ps(_mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
}
#endif

}  // namespace
