// Thin names over AVX-512 / AVX2. Included once per instruction set; everything lives in an anonymous namespace so that no inline function
// compiled for a wide machine can be picked by the linker for a narrow one (for the same reason no C++ library header is used here).
#pragma once
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#define INL __attribute__((always_inline)) inline

namespace {

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

constexpr float kLog2e = 1.44269504088896340736f, kLn2 = 0.69314718055994530942f;

// 2^f on [0, 1) with p(0) = 1 exactly: weighted minimax fit of degree 6, relative error 2e-9 before rounding
#define EXP2_C6 2.16129160e-4f
#define EXP2_C5 1.24678461e-3f
#define EXP2_C4 9.67545161e-3f
#define EXP2_C3 5.54852806e-2f
#define EXP2_C2 2.40229306e-1f
#define EXP2_C1 6.93147044e-1f

#ifdef __AVX512F__
constexpr int VL = 16, MR = 8;
typedef __m512 V;
typedef __m512i VI;
typedef __mmask16 VM;
INL V zero() { return _mm512_setzero_ps(); }
INL V set1(float x) { return _mm512_set1_ps(x); }
INL V load(const float* p) { return _mm512_loadu_ps(p); }
INL void store(float* p, V x) { _mm512_storeu_ps(p, x); }
INL V add(V a, V b) { return _mm512_add_ps(a, b); }
INL V sub(V a, V b) { return _mm512_sub_ps(a, b); }
INL V mul(V a, V b) { return _mm512_mul_ps(a, b); }
INL V div(V a, V b) { return _mm512_div_ps(a, b); }
INL V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
INL V max(V a, V b) { return _mm512_max_ps(a, b); }  // NaN in either: b
INL V abs(V a) { return _mm512_abs_ps(a); }
INL float hmax(V a) { return _mm512_reduce_max_ps(a); }
INL float hsum(V a) { return _mm512_reduce_add_ps(a); }
INL VM mask_of_bits(uint32_t bits) { return (VM)bits; }
INL V keep(VM m, V a, V other) { return _mm512_mask_blend_ps(m, other, a); }  // m ? a : other
INL VM below(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
INL V load_n(const float* p, int n) { return _mm512_maskz_loadu_ps((VM)((1u << n) - 1), p); }
INL void store_n(float* p, V x, int n) { _mm512_mask_storeu_ps(p, (VM)((1u << n) - 1), x); }
INL V int_diff(const int32_t* p, int32_t x, int n) {  // float(p[i] - x)
  return _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_maskz_loadu_epi32((VM)(n >= 16 ? 0xffff : (1u << n) - 1), p), _mm512_set1_epi32(x)));
}
INL V of_half(const bf16* p) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16)); }
INL V of_half(const f16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
INL void to_half(bf16* p, V x) {  // round to nearest even, NaN kept
  __m512i u = _mm512_castps_si512(x);
  __m512i r = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1)));
  r = _mm512_mask_or_epi32(r, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), u, _mm512_set1_epi32(0x400000));
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16)));
}
INL void to_half(f16* p, V x) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }
INL V exp2v(V x) {  // any x <= about 126; NaN stays NaN; below 2^-149: 0
  x = _mm512_max_ps(set1(-200.0f), x);
  V f = _mm512_sub_ps(x, _mm512_roundscale_ps(x, 0x09));  // x - floor(x)
  V p = fma(set1(EXP2_C6), f, set1(EXP2_C5));
  p = fma(p, f, set1(EXP2_C4));
  p = fma(p, f, set1(EXP2_C3));
  p = fma(p, f, set1(EXP2_C2));
  p = fma(p, f, set1(EXP2_C1));
  p = fma(p, f, set1(1.0f));
  return _mm512_scalef_ps(p, x);
}
INL V exp2_bf16(V x) {  // for results that are rounded to bf16: degree 4, relative error 3e-06
  x = _mm512_max_ps(set1(-200.0f), x);
  V f = _mm512_sub_ps(x, _mm512_roundscale_ps(x, 0x09));
  V p = fma(set1(1.34266852e-02f), f, set1(5.22424722e-02f));
  p = fma(p, f, set1(2.41280206e-01f));
  p = fma(p, f, set1(6.93044845e-01f));
  p = fma(p, f, set1(1.0f));
  return _mm512_scalef_ps(p, x);
}
INL void transpose(V* r) {
  V t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 8; i++) t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]), t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
#define PD(x) _mm512_castps_pd(x)
    r[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(PD(t[4 * i]), PD(t[4 * i + 2])));
    r[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(PD(t[4 * i]), PD(t[4 * i + 2])));
    r[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(PD(t[4 * i + 1]), PD(t[4 * i + 3])));
    r[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(PD(t[4 * i + 1]), PD(t[4 * i + 3])));
#undef PD
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[4 + i], 0x88), t[4 + i] = _mm512_shuffle_f32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0x88), t[12 + i] = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    r[i] = _mm512_shuffle_f32x4(t[i], t[8 + i], 0x88), r[8 + i] = _mm512_shuffle_f32x4(t[i], t[8 + i], 0xdd);
    r[4 + i] = _mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0x88), r[12 + i] = _mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0xdd);
  }
}
#else
constexpr int VL = 8, MR = 4;
typedef __m256 V;
typedef __m256i VI;
typedef __m256 VM;
INL V zero() { return _mm256_setzero_ps(); }
INL V set1(float x) { return _mm256_set1_ps(x); }
INL V load(const float* p) { return _mm256_loadu_ps(p); }
INL void store(float* p, V x) { _mm256_storeu_ps(p, x); }
INL V add(V a, V b) { return _mm256_add_ps(a, b); }
INL V sub(V a, V b) { return _mm256_sub_ps(a, b); }
INL V mul(V a, V b) { return _mm256_mul_ps(a, b); }
INL V div(V a, V b) { return _mm256_div_ps(a, b); }
INL V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
INL V max(V a, V b) { return _mm256_max_ps(a, b); }
INL V abs(V a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
INL float hmax(V a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
}
INL float hsum(V a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
}
INL VM mask_of_bits(uint32_t bits) {
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32((int)bits), lane), lane));
}
INL V keep(VM m, V a, V other) { return _mm256_blendv_ps(other, a, m); }
INL VM below(V a, V b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
INL __m256i lanes_n(int n) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }
INL V load_n(const float* p, int n) { return _mm256_maskload_ps(p, lanes_n(n)); }
INL void store_n(float* p, V x, int n) { _mm256_maskstore_ps(p, lanes_n(n), x); }
INL V int_diff(const int32_t* p, int32_t x, int n) {
  return _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_maskload_epi32(p, lanes_n(n)), _mm256_set1_epi32(x)));
}
INL V of_half(const bf16* p) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16)); }
INL V of_half(const f16* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
INL void to_half(bf16* p, V x) {
  __m256i u = _mm256_castps_si256(x);
  __m256i r = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1)));
  __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  r = _mm256_blendv_epi8(r, _mm256_or_si256(u, _mm256_set1_epi32(0x400000)), nan);
  r = _mm256_srli_epi32(r, 16);
  _mm_storeu_si128((__m128i*)p, _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1)));
}
INL void to_half(f16* p, V x) { _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }
INL V exp2v(V x) {
  VM tiny = below(x, set1(-126.0f));
  x = _mm256_max_ps(set1(-126.0f), x);
  V r = _mm256_floor_ps(x), f = sub(x, r);
  V p = fma(set1(EXP2_C6), f, set1(EXP2_C5));
  p = fma(p, f, set1(EXP2_C4));
  p = fma(p, f, set1(EXP2_C3));
  p = fma(p, f, set1(EXP2_C2));
  p = fma(p, f, set1(EXP2_C1));
  p = fma(p, f, set1(1.0f));
  V s = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(r), _mm256_set1_epi32(127)), 23));
  return _mm256_andnot_ps(tiny, _mm256_blendv_ps(mul(p, s), x, _mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
}
INL void transpose(V* r) {
  V t[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]), t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++) {
    r[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44), r[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    r[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44), r[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    t[i] = _mm256_permute2f128_ps(r[i], r[4 + i], 0x20), t[4 + i] = _mm256_permute2f128_ps(r[i], r[4 + i], 0x31);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) r[i] = t[i];
}
#endif

constexpr int PANEL = 2 * VL;  // columns of one packed panel

INL V load_as_f32(const float* p) { return load(p); }
INL V load_as_f32(const bf16* p) { return of_half(p); }
INL V load_as_f32(const f16* p) { return of_half(p); }
INL V load_as_f32(const float* p, int n) { return n >= VL ? load(p) : load_n(p, n); }
template <class T> INL V load_as_f32(const T* p, int n) {
  if (n >= VL) return of_half(p);
  T t[VL];
  memset(t, 0, sizeof t);
  memcpy(t, p, n * sizeof(T));
  return of_half(t);
}
INL void store_from_f32(float* p, V x, int n) { n >= VL ? store(p, x) : store_n(p, x, n); }
template <class T> INL void store_from_f32(T* p, V x, int n) {
  if (n >= VL) return to_half(p, x);
  T t[VL];
  to_half(t, x);
  memcpy(p, t, n * sizeof(T));
}
INL int imin(int a, int b) { return a < b ? a : b; }
INL int imax(int a, int b) { return a > b ? a : b; }
INL int64_t round_up(int64_t x, int64_t m) { return (x + m - 1) / m * m; }

// tanh with small relative error near 0 (odd polynomial) and 1 - 2 / (e^2x + 1) further out
INL V tanhv(V x) {
  V a = abs(x), z = mul(x, x);
  V p = fma(set1(-5.70498872745e-3f), z, set1(2.06390887954e-2f));
  p = fma(p, z, set1(-5.37397155531e-2f));
  p = fma(p, z, set1(1.33314422036e-1f));
  p = fma(p, z, set1(-3.33332819422e-1f));
  V small = fma(mul(p, z), x, x);
  V capped = sub(zero(), max(set1(-20.0f), sub(zero(), a)));  // min(a, 20), NaN kept
  V e = exp2v(mul(capped, set1(2.0f * kLog2e)));
  V big = sub(set1(1.0f), div(set1(2.0f), add(e, set1(1.0f))));
  big = keep(below(x, zero()), sub(zero(), big), big);
  return keep(below(a, set1(0.625f)), small, big);
}

}  // namespace
