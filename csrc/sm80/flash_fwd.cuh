// Attention forward: out = softmax(scale · q kᵀ + mask) v, and the log of the softmax's sum.
// A block computes one tile of queries of one head. The keys pass in slices, and each unit works
// under the products of another: the exponentials of a slice under q kᵀ of the next. So the keys of
// a slice are needed one slice before its values, and a stage of the pipeline holds values from a
// key on and keys from one slice later on. Where p.splits blocks share out the keys, each leaves a
// float32 output and LSE in p.partial (flash_combine.cu).
//   steady:     weights are measured from the maximum of the first slice, for bfloat16 holds what
//               is far above it. Where sums leave float32 that way, the block starts again:
//   following:  from a maximum that follows, each slice's taken under p v of the one before.
#pragma once
#include <type_traits>

#include "../dropout.cuh"
#include "../mask.cuh"
#include "../softmax.cuh"
#include "products.cuh"
#include "tiles.h"

namespace ldm {

// What a split has of the keys that a block of queries sees: a share of whole stages, or nothing.
struct KeyRange {
  int begin, end;
};
template <class C>
LDM_DEVICE KeyRange share_of_keys(const FlashParams& p, int q_begin, int split, int splits) {
  const int seen = key_limit(p, q_begin + C::kBlockQ - 1);
  if (!C::kSplit) return {0, seen};
  const int share = ceil_div(ceil_div(seen, C::kBlockK), splits) * C::kBlockK;
  return {split * share, min(seen, (split + 1) * share)};
}

template <class C>
struct KeyValueStages {
  using InputTile = Tile<C::kPadded>;
  const FlashParams& p;
  Rows k, v;  // of this head
  uint32_t base;
  int key_begin, key_end;

  LDM_DEVICE InputTile first_keys() const { return {base}; }
  LDM_DEVICE InputTile values(int stage) const {
    return {base + static_cast<uint32_t>(InputTile::bytes(C::kSlice) +
                                         stage % C::kStages * 2 * InputTile::bytes(C::kBlockK))};
  }
  LDM_DEVICE InputTile keys(int stage) const { return values(stage).rows_from(C::kBlockK); }
  LDM_DEVICE void start_first_keys() const {
    load_tile<C::kSlice, C::kThreads>(first_keys(), k, key_begin, p.k_len, p.head_dim);
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

// Divides by the rows' sums and by the share of weights that dropout keeps, writes the LSE.
template <int kRowTiles, int kOutTiles>
LDM_DEVICE void finish_rows(float (&out)[kRowTiles][kOutTiles][4],
                            const SoftmaxRows<kRowTiles>& rows, float* lse, float kept, int row,
                            int q_len) {
  const int lane = thread_index() % kWarp;
  LDM_UNROLL for (int r = 0; r < kRowTiles; ++r) {
    float inverse[2];
    LDM_UNROLL for (int half = 0; half < 2; ++half) {
      const float sum = rows.sum[r][half];
      inverse[half] = sum == 0.0f ? 0.0f : 1.0f / (sum * kept);
      const int query = row + r * 16 + lane / 4 + half * 8;
      if (lane % 4 == 0 && query < q_len) {
        lse[query] = sum == 0.0f ? -INFINITY : rows.base[r][half] * kLn2 + natural_log(sum);
      }
    }
    LDM_UNROLL for (int n = 0; n < kOutTiles; ++n) {
      LDM_UNROLL for (int e = 0; e < 4; ++e) out[r][n][e] *= inverse[e / 2];
    }
  }
}

template <typename T, int kRowTiles, int kOutTiles, int kColumns>
LDM_DEVICE void round_rows(T type, Tile<kColumns> tile,
                           const float (&out)[kRowTiles][kOutTiles][4]) {
  LDM_UNROLL for (int r = 0; r < kRowTiles; ++r) {
    LDM_UNROLL for (int n = 0; n < kOutTiles; ++n) {
      store_accumulator(type, tile, r * 16, n * 8, out[r][n]);
    }
  }
}

// Where a split leaves its part of a head's output, and of its LSE.
LDM_DEVICE float* partial_out(const FlashParams& p, int split, int head_index) {
  const int64_t rows = split * partial_rows(p) + static_cast<int64_t>(head_index) * p.q_len;
  return p.partial + rows * partial_width(p);
}
LDM_DEVICE float* partial_lse(const FlashParams& p, int split, int head_index) {
  return partial_out(p, p.splits, 0) + split * partial_rows(p) +
         static_cast<int64_t>(head_index) * p.q_len;
}

// Writes what of the rows exists; column(n) is the first of a block of columns.
template <int kRowTiles, int kOutTiles, typename F>
LDM_DEVICE void store_partial(const float (&out)[kRowTiles][kOutTiles][4], float* target, int row,
                              int q_len, int width, F&& column) {
  const int lane = thread_index() % kWarp;
  LDM_UNROLL for (int r = 0; r < kRowTiles; ++r) {
    LDM_UNROLL for (int half = 0; half < 2; ++half) {
      const int query = row + r * 16 + lane / 4 + half * 8;
      if (query >= q_len) continue;
      LDM_UNROLL for (int n = 0; n < kOutTiles; ++n) {
        if (column(n) >= width) continue;
        const float pair[2] = {out[r][n][2 * half], out[r][n][2 * half + 1]};
        store_pair(target + static_cast<int64_t>(query) * width + column(n) + lane % 4 * 2, pair);
      }
    }
  }
}

template <class C>
using Scores = float[C::kRowTiles][C::kSlice / 8][4];

// Computes a block's tile of queries; false, and nothing is written, where it must start again.
template <typename T, class C, bool kGeneral>
LDM_DEVICE bool attend_block(const FlashParams& p, bool follow) {
  constexpr int kWarpRows = C::kRowTiles * 16;
  const int q_tiles = ceil_div(p.q_len, C::kBlockQ);
  const int splits = C::kSplit ? p.splits : 1;
  const int block = static_cast<int>(block_index()) / splits;
  const int split = static_cast<int>(block_index()) % splits;
  const int head_index = block / q_tiles;
  // the last queries of a causal head have the most keys: they start first
  const int q_begin = (q_tiles - 1 - block % q_tiles) * C::kBlockQ;
  const int batch = head_index / p.heads, head = head_index % p.heads;
  const int kv_head = head / (p.heads / p.kv_heads);
  const int warp_row = warp_index() * kWarpRows;
  const int row = q_begin + warp_row;
  const KeyRange keys = share_of_keys<C>(p, q_begin, split, splits);
  const int key_end = min(keys.end, key_limit(p, row + kWarpRows - 1));  // of this warp

  const Tile<C::kPadded> q_tile = {shared_base()};
  const KeyValueStages<C> stages = {p,
                                    rows_of(p.k, batch, kv_head),
                                    rows_of(p.v, batch, kv_head),
                                    q_tile.rows_from(C::kBlockQ).base,
                                    keys.begin,
                                    keys.end};
  const auto start = [&](int stage) { stages.start(stage); };
  load_tile<C::kBlockQ, C::kThreads>(q_tile, rows_of(p.q, batch, head), q_begin, p.q_len,
                                     p.head_dim);
  stages.start_first_keys();
  copy_commit();
  const int first_stage = keys.begin / C::kBlockK;
  LDM_UNROLL for (int stage = 0; stage < steps_ahead<C::kStages>; ++stage)
      start(first_stage + stage);
  copy_wait<steps_ahead<C::kStages>>();
  sync_block();
  RowOperand<C::kPadded, C::kRowTiles, kGeneral ? C::kGeneralKept : C::kKept> query;
  query.load(q_tile.rows_from(warp_row));

  // exp2 folds log2(e) into the scale; a masked score is scaled before the mask is added
  const float scale = kGeneral ? 1.0f : p.scale * kLog2e;
  const auto hide = [&](Scores<C>& s, int key) {
    if constexpr (kGeneral) scale_and_mask<T, false>(s, p, batch, head, row, key);
    if (!LDM_LIKELY(key + C::kSlice <= key_limit(p, row))) hide_unseen_keys<false>(s, p, row, key);
  };
  constexpr bool kSteady = C::kSteady && !kGeneral && std::is_same<T, BFloat16>::value;
  float out[C::kRowTiles][C::kHeadDim / 8][4] = {};
  SoftmaxRows<C::kRowTiles> softmax;
  softmax.clear();
  Scores<C> slices[2] = {};
  multiply_rows<C::kSteps>(T(), slices[0], query, stages.first_keys(), 0);
  hide(slices[0], stages.key_begin);
  if (!kSteady) softmax.look(slices[0], 0, 1);
  LDM_ROLLED for (int stage = first_stage; stage * C::kBlockK < keys.end; ++stage) {
    await_step<C::kStages>(stage, start);
    LDM_UNROLL for (int i = 0; i < C::kSlices; ++i) {
      const int key = stage * C::kBlockK + i * C::kSlice;
      if (key >= key_end) break;
      Scores<C>&now = slices[i % 2], &next = slices[(i + 1) % 2];
      if constexpr (!kSteady) {
        softmax.rebase(out, scale);
      } else if (!LDM_LIKELY(!follow && (i > 0 || stage > first_stage))) {
        softmax.look(now, 0, 1);
        softmax.rebase(out, scale);
      }
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
      accumulate(T(), out, now, stages.values(stage), i * C::kSlice, 0, [&](int part, int parts) {
        if (!kSteady) softmax.look(next, part, parts);
      });
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
  if constexpr (kSteady) {
    if (any_thread(!follow && softmax.is_lost(out))) return false;
  } else {
    sync_block();
  }
  softmax.reduce_sums();
  if (splits > 1) {
    finish_rows(out, softmax, partial_lse(p, split, head_index), 1.0f - p.dropout_p, row, p.q_len);
    store_partial(out, partial_out(p, split, head_index), row, p.q_len, partial_width(p),
                  [](int n) { return n * 8; });
    return true;
  }
  float* lse = p.lse + static_cast<int64_t>(head_index) * p.q_len;
  finish_rows(out, softmax, lse, 1.0f - p.dropout_p, row, p.q_len);
  round_rows(T(), q_tile.rows_from(warp_row), out);
  sync_block();
  store_tile<C::kBlockQ, C::kThreads>(rows_of(p.o, batch, head), q_tile, q_begin, p.q_len,
                                      p.head_dim);
  return true;
}

template <typename T, class C, bool kGeneral>
LDM_KERNEL(C::kThreads, kGeneral ? 1 : C::kResident)
flash_fwd_kernel(LDM_PARAMS p) {
  bool follow = false;
  while (!attend_block<T, C, kGeneral>(p, follow)) follow = true;
}

}  // namespace ldm
