// Attention backward by keys: a block holds one tile of K and V, meets every tile of queries, and
// keeps dK and dV in registers (Dao 2023, algorithm 2, with the scores transposed):
//     pᵀ = exp(scale · k qᵀ − lse)     dv += pᵀ do
//     dsᵀ = pᵀ ∘ (v doᵀ − delta)       dk += scale · dsᵀ q     dq += scale · ds k
// Rows of the scores are keys, so pᵀ and dsᵀ are operand A of the next product without leaving the
// registers; only ds passes through shared memory, for dq, where a block needs it transposed.
//
// dq, by p.dq_mode:
//   kStoreOnce       one block holds all keys: it writes dq. One launch, no workspace, no atomics.
//   kAtomic          blocks add to a float32 workspace; another launch rounds it. Not
//   deterministic. kSeparateKernel  not computed here but by flash_bwd_dq.cuh, which recomputes the
//   scores: 7
//                    products instead of 5, for a result that is the same in every run.
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
    return p.dq_accum + tile * C::kDqFloats + warp * 16 * C::kDqColumns + lane;
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

// dq of one query tile from this block's keys: stored, or added to the workspace. At most 64
// columns at a time, which bounds the registers.
template <typename T, class C>
LDM_DEVICE void query_gradient(T type, const FlashParams& p, Tile<C::kBlockQ> ds,
                               Tile<C::kPadded> keys, int batch, int head, int query) {
  constexpr int kMost = C::kPadded > 192 ? 16 : 64;
  constexpr int kColumns = C::kDqColumns < kMost ? C::kDqColumns : kMost;
  const DqShare<C> share;
  const int64_t head_index = static_cast<int64_t>(batch) * p.heads + head;
  const int64_t tile = head_index * ceil_div(p.q_len, C::kBlockQ) + query / C::kBlockQ;
  LDM_UNROLL for (int first = 0; first < C::kDqColumns; first += kColumns) {
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
      if (p.dq_mode == kStoreOnce) {
        share.store(type, rows_of(p.dq, batch, head), query, block, dq[n], p);
      } else {
        float* target = share.workspace(p, tile) + block * 4 * kWarp;
        LDM_UNROLL for (int e = 0; e < 4; ++e) add_atomic(target + e * kWarp, dq[n][e]);
      }
    }
  }
}

template <typename T, class C, bool kHasMask>
LDM_KERNEL(C::kThreads, 1)
flash_bwd_kernel(LDM_PARAMS p) {
  const int k_tiles = ceil_div(p.k_len, C::kBlockK);
  const int group = p.heads / p.kv_heads;
  const int k_begin = static_cast<int>(block_index() % k_tiles) * C::kBlockK;
  const int batch = static_cast<int>(block_index() / k_tiles / p.kv_heads);
  const int kv_head = static_cast<int>(block_index() / k_tiles % p.kv_heads);
  const int warp = thread_index() / kWarp;
  const int warp_row = warp % C::kKeyWarps * C::kWarpKeys;
  const int warp_query = warp / C::kKeyWarps * C::kWarpQueries;
  const int warp_column = warp / C::kKeyWarps * C::kWarpColumns;

  const Tile<C::kPadded> k_tile = {shared_base()}, v_tile = k_tile.rows_from(C::kBlockK);
  const uint32_t stages = v_tile.rows_from(C::kBlockK).base;
  const Tile<C::kBlockQ> ds_tile = {stages + C::kStages * C::kStageBytes};
  const Tile<C::kBlockQ> p_tile = {ds_tile.base + (C::kColumnWarps > 1 ? C::kScoreBytes : 0)};
  const uint32_t floats = p_tile.base + C::kScoreBytes;

  // the first queries of a causal head see none of these keys
  const int first = p.causal ? k_begin / C::kBlockQ : 0;
  const int q_tiles = max(ceil_div(p.q_len, C::kBlockQ) - first, 0);
  const int steps = group * q_tiles;
  const auto head_of = [&](int step) { return kv_head * group + step / q_tiles; };
  const auto query_of = [&](int step) { return (first + step % q_tiles) * C::kBlockQ; };
  const auto start = [&](int step) {
    if (step < steps) {
      QueryStage<C>(stages, floats, step).load(p, batch, head_of(step), query_of(step));
    }
    copy_commit();
  };

  load_tile<C::kBlockK, C::kThreads>(k_tile, rows_of(p.k, batch, kv_head), k_begin, p.k_len,
                                     p.head_dim);
  load_tile<C::kBlockK, C::kThreads>(v_tile, rows_of(p.v, batch, kv_head), k_begin, p.k_len,
                                     p.head_dim);
  copy_commit();  // a group of their own: there may be no query that sees these keys
  if (p.fused_delta) {
    for (int row = warp; row < group * p.q_len; row += C::kWarps) {
      const int head = kv_head * group + row / p.q_len, query = row % p.q_len;
      const float delta = row_delta<T>(p, batch, head, query);
      p.delta[(static_cast<int64_t>(batch) * p.heads + head) * p.q_len + query] = delta;
    }
    sync_block();
  }
  LDM_UNROLL for (int step = 0; step < C::kStages - 1; ++step) start(step);

  float dk[C::kRowTiles][C::kWarpColumns / 8][4] = {};
  float dv[C::kRowTiles][C::kWarpColumns / 8][4] = {};
  LDM_ROLLED for (int step = 0; step < steps; ++step) {
    await_step<C::kStages>(step, start);
    const QueryStage<C> stage(stages, floats, step);
    const int head = head_of(step), query = query_of(step);
    float s[C::kRowTiles][C::kWarpQueries / 8][4] = {};
    float ds[C::kRowTiles][C::kWarpQueries / 8][4] = {};
    multiply_rows(T(), s, k_tile, warp_row, stage.q, warp_query);
    multiply_rows(T(), ds, v_tile, warp_row, stage.d_o, warp_query);
    probabilities<T, C, kHasMask>(s, ds, p, stage, batch, head, k_begin + warp_row,
                                  query + warp_query, warp_query);
    LDM_UNROLL for (int r = 0; r < C::kRowTiles; ++r) {
      LDM_UNROLL for (int n = 0; n < C::kWarpQueries / 8; ++n) {
        const int row = warp_row + r * 16, column = warp_query + n * 8;
        store_accumulator(T(), ds_tile, row, column, ds[r][n]);
        if constexpr (C::kColumnWarps > 1) store_accumulator(T(), p_tile, row, column, s[r][n]);
      }
    }
    if constexpr (C::kColumnWarps > 1) sync_block();
    accumulate<T, C>(T(), dv, s, p_tile, warp_row, stage.d_o, warp_column);
    accumulate<T, C>(T(), dk, ds, ds_tile, warp_row, stage.q, warp_column);
    if (p.dq_mode != kSeparateKernel) {
      if constexpr (C::kColumnWarps == 1) sync_block();
      query_gradient<T, C>(T(), p, ds_tile, k_tile, batch, head, query);
    }
  }

  copy_wait<0>();
  sync_block();
  LDM_UNROLL for (int r = 0; r < C::kRowTiles; ++r) {
    LDM_UNROLL for (int n = 0; n < C::kWarpColumns / 8; ++n) {
      LDM_UNROLL for (int e = 0; e < 4; ++e) dk[r][n][e] *= p.scale;
      store_accumulator(T(), k_tile, warp_row + r * 16, warp_column + n * 8, dk[r][n]);
      store_accumulator(T(), v_tile, warp_row + r * 16, warp_column + n * 8, dv[r][n]);
    }
  }
  sync_block();
  store_tile<C::kBlockK, C::kThreads>(rows_of(p.dk, batch, kv_head), k_tile, k_begin, p.k_len,
                                      p.head_dim);
  store_tile<C::kBlockK, C::kThreads>(rows_of(p.dv, batch, kv_head), v_tile, k_begin, p.k_len,
                                      p.head_dim);
}

// A block per tile of queries: delta of its rows, and zeros in its part of the workspace.
template <typename T, class C>
LDM_KERNEL(C::kThreads, 1)
flash_bwd_prepare_kernel(LDM_PARAMS p) {
  const int q_tiles = ceil_div(p.q_len, C::kBlockQ);
  const int64_t head_index = block_index() / q_tiles;
  const int batch = static_cast<int>(head_index / p.heads);
  const int head = static_cast<int>(head_index % p.heads);
  const int begin = static_cast<int>(block_index() % q_tiles) * C::kBlockQ;
  const int end = min(begin + C::kBlockQ, p.q_len);
  for (int query = begin + thread_index() / kWarp; query < end; query += C::kWarps) {
    p.delta[head_index * p.q_len + query] = row_delta<T>(p, batch, head, query);
  }
  if (p.dq_mode != kAtomic) return;
  float* part = p.dq_accum + block_index() * C::kDqFloats;
  for (int i = thread_index(); i < C::kDqFloats; i += C::kThreads) part[i] = 0.0f;
}

// A block per tile of queries: dq from the workspace, scaled and rounded.
template <typename T, class C>
LDM_KERNEL(C::kThreads, 1)
flash_bwd_round_kernel(LDM_PARAMS p) {
  const int q_tiles = ceil_div(p.q_len, C::kBlockQ);
  const int64_t head_index = block_index() / q_tiles;
  const int query = static_cast<int>(block_index() % q_tiles) * C::kBlockQ;
  const Rows dq =
      rows_of(p.dq, static_cast<int>(head_index / p.heads), static_cast<int>(head_index % p.heads));
  const DqShare<C> share;
  const float* source = share.workspace(p, block_index());
  LDM_UNROLL for (int n = 0; n < C::kDqColumns / 8; ++n) {
    float x[4];
    LDM_UNROLL for (int e = 0; e < 4; ++e) x[e] = source[(n * 4 + e) * kWarp];
    share.store(T(), dq, query, n, x, p);
  }
}

}  // namespace ldm
