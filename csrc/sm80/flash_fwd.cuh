// Attention forward: out = softmax(scale · q kᵀ + mask) v, and the log of the softmax's sum.
// A block computes one tile of queries of one head. The keys pass in slices, and each unit works
// under the products of another: the exponentials of a slice under q kᵀ of the next, the next one's
// maxima under this one's p v. So the keys of a slice are needed one slice before its values, and a
// stage of the pipeline holds values from a key on and keys from one slice later on.
#pragma once
#include "../dropout.cuh"
#include "../mask.cuh"
#include "../softmax.cuh"
#include "products.cuh"
#include "tiles.h"

namespace ldm {

template <class C>
struct KeyValueStages {
  using InputTile = Tile<C::kPadded>;
  const FlashParams& p;
  Rows k, v;  // of this head
  uint32_t base;
  int key_end;

  LDM_DEVICE InputTile first_keys() const { return {base}; }
  LDM_DEVICE InputTile values(int stage) const {
    return {base + static_cast<uint32_t>(InputTile::bytes(C::kSlice) +
                                         stage % C::kStages * 2 * InputTile::bytes(C::kBlockK))};
  }
  LDM_DEVICE InputTile keys(int stage) const { return values(stage).rows_from(C::kBlockK); }
  LDM_DEVICE void start_first_keys() const {
    load_tile<C::kSlice, C::kThreads>(first_keys(), k, 0, p.k_len, p.head_dim);
  }
  // Every stage commits a group, an empty one past the end, so that waiting can count groups.
  LDM_DEVICE void start(int stage) const {
    const int key = stage * C::kBlockK;
    if (key < key_end) {
      load_tile<C::kBlockK, C::kThreads>(values(stage), v, key, p.k_len, p.head_dim);
      load_tile<C::kBlockK, C::kThreads>(keys(stage), k, key + C::kSlice, p.k_len, p.head_dim);
    }
    copy_commit();
  }
};

// Divides by the sums and by the share of weights that dropout keeps, leaves the rounded output in
// the queries' tile, writes the LSE.
template <typename T, class C>
LDM_DEVICE void finish_rows(T type, float (&out)[C::kRowTiles][C::kHeadDim / 8][4],
                            const SoftmaxRows<C::kRowTiles>& rows, Tile<C::kPadded> tile,
                            float* lse, float kept, int row, int q_len) {
  const int lane = thread_index() % kWarp;
  LDM_UNROLL for (int r = 0; r < C::kRowTiles; ++r) {
    float inverse[2];
    LDM_UNROLL for (int half = 0; half < 2; ++half) {
      const float sum = quad_sum(rows.sum[r][half]);
      inverse[half] = sum == 0.0f ? 0.0f : 1.0f / (sum * kept);
      const int query = row + r * 16 + lane / 4 + half * 8;
      if (lane % 4 == 0 && query < q_len) {
        lse[query] = sum == 0.0f ? -INFINITY : rows.base[r][half] * kLn2 + natural_log(sum);
      }
    }
    LDM_UNROLL for (int n = 0; n < C::kHeadDim / 8; ++n) {
      LDM_UNROLL for (int e = 0; e < 4; ++e) out[r][n][e] *= inverse[e / 2];
      store_accumulator(type, tile, r * 16, n * 8, out[r][n]);
    }
  }
}

template <class C>
using Scores = float[C::kRowTiles][C::kSlice / 8][4];

template <typename T, class C, bool kGeneral>
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
  const int warp_row = warp_index() * kWarpRows;
  const int row = q_begin + warp_row;
  const int key_end = key_limit(p, row + kWarpRows - 1);  // of this warp

  const Tile<C::kPadded> q_tile = {shared_base()};
  const KeyValueStages<C> stages = {p, rows_of(p.k, batch, kv_head), rows_of(p.v, batch, kv_head),
                                    q_tile.rows_from(C::kBlockQ).base,
                                    key_limit(p, q_begin + C::kBlockQ - 1)};
  const auto start = [&](int stage) { stages.start(stage); };
  load_tile<C::kBlockQ, C::kThreads>(q_tile, rows_of(p.q, batch, head), q_begin, p.q_len,
                                     p.head_dim);
  stages.start_first_keys();
  copy_commit();
  LDM_UNROLL for (int stage = 0; stage < C::kStages - 1; ++stage) start(stage);
  copy_wait<C::kStages - 1>();
  sync_block();
  RowOperand<C::kPadded, C::kRowTiles, C::kKept> query;
  query.load(q_tile.rows_from(warp_row));

  // exp2 folds log2(e) into the scale; a masked score is scaled before the mask is added
  const float scale = kGeneral ? 1.0f : p.scale * kLog2e;
  const auto hide = [&](Scores<C>& s, int key) {
    if constexpr (kGeneral) scale_and_mask<T, false>(s, p, batch, head, row, key);
    if (!LDM_LIKELY(key + C::kSlice <= key_limit(p, row))) hide_unseen_keys<false>(s, p, row, key);
  };
  float out[C::kRowTiles][C::kHeadDim / 8][4] = {};
  SoftmaxRows<C::kRowTiles> softmax;
  softmax.clear();
  Scores<C> slices[2] = {};
  multiply_rows<C::kSteps>(T(), slices[0], query, stages.first_keys(), 0);
  hide(slices[0], 0);
  softmax.look(slices[0], 0, 1);
  LDM_ROLLED for (int stage = 0; stage * C::kBlockK < stages.key_end; ++stage) {
    await_step<C::kStages>(stage, start);
    LDM_UNROLL for (int i = 0; i < C::kSlices; ++i) {
      const int key = stage * C::kBlockK + i * C::kSlice;
      if (key >= key_end) break;
      Scores<C>&now = slices[i % 2], &next = slices[(i + 1) % 2];
      softmax.rebase(out, scale);
      if (key + C::kSlice < key_end) {
        fill(next, 0.0f);
        multiply_rows<C::kSteps>(
            T(), next, query, stages.keys(stage), i * C::kSlice,
            [&](int part, int parts) { softmax.exponentiate(now, scale, part, parts); });
        hide(next, key + C::kSlice);
      } else {
        softmax.exponentiate(now, scale, 0, 1);
      }
      if constexpr (kGeneral) {
        if (p.seed) {
          for_each_element(now, row, key, [&](float& weight, int query, int at_key) {
            if (!is_kept(p, batch, head, query, at_key)) weight = 0.0f;
          });
        }
      }
      accumulate(T(), out, now, stages.values(stage), i * C::kSlice, 0,
                 [&](int part, int parts) { softmax.look(next, part, parts); });
      if constexpr (C::kSlices == 1) {
        LDM_UNROLL for (int r = 0; r < C::kRowTiles; ++r) {
          LDM_UNROLL for (int n = 0; n < C::kSlice / 8; ++n) {
            LDM_UNROLL for (int e = 0; e < 4; ++e) now[r][n][e] = next[r][n][e];
          }
        }
      }
    }
  }
  copy_wait<0>();
  sync_block();
  float* lse = p.lse + (static_cast<int64_t>(batch) * p.heads + head) * p.q_len;
  finish_rows<T, C>(T(), out, softmax, q_tile.rows_from(warp_row), lse, 1.0f - p.dropout_p, row,
                    p.q_len);
  sync_block();
  store_tile<C::kBlockQ, C::kThreads>(rows_of(p.o, batch, head), q_tile, q_begin, p.q_len,
                                      p.head_dim);
}

}  // namespace ldm
