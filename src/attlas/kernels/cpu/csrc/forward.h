// Forward attention over a BlockMap. A task = one (batch row, kv head) and a few units; a unit = one block of queries of one query head.
// Keys run in the outer loop: a block of keys and values is packed once into L2 and used by all units of the task.
#pragma once
#include "kernels.h"
#include "softmax.h"

namespace {

constexpr int kMaxUnits = 8;

template <class T> INL const T* row_at(const void* base, const AttlasStride& s, int64_t b, int64_t t, int64_t h) {
  return (const T*)base + b * s.batch + t * s.row + h * s.head;
}
template <class T> INL void gather_rows(const T** rows, const void* base, const AttlasStride& s, int64_t b, int64_t t0, int n, int64_t h) {
  for (int i = 0; i < n; i++) rows[i] = row_at<T>(base, s, b, t0 + i, h);
}
INL int64_t map_row(const AttlasAttention* a, int64_t b, int64_t h, int64_t blocks, int64_t i) {
  return ((a->map_batch == 1 ? 0 : b) * a->map_heads + (a->map_heads == 1 ? 0 : h)) * blocks + i;
}
INL ScoreMods mods_of(const AttlasAttention* a, int64_t b, int64_t h) {
  ScoreMods m;
  m.scale = (float)a->scale, m.softcap = (float)a->softcap, m.count = (int)a->num_mods;
  m.slope = a->alibi ? a->alibi[h] : 0.0f;
  m.bias = a->bias ? a->bias + b * a->bias_batch + h * a->bias_head : nullptr;
  m.bias_row = a->bias_row, m.q_pos = a->q_pos, m.k_pos = a->k_pos;
  for (int i = 0; i < ATTLAS_MAX_MODS; i++) m.ops[i] = a->mods[i];
  return m;
}

// Hands out aligned pieces of a thread's scratch memory; with base == nullptr it only counts.
struct Arena {
  char* base;
  size_t used;
  INL float* floats(int64_t n) {
    float* p = (float*)(base + used);
    used += (size_t)round_up(n * 4, 64) + 64;  // the gap keeps equal-sized buffers out of the same cache sets
    return p;
  }
};

struct ForwardScratch {
  float *k, *v, *s, *alpha;
  struct Unit {
    float *q, *o, *m, *l;
  } unit[kMaxUnits];
  int64_t ldq, ldo, lds;
  size_t bytes;
  template <class M> static ForwardScratch plan(const AttlasAttention* a, int64_t units, char* base) {
    ForwardScratch f;
    Arena m = {base, 0};
    int64_t w = words<M>((int)a->dim), rows = a->block_q + MR;
    f.ldq = round_up(w, VL), f.ldo = round_up(a->dim_v, VL), f.lds = a->block_k + VL;
    f.k = m.floats(round_up(a->block_k, PANEL) * w);
    f.v = m.floats(round_up(f.ldo, PANEL) * (a->block_k / M::PER));
    f.s = m.floats(MR * f.lds), f.alpha = m.floats(VL);
    for (int64_t u = 0; u < units; u++)
      f.unit[u] = {m.floats(rows * f.ldq), m.floats(rows * f.ldo), m.floats(rows), m.floats(rows * VL)};
    f.bytes = m.used;
    return f;
  }
};

template <class M, class T> void write_unit(const AttlasAttention* a, int64_t b, int64_t h, int64_t q0, int n, const ForwardScratch& f, int u, float c) {
  for (int r = 0; r < n; r++) {
    float inv = finish_row(f.unit[u].m[r], f.unit[u].l + r * VL, c, a->sink ? a->sink + h : nullptr, a->lse + ((b * a->q_len + q0 + r) * a->heads + h));
    T* out = (T*)a->out_w + b * a->so.batch + (q0 + r) * a->so.row + h * a->so.head;
    for (int d = 0; d < a->dim_v; d += VL) store_from_f32(out + d, mul(load(f.unit[u].o + r * f.ldo + d), set1(inv)), (int)a->dim_v - d);
  }
}

template <class M, class T> void forward_task(const ForwardPlan* p, int64_t task, char* scratch) {
  const AttlasAttention* a = p->a;
  ForwardScratch f = ForwardScratch::plan<M>(a, p->units_per_task, scratch);
  int64_t group = a->heads / a->kv_heads, bkv = task / p->tasks_per_kv_head, b = bkv / a->kv_heads, kvh = bkv % a->kv_heads;
  int64_t u0 = (p->tasks_per_kv_head - 1 - task % p->tasks_per_kv_head) * p->units_per_task;  // long causal rows first
  int nu = (int)(p->num_q_blocks * group - u0 < p->units_per_task ? p->num_q_blocks * group - u0 : p->units_per_task);
  int64_t nk = (a->k_len + a->block_k - 1) / a->block_k;
  const T* rows[ATTLAS_MAX_BLOCK];
  int64_t at[kMaxUnits], end[kMaxUnits], q0[kMaxUnits], head[kMaxUnits];
  int nq[kMaxUnits];
  ScoreMods mods[kMaxUnits];
  for (int u = 0; u < nu; u++) {
    int64_t qb = (u0 + u) / group;
    head[u] = kvh * group + (u0 + u) % group, q0[u] = qb * a->block_q, nq[u] = imin((int)a->block_q, (int)(a->q_len - q0[u]));
    int64_t r = map_row(a, b, head[u], p->num_q_blocks, qb);
    at[u] = a->row_ptr ? a->row_ptr[r] : 0, end[u] = a->row_ptr ? a->row_ptr[r + 1] : nk;
    mods[u] = mods_of(a, b, head[u]);
    gather_rows<T>(rows, a->q, a->sq, b, q0[u], nq[u], head[u]);
    pack_rows<M, T>(rows, nq[u], (int)a->dim, f.unit[u].q, f.ldq);
    memset(f.unit[u].q + nq[u] * f.ldq, 0, MR * f.ldq * 4);
    memset(f.unit[u].o, 0, (nq[u] + MR) * f.ldo * 4);
    memset(f.unit[u].l, 0, (nq[u] + MR) * VL * 4);
    for (int i = 0; i < nq[u] + MR; i++) f.unit[u].m[i] = -INFINITY;
  }
  float c = mods[0].active() ? kLog2e : (float)(a->scale * 1.4426950408889634);
  uint8_t tail[ATTLAS_MAX_BLOCK / 8];
  for (;;) {
    int64_t col = INT64_MAX;
    for (int u = 0; u < nu; u++)
      if (at[u] < end[u]) {
        int64_t x = a->row_ptr ? a->cols[at[u]] : at[u];
        if (x < col) col = x;
      }
    if (col == INT64_MAX) break;
    KeyBlock kb;
    kb.k = f.k, kb.v = f.v, kb.dim_words = words<M>((int)a->dim), kb.dim_v_vecs = (int)f.ldo / VL;
    kb.k_panel = (int64_t)kb.dim_words * PANEL, kb.capacity = a->block_k, kb.v_panel = kb.capacity / M::PER * PANEL;
    kb.k0 = (int)(col * a->block_k), kb.n = imin((int)a->block_k, (int)(a->k_len - kb.k0));
    int lo = kb.n, hi = 0;  // keys that some unit touches, in whole panels: sparse maps use small parts of their blocks
    for (int u = 0; u < nu; u++) {
      if (at[u] >= end[u] || (a->row_ptr ? a->cols[at[u]] : at[u]) != col) continue;
      int64_t id = a->row_ptr ? a->tile_ids[at[u]] : -1;
      Allowed used = {0, kb.n, nullptr, 0};
      if (id >= 0) used = allowed_in_tile(a->tiles + id * a->block_q * (a->block_k / 8), nq[u], (int)a->block_k);
      if (used.first < used.last) lo = imin(lo, used.first / PANEL * PANEL), hi = imax(hi, imin(kb.n, (int)round_up(used.last, PANEL)));
    }
    kb.v_bad = false;
    if (lo < hi) {
      gather_rows<T>(rows, a->k, a->sk, b, kb.k0 + lo, hi - lo, kvh);
      pack_transposed<M, T>(rows, hi - lo, (int)a->dim, f.k + (int64_t)lo / PANEL * kb.k_panel);
      gather_rows<T>(rows, a->v, a->sv, b, kb.k0 + lo, hi - lo, kvh);
      kb.v_bad = pack_natural<M, T>(rows, hi - lo, (int)a->dim_v, kb.capacity, f.v + (int64_t)lo / M::PER * PANEL);
    }
    Allowed full = {0, kb.n, kb.n % VL ? tail_bits(tail, kb.n, (int)a->block_k) : nullptr, 0};
    for (int u = 0; u < nu; u++) {
      if (at[u] >= end[u] || (a->row_ptr ? a->cols[at[u]] : at[u]) != col) continue;
      int64_t id = a->row_ptr ? a->tile_ids[at[u]] : -1;
      at[u]++;
      const uint8_t* tile = id < 0 ? nullptr : a->tiles + id * a->block_q * (a->block_k / 8);
      Rows st = {f.unit[u].q, f.ldq, f.unit[u].o, f.ldo, f.unit[u].m, f.unit[u].l};
      for (int r = 0; r < nq[u]; r += MR) {
        int n = imin(MR, nq[u] - r);
        Allowed ok = tile ? allowed_in_tile(tile + r * (a->block_k / 8), n, (int)a->block_k) : full;
        if (ok.first < ok.last) attend_group<M>(kb, st, r, n, ok, c, mods[u], (int)q0[u] + r, f.s, f.lds, f.alpha);
      }
    }
  }
  for (int u = 0; u < nu; u++) write_unit<M, T>(a, b, head[u], q0[u], nq[u], f, u, c);
}

}  // namespace
