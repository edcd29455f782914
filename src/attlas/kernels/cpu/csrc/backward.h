// Backward attention over the transposed BlockMap, recomputing the probabilities from the log-sum-exp:
//   P = exp(S - lse)   dV += P^T dO   dP = dO V^T   dS = P * (dP - delta)   dQ += dS K   dK += dS^T Q,   delta = rowsum(dO * O) - dlse
// A task owns one kv head and every `lanes`-th chunk of key blocks, so dK and dV have one writer; dQ is summed per lane in a fixed order and
// the lanes are added in order at the end: the result does not depend on the number of threads. A lane has memory for the query blocks alone
// that its chunks touch; the first chunk that touches one writes, later ones add.
#pragma once
#include "forward.h"

namespace {

constexpr int kMaxChunk = 4, kMaxLanes = 64;

struct BackwardScratch {
  struct KeyUnit {
    float *kt, *kn, *vt, *dk, *dv;
    int k0, n;
    bool bad;
  } unit[kMaxChunk];
  float *q, *don, *qn, *dout, *dq, *p, *ds, *s, *dp, *factor, *lse2, *delta, *zeros;
  int64_t ldq, ldo, ldp, lds, ldk, ldv, dq_ld;
  size_t bytes;
  template <class M> static BackwardScratch plan(const AttlasAttention* a, int64_t units, char* base) {
    BackwardScratch f;
    Arena m = {base, 0};
    int64_t w = words<M>((int)a->dim), wv = words<M>((int)a->dim_v), bq = round_up(a->block_q, 2), bk = a->block_k;
    f.ldq = round_up(w, VL), f.ldo = round_up(wv, VL), f.ldk = round_up(a->dim, VL), f.ldv = round_up(a->dim_v, VL);
    f.ldp = bk + 16, f.lds = bk + VL;
    for (int64_t u = 0; u < units; u++) {
      f.unit[u].kt = m.floats(round_up(bk, PANEL) * w), f.unit[u].vt = m.floats(round_up(bk, PANEL) * wv);
      f.unit[u].kn = m.floats(round_up(f.ldk, PANEL) * (bk / M::PER));
      f.unit[u].dk = m.floats(bk * f.ldk), f.unit[u].dv = m.floats(bk * f.ldv);
    }
    f.q = m.floats((bq + MR) * f.ldq), f.dout = m.floats((bq + MR) * f.ldo);
    f.qn = m.floats(round_up(f.ldk, PANEL) * (bq / M::PER)), f.don = m.floats(round_up(f.ldv, PANEL) * (bq / M::PER));
    f.dq = m.floats((bq + MR) * f.ldk);
    f.p = m.floats((bq / M::PER + MR) * f.ldp), f.ds = m.floats((bq / M::PER + MR) * f.ldp);
    f.s = m.floats(MR * f.lds), f.dp = m.floats(MR * f.lds), f.factor = m.floats(MR * f.ldp);
    f.lse2 = m.floats(bq + MR), f.delta = m.floats(bq + MR);
    f.zeros = m.floats(round_up(a->dim > a->dim_v ? a->dim : a->dim_v, 64));
    f.bytes = m.used;
    return f;
  }
};

template <class T> void delta_task(const BackwardPlan* p, int64_t task) {
  const AttlasAttention* a = p->a;
  int64_t b = task / p->num_q_blocks, q0 = task % p->num_q_blocks * a->block_q, q1 = q0 + a->block_q < a->q_len ? q0 + a->block_q : a->q_len;
  for (int64_t t = q0; t < q1; t++)
    for (int64_t h = 0; h < a->heads; h++) {
      const T *o = row_at<T>(a->out, a->so, b, t, h), *g = row_at<T>(a->dout, a->sdo, b, t, h);
      V sum = zero();
      for (int d = 0; d < a->dim_v; d += VL) sum = fma(load_as_f32(o + d, (int)a->dim_v - d), load_as_f32(g + d, (int)a->dim_v - d), sum);
      int64_t i = (b * a->q_len + t) * a->heads + h;
      a->delta[i] = a->lse[i] == -INFINITY ? 0.0f : hsum(sum) - (a->dlse ? a->dlse[i] : 0.0f);
    }
}

// Everything the row pass of one row group needs.
struct RowPass {
  int v0, v1, nv, rows;
  float c;
  const float *lse2, *delta, *factor;  // factor: softcap derivative or nullptr
  int64_t ldf;
  float* dbias;  // first row and column of this group, or nullptr
  int64_t dbias_row;
  bool bias_inside;  // the bias comes before the softcap
  int n;             // keys of the block
};

template <bool MASKED> INL void probabilities(const RowPass& w, const Allowed& ok, int r, int v, V s, V dp, V* p_out, V* ds_out) {
  V p = exp2v(fma(s, set1(w.c), set1(-w.lse2[r]))), ds = mul(p, sub(dp, set1(w.delta[r])));
  if (MASKED) {
    VM m = mask_of_bits(ok.vec(r, v));
    p = keep(m, p, zero()), ds = keep(m, ds, zero());
  }
  V inner = w.factor ? mul(ds, load(w.factor + r * w.ldf + v * VL)) : ds;
  if (MASKED && w.factor) inner = keep(mask_of_bits(ok.vec(r, v)), inner, zero());
  if (w.dbias) store_from_f32(w.dbias + r * w.dbias_row + v * VL, w.bias_inside ? inner : ds, w.n - v * VL);
  *p_out = p, *ds_out = inner;
}

// FP32: S and dP lie in P and dS already, rows of ldp words
template <bool MASKED> INL void row_pass(Fp32, const RowPass& w, const Allowed& ok, float* P, float* D, int64_t ldp, float*, float*, int64_t) {
  for (int r = 0; r < w.rows; r++) {
    float *p = P + r * ldp, *d = D + r * ldp;
    if (ok.bits)
      for (int v = 0; v < w.nv; v++)
        if (v < w.v0 || v >= w.v1) store(p + v * VL, zero()), store(d + v * VL, zero());
    for (int v = w.v0; v < w.v1; v++) {
      V x, y;
      probabilities<MASKED>(w, ok, r, v, load(p + v * VL), load(d + v * VL), &x, &y);
      store(p + v * VL, x), store(d + v * VL, y);
    }
  }
}
#ifdef __AVX512BF16__
// BF16: S and dP lie in S, DP (fp32); P and D get words of two rows; DP becomes the words along the row
template <bool MASKED> INL void row_pass(Bf16, const RowPass& w, const Allowed& ok, float* P, float* D, int64_t ldp, float* S, float* DP, int64_t lds) {
  for (int r = 0; r < w.rows; r += 2) {
    float *p = P + r / 2 * ldp, *d = D + r / 2 * ldp;
    if (ok.bits)
      for (int v = 0; v < w.nv; v++)
        if (v < w.v0 || v >= w.v1) store(p + v * VL, zero()), store(d + v * VL, zero());
    for (int v = w.v0; v < w.v1; v++) {
      V x0, y0, x1 = zero(), y1 = zero();
      probabilities<MASKED>(w, ok, r, v, load(S + r * lds + v * VL), load(DP + r * lds + v * VL), &x0, &y0);
      if (r + 1 < w.rows) {
        probabilities<MASKED>(w, ok, r + 1, v, load(S + (r + 1) * lds + v * VL), load(DP + (r + 1) * lds + v * VL), &x1, &y1);
        store_words<Bf16>(DP + (r + 1) * lds, v, y1);
      }
      store_words<Bf16>(DP + r * lds, v, y0);
      store(p + v * VL, pair_words(x0, x1)), store(d + v * VL, pair_words(y0, y1));
    }
  }
}
#endif

// First and last query row of a tile that touches each group of MR keys
void query_hulls(const uint8_t* tile, int nq, int n, int block_k, int16_t* lo, int16_t* hi) {
  int groups = (n + MR - 1) / MR;
  for (int g = 0; g < groups; g++) lo[g] = 0, hi[g] = 0;
  for (int r = 0; r < nq; r++)
    for (int g = 0; g < groups; g++) {
      int bits = tile[r * (block_k / 8) + g * MR / 8];
      if (MR == 4) bits &= g & 1 ? 0xf0 : 0x0f;
      if (!bits) continue;
      if (hi[g] == 0) lo[g] = (int16_t)r;
      hi[g] = (int16_t)(r + 1);
    }
}

// Word (row, column) of P or dS as a float
template <class M> INL float pair_at(const float* p, int64_t ldp, int r, int j) {
  if (M::PER == 1) return p[r * ldp + j];
  uint32_t w;
  memcpy(&w, p + (r / 2) * ldp + j, 4);
  w = r & 1 ? w & 0xffff0000u : w << 16;
  float x;
  memcpy(&x, &w, 4);
  return x;
}

// The three accumulations with masked pairs left out instead of multiplied by 0: needed when q, k or dout hold inf or NaN.
template <class M>
void accumulate_carefully(const AttlasAttention* a, const BackwardScratch& f, const BackwardScratch::KeyUnit& ku, int nq, const uint8_t* bits, int64_t stride) {
  int64_t bq = round_up(a->block_q, 2);
  for (int r = 0; r < nq; r++)
    for (int j = 0; j < ku.n; j++) {
      if (!(bits[r * stride + (j >> 3)] >> (j & 7) & 1)) continue;
      float p = pair_at<M>(f.p, f.ldp, r, j), ds = pair_at<M>(f.ds, f.ldp, r, j);
      for (int d = 0; d < a->dim; d++) {
        f.dq[r * f.ldk + d] += ds * natural_at<M>(ku.kn, a->block_k, j, d);
        ku.dk[j * f.ldk + d] += ds * natural_at<M>(f.qn, bq, r, d);
      }
      for (int d = 0; d < a->dim_v; d++) ku.dv[j * f.ldv + d] += p * natural_at<M>(f.don, bq, r, d);
    }
}

struct PairInfo {
  int64_t b, h, q0;
  int nq;
  bool q_bad, bias_inside, softcap;
  float c;
};

template <class M>
void backward_pair(const AttlasAttention* a, const BackwardScratch& f, const BackwardScratch::KeyUnit& ku, const PairInfo& w, const ScoreMods& md, const uint8_t* tile) {
  int wk = words<M>((int)a->dim), wv = words<M>((int)a->dim_v), bk = (int)a->block_k, nv = (ku.n + VL - 1) / VL;
  int64_t bq = round_up(a->block_q, 2);
  uint8_t tail[ATTLAS_MAX_BLOCK / 8];
  Allowed full = {0, ku.n, ku.n % VL ? tail_bits(tail, ku.n, bk) : nullptr, 0};
  bool careful = (ku.bad || w.q_bad) && (tile || full.bits);
  for (int r = 0; r < w.nq; r += MR) {
    int n = imin(MR, w.nq - r);
    Allowed ok = tile ? allowed_in_tile(tile + r * (bk / 8), n, bk) : full;
    RowPass rp;
    rp.v0 = ok.first / VL, rp.v1 = (ok.last + VL - 1) / VL, rp.nv = nv, rp.rows = n, rp.c = w.c, rp.n = ku.n;
    rp.lse2 = f.lse2 + r, rp.delta = f.delta + r, rp.factor = w.softcap ? f.factor : nullptr, rp.ldf = f.ldp, rp.bias_inside = w.bias_inside;
    rp.dbias_row = a->k_len;
    rp.dbias = a->dbias ? a->dbias + ((w.b * a->heads + w.h) * a->q_len + w.q0 + r) * a->k_len + ku.k0 : nullptr;
    float *P = f.p + r / M::PER * f.ldp, *D = f.ds + r / M::PER * f.ldp;
    if (ok.first >= ok.last) {
      for (int i = 0; i < (n + M::PER - 1) / M::PER; i++) memset(P + i * f.ldp, 0, nv * VL * 4), memset(D + i * f.ldp, 0, nv * VL * 4);
      continue;
    }
    if (tile && !ok.bits && (rp.v0 > 0 || rp.v1 < nv))
      for (int i = 0; i < (n + M::PER - 1) / M::PER; i++) memset(P + i * f.ldp, 0, nv * VL * 4), memset(D + i * f.ldp, 0, nv * VL * 4);
    float *S = M::PER == 1 ? P : f.s, *DP = M::PER == 1 ? D : f.dp;
    int64_t ld = M::PER == 1 ? f.ldp : f.lds;
    gemm<M, FRESH>(n, f.q + r * f.ldq, f.ldq, 1, ku.kt, (int64_t)wk * PANEL, S, ld, rp.v0, rp.v1, 0, wk);
    gemm<M, FRESH>(n, f.dout + r * f.ldo, f.ldo, 1, ku.vt, (int64_t)wv * PANEL, DP, ld, rp.v0, rp.v1, 0, wv);
    if (md.active()) apply_mods(S, ld, n, rp.v0, rp.v1, (int)w.q0 + r, ku.k0, ku.n, md, w.softcap ? f.factor : nullptr);
    if (w.softcap && ld != f.ldp) rp.ldf = ld;
    if (ok.bits)
      row_pass<true>(M(), rp, ok, P, D, f.ldp, S, DP, ld);
    else
      row_pass<false>(M(), rp, ok, P, D, f.ldp, S, DP, ld);
    if (careful) continue;
    int w0 = ok.first / M::PER, w1 = (ok.last + M::PER - 1) / M::PER;
    gemm<M, ACCUMULATE>(n, DP + w0, ld, 1, ku.kn, (int64_t)bk / M::PER * PANEL, f.dq + r * f.ldk, f.ldk, 0, (int)f.ldk / VL, w0, w1 - w0);
  }
  if (careful) return accumulate_carefully<M>(a, f, ku, w.nq, tile ? tile : tail, tile ? bk / 8 : 0);
  int16_t lo[ATTLAS_MAX_BLOCK / MR], hi[ATTLAS_MAX_BLOCK / MR];
  if (tile) query_hulls(tile, w.nq, ku.n, bk, lo, hi);
  for (int g = 0; g * MR < ku.n; g++) {
    int first = tile ? lo[g] / M::PER : 0, last = ((tile ? hi[g] : w.nq) + M::PER - 1) / M::PER;
    if (first >= last) continue;
    const float *P = f.p + first * f.ldp + g * MR, *D = f.ds + first * f.ldp + g * MR;
    gemm<M, ACCUMULATE>(MR, P, 1, f.ldp, f.don, bq / M::PER * PANEL, ku.dv + g * MR * f.ldv, f.ldv, 0, (int)f.ldv / VL, first, last - first);
    gemm<M, ACCUMULATE>(MR, D, 1, f.ldp, f.qn, bq / M::PER * PANEL, ku.dk + g * MR * f.ldk, f.ldk, 0, (int)f.ldk / VL, first, last - first);
  }
}

template <class M, class T> void load_key_unit(const AttlasAttention* a, const BackwardScratch& f, BackwardScratch::KeyUnit* u, int64_t b, int64_t kvh, int64_t kb) {
  const T* rows[ATTLAS_MAX_BLOCK];
  u->k0 = (int)(kb * a->block_k), u->n = imin((int)a->block_k, (int)(a->k_len - u->k0));
  gather_rows<T>(rows, a->k, a->sk, b, u->k0, u->n, kvh);
  pack_transposed<M, T>(rows, u->n, (int)a->dim, u->kt);
  u->bad = pack_natural<M, T>(rows, u->n, (int)a->dim, a->block_k, u->kn);
  gather_rows<T>(rows, a->v, a->sv, b, u->k0, u->n, kvh);
  pack_transposed<M, T>(rows, u->n, (int)a->dim_v, u->vt);
  memset(u->dk, 0, a->block_k * f.ldk * 4);
  memset(u->dv, 0, a->block_k * f.ldv * 4);
}

template <class M, class T> void load_queries(const AttlasAttention* a, const BackwardScratch& f, PairInfo* w) {
  const T* rows[ATTLAS_MAX_BLOCK];
  const float *lse = a->lse + (w->b * a->q_len + w->q0) * a->heads + w->h, *delta = a->delta + (w->b * a->q_len + w->q0) * a->heads + w->h;
  int64_t bq = round_up(a->block_q, 2);
  for (int r = 0; r < w->nq + MR; r++) {
    float x = r < w->nq ? lse[r * a->heads] : -INFINITY;
    f.lse2[r] = x == -INFINITY ? INFINITY : x * kLog2e, f.delta[r] = r < w->nq ? delta[r * a->heads] : 0.0f;
  }
  // rows without any key take no part, whatever their query and gradient hold
  for (int pass = 0; pass < 2; pass++) {
    if (pass == 0)
      gather_rows<T>(rows, a->q, a->sq, w->b, w->q0, w->nq, w->h);
    else
      gather_rows<T>(rows, a->dout, a->sdo, w->b, w->q0, w->nq, w->h);
    for (int r = 0; r < w->nq; r++)
      if (f.lse2[r] == INFINITY) rows[r] = (const T*)f.zeros;
    int dim = (int)(pass == 0 ? a->dim : a->dim_v);
    float* flat = pass == 0 ? f.q : f.dout;
    int64_t ld = pass == 0 ? f.ldq : f.ldo;
    pack_rows<M, T>(rows, w->nq, dim, flat, ld);
    memset(flat + w->nq * ld, 0, MR * ld * 4);
    bool bad = pack_natural<M, T>(rows, w->nq, dim, bq, pass == 0 ? f.qn : f.don);
    w->q_bad = pass == 0 ? bad : w->q_bad || bad;
  }
  memset(f.dq, 0, (bq + MR) * f.ldk * 4);
}

// The rows of head h of a query block where a lane sums dq: the first one, nullptr = the lane does not touch the block. A lane that is alone
// may sum in dq itself.
struct LaneRows {
  float* data;
  int64_t stride;
  bool first;  // `chunk` is the first that comes there
};
INL LaneRows lane_rows(const BackwardPlan* p, int64_t b, int64_t h, int64_t lane, int64_t qb, int64_t chunk) {
  const AttlasAttention* a = p->a;
  int64_t i = (map_row(a, b, h, 1, 0) * a->lanes + lane) * p->num_q_blocks + qb;
  if (p->piece[i] < 0) return {nullptr, 0, false};
  if (a->dq_lanes == a->dq) return {a->dq_lanes + ((b * a->q_len + qb * a->block_q) * a->heads + h) * a->dim, a->heads * a->dim, p->first_chunk[i] == chunk};
  return {a->dq_lanes + (p->pieces[b * a->heads + h] + p->piece[i]) * a->dim, a->dim, p->first_chunk[i] == chunk};
}

template <class M, class T>
void backward_chunk(const BackwardPlan* p, BackwardScratch& f, int64_t b, int64_t kvh, int64_t kb0, int nu, int64_t lane) {
  const AttlasAttention* a = p->a;
  int64_t group = a->heads / a->kv_heads;
  for (int u = 0; u < nu; u++) load_key_unit<M, T>(a, f, &f.unit[u], b, kvh, kb0 + u);
  for (int64_t h = kvh * group; h < (kvh + 1) * group; h++) {
    int64_t at[kMaxChunk], end[kMaxChunk];
    for (int u = 0; u < nu; u++) {
      int64_t r = map_row(a, b, h, p->num_k_blocks, kb0 + u);
      at[u] = a->row_ptr ? a->col_ptr[r] : 0, end[u] = a->row_ptr ? a->col_ptr[r + 1] : p->num_q_blocks;
    }
    ScoreMods md = mods_of(a, b, h);
    PairInfo w;
    w.b = b, w.h = h, w.softcap = false, w.bias_inside = false;
    for (int i = md.count - 1; i >= 0; i--) {
      if (md.ops[i] == ATTLAS_MOD_SOFTCAP) w.softcap = true;
      if (md.ops[i] == ATTLAS_MOD_BIAS) w.bias_inside = w.softcap;
    }
    w.c = md.active() ? kLog2e : (float)(a->scale * 1.4426950408889634);
    for (;;) {
      int64_t qb = INT64_MAX;
      for (int u = 0; u < nu; u++)
        if (at[u] < end[u]) {
          int64_t x = a->row_ptr ? a->rows[at[u]] : at[u];
          if (x < qb) qb = x;
        }
      if (qb == INT64_MAX) break;
      w.q0 = qb * a->block_q, w.nq = imin((int)a->block_q, (int)(a->q_len - w.q0));
      load_queries<M, T>(a, f, &w);
      for (int u = 0; u < nu; u++) {
        if (at[u] >= end[u] || (a->row_ptr ? a->rows[at[u]] : at[u]) != qb) continue;
        int64_t id = a->row_ptr ? a->row_tile_ids[at[u]] : -1;
        at[u]++;
        backward_pair<M>(a, f, f.unit[u], w, md, id < 0 ? nullptr : a->tiles + id * a->block_q * (a->block_k / 8));
      }
      LaneRows to = lane_rows(p, b, h, lane, qb, kb0 / p->blocks_per_chunk);
      for (int r = 0; r < w.nq; r++)
        for (int d = 0; d < a->dim; d += VL) {
          float* dst = to.data + r * to.stride + d;
          int left = (int)a->dim - d;
          V found = load(f.dq + r * f.ldk + d);
          store_from_f32(dst, to.first ? found : add(load_as_f32(dst, left), found), left);
        }
    }
  }
  V scale = set1((float)a->scale);
  for (int u = 0; u < nu; u++)
    for (int i = 0; i < f.unit[u].n; i++) {
      int64_t row = (b * a->k_len + f.unit[u].k0 + i) * a->kv_heads + kvh;
      for (int d = 0; d < a->dim; d += VL) store_from_f32((T*)a->dk + row * a->dim + d, mul(scale, load(f.unit[u].dk + i * f.ldk + d)), (int)a->dim - d);
      for (int d = 0; d < a->dim_v; d += VL) store_from_f32((T*)a->dv + row * a->dim_v + d, load(f.unit[u].dv + i * f.ldv + d), (int)a->dim_v - d);
    }
}

template <class M, class T> void backward_task(const BackwardPlan* p, int64_t task, char* scratch) {
  const AttlasAttention* a = p->a;
  BackwardScratch f = BackwardScratch::plan<M>(a, p->blocks_per_chunk, scratch);
  memset(f.zeros, 0, round_up(a->dim > a->dim_v ? a->dim : a->dim_v, 64) * 4);
  int64_t lane = task % a->lanes, bkv = task / a->lanes, b = bkv / a->kv_heads, kvh = bkv % a->kv_heads;
  for (int64_t kb = lane * p->blocks_per_chunk; kb < p->num_k_blocks; kb += a->lanes * p->blocks_per_chunk) {
    int64_t left = p->num_k_blocks - kb;
    backward_chunk<M, T>(p, f, b, kvh, kb, (int)(left < p->blocks_per_chunk ? left : p->blocks_per_chunk), lane);
  }
}

// dq = scale * sum of the lanes
template <class T> void reduce_task(const BackwardPlan* p, int64_t task) {
  const AttlasAttention* a = p->a;
  int64_t b = task / p->num_q_blocks, qb = task % p->num_q_blocks, q0 = qb * a->block_q, nq = imin((int)a->block_q, (int)(a->q_len - q0));
  V scale = set1((float)a->scale);
  for (int64_t h = 0; h < a->heads; h++) {
    LaneRows from[kMaxLanes];
    int parts = 0;
    for (int64_t l = 0; l < a->lanes; l++) {
      from[parts] = lane_rows(p, b, h, l, qb, 0);
      parts += from[parts].data != nullptr;
    }
    for (int64_t r = 0; r < nq; r++) {
      T* dst = (T*)a->dq + ((b * a->q_len + q0 + r) * a->heads + h) * a->dim;
      for (int d = 0; d < a->dim; d += VL) {
        int left = (int)a->dim - d;
        V sum = zero();
        for (int i = 0; i < parts; i++) sum = add(sum, load_as_f32(from[i].data + r * from[i].stride + d, left));
        store_from_f32(dst + d, mul(sum, scale), left);
      }
    }
  }
}

}  // namespace
