// Attention forward: out = softmax(scale · q kᵀ + mask) v, and the log of the softmax's sum.
// A block computes one tile of queries of one head. Tiles of K and V arrive in turn, K₀ V₀ K₁ V₁ …,
// through one ring of slots, so that the next ones are under way while this one is multiplied.
#pragma once
#include "../mask.cuh"
#include "../softmax.cuh"
#include "products.cuh"
#include "tiles.h"

namespace ldm {

template <class C>
struct KeyValueRing {
  const FlashParams& p;  // pointers and strides are found anew each time: they cost registers
  int batch, kv_head;
  uint32_t base;
  int steps;  // twice the number of key tiles

  LDM_DEVICE Tile<C::kPadded> slot(int step) const {
    return {base + static_cast<uint32_t>(step % C::kSlots) * Tile<C::kPadded>::bytes(C::kBlockK)};
  }
  // Every step commits a group, an empty one past the end, so that waiting can count groups.
  LDM_DEVICE void start(int step) const {
    if (step < steps) {
      const Rows rows = rows_of(step % 2 == 0 ? p.k : p.v, batch, kv_head);
      load_tile<C::kBlockK, C::kThreads>(slot(step), rows, step / 2 * C::kBlockK, p.k_len,
                                         p.head_dim);
    }
    copy_commit();
  }
  // The tile of this step; the slot of the step before is free from here on and filled anew.
  LDM_DEVICE Tile<C::kPadded> next(int step) const {
    await_step<C::kSlots>(step, [&](int later) { start(later); });
    return slot(step);
  }
};

// Divides by the sums, leaves the rounded output in the queries' tile, writes the LSE.
template <typename T, class C>
LDM_DEVICE void finish_rows(T type, float (&out)[C::kRowTiles][C::kHeadDim / 8][4],
                            const SoftmaxRows<C::kRowTiles>& rows, Tile<C::kPadded> tile,
                            float* lse, float scale, int row, int q_len) {
  const int lane = thread_index() % kWarp;
  LDM_UNROLL for (int r = 0; r < C::kRowTiles; ++r) {
    float inverse[2];
    LDM_UNROLL for (int half = 0; half < 2; ++half) {
      const float sum = quad_sum(rows.sum[r][half]);
      inverse[half] = sum == 0.0f ? 0.0f : 1.0f / sum;
      const int query = row + r * 16 + lane / 4 + half * 8;
      if (lane % 4 == 0 && query < q_len) {
        lse[query] = sum == 0.0f ? -INFINITY : rows.max[r][half] * scale * kLn2 + natural_log(sum);
      }
    }
    LDM_UNROLL for (int n = 0; n < C::kHeadDim / 8; ++n) {
      LDM_UNROLL for (int e = 0; e < 4; ++e) out[r][n][e] *= inverse[e / 2];
      store_accumulator(type, tile, r * 16, n * 8, out[r][n]);
    }
  }
}

template <typename T, class C, bool kHasMask>
LDM_KERNEL(C::kThreads, 1)
flash_fwd_kernel(LDM_PARAMS p) {
  constexpr int kWarpRows = C::kRowTiles * 16;
  const int q_tiles = ceil_div(p.q_len, C::kBlockQ);
  const int64_t head_index = block_index() / q_tiles;
  // the last queries of a causal head have the most keys: they start first
  const int q_begin = (q_tiles - 1 - static_cast<int>(block_index() % q_tiles)) * C::kBlockQ;
  const int batch = static_cast<int>(head_index / p.heads);
  const int head = static_cast<int>(head_index % p.heads);
  const int kv_head = head / (p.heads / p.kv_heads);
  const int warp_row = thread_index() / kWarp * kWarpRows;
  const int row = q_begin + warp_row;
  const int key_end = key_limit(p, q_begin + C::kBlockQ - 1);
  const int k_tiles = ceil_div(key_end, C::kBlockK);

  const Tile<C::kPadded> q_tile = {shared_base()};
  const KeyValueRing<C> ring = {p, batch, kv_head, q_tile.rows_from(C::kBlockQ).base, 2 * k_tiles};
  load_tile<C::kBlockQ, C::kThreads>(q_tile, rows_of(p.q, batch, head), q_begin, p.q_len,
                                     p.head_dim);
  LDM_UNROLL for (int step = 0; step < C::kSlots - 1; ++step) ring.start(step);
  copy_wait<C::kSlots - 2>();
  sync_block();
  RowOperand<C::kPadded, C::kRowTiles, C::kQueryInRegisters> query;
  query.load(q_tile.rows_from(warp_row));

  // exp2 folds log2(e) into the scale; a masked score is scaled before the mask is added
  const float scale = kHasMask ? 1.0f : p.scale * kLog2e;
  float out[C::kRowTiles][C::kHeadDim / 8][4] = {};
  SoftmaxRows<C::kRowTiles> softmax;
  softmax.clear();
  LDM_ROLLED for (int tile = 0; tile < k_tiles; ++tile) {
    const int key = tile * C::kBlockK;
    float s[C::kRowTiles][C::kBlockK / 8][4] = {};
    multiply_rows<C::kUnroll>(T(), s, query, ring.next(2 * tile), 0);
    if constexpr (kHasMask) scale_and_mask<T, false>(s, p, batch, head, row, key);
    if (key + C::kBlockK > key_limit(p, row)) hide_unseen_keys<false>(s, p, row, key);
    online_softmax(s, out, softmax, scale);
    accumulate(T(), out, s, ring.next(2 * tile + 1), 0, 0);
  }
  copy_wait<0>();
  sync_block();
  finish_rows<T, C>(T(), out, softmax, q_tile.rows_from(warp_row), p.lse + head_index * p.q_len,
                    scale, row, p.q_len);
  sync_block();
  store_tile<C::kBlockQ, C::kThreads>(rows_of(p.o, batch, head), q_tile, q_begin, p.q_len,
                                      p.head_dim);
}

}  // namespace ldm
