// The small launches around flash_bwd.cuh: delta and zeros before it, sums of floats after it.
#pragma once
#include "flash_bwd.cuh"

namespace ldm {

// A block per key/value head: the sum of the parts that p.splits blocks left, rounded.
template <typename T, class C>
LDM_KERNEL(C::kThreads, 1)
flash_bwd_sum_kernel(LDM_PARAMS p) {
  const int batch = static_cast<int>(block_index() / p.kv_heads);
  const int kv_head = static_cast<int>(block_index() % p.kv_heads);
  const Rows rows[2] = {rows_of(p.dk, batch, kv_head), rows_of(p.dv, batch, kv_head)};
  const WarpShare<C> warp;
  const int lane = thread_index() % kWarp;
  const float* parts = p.workspace + block_index() * p.splits * C::kDkvFloats + thread_index();
  LDM_UNROLL for (int r = 0; r < C::kRowTiles; ++r) {
    LDM_UNROLL for (int n = 0; n < C::kWarpColumns / 8; ++n) {
      float sum[8] = {};
      for (int part = 0; part < p.splits; ++part) {
        const int at = (r * (C::kWarpColumns / 8) + n) * 8;
        LDM_UNROLL for (int e = 0; e < 8; ++e) {
          sum[e] += parts[part * C::kDkvFloats + (at + e) * C::kThreads];
        }
      }
      LDM_UNROLL for (int half = 0; half < 4; ++half) {
        const int key = warp.row + r * 16 + lane / 4 + half % 2 * 8;
        store_pair(T(), rows[half / 2], key, warp.column + n * 8 + lane % 4 * 2, p.k_len,
                   p.head_dim, sum[2 * half], sum[2 * half + 1]);
      }
    }
  }
}

// A block per tile of queries: delta of its rows, and zeros in its part of the workspace.
template <typename T, class C>
LDM_KERNEL(C::kThreads, 1)
flash_bwd_prepare_kernel(LDM_PARAMS p) {
  const int q_tiles = ceil_div(p.q_len, C::kBlockQ);
  const int64_t head_index = block_index() / q_tiles;
  const int batch = static_cast<int>(head_index / p.heads);
  const int head = static_cast<int>(head_index % p.heads);
  store_deltas<T, C>(p, batch, head, static_cast<int>(block_index() % q_tiles) * C::kBlockQ);
  if (p.dq_mode != kAtomic) return;
  float* part = p.workspace + block_index() * C::kDqFloats;
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
