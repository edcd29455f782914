// Decode: the few newest queries of each sequence over a contiguous or paged cache, split along the keys.
// A task = one split of one sequence and a run of kv heads. All query heads of a kv head are rows of one product, so each key is read once;
// kv heads run in the inner loop because the heads of a token are neighbours in memory.
#pragma once
#include "quantised.h"

namespace {

constexpr int kChunk = 128;  // keys packed at a time

struct DecodeScratch {
  float *k, *v, *s, *alpha, *q, *o, *m, *l, *slopes, *scales, *wide_k, *wide_v;  // wide_k, wide_v, scales: of 8-bit caches
  int32_t *q_pos, *k_pos;
  uint8_t* bits;
  int64_t ldq, ldo, rows;  // rows: padded rows of one kv head
  size_t bytes;
  template <class M> static DecodeScratch plan(const DecodePlan* p, char* base) {
    const AttlasDecode* a = p->a;
    DecodeScratch f;
    Arena m = {base, 0};
    int64_t w = words<M>((int)a->dim);
    f.ldq = round_up(w, VL), f.ldo = p->dim_v_padded, f.rows = p->rows + MR;
    f.k = m.floats(kChunk * w), f.v = m.floats(round_up(f.ldo, PANEL) * (kChunk / M::PER));
    f.s = m.floats(MR * (kChunk + VL)), f.alpha = m.floats(VL);
    int64_t all = p->heads_per_task * f.rows;
    f.q = m.floats(all * f.ldq), f.o = m.floats(all * f.ldo), f.m = m.floats(all), f.l = m.floats(all * VL), f.slopes = m.floats(all);
    f.q_pos = (int32_t*)m.floats(f.rows), f.k_pos = (int32_t*)m.floats(kChunk), f.bits = (uint8_t*)m.floats(MR * kChunk / 32);
    f.scales = f.wide_k = f.wide_v = nullptr;
    if (a->kv_dtype) {
      f.scales = m.floats(2 * p->heads_per_task * kChunk);
      f.wide_k = m.floats(kChunk * round_up(a->dim, VL)), f.wide_v = m.floats(kChunk * round_up(a->dim_v, VL));
    }
    f.bytes = m.used;
    return f;
  }
};

template <class T> INL void gather_cache(const T** rows, const AttlasDecode* a, const void* base, const AttlasStride& s, int64_t b, int64_t k0, int n, int64_t h) {
  if (!a->block_table) return gather_rows<T>(rows, base, s, b, k0, n, h);
  for (int i = 0; i < n;) {
    int64_t page = (k0 + i) / a->page_size, slot = (k0 + i) % a->page_size;
    const T* p = (const T*)base + a->block_table[b * a->max_blocks + page] * s.batch + slot * s.row + h * s.head;
    for (; slot < a->page_size && i < n; slot++, i++, p += s.row) rows[i] = p;
  }
}

// dst[h * N + i] = scale of key k0 + i in head h0 + h, 0 for i >= n
template <class C, int N> void gather_scales(float* dst, const AttlasDecode* a, const float* base, const AttlasStride& s, int64_t b, int64_t k0, int n, int64_t h0, int nh) {
  const float* rows[N];
  gather_cache<float>(rows, a, base, s, b, k0, n, h0);
  for (int h = 0; h < nh; h++) {
    for (int i = 0; i < n; i++) dst[h * N + i] = rows[i][h * s.head] * Coded<C>::unit;
    for (int i = n; i < N; i++) dst[h * N + i] = 0.0f;
  }
}

// Bits [lo, hi) of a 128-bit mask
INL void set_range(uint64_t* w, int64_t lo, int64_t hi) {
  for (int i = 0; i < kChunk / 64; i++) {
    int64_t l = lo - 64 * i, h = hi - 64 * i;
    l = l < 0 ? 0 : l, h = h > 64 ? 64 : h;
    if (l < h) w[i] |= (h - l == 64 ? ~0ull : ((1ull << (h - l)) - 1)) << l;
  }
}

struct Visible {  // keys that a query may see: [0, sinks) and [low(t), high(t)), absolute positions
  int64_t length, first_query, window, sinks;
  bool causal;
  INL int64_t high(int64_t t) const { return causal ? first_query + t + 1 : length; }
  INL int64_t low(int64_t t) const {
    int64_t x = window < 0 ? 0 : first_query + t - window;
    return x < 0 ? 0 : x;
  }
};

template <class M, class C> void load_decode_rows(const DecodePlan* p, const DecodeScratch& f, int64_t b, int64_t h0, int nh, int64_t first_query) {
  const AttlasDecode* a = p->a;
  int64_t group = a->heads / a->kv_heads;
  for (int h = 0; h < nh; h++)
    for (int64_t r = 0; r < f.rows; r++) {
      int64_t i = h * f.rows + r;
      f.m[i] = -INFINITY;
      if (r >= p->rows) {
        memset(f.q + i * f.ldq, 0, f.ldq * 4);
        continue;
      }
      int64_t head = (h0 + h) * group + r / a->q_len;
      pack_query<M, C>(a, b, r % a->q_len, head, f.q + i * f.ldq, f.ldq);
      f.slopes[i] = a->alibi ? a->alibi[head] : 0.0f, f.q_pos[r] = (int32_t)(first_query + r % a->q_len);
    }
  memset(f.o, 0, nh * f.rows * f.ldo * 4);
  memset(f.l, 0, nh * f.rows * VL * 4);
}

template <class M>
INL void decode_rows(const DecodePlan* p, const DecodeScratch& f, const KeyBlock& kb, const Visible& see, int64_t k0, int h, float c, ScoreMods md) {
  const AttlasDecode* a = p->a;
  Rows st = {f.q + h * f.rows * f.ldq, f.ldq, f.o + h * f.rows * f.ldo, f.ldo, f.m + h * f.rows, f.l + h * f.rows * VL};
  md.row_slopes = f.slopes + h * f.rows;
  bool masked = kb.n % VL || (see.causal && k0 + kb.n > see.high(0)) || see.low(a->q_len - 1) > k0;
  for (int r = 0; r < p->rows; r += MR) {
    int n = imin(MR, (int)p->rows - r);
    Allowed ok = {0, kb.n, nullptr, 0};
    if (masked) {
      uint64_t* w = (uint64_t*)f.bits;
      memset(w, 0, MR * kChunk / 8);
      for (int i = 0; i < n; i++) {
        int64_t t = (r + i) % a->q_len, hi = see.high(t) - k0 < kb.n ? see.high(t) - k0 : kb.n;
        set_range(w + i * (kChunk / 64), see.low(t) - k0, hi);
        set_range(w + i * (kChunk / 64), 0, see.sinks - k0 < hi ? see.sinks - k0 : hi);
      }
      ok = allowed_in_tile(f.bits, n, kChunk);
      if (ok.first >= ok.last) continue;
    }
    attend_group<M>(kb, st, r, n, ok, c, md, r, f.s, kChunk + VL, f.alpha);
  }
}

INL void prefetch_row(const void* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch((const char*)p + i, _MM_HINT_T0);
}

INL Visible visible_of(const AttlasDecode* a, int64_t b) {
  Visible see = {a->lengths[b], a->lengths[b] - a->q_len, a->window_left, a->num_sinks, a->causal != 0};
  return see;
}

// Partial result of one row of one split: dim_v_padded accumulated values, the maximum (log2 units), the sum
INL float* partial_at(const DecodePlan* p, int64_t row, int64_t split) { return p->a->partial + (row * p->max_splits + split) * (p->dim_v_padded + 16); }

template <class M> struct Element { typedef float T; };  // what 8-bit numbers become before they are packed
#ifdef __AVX512BF16__
template <> struct Element<Bf16> { typedef bf16 T; };
#endif

// Keys and values of head h, packed; returns true if a value was inf or NaN
template <class M, class C>
INL bool pack_head(const DecodeScratch& f, const AttlasDecode* a, const C* const* krows, const C* const* vrows, int n, int64_t h, int64_t nh) {
  if constexpr (Coded<C>::yes) {
    typedef typename Element<M>::T E;
    const E* rows[kChunk];
    widen_rows(krows, f.scales + h * kChunk, n, (int)a->dim, (E*)f.wide_k, rows);
    pack_transposed<M, E>(rows, n, (int)a->dim, f.k);
    widen_rows(vrows, f.scales + (nh + h) * kChunk, n, (int)a->dim_v, (E*)f.wide_v, rows);
    return pack_natural<M, E>(rows, n, (int)a->dim_v, kChunk, f.v);
  } else {
    pack_transposed<M, C>(krows, n, (int)a->dim, f.k);
    return pack_natural<M, C>(vrows, n, (int)a->dim_v, kChunk, f.v);
  }
}

// Many rows (chunks of new tokens): keys and values are packed, as in prefill.
template <class M, class C> void decode_packed_rows(const DecodePlan* p, int64_t b, int64_t split, int64_t h0, int nh, char* scratch) {
  const AttlasDecode* a = p->a;
  int64_t group = a->heads / a->kv_heads;
  Visible see = visible_of(a, b);
  int64_t begin = split * a->split, stop = begin + a->split < see.length ? begin + a->split : see.length;
  DecodeScratch f = DecodeScratch::plan<M>(p, scratch);
  load_decode_rows<M, C>(p, f, b, h0, nh, see.first_query);
  ScoreMods md;
  md.scale = (float)a->scale, md.softcap = (float)a->softcap, md.count = 0, md.bias = nullptr, md.q_pos = f.q_pos, md.k_pos = f.k_pos, md.slope = 0;
  if (a->softcap > 0) md.ops[md.count++] = ATTLAS_MOD_SOFTCAP;
  if (a->alibi) md.ops[md.count++] = ATTLAS_MOD_ALIBI;
  float c = md.active() ? kLog2e : (float)(a->scale * 1.4426950408889634);
  KeyBlock kb;
  kb.k = f.k, kb.v = f.v, kb.dim_words = words<M>((int)a->dim), kb.dim_v_vecs = (int)f.ldo / VL;
  kb.k_panel = (int64_t)kb.dim_words * PANEL, kb.capacity = kChunk, kb.v_panel = kChunk / M::PER * PANEL, kb.k0 = 0;
  const C *krows[kChunk], *vrows[kChunk];
  for (int64_t k0 = begin; k0 < stop; k0 += kChunk) {
    kb.n = (int)(stop - k0 < kChunk ? stop - k0 : kChunk);
    if (k0 >= see.sinks && k0 + kb.n <= see.low(0)) continue;
    if (k0 >= see.high(a->q_len - 1)) break;
    for (int i = 0; i < kb.n; i++) f.k_pos[i] = (int32_t)(k0 + i);
    gather_cache<C>(krows, a, a->k, a->sk, b, k0, kb.n, h0);
    gather_cache<C>(vrows, a, a->v, a->sv, b, k0, kb.n, h0);
    if constexpr (Coded<C>::yes) {
      gather_scales<C, kChunk>(f.scales, a, a->k_scale, a->sks, b, k0, kb.n, h0, nh);
      gather_scales<C, kChunk>(f.scales + nh * kChunk, a, a->v_scale, a->svs, b, k0, kb.n, h0, nh);
    }
    for (int h = 0; h < nh; h++) {
      if (h + 1 < nh)
        for (int i = 0; i < kb.n; i++) {
          prefetch_row(krows[i] + a->sk.head, a->dim * (int64_t)sizeof(C));
          prefetch_row(vrows[i] + a->sv.head, a->dim_v * (int64_t)sizeof(C));
        }
      kb.v_bad = pack_head<M, C>(f, a, krows, vrows, kb.n, h, nh);
      decode_rows<M>(p, f, kb, see, k0, h, c, md);
      for (int i = 0; i < kb.n; i++) krows[i] += a->sk.head, vrows[i] += a->sv.head;
    }
  }
  for (int h = 0; h < nh; h++)
    for (int64_t r = 0; r < p->rows; r++) {
      int64_t i = h * f.rows + r, row = (b * a->q_len + r % a->q_len) * a->heads + (h0 + h) * group + r / a->q_len;
      float* dst = partial_at(p, row, split);
      for (int d = 0; d < f.ldo; d += VL) store(dst + d, load(f.o + i * f.ldo + d));
      dst[f.ldo] = f.m[i] == -INFINITY ? -INFINITY : f.m[i] * c, dst[f.ldo + 1] = hsum(load(f.l + i * VL));
    }
}

// One task = one query token: all its heads
template <class T> void decode_merge_task(const DecodePlan* p, int64_t task) {
  const AttlasDecode* a = p->a;
  int64_t b = task / a->q_len, t = task % a->q_len, ld = p->dim_v_padded;
  int64_t splits = (a->lengths[b] + a->split - 1) / a->split;
  for (int64_t h = 0; h < a->heads; h++) {
    int64_t row = task * a->heads + h;
    float* part = a->partial + row * p->max_splits * (ld + 16);
    float sink = a->sink ? a->sink[h] * kLog2e : -INFINITY, top = sink;
    for (int64_t s = 0; s < splits; s++) top = part[s * (ld + 16) + ld] > top || part[s * (ld + 16) + ld] != part[s * (ld + 16) + ld] ? part[s * (ld + 16) + ld] : top;
    T* out = (T*)a->out + b * a->so.batch + t * a->so.row + h * a->so.head;
    bool empty = top == -INFINITY;
    double total = a->sink && !empty ? exp2((double)sink - top) : 0.0;
    for (int64_t s = 0; s < splits; s++) {  // the weight replaces the maximum
      float* m = part + s * (ld + 16) + ld;
      *m = empty || *m == -INFINITY ? 0.0f : (float)exp2((double)*m - top);
      total += (double)*m * m[1];
    }
    V inv = set1(empty ? 0.0f : (float)(1.0 / total));
    for (int64_t d = 0; d < a->dim_v; d += VL) {
      V sum = zero();
      for (int64_t s = 0; s < splits; s++) {
        const float* x = part + s * (ld + 16);
        if (x[ld] != 0.0f) sum = fma(set1(x[ld]), load(x + d), sum);
      }
      store_from_f32(out + d, mul(sum, inv), (int)(a->dim_v - d));
    }
    a->lse[row] = empty ? -INFINITY : (float)((top + log2(total)) * 0.69314718055994530942);
  }
}

}  // namespace
