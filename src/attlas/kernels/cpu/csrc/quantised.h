// 8-bit keys and values with one fp32 scale for each token and head, widened as they are read. A score is scaled once per key, a probability
// once per value, so that the numbers themselves are multiplied as the small integers (or 8-bit floats) that they are.
#pragma once
#include <float.h>

#include "codes.h"
#include "forward.h"

namespace {

template <class C> struct Coded {
  static constexpr bool yes = false;
};
template <> struct Coded<i8> {
  static constexpr bool yes = true;
  static constexpr float unit = 1.0f;
};
template <> struct Coded<e4m3> {
  static constexpr bool yes = true;
  static constexpr float unit = 256.0f;  // of_half reads the bits as those of an fp16, whose bias is 15
};

#ifdef __AVX512F__
INL V of_half(const i8* p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p))); }
INL V of_half(const e4m3* p) {
  __m256i x = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)), 7);
  return _mm512_cvtph_ps(_mm256_and_si256(x, _mm256_set1_epi16((short)0xbf80)));
}
typedef __m512i Lanes;
INL Lanes lanes_at(const int32_t* p) { return _mm512_loadu_si512(p); }
INL V pick(V x, Lanes lanes) { return _mm512_permutexvar_ps(lanes, x); }
#else
INL V of_half(const i8* p) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))); }
INL V of_half(const e4m3* p) {
  __m128i x = _mm_slli_epi16(_mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i*)p)), 7);
  return _mm256_cvtph_ps(_mm_and_si128(x, _mm_set1_epi16((short)0xbf80)));
}
typedef __m256i Lanes;
INL Lanes lanes_at(const int32_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
INL V pick(V x, Lanes lanes) { return _mm256_permutevar8x32_ps(x, lanes); }
#endif
INL V load_as_f32(const i8* p) { return of_half(p); }
INL V load_as_f32(const e4m3* p) { return of_half(p); }

#ifdef __AVX512BF16__
// Both kinds of numbers are exact in bf16.
template <class C> INL V coded_words(const C* row, int w, int dim) {
  int left = dim - 2 * w;
  V low = load_as_f32(row + 2 * w, left), high = left > VL ? load_as_f32(row + 2 * w + VL, left - VL) : zero();
  return _mm512_castsi512_ps((__m512i)_mm512_cvtne2ps_pbh(high, low));
}
template <> struct Words<Bf16, i8> {
  INL static V get(const i8* row, int w, int dim) { return coded_words(row, w, dim); }
};
template <> struct Words<Bf16, e4m3> {
  INL static V get(const e4m3* row, int w, int dim) { return coded_words(row, w, dim); }
};
#endif

// One query, ready for products with keys. C: what the cache holds, which is the dtype of the query where it is not 8-bit.
template <class M, class C> INL void pack_query(const AttlasDecode* a, int64_t b, int64_t t, int64_t head, float* dst, int64_t ld) {
  int64_t at = b * a->sq.batch + t * a->sq.row + head * a->sq.head;
  auto pack = [&](auto* q) { pack_rows<M>(&q, 1, (int)a->dim, dst, ld); };
  if constexpr (!Coded<C>::yes)
    pack((const C*)a->q + at);
  else if (M::PER == 2 || a->dtype == ATTLAS_BF16)
    pack((const bf16*)a->q + at);
  else if constexpr (M::PER == 1)
    a->dtype == ATTLAS_F16 ? pack((const f16*)a->q + at) : pack((const float*)a->q + at);
}

// VL words of the values of PER keys that follow each other, in the order of the columns
template <class M, class C> struct ValueWords {
  INL static V get(const C* const* rows, int64_t at, int left) { return load_as_f32(rows[0] + at, left); }
};
#ifdef __AVX512BF16__
template <class C> struct ValueWords<Bf16, C> {
  INL static V get(const C* const* rows, int64_t at, int left) {  // the lower half of the fp32 form is zero
    __m512i a = _mm512_castps_si512(load_as_f32(rows[0] + at, left)), b = _mm512_castps_si512(load_as_f32(rows[1] + at, left));
    return _mm512_castsi512_ps(_mm512_or_si512(_mm512_srli_epi32(a, 16), b));
  }
};
#endif

// n rows of `dim` numbers times their scales, into dst [n, dim rounded up to whole vectors]; rows[i] points to them afterwards
template <class E, class C>
void widen_rows(const C* const* codes, const float* scales, int n, int dim, E* dst, const E** rows) {
  int64_t ld = round_up(dim, VL);
  for (int i = 0; i < n; i++) {
    V scale = set1(scales[i]);
    for (int d = 0; d < dim; d += VL) store_from_f32(dst + i * ld + d, mul(load_as_f32(codes[i] + d, dim - d), scale), VL);
    rows[i] = dst + i * ld;
  }
}

}  // namespace
