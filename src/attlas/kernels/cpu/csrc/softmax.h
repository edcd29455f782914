// Scores of one row group: modifications, masking, online softmax, and the product with the values.
#pragma once
#include "gemm.h"

namespace {

struct ScoreMods {
  float scale, softcap, slope;
  int count;
  int64_t ops[ATTLAS_MAX_MODS];
  const float* bias;  // of this batch row and head
  int64_t bias_row;
  const int32_t *q_pos, *k_pos;
  const float* row_slopes = nullptr;  // ALiBi slope of each row, when the rows belong to different heads
  INL bool active() const { return count > 0 || !(scale > 0.0f); }
};

// A bit per key: row r of the group is bits + r * stride. bits == nullptr: every key of [first, last) is allowed, which then are whole vectors.
struct Allowed {
  int first, last;
  const uint8_t* bits;
  int64_t stride;
  INL uint32_t vec(int r, int v) const {
    const uint8_t* p = bits + r * stride;
    if (VL == 8) return p[v];
    uint16_t w;
    memcpy(&w, p + 2 * v, 2);
    return w;
  }
  INL bool key(int r, int j) const { return bits[r * stride + (j >> 3)] >> (j & 7) & 1; }
};

const uint8_t* tail_bits(uint8_t* buffer, int n, int block) {
  for (int i = 0; i < block / 8; i++) buffer[i] = n >= 8 * i + 8 ? 0xff : n <= 8 * i ? 0 : (uint8_t)((1 << (n - 8 * i)) - 1);
  return buffer;
}

// Hull of the allowed keys of `rows` rows of a tile; drops the bits when all of the hull is allowed on whole vectors.
Allowed allowed_in_tile(const uint8_t* tile, int rows, int block) {
  uint64_t any[4] = {0, 0, 0, 0}, all[4] = {~0ull, ~0ull, ~0ull, ~0ull};
  int64_t bytes = block / 8;
  for (int r = 0; r < rows; r++) {
    uint64_t w[4] = {0, 0, 0, 0};
    memcpy(w, tile + r * bytes, bytes);
    for (int i = 0; i < 4; i++) any[i] |= w[i], all[i] &= w[i];
  }
  Allowed a = {0, 0, tile, bytes};
  int first = -1, last = 0;
  for (int i = 0; i < 4; i++)
    if (any[i]) {
      if (first < 0) first = 64 * i + __builtin_ctzll(any[i]);
      last = 64 * i + 64 - __builtin_clzll(any[i]);
    }
  if (first < 0) return a;
  a.first = first, a.last = last;
  bool whole = first % VL == 0 && last % VL == 0;
  for (int j = first; whole && j < last; j += VL) whole = (all[j / 64] >> (j % 64) & (VL == 16 ? 0xffffull : 0xffull)) == (VL == 16 ? 0xffffull : 0xffull);
  if (whole) a.bits = nullptr;
  return a;
}

// S := modifications(scale * S) in natural units; factor (same layout) receives d S_out / d S_in of the softcap (1 without one)
void apply_mods(float* S, int64_t lds, int rows, int v0, int v1, int q0, int k0, int n, const ScoreMods& md, float* factor) {
  for (int r = 0; r < rows; r++)
    for (int v = v0; v < v1; v++) {
      int left = imin(n - v * VL, VL);
      V s = mul(load(S + r * lds + v * VL), set1(md.scale)), f = set1(1.0f);
      for (int i = 0; i < md.count; i++) {
        if (md.ops[i] == ATTLAS_MOD_ALIBI) {
          float slope = md.row_slopes ? md.row_slopes[q0 + r] : md.slope;
          s = sub(s, mul(set1(slope), abs(int_diff(md.k_pos + k0 + v * VL, md.q_pos[q0 + r], left))));
        } else if (md.ops[i] == ATTLAS_MOD_BIAS) {
          s = add(s, load_as_f32(md.bias + (q0 + r) * md.bias_row + k0 + v * VL, left));
        } else {
          V t = tanhv(div(s, set1(md.softcap)));
          s = mul(t, set1(md.softcap));
          f = mul(f, sub(set1(1.0f), mul(t, t)));
        }
      }
      store(S + r * lds + v * VL, s);
      if (factor) store(factor + r * lds + v * VL, f);
    }
}

// S -> P = 2^(c S - running max) as words; m (raw scores), l (VL partial sums a row) and alpha (rescale of what came before) are updated.
template <class M, bool MASKED>
INL void softmax_rows(float* S, int64_t lds, int rows, int v0, int v1, const Allowed& ok, float c, float* m, float* l, float* alpha) {
  const V lowest = set1(-INFINITY);
  float shift[16], before[16];
  for (int i = 0; i < 16; i++) shift[i] = 0.0f, before[i] = 0.0f;
  for (int r = 0; r < rows; r++) {
    const float* s = S + r * lds;
    V top = lowest;
    for (int v = v0; v < v1; v++) {
      V x = load(s + v * VL);
      if (MASKED) x = keep(mask_of_bits(ok.vec(r, v)), x, lowest);
      top = max(top, x);
    }
    float old = m[r], now = hmax(top);
    now = now > old ? now : (now != now ? now : old);
    m[r] = now;
    shift[r] = now == -INFINITY ? 0.0f : now * c;
    before[r] = old * c;
  }
  for (int i = 0; i < MR; i += VL) store(alpha + i, exp2v(sub(load(before + i), load(shift + i))));
  for (int r = 0; r < rows; r++) {
    float* s = S + r * lds;
    V sum = zero(), neg = set1(-shift[r]), cc = set1(c);
    for (int v = v0; v < v1; v++) {
      V x = load(s + v * VL);
      if (MASKED) x = keep(mask_of_bits(ok.vec(r, v)), x, lowest);
      x = M::exp2(fma(x, cc, neg));
      sum = add(sum, x);
      store_words<M>(s, v, x);
    }
    store(l + r * VL, fma(load(l + r * VL), set1(alpha[r]), sum));
  }
}

// Packed keys and values of one block of keys.
struct KeyBlock {
  const float *k, *v;
  int dim_words, dim_v_vecs;
  int64_t k_panel, v_panel, capacity;  // words from panel to panel; rows laid out in v
  int k0, n;
  bool v_bad;  // a value is inf or NaN: products with masked keys must be skipped, not multiplied by 0
};
struct Rows {
  const float* q;
  int64_t ldq;
  float* o;
  int64_t ldo;
  float *m, *l;
};

template <class M>
void add_values_carefully(const float* P, int64_t lds, int rows, const Allowed& ok, const KeyBlock& kb, float* O, int64_t ldo, const float* alpha) {
  for (int r = 0; r < rows; r++) {
    float* o = O + r * ldo;
    for (int d = 0; d < kb.dim_v_vecs * VL; d++) o[d] *= alpha[r];
    for (int j = ok.first; j < ok.last; j++) {
      if (!ok.key(r, j)) continue;
      float p = P[r * lds + j];
      if (M::PER == 2) {
        uint16_t h;
        memcpy(&h, (const uint16_t*)(P + r * lds) + j, 2);
        uint32_t w = (uint32_t)h << 16;
        memcpy(&p, &w, 4);
      }
      for (int d = 0; d < kb.dim_v_vecs * VL; d++) o[d] += p * natural_at<M>(kb.v, kb.capacity, j, d);
    }
  }
}

// Rows [r0, r0 + rows) of `st` against one block of keys. q0: array index of row r0 (for the score modifications).
template <class M>
INL void attend_group(const KeyBlock& kb, const Rows& st, int r0, int rows, const Allowed& ok, float c, const ScoreMods& md, int q0, float* S, int64_t lds,
                      float* alpha) {
  int v0 = ok.first / VL, v1 = (ok.last + VL - 1) / VL;
  gemm<M, FRESH>(rows, st.q + r0 * st.ldq, st.ldq, 1, kb.k, kb.k_panel, S, lds, v0, v1, 0, kb.dim_words);
  if (__builtin_expect(md.active(), 0)) apply_mods(S, lds, rows, v0, v1, q0, kb.k0, kb.n, md, nullptr);
  if (ok.bits)
    softmax_rows<M, true>(S, lds, rows, v0, v1, ok, c, st.m + r0, st.l + r0 * VL, alpha);
  else
    softmax_rows<M, false>(S, lds, rows, v0, v1, ok, c, st.m + r0, st.l + r0 * VL, alpha);
  float* O = st.o + r0 * st.ldo;
  if (__builtin_expect(kb.v_bad && ok.bits, 0)) return add_values_carefully<M>(S, lds, rows, ok, kb, O, st.ldo, alpha);
  int w0 = ok.first / M::PER, w1 = (ok.last + M::PER - 1) / M::PER;
  gemm<M, RESCALE>(rows, S + w0, lds, 1, kb.v, kb.v_panel, O, st.ldo, 0, kb.dim_v_vecs, w0, w1 - w0, alpha);
}

// lse and the factor that turns the accumulated row into the output; an empty row gives 0 and lse = -inf
INL float finish_row(float m, const float* l, float c, const float* sink, float* lse) {
  float sum = hsum(load(l));
  if (m == -INFINITY) {
    *lse = sink ? *sink : -INFINITY;
    return 0.0f;
  }
  double shift = (double)(m * c) * 0.69314718055994530942;
  if (!sink) {
    *lse = (float)(shift + log((double)sum));
    return 1.0f / sum;
  }
  double rel = (double)*sink - shift;
  double total = rel > 0 ? sum * exp(-rel) + 1.0 : sum + exp(rel);
  *lse = (float)(rel > 0 ? (double)*sink + log(total) : shift + log(total));
  return (float)(rel > 0 ? exp(-rel) / total : 1.0 / total);
}

}  // namespace
