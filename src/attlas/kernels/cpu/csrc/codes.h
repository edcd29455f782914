// 8-bit numbers with one fp32 scale for each token and head, and how they are made.
#pragma once
#include <float.h>

#include "api.h"
#include "simd.h"

namespace {

struct i8 { int8_t bits; };
struct e4m3 { uint8_t bits; };  // 4 bits of exponent (bias 7), 3 of mantissa; 448 is the largest

// Codes of x, |x| <= top: to the nearest, ties to even
INL void encode(i8* code, float x) { code->bits = (int8_t)__builtin_rintf(x); }
INL void encode(e4m3* code, float x) {
  uint32_t u, sign;
  memcpy(&u, &x, 4);
  sign = u >> 24 & 0x80, u &= 0x7fffffff;
  float small, shift = 16384.0f;  // its last bit is worth the smallest step, 2^-9
  memcpy(&small, &u, 4);
  small += shift;
  uint32_t s, normal = (u + (uint32_t)((7 - 127) * (1 << 23)) + 0x7ffff + (u >> 20 & 1)) >> 20;
  memcpy(&s, &small, 4);
  code->bits = (uint8_t)(sign | (u < (121u << 23) ? s - (141u << 23) : normal));
}

// scale = max |x| / top, code = x / scale; a scale of NaN where a number is not finite
template <class C, class T> void put_codes(C* codes, float* scale, const T* x, int64_t dim, float top) {
  float wide[ATTLAS_MAX_DIM + VL];
  V most = zero(), seen = zero();
  for (int64_t d = 0; d < dim; d += VL) {
    V t = load_as_f32(x + d, dim - d < VL ? (int)(dim - d) : VL);
    most = max(abs(t), most), seen = fma(t, zero(), seen);
    store(wide + d, t);
  }
  float factor = hmax(most) / top, unit = factor > FLT_MIN ? factor : FLT_MIN;
  bool finite = hsum(seen) == 0.0f;
  *scale = finite ? factor : NAN;
  for (int64_t d = 0; d < dim; d++) {
    float y = finite ? wide[d] / unit : 0.0f;
    encode(codes + d, y > top ? top : y < -top ? -top : y);
  }
}

}  // namespace
