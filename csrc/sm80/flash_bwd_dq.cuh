// dQ by queries, the same in every run: a block holds one tile of Q and dO and meets every tile of
// K and V, recomputing the scores from the LSE:
//     p = exp(scale · q kᵀ − lse)     ds = p ∘ (do vᵀ − delta)     dq = scale · Σ ds k
#pragma once
#include "../mask.cuh"
#include "tile.cuh"
#include "tiles.h"

namespace ldm {

// s → ds = p (dp − delta), p = exp2(s − lse). Rows are queries; a lane has two of them.
template <typename T, class C, bool kHasMask>
LDM_DEVICE void score_gradient(float (&s)[1][C::kBlockK / 8][4],
                               const float (&dp)[1][C::kBlockK / 8][4], const FlashParams& p,
                               const float (&lse)[2], const float (&delta)[2], int batch, int head,
                               int query, int key) {
  const int lane = thread_index() % kWarp;
  const bool whole = key + C::kBlockK <= key_limit(p, query);
  LDM_UNROLL for (int n = 0; n < C::kBlockK / 8; ++n) {
    LDM_UNROLL for (int e = 0; e < 4; ++e) {
      const int at_query = query + lane / 4 + e / 2 * 8,
                at_key = key + n * 8 + lane % 4 * 2 + e % 2;
      float x = s[0][n][e] * (p.scale * kLog2e) - lse[e / 2];
      if constexpr (kHasMask) {
        if (at_query < p.q_len && at_key < p.k_len) {
          x += mask_term<T>(p, batch, head, at_query, at_key);
        }
      }
      x = exp2_approx(x);
      if (!whole && at_key >= key_limit(p, at_query)) x = 0.0f;
      s[0][n][e] = x * (dp[0][n][e] - delta[e / 2]);
    }
  }
}

template <typename T, class C, bool kHasMask>
LDM_KERNEL(C::kThreads, 1)
flash_bwd_dq_kernel(LDM_PARAMS p) {
  const int q_tiles = ceil_div(p.q_len, C::kBlockQ);
  const int64_t head_index = block_index() / q_tiles;
  const int q_begin = (q_tiles - 1 - static_cast<int>(block_index() % q_tiles)) * C::kBlockQ;
  const int batch = static_cast<int>(head_index / p.heads);
  const int head = static_cast<int>(head_index % p.heads);
  const int kv_head = head / (p.heads / p.kv_heads);
  const int lane = thread_index() % kWarp, warp_row = thread_index() / kWarp * 16;
  const int k_tiles = ceil_div(key_limit(p, q_begin + C::kBlockQ - 1), C::kBlockK);

  const Tile<C::kPadded> q_tile = {shared_base()}, do_tile = q_tile.rows_from(C::kBlockQ);
  const Tile<C::kPadded> stages = do_tile.rows_from(C::kBlockQ);
  const auto k_stage = [&](int step) {
    return stages.rows_from(step % C::kStages * 2 * C::kBlockK);
  };
  const auto start = [&](int step) {
    if (step < k_tiles) {
      const int key = step * C::kBlockK;
      load_tile<C::kBlockK, C::kThreads>(k_stage(step), rows_of(p.k, batch, kv_head), key, p.k_len,
                                         p.head_dim);
      load_tile<C::kBlockK, C::kThreads>(k_stage(step).rows_from(C::kBlockK),
                                         rows_of(p.v, batch, kv_head), key, p.k_len, p.head_dim);
    }
    copy_commit();
  };
  load_tile<C::kBlockQ, C::kThreads>(q_tile, rows_of(p.q, batch, head), q_begin, p.q_len,
                                     p.head_dim);
  load_tile<C::kBlockQ, C::kThreads>(do_tile, rows_of(p.d_o, batch, head), q_begin, p.q_len,
                                     p.head_dim);
  copy_commit();
  LDM_UNROLL for (int step = 0; step < C::kStages - 1; ++step) start(step);

  float lse[2], delta[2];
  LDM_UNROLL for (int half = 0; half < 2; ++half) {
    const int query = q_begin + warp_row + lane / 4 + half * 8;
    const float x = query < p.q_len ? p.lse[head_index * p.q_len + query] : 0.0f;
    lse[half] = x == -INFINITY ? INFINITY : x * kLog2e;
    delta[half] = query < p.q_len ? p.delta[head_index * p.q_len + query] : 0.0f;
  }
  float dq[C::kPadded / 8][4] = {};
  LDM_ROLLED for (int step = 0; step < k_tiles; ++step) {
    await_step<C::kStages>(step, start);
    const Tile<C::kPadded> keys = k_stage(step), values = keys.rows_from(C::kBlockK);
    float s[1][C::kBlockK / 8][4] = {}, dp[1][C::kBlockK / 8][4] = {};
    multiply_rows(T(), s, q_tile, warp_row, keys, 0);
    multiply_rows(T(), dp, do_tile, warp_row, values, 0);
    score_gradient<T, C, kHasMask>(s, dp, p, lse, delta, batch, head, q_begin + warp_row,
                                   step * C::kBlockK);
    LDM_UNROLL for (int k = 0; k < C::kBlockK / 16; ++k) {
      uint32_t a[4];
      accumulators_to_a(T(), a, s[0][2 * k], s[0][2 * k + 1]);
      LDM_UNROLL for (int n = 0; n < C::kPadded / 16; ++n) {
        uint32_t b[4];
        load_b_transposed(b, keys, k * 16, n * 16);
        mma(T(), dq[2 * n], a, b[0], b[1]);
        mma(T(), dq[2 * n + 1], a, b[2], b[3]);
      }
    }
  }

  copy_wait<0>();
  sync_block();
  LDM_UNROLL for (int n = 0; n < C::kPadded / 8; ++n) {
    LDM_UNROLL for (int e = 0; e < 4; ++e) dq[n][e] *= p.scale;
    store_accumulator(T(), q_tile, warp_row, n * 8, dq[n]);
  }
  sync_block();
  store_tile<C::kBlockQ, C::kThreads>(rows_of(p.dq, batch, head), q_tile, q_begin, p.q_len,
                                      p.head_dim);
}

}  // namespace ldm
