// Decode for few rows (query heads of one kv head x new tokens <= 8): keys and values are used straight from the cache, without packing.
// Scores of R rows and VL / R keys share one vector, so the online softmax of all rows is one stream of vector instructions.
// Lane i holds row (i / PER) % R and key PER * (i / (PER * R)) + i % PER of its group: with PER = 2 the bf16 probabilities of two consecutive
// keys come out as one word, ready to be broadcast into the dot product with the values.
#pragma once
#include "decode.h"

namespace {

constexpr int kDirectRows = 8, kDirectKeys = 32;

#ifdef __AVX512F__
INL V permute_xor(V x, int s) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return _mm512_permutexvar_ps(_mm512_xor_si512(lane, _mm512_set1_epi32(s)), x);
}
INL V sums(const V* a) {  // lane i = sum of a[i]
  V t[8], u[4];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    V x = a[(i >> 2) * 8 + (i & 3)], y = a[(i >> 2) * 8 + (i & 3) + 4];  // the order that the later steps turn into 0, 1, 2, ...
    t[i] = add(_mm512_shuffle_f32x4(x, y, 0x44), _mm512_shuffle_f32x4(x, y, 0xee));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) u[i] = add(_mm512_shuffle_f32x4(t[i], t[i + 4], 0x88), _mm512_shuffle_f32x4(t[i], t[i + 4], 0xdd));
  V w0 = add(_mm512_unpacklo_ps(u[0], u[1]), _mm512_unpackhi_ps(u[0], u[1])), w1 = add(_mm512_unpacklo_ps(u[2], u[3]), _mm512_unpackhi_ps(u[2], u[3]));
  __m512d d0 = _mm512_castps_pd(w0), d1 = _mm512_castps_pd(w1);
  return add(_mm512_castpd_ps(_mm512_unpacklo_pd(d0, d1)), _mm512_castpd_ps(_mm512_unpackhi_pd(d0, d1)));
}
#else
INL V permute_xor(V x, int s) {
  return _mm256_permutevar8x32_ps(x, _mm256_xor_si256(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(s)));
}
INL V sums(const V* a) {
  V x = _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3]));
  V y = _mm256_hadd_ps(_mm256_hadd_ps(a[4], a[5]), _mm256_hadd_ps(a[6], a[7]));
  return add(_mm256_permute2f128_ps(x, y, 0x20), _mm256_permute2f128_ps(x, y, 0x31));
}
#endif

template <class M, int R> INL int lane_row(int i) { return (i / M::PER) % R; }
template <class M, int R> INL int lane_key(int i) { return M::PER * (i / (M::PER * R)) + i % M::PER; }
template <class M, int R> INL V max_of_row(V x) {
#pragma GCC unroll 4
  for (int s = 1; s < VL; s *= 2)
    if (s < M::PER || s >= M::PER * R) x = max(x, permute_xor(x, s));
  return x;
}

// x[lane_key(i)] in lane i
template <class M, int R> INL V spread(const float* x) {
  int32_t key[VL];
  for (int i = 0; i < VL; i++) key[i] = lane_key<M, R>(i);
  return pick(load(x), lanes_at(key));
}

// One vector of scores: R rows with VL / R keys, times the scales of the keys where they have any
template <class M, class C, int R> INL void direct_scores(const float* q, int64_t ldq, const C* const* keys, int64_t shift, int dim, const float* scales, float* S) {
  constexpr int KG = VL / R;
  int w = words<M>(dim), whole = dim / M::PER / VL * VL;
  V acc[VL];
#pragma GCC unroll 16
  for (int i = 0; i < VL; i++) acc[i] = zero();
  for (int d = 0; d < w; d += VL) {
    V k[KG];
    if (d < whole) {
#pragma GCC unroll 16
      for (int j = 0; j < KG; j++) k[j] = Words<M, C>::get(keys[j] + shift, d, d * M::PER + VL * M::PER);
    } else {
      for (int j = 0; j < KG; j++) k[j] = Words<M, C>::get(keys[j] + shift, d, dim);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      V x = load(q + r * ldq + d);
#pragma GCC unroll 16
      for (int j = 0; j < KG; j++) {
        int lane = (j / M::PER) * M::PER * R + r * M::PER + j % M::PER;
        acc[lane] = M::mac(acc[lane], x, k[j]);
      }
    }
  }
  V score = sums(acc);
  if constexpr (Coded<C>::yes) score = mul(score, spread<M, R>(scales));
  store(S, score);
}

// O = alpha * O + P V, columns as they come
template <class M, class C, int R, int NV, bool TAIL>
INL void direct_values_tile(const float* P, const C* const* values, int64_t shift, int n, int d, int dim, float* O, int64_t ldo, const float* alpha) {
  V o[R][NV];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) o[r][j] = mul(load(O + r * ldo + d + j * VL), set1(alpha[r * M::PER]));
  for (int k = 0; k < n; k += M::PER) {
    V v[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) v[j] = ValueWords<M, C>::get(values + k, shift + d + j * VL, TAIL ? dim - d : VL);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      V p = set1(P[k / M::PER * R + r]);
#pragma GCC unroll 4
      for (int j = 0; j < NV; j++) o[r][j] = M::mac(o[r][j], p, v[j]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) store(O + r * ldo + d + j * VL, o[r][j]);
}
template <class M, class C, int R> struct DirectValues {
  INL static void run(const float* P, const C* const* values, int64_t shift, int n, int dim, float* O, int64_t ldo, const float* alpha) {
    constexpr int NV = VL == 8 ? (R <= 2 ? 4 : R <= 4 ? 2 : 1) : (R <= 4 ? 4 : 2);
    int d = 0;
    for (; d + NV * VL <= dim; d += NV * VL) direct_values_tile<M, C, R, NV, false>(P, values, shift, n, d, dim, O, ldo, alpha);
    for (; d < dim; d += VL) direct_values_tile<M, C, R, 1, true>(P, values, shift, n, d, dim, O, ldo, alpha);
  }
  INL static int column(int d) { return d; }
};

#ifdef __AVX512BF16__
// Interleaving two rows of values leaves the columns of each 32 in the order 0-3, 8-11, 16-19, 24-27, 4-7, ...; undone when the split ends.
template <int R, int NB, bool TAIL>
INL void interleaved_values_tile(const float* P, const bf16* const* values, int64_t shift, int n, int d, int dim, float* O, int64_t ldo, const float* alpha) {
  V o[R][2 * NB];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int j = 0; j < 2 * NB; j++) o[r][j] = mul(load(O + r * ldo + d + j * VL), set1(alpha[2 * r]));
  __mmask32 keep_columns = TAIL ? (__mmask32)((1ull << (dim - d)) - 1) : (__mmask32)~0u;
  for (int k = 0; k < n; k += 2) {
    V v[2 * NB];
#pragma GCC unroll 2
    for (int j = 0; j < NB; j++) {
      __m512i a = TAIL ? _mm512_maskz_loadu_epi16(keep_columns, values[k] + shift + d) : _mm512_loadu_si512(values[k] + shift + d + 32 * j);
      __m512i b = TAIL ? _mm512_maskz_loadu_epi16(keep_columns, values[k + 1] + shift + d) : _mm512_loadu_si512(values[k + 1] + shift + d + 32 * j);
      v[2 * j] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(a, b)), v[2 * j + 1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(a, b));
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      V p = set1(P[k / 2 * R + r]);
#pragma GCC unroll 4
      for (int j = 0; j < 2 * NB; j++) o[r][j] = Bf16::mac(o[r][j], p, v[j]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int j = 0; j < 2 * NB; j++) store(O + r * ldo + d + j * VL, o[r][j]);
}
template <int R> struct DirectValues<Bf16, bf16, R> {
  INL static void run(const float* P, const bf16* const* values, int64_t shift, int n, int dim, float* O, int64_t ldo, const float* alpha) {
    constexpr int NB = R <= 4 ? 2 : 1;
    int d = 0;
    for (; d + NB * 32 <= dim; d += NB * 32) interleaved_values_tile<R, NB, false>(P, values, shift, n, d, dim, O, ldo, alpha);
    for (; d + 32 <= dim; d += 32) interleaved_values_tile<R, 1, false>(P, values, shift, n, d, dim, O, ldo, alpha);
    if (d < dim) interleaved_values_tile<R, 1, true>(P, values, shift, n, d, dim, O, ldo, alpha);
  }
  INL static int column(int d) { return d / 32 * 32 + (d % 8 >= 4 ? 16 : 0) + d % 32 / 8 * 4 + d % 4; }
};
#endif

struct DirectState {  // of one kv head
  const float* q;
  float *o, *m, *l;   // m and l in lane layout
  const float *slope, *q_pos;  // lane layout, ALiBi; q_pos relative to the first query
};
struct DirectMods {
  bool active, alibi;
  float scale, softcap, c;
};

// Scores -> probabilities of one head (S in place), times the scales of the values where they have any; alpha: rescale of what came before, lane
// layout
template <class M, class C, int R> INL void direct_softmax(const DirectState& st, float* S, const DirectMods& md, const float* scales, float* alpha) {
  constexpr int KG = VL / R, NS = kDirectKeys / KG;
  V top = set1(-INFINITY);
#pragma GCC unroll 4
  for (int g = 0; g < NS; g++) top = max(top, load(S + g * VL));
  top = max_of_row<M, R>(top);
  V old = load(st.m), now = max(old, top);
  V shift = keep(below(set1(-INFINITY), now), mul(now, set1(-md.c)), zero());  // 0 while nothing was seen
  V a = exp2v(fma(old, set1(md.c), shift)), sum = zero();
#pragma GCC unroll 4
  for (int g = 0; g < NS; g++) {
    V s = load(S + g * VL), p = exp2v(fma(s, set1(md.c), shift));
    sum = add(sum, p);
    if constexpr (Coded<C>::yes) p = keep(below(s, set1(-FLT_MAX)), zero(), mul(p, spread<M, R>(scales + g * KG)));  // masked: also where the scale is NaN
    store_words<M>(S, g, p);
  }
  store(alpha, a), store(st.m, now), store(st.l, fma(load(st.l), a, sum));
}

template <int R, int KG> void direct_mods(const DirectState& st, float* S, const DirectMods& md, const float* key_offset, float k_pos) {
  for (int g = 0; g < kDirectKeys / KG; g++) {
    V s = mul(load(S + g * VL), set1(md.scale));
    if (md.softcap > 0) s = mul(tanhv(div(s, set1(md.softcap))), set1(md.softcap));
    if (md.alibi) s = sub(s, mul(load(st.slope), abs(sub(add(load(key_offset), set1(k_pos + (float)(g * KG))), load(st.q_pos)))));
    store(S + g * VL, s);
  }
}

template <class T> bool any_not_finite(const T* const* rows, int64_t shift, int n, int dim) {
  V seen = zero();
  for (int k = 0; k < n; k++)
    for (int d = 0; d < dim; d += VL) seen = fma(load_as_f32(rows[k] + shift + d, dim - d), zero(), seen);
  return !(hsum(seen) == 0.0f);
}

// Values with masked pairs left out instead of multiplied by 0
template <class M, class C, int R, class Allow>
void direct_values_carefully(const float* P, const C* const* values, int64_t shift, int n, int dim, float* O, int64_t ldo, const float* alpha, const Allow& allow) {
  for (int r = 0; r < R; r++) {
    for (int d = 0; d < ldo; d++) O[r * ldo + d] *= alpha[r * M::PER];
    for (int k = 0; k < n; k++) {
      if (!allow(r, k)) continue;
      float p = P[k / M::PER * R + r], x[VL];
      if (M::PER == 2) {
        uint32_t w;
        memcpy(&w, P + k / 2 * R + r, 4);
        w = k & 1 ? w & 0xffff0000u : w << 16;
        memcpy(&p, &w, 4);
      }
      for (int d = 0; d < dim; d++) {
        store(x, load_as_f32(values[k] + shift + d, 1));
        O[r * ldo + DirectValues<M, C, R>::column(d)] += p * x[0];
      }
    }
  }
}

struct DirectScratch {
  float *q, *o, *m, *l, *slope, *q_pos, *zeros, *s, *alpha, *k_scale, *v_scale;
  int64_t ldq, ldo;
  size_t bytes;
  template <class M> static DirectScratch plan(const DecodePlan* p, char* base) {
    DirectScratch f;
    Arena a = {base, 0};
    int64_t nh = p->heads_per_task;
    f.ldq = round_up(words<M>((int)p->a->dim), VL), f.ldo = round_up(p->a->dim_v, 32);
    f.q = a.floats(nh * kDirectRows * f.ldq), f.o = a.floats(nh * kDirectRows * f.ldo);
    f.m = a.floats(nh * VL), f.l = a.floats(nh * VL), f.slope = a.floats(nh * VL), f.q_pos = a.floats(VL);
    f.zeros = a.floats(round_up(p->a->dim > p->a->dim_v ? p->a->dim : p->a->dim_v, 64));
    f.s = a.floats(nh * kDirectKeys * kDirectRows), f.alpha = a.floats(nh * VL);
    f.k_scale = f.v_scale = nullptr;
    if (p->a->kv_dtype) f.k_scale = a.floats(nh * kDirectKeys + VL), f.v_scale = a.floats(nh * kDirectKeys + VL);
    f.bytes = a.used;
    return f;
  }
};

// Row r of a kv head is query head r / q_len of its group and new token r % q_len.
template <class M, class C, int R> void load_direct_rows(const DecodePlan* p, const DirectScratch& f, int64_t b, int64_t h0, int nh) {
  const AttlasDecode* a = p->a;
  int64_t group = a->heads / a->kv_heads;
  memset(f.q, 0, nh * R * f.ldq * 4), memset(f.o, 0, nh * R * f.ldo * 4), memset(f.l, 0, nh * VL * 4);
  memset(f.zeros, 0, round_up(a->dim > a->dim_v ? a->dim : a->dim_v, 64) * 4);
  for (int h = 0; h < nh; h++) {
    for (int r = 0; r < p->rows; r++) pack_query<M, C>(a, b, r % a->q_len, (h0 + h) * group + r / a->q_len, f.q + (h * R + r) * f.ldq, f.ldq);
    for (int i = 0; i < VL; i++) {
      int r = lane_row<M, R>(i);
      f.m[h * VL + i] = -INFINITY, f.q_pos[i] = (float)(r % a->q_len);
      f.slope[h * VL + i] = a->alibi && r < p->rows ? a->alibi[(h0 + h) * group + r / a->q_len] : 0.0f;
    }
  }
}

template <class M, class C, int R> void write_direct_rows(const DecodePlan* p, const DirectScratch& f, int64_t b, int64_t h0, int nh, int64_t split, float c) {
  const AttlasDecode* a = p->a;
  int64_t group = a->heads / a->kv_heads;
  for (int h = 0; h < nh; h++)
    for (int r = 0; r < p->rows; r++) {
      float* dst = partial_at(p, (b * a->q_len + r % a->q_len) * a->heads + (h0 + h) * group + r / a->q_len, split);
      const float* o = f.o + (h * R + r) * f.ldo;
      for (int d = 0; d < p->dim_v_padded; d++) dst[d] = o[DirectValues<M, C, R>::column(d)];
      float sum = 0.0f, m = f.m[h * VL + r * M::PER];
      for (int i = 0; i < VL; i++)
        if (lane_row<M, R>(i) == r) sum += f.l[h * VL + i];
      dst[p->dim_v_padded] = m == -INFINITY ? m : m * c, dst[p->dim_v_padded + 1] = sum;
    }
}

template <class T> INL void fetch_rows(const T* const* rows, int n, int64_t shift, int64_t dim) {
  for (int i = 0; i < n; i++)
    for (int64_t x = 0; x < dim * (int64_t)sizeof(T); x += 64) _mm_prefetch((const char*)(rows[i] + shift) + x, _MM_HINT_T1);
}

INL void fetch_scales(const AttlasDecode* a, const float* base, const AttlasStride& s, int64_t b, int64_t k0, int n, int64_t h0) {
  const float* rows[kDirectKeys];
  gather_cache<float>(rows, a, base, s, b, k0, n, h0);
  for (int i = 0; i < n; i++) _mm_prefetch((const char*)rows[i], _MM_HINT_T1);
}

template <class M, class C, int R> void decode_direct_rows(const DecodePlan* p, int64_t b, int64_t split, int64_t h0, int nh, char* scratch) {
  const AttlasDecode* a = p->a;
  Visible see = visible_of(a, b);
  DirectScratch f = DirectScratch::plan<M>(p, scratch);
  load_direct_rows<M, C, R>(p, f, b, h0, nh);
  DirectMods md;
  md.alibi = a->alibi != nullptr, md.scale = (float)a->scale, md.softcap = (float)a->softcap;
  md.active = md.alibi || md.softcap > 0 || !(md.scale > 0);
  md.c = md.active ? kLog2e : (float)(a->scale * 1.4426950408889634);
  int64_t begin = split * a->split, stop = begin + a->split < see.length ? begin + a->split : see.length;
  int64_t range[2][2] = {{begin, begin}, {begin, stop}};  // keys of the sinks, keys of the window
  int64_t low = see.low(0), high = see.high(a->q_len - 1);
  if (high < stop) range[1][1] = stop = high;
  if (low > begin) {
    range[1][0] = low;
    range[0][1] = see.sinks < low ? see.sinks : low;
    if (range[0][1] > stop) range[0][1] = stop;
  }
  constexpr int KG = VL / R, NS = kDirectKeys / KG, VALUES_AT_ONCE = Coded<C>::yes ? 32 : 8;
  float key_offset[VL], ones[VL];
  for (int i = 0; i < VL; i++) key_offset[i] = (float)lane_key<M, R>(i), ones[i] = 1.0f;
  const C *k[kDirectKeys], *v[kDirectKeys], *next[kDirectKeys];
  for (int part = 0; part < 2; part++)
    for (int64_t k0 = range[part][0], end = range[part][1]; k0 < end; k0 += kDirectKeys) {
      int n = (int)(end - k0 < kDirectKeys ? end - k0 : kDirectKeys);
      gather_cache<C>(k, a, a->k, a->sk, b, k0, n, h0);
      gather_cache<C>(v, a, a->v, a->sv, b, k0, n, h0);
      int64_t after = end - k0 - n;  // a core has few outstanding misses, so fetching ahead is spread over the arithmetic: values of
      int ahead = (int)(after < kDirectKeys ? after : kDirectKeys);  // this chunk during the scores, the next keys during the values
      gather_cache<C>(next, a, a->k, a->sk, b, k0 + n, ahead, h0);
      if constexpr (Coded<C>::yes) {
        gather_scales<C, kDirectKeys>(f.k_scale, a, a->k_scale, a->sks, b, k0, n, h0, nh), fetch_scales(a, a->k_scale, a->sks, b, k0 + n, ahead, h0);
        gather_scales<C, kDirectKeys>(f.v_scale, a, a->v_scale, a->svs, b, k0, n, h0, nh), fetch_scales(a, a->v_scale, a->svs, b, k0 + n, ahead, h0);
      }
      bool masked = (see.causal && k0 + n > see.high(0)) || (see.low(a->q_len - 1) > k0 && k0 + n > see.sinks);
      auto allow = [&](int r, int key) {
        int64_t t = r % a->q_len, x = k0 + key;
        return x < see.high(t) && (x >= see.low(t) || x < see.sinks);
      };
      // Few keys at a time, all heads of each: rows are read to their end, in the order in which they lie in memory, which is what
      // the hardware prefetchers follow.
      for (int g = 0; g < NS; g++) {
        const C* rows[KG];
        if (g * KG + KG <= n) {
          for (int h = 0; h < nh; h++) {
            fetch_rows(v + g * KG, KG, h * a->sv.head, a->dim_v);
            direct_scores<M, C, R>(f.q + h * R * f.ldq, f.ldq, k + g * KG, h * a->sk.head, (int)a->dim, f.k_scale + h * kDirectKeys + g * KG, f.s + (h * NS + g) * VL);
          }
          continue;
        }
        for (int h = 0; h < nh; h++) {
          for (int j = 0; j < KG; j++) rows[j] = g * KG + j < n ? k[g * KG + j] + h * a->sk.head : (const C*)f.zeros;
          direct_scores<M, C, R>(f.q + h * R * f.ldq, f.ldq, rows, 0, (int)a->dim, f.k_scale + h * kDirectKeys + g * KG, f.s + (h * NS + g) * VL);
        }
      }
      bool bad = false;
      for (int h = 0; h < nh; h++) {
        DirectState st = {f.q + h * R * f.ldq, f.o + h * R * f.ldo, f.m + h * VL, f.l + h * VL, f.slope + h * VL, f.q_pos};
        float* S = f.s + h * NS * VL;
        if (__builtin_expect(md.active, 0)) direct_mods<R, KG>(st, S, md, key_offset, (float)(k0 - see.first_query));
        if (masked || n < kDirectKeys)
          for (int i = 0; i < NS * VL; i++) {
            int key = i / VL * KG + lane_key<M, R>(i % VL);
            if (key >= n || (masked && !allow(lane_row<M, R>(i % VL), key))) S[i] = -INFINITY;
          }
        if (masked && !Coded<C>::yes) bad |= any_not_finite(v, h * a->sv.head, n, (int)a->dim_v);
        direct_softmax<M, C, R>(st, S, md, f.v_scale + h * kDirectKeys, f.alpha + h * VL);
      }
      if (__builtin_expect(bad, 0)) {
        for (int h = 0; h < nh; h++)
          direct_values_carefully<M, C, R>(f.s + h * NS * VL, v, h * a->sv.head, n, (int)a->dim_v, f.o + h * R * f.ldo, f.ldo, f.alpha + h * VL, allow);
        continue;
      }
      for (int j = 0; j < n; j += VALUES_AT_ONCE)
        for (int h = 0; h < nh; h++) {
          int m = n - j < VALUES_AT_ONCE ? n - j : VALUES_AT_ONCE;
          const C* const* rows = v + j;
          const C* filled[VALUES_AT_ONCE];
          int64_t shift = h * a->sv.head;
          if (j < ahead) fetch_rows(next + j, ahead - j < VALUES_AT_ONCE ? ahead - j : VALUES_AT_ONCE, h * a->sk.head, a->dim);
          if (m % M::PER) {  // bf16 values come in pairs
            for (int i = 0; i < m; i++) filled[i] = v[j + i] + shift;
            filled[m++] = (const C*)f.zeros, rows = filled, shift = 0;
          }
          DirectValues<M, C, R>::run(f.s + h * NS * VL + j / M::PER * R, rows, shift, m, (int)a->dim_v, f.o + h * R * f.ldo, f.ldo, j ? ones : f.alpha + h * VL);
        }
    }
  write_direct_rows<M, C, R>(p, f, b, h0, nh, split, md.c);
}

template <class M, class C> void decode_task(const DecodePlan* p, int64_t task, char* scratch) {
  const AttlasDecode* a = p->a;
  int64_t hb = task % p->head_tasks, split = task / p->head_tasks % p->max_splits, b = task / p->head_tasks / p->max_splits;
  int64_t h0 = hb * p->heads_per_task;
  int nh = (int)(a->kv_heads - h0 < p->heads_per_task ? a->kv_heads - h0 : p->heads_per_task);
  if (split * a->split >= a->lengths[b]) return;  // the merge looks only at splits that exist
  if (p->rows > kDirectRows) return decode_packed_rows<M, C>(p, b, split, h0, nh, scratch);
  if (p->rows > 4) return decode_direct_rows<M, C, 8>(p, b, split, h0, nh, scratch);
  if (p->rows > 2) return decode_direct_rows<M, C, 4>(p, b, split, h0, nh, scratch);
  if (p->rows > 1) return decode_direct_rows<M, C, 2>(p, b, split, h0, nh, scratch);
  decode_direct_rows<M, C, 1>(p, b, split, h0, nh, scratch);
}

}  // namespace
