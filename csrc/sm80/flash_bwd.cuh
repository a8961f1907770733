// Attention backward by keys: a block holds one tile of K and V, meets every tile of queries, and
// keeps dK and dV in registers (Dao 2023, algorithm 2, with the scores transposed):
//     pᵀ = exp(scale · k qᵀ − lse)     dv += pᵀ do
//     dsᵀ = pᵀ ∘ (v doᵀ − delta)       dk += scale · dsᵀ q     dq += scale · ds k
// Rows of the scores are keys, so pᵀ and dsᵀ are operand A of the next product without leaving the
// registers; only ds passes through shared memory, for dq, where a block needs it transposed.
//
// p.dq_mode says where dq is summed:
// - kInTurn: a launch a tile of keys, a block a head: each adds its share to dq, and the last
// rounds
//   it. No atomics, the same in every run; one tile of keys is one launch and needs no workspace.
//   Many queries against one tile of keys are shared out among p.splits blocks, whose dk and dv
//   another launch adds up.
// - kAtomic: a block a tile of keys; they add to a float32 workspace, which another launch rounds.
// - kSeparateKernel: not here but in flash_bwd_dq.cuh, which recomputes the scores: 7 products
//   instead of 5, for a result that is the same in every run.
#pragma once
#include "../mask.cuh"
#include "tile.cuh"
#include "tiles.h"

namespace ldm {

// One tile of queries of one head, and its place in the pipeline.
template <class C>
struct QueryStage {
  Tile<C::kPadded> q, d_o;
  uint32_t lse, delta;  // addresses of kBlockQ floats

  LDM_DEVICE QueryStage(uint32_t tiles, uint32_t floats, int step)
      : q{tiles + static_cast<uint32_t>(step % C::kStages) * C::kStageBytes},
        d_o(q.rows_from(C::kBlockQ)),
        lse(floats + static_cast<uint32_t>(step % C::kStages) * C::kBlockQ * 8),
        delta(lse + C::kBlockQ * 4) {}

  LDM_DEVICE void load(const FlashParams& p, int batch, int head, int query) const {
    load_tile<C::kBlockQ, C::kThreads>(q, rows_of(p.q, batch, head), query, p.q_len, p.head_dim);
    load_tile<C::kBlockQ, C::kThreads>(d_o, rows_of(p.d_o, batch, head), query, p.q_len,
                                       p.head_dim);
    const int64_t row = (static_cast<int64_t>(batch) * p.heads + head) * p.q_len + query;
    const int t = thread_index();
    if (t < C::kBlockQ) {
      // queries past the end have q = do = 0, so that lse = delta = 0 adds nothing
      const bool valid = query + t < p.q_len;
      copy_async_4(lse + t * 4, valid ? p.lse + row + t : p.lse, valid);
      copy_async_4(delta + t * 4, valid ? p.delta + row + t : p.delta, valid);
    }
  }
};

// Σ_d do·o − dlse of one row, computed by one warp; every lane gets it.
template <typename T>
LDM_DEVICE float row_delta(const FlashParams& p, int batch, int head, int query) {
  const Rows o = rows_of(p.o, batch, head), d_o = rows_of(p.d_o, batch, head);
  float sum = 0.0f;
  for (int d = thread_index() % kWarp; d < p.head_dim; d += kWarp) {
    sum +=
        to_float(T{o.data[query * o.stride + d]}) * to_float(T{d_o.data[query * d_o.stride + d]});
  }
  LDM_UNROLL for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) sum += shuffle_xor(sum, lanes);
  const int64_t row = (static_cast<int64_t>(batch) * p.heads + head) * p.q_len + query;
  return p.dlse ? sum - p.dlse[row] : sum;
}

// delta of one tile of queries, by the whole block.
template <typename T, class C>
LDM_DEVICE void store_deltas(const FlashParams& p, int batch, int head, int begin) {
  const int64_t row = (static_cast<int64_t>(batch) * p.heads + head) * p.q_len;
  const int end = min(begin + C::kBlockQ, p.q_len);
  for (int query = begin + thread_index() / kWarp; query < end; query += C::kWarps) {
    p.delta[row + query] = row_delta<T>(p, batch, head, query);
  }
}

// s → p = exp2(s − lse); dp → ds = p (dp − delta). Rows are keys, columns are queries.
template <typename T, class C, bool kHasMask>
LDM_DEVICE void probabilities(float (&s)[C::kRowTiles][C::kWarpQueries / 8][4],
                              float (&dp)[C::kRowTiles][C::kWarpQueries / 8][4],
                              const FlashParams& p, const QueryStage<C>& stage, int batch, int head,
                              int key, int query, int tile_column) {
  const int lane = thread_index() % kWarp;
  const bool whole = key + C::kWarpKeys <= key_limit(p, query);
  LDM_UNROLL for (int n = 0; n < C::kWarpQueries / 8; ++n) {
    float lse[2], delta[2];
    const int column = n * 8 + lane % 4 * 2;
    load_shared_pair(lse[0], lse[1], stage.lse + (tile_column + column) * 4);
    load_shared_pair(delta[0], delta[1], stage.delta + (tile_column + column) * 4);
    // a row that sees no key has lse = −inf: its p is 0
    LDM_UNROLL for (int i = 0; i < 2; ++i) {
      lse[i] = lse[i] == -INFINITY ? INFINITY : lse[i] * kLog2e;
    }
    LDM_UNROLL for (int r = 0; r < C::kRowTiles; ++r) {
      LDM_UNROLL for (int e = 0; e < 4; ++e) {
        const int at_key = key + r * 16 + lane / 4 + e / 2 * 8, at_query = query + column + e % 2;
        float x = s[r][n][e] * (p.scale * kLog2e) - lse[e % 2];
        if constexpr (kHasMask) {
          if (at_query < p.q_len && at_key < p.k_len) {
            x += mask_term<T>(p, batch, head, at_query, at_key);
          }
        }
        x = exp2_approx(x);
        if (!whole && at_key >= key_limit(p, at_query)) x = 0.0f;
        s[r][n][e] = x;
        dp[r][n][e] = x * (dp[r][n][e] - delta[e % 2]);
      }
    }
  }
}

// sum += scores · queries, for this warp's keys and columns; the scores are this warp's own
// registers, or where several warps share the keys, a tile that all of them wrote.
template <typename T, class C>
LDM_DEVICE void accumulate(T type, float (&sum)[C::kRowTiles][C::kWarpColumns / 8][4],
                           const float (&own)[C::kRowTiles][C::kWarpQueries / 8][4],
                           Tile<C::kBlockQ> shared, int key_row, Tile<C::kPadded> queries,
                           int column) {
  constexpr int kUnroll = C::kColumnWarps > 1 ? 1 : C::kBlockQ / 16;  // registers: by constants
#pragma unroll kUnroll
  for (int k = 0; k < C::kBlockQ / 16; ++k) {
    uint32_t a[C::kRowTiles][4];
    LDM_UNROLL for (int r = 0; r < C::kRowTiles; ++r) {
      if constexpr (C::kColumnWarps == 1) {
        accumulators_to_a(type, a[r], own[r][2 * k], own[r][2 * k + 1]);
      } else {
        load_a(a[r], shared, key_row + r * 16, k * 16);
      }
    }
    LDM_UNROLL for (int n = 0; n < C::kWarpColumns / 16; ++n) {
      uint32_t b[4];
      load_b_transposed(b, queries, k * 16, column + n * 16);
      LDM_UNROLL for (int r = 0; r < C::kRowTiles; ++r) {
        mma(type, sum[r][2 * n], a[r], b[0], b[1]);
        if (C::kColumnWarps > 1 || 2 * n + 1 < C::kHeadDim / 8) {
          mma(type, sum[r][2 * n + 1], a[r], b[2], b[3]);
        }
      }
    }
  }
}

// Where a warp's share of a dQ tile goes: 16 rows and kDqColumns columns of it.
template <class C>
struct DqShare {
  int row, column;
  LDM_DEVICE DqShare() {
    const int warp = thread_index() / kWarp;
    row = warp % C::kDqRowWarps * 16;
    column = warp / C::kDqRowWarps * C::kDqColumns;
  }
  // fragments lie in the order of the threads that hold them: every access is one line a warp
  LDM_DEVICE float* workspace(const FlashParams& p, int64_t tile) const {
    const int warp = thread_index() / kWarp, lane = thread_index() % kWarp;
    return p.workspace + tile * C::kDqFloats + warp * 16 * C::kDqColumns + lane;
  }
  template <typename T>
  LDM_DEVICE void store(T type, Rows dq, int query, int n, const float (&x)[4],
                        const FlashParams& p) const {
    const int lane = thread_index() % kWarp, at = column + n * 8 + lane % 4 * 2;
    LDM_UNROLL for (int half = 0; half < 2; ++half) {
      store_pair(type, dq, query + row + lane / 4 + half * 8, at, p.q_len, p.head_dim,
                 x[2 * half] * p.scale, x[2 * half + 1] * p.scale);
    }
  }
};

// dq of one query tile from one key tile: added to that of the keys before, and stored after the
// last, or left to atomics. At most 64 columns at a time, which bounds the registers.
template <typename T, class C>
LDM_DEVICE void query_gradient(T type, const FlashParams& p, Tile<C::kBlockQ> ds,
                               Tile<C::kPadded> keys, int batch, int head, int query, int key) {
  const bool last = key + C::kBlockK >= key_limit(p, query + C::kBlockQ - 1);
  constexpr int kMost = C::kPadded > 192 ? 32 : 64;
  constexpr int kColumns = C::kDqColumns < kMost ? C::kDqColumns : kMost;
  const DqShare<C> share;
  const int64_t head_index = static_cast<int64_t>(batch) * p.heads + head;
  const int64_t tile = head_index * ceil_div(p.q_len, C::kBlockQ) + query / C::kBlockQ;
  LDM_ROLLED for (int first = 0; first < C::kDqColumns; first += kColumns) {
    float dq[kColumns / 8][4] = {};
    LDM_UNROLL for (int k = 0; k < C::kBlockK / 16; ++k) {
      uint32_t a[4];
      load_a_transposed(a, ds, k * 16, share.row);
      LDM_UNROLL for (int n = 0; n < kColumns / 16; ++n) {
        const int column = share.column + first + n * 16;
        if (first + n * 16 >= C::kDqColumns || column >= C::kPadded) break;
        uint32_t b[4];
        load_b_transposed(b, keys, k * 16, column);
        mma(type, dq[2 * n], a, b[0], b[1]);
        mma(type, dq[2 * n + 1], a, b[2], b[3]);
      }
    }
    LDM_UNROLL for (int n = 0; n < kColumns / 8; ++n) {
      const int block = first / 8 + n;
      if (block >= C::kDqColumns / 8) break;
      float* target = share.workspace(p, tile) + block * 4 * kWarp;
      if (p.dq_mode == kAtomic) {
        LDM_UNROLL for (int e = 0; e < 4; ++e) add_atomic(target + e * kWarp, dq[n][e]);
        continue;
      }
      if (key > 0) {
        LDM_UNROLL for (int e = 0; e < 4; ++e) dq[n][e] += target[e * kWarp];
      }
      if (last) {
        share.store(type, rows_of(p.dq, batch, head), query, block, dq[n], p);
      } else {
        LDM_UNROLL for (int e = 0; e < 4; ++e) target[e * kWarp] = dq[n][e];
      }
    }
  }
}

// What a block does with one tile of keys: which queries it meets, and where its tiles lie.
template <class C>
struct KeyTile {
  const FlashParams& p;
  int batch, kv_head, group, key;
  int first, q_tiles;  // the first queries of a causal head see none of these keys
  int begin, end;      // steps: a step is one tile of queries of one head of the group
  Tile<C::kPadded> k, v;
  Tile<C::kBlockQ> ds, scores;
  uint32_t stages, floats;

  LDM_DEVICE explicit KeyTile(const FlashParams& params) : p(params), group(p.heads / p.kv_heads) {
    const int k_tiles = ceil_div(p.k_len, C::kBlockK);
    const int blocks = p.dq_mode == kInTurn ? p.splits : k_tiles;  // a head
    const int part = static_cast<int>(block_index() % blocks);
    batch = static_cast<int>(block_index() / blocks / p.kv_heads);
    kv_head = static_cast<int>(block_index() / blocks % p.kv_heads);
    key = (p.dq_mode == kInTurn ? static_cast<int>(p.turn) : part) * C::kBlockK;
    first = p.causal ? key / C::kBlockQ : 0;
    q_tiles = max(ceil_div(p.q_len, C::kBlockQ) - first, 0);
    const int share = ceil_div(group * q_tiles, p.splits);
    begin = p.dq_mode == kInTurn ? min(part * share, group * q_tiles) : 0;
    end = p.dq_mode == kInTurn ? min(begin + share, group * q_tiles) : group * q_tiles;
    k = {shared_base()};
    v = k.rows_from(C::kBlockK);
    stages = v.rows_from(C::kBlockK).base;
    ds = {stages + C::kStages * C::kStageBytes};
    scores = {ds.base + (C::kColumnWarps > 1 ? C::kScoreBytes : 0)};
    floats = scores.base + C::kScoreBytes;
  }
  LDM_DEVICE int head(int step) const { return kv_head * group + step / q_tiles; }
  LDM_DEVICE int query(int step) const { return (first + step % q_tiles) * C::kBlockQ; }
  LDM_DEVICE QueryStage<C> stage(int step) const {
    return QueryStage<C>(stages, floats, step - begin);
  }
  LDM_DEVICE void start(int step) const {
    if (step < end) stage(step).load(p, batch, head(step), query(step));
    copy_commit();
  }
  LDM_DEVICE void start_keys() const {
    const Rows keys = rows_of(p.k, batch, kv_head), values = rows_of(p.v, batch, kv_head);
    load_tile<C::kBlockK, C::kThreads>(k, keys, key, p.k_len, p.head_dim);
    load_tile<C::kBlockK, C::kThreads>(v, values, key, p.k_len, p.head_dim);
    copy_commit();  // a group of their own: there may be no query that sees these keys
  }
  // The lane's own floats of this block's part of the workspace.
  LDM_DEVICE float* workspace(int part) const {
    const int64_t head_index = static_cast<int64_t>(batch) * p.kv_heads + kv_head;
    return p.workspace + (head_index * p.splits + part) * C::kDkvFloats + thread_index();
  }
};

// The keys and columns of dK and dV that a warp owns.
template <class C>
struct WarpShare {
  int row, query, column;
  LDM_DEVICE WarpShare() {
    const int warp = thread_index() / kWarp;
    row = warp % C::kKeyWarps * C::kWarpKeys;
    query = warp / C::kKeyWarps * C::kWarpQueries;
    column = warp / C::kKeyWarps * C::kWarpColumns;
  }
};

template <class C>
using KeyGradient = float[C::kRowTiles][C::kWarpColumns / 8][4];

// One step: dk and dv gain from one tile of queries, and its dq from this tile of keys.
template <typename T, class C, bool kHasMask>
LDM_DEVICE void meet_queries(KeyGradient<C>& dk, KeyGradient<C>& dv, const KeyTile<C>& tile,
                             const WarpShare<C>& warp, int step) {
  const FlashParams& p = tile.p;
  const QueryStage<C> stage = tile.stage(step);
  const int head = tile.head(step), query = tile.query(step);
  float s[C::kRowTiles][C::kWarpQueries / 8][4] = {};
  float ds[C::kRowTiles][C::kWarpQueries / 8][4] = {};
  multiply_rows(T(), s, tile.k, warp.row, stage.q, warp.query);
  multiply_rows(T(), ds, tile.v, warp.row, stage.d_o, warp.query);
  probabilities<T, C, kHasMask>(s, ds, p, stage, tile.batch, head, tile.key + warp.row,
                                query + warp.query, warp.query);
  LDM_UNROLL for (int r = 0; r < C::kRowTiles; ++r) {
    LDM_UNROLL for (int n = 0; n < C::kWarpQueries / 8; ++n) {
      const int row = warp.row + r * 16, column = warp.query + n * 8;
      store_accumulator(T(), tile.ds, row, column, ds[r][n]);
      if constexpr (C::kColumnWarps > 1) store_accumulator(T(), tile.scores, row, column, s[r][n]);
    }
  }
  if constexpr (C::kColumnWarps > 1) sync_block();
  accumulate<T, C>(T(), dv, s, tile.scores, warp.row, stage.d_o, warp.column);
  accumulate<T, C>(T(), dk, ds, tile.ds, warp.row, stage.q, warp.column);
  if (p.dq_mode == kSeparateKernel) return;
  if constexpr (C::kColumnWarps == 1) sync_block();
  query_gradient<T, C>(T(), p, tile.ds, tile.k, tile.batch, head, query, tile.key);
}

// dk and dv leave the block: as rows of the result, or as floats where other blocks have a part.
template <typename T, class C>
LDM_DEVICE void store_keys(KeyGradient<C>& dk, KeyGradient<C>& dv, const KeyTile<C>& tile,
                           const WarpShare<C>& warp) {
  const FlashParams& p = tile.p;
  const bool shared = p.splits > 1;
  float* part = tile.workspace(static_cast<int>(block_index() % p.splits));
  LDM_UNROLL for (int r = 0; r < C::kRowTiles; ++r) {
    LDM_UNROLL for (int n = 0; n < C::kWarpColumns / 8; ++n) {
      LDM_UNROLL for (int e = 0; e < 4; ++e) dk[r][n][e] *= p.scale;
      if (!shared) {
        store_accumulator(T(), tile.k, warp.row + r * 16, warp.column + n * 8, dk[r][n]);
        store_accumulator(T(), tile.v, warp.row + r * 16, warp.column + n * 8, dv[r][n]);
        continue;
      }
      const int at = (r * (C::kWarpColumns / 8) + n) * 8;
      LDM_UNROLL for (int e = 0; e < 4; ++e) {
        part[(at + e) * C::kThreads] = dk[r][n][e];
        part[(at + 4 + e) * C::kThreads] = dv[r][n][e];
      }
    }
  }
  if (shared) return;
  sync_block();
  store_tile<C::kBlockK, C::kThreads>(rows_of(p.dk, tile.batch, tile.kv_head), tile.k, tile.key,
                                      p.k_len, p.head_dim);
  store_tile<C::kBlockK, C::kThreads>(rows_of(p.dv, tile.batch, tile.kv_head), tile.v, tile.key,
                                      p.k_len, p.head_dim);
}

template <typename T, class C, bool kHasMask>
LDM_KERNEL(C::kThreads, 1)
flash_bwd_kernel(LDM_PARAMS p) {
  const KeyTile<C> tile(p);
  const WarpShare<C> warp;
  tile.start_keys();
  if (p.dq_mode == kInTurn && p.turn == 0) {  // the first turn has every query
    for (int step = tile.begin; step < tile.end; ++step) {
      store_deltas<T, C>(p, tile.batch, tile.head(step), tile.query(step));
    }
    sync_block();
  }
  const auto start = [&](int step) { tile.start(tile.begin + step); };
  LDM_UNROLL for (int step = 0; step < C::kStages - 1; ++step) start(step);
  KeyGradient<C> dk = {}, dv = {};
  LDM_ROLLED for (int step = 0; step < tile.end - tile.begin; ++step) {
    await_step<C::kStages>(step, start);
    meet_queries<T, C, kHasMask>(dk, dv, tile, warp, tile.begin + step);
  }
  copy_wait<0>();
  sync_block();
  store_keys<T, C>(dk, dv, tile, warp);
}

}  // namespace ldm
