// INT8 attention forward: flash_fwd.cuh with the scores' products in INT8 (SageAttention, arXiv
// 2410.02367). Keys come rounded from quantize.cuh; a block rounds its queries itself, each row
// with a scale of its own, for no other block needs them. P v stays in 16 bits with float32 sums.
#pragma once
#include "../rounding.cuh"
#include "flash_fwd.cuh"
#include "int8_tiles.h"

namespace ldm {

// Keys in INT8 and values, in stages as KeyValueStages has them.
template <class C>
struct Int8Stages {
  using KeyTile = Tile<C::kKeyColumns>;  // a pair of INT8 counts as one column
  using ValueTile = Tile<C::kPadded>;
  Rows k, v;
  const float* k_scale;
  uint32_t base;
  int k_len, head_dim, key_end;

  LDM_DEVICE Int8Stages(const Int8Params& p, int batch, int kv_head, uint32_t at, int end)
      : v(rows_of(p.flash.v, batch, kv_head)),
        base(at),
        k_len(p.flash.k_len),
        head_dim(p.flash.head_dim),
        key_end(end) {
    const int64_t kv_index = static_cast<int64_t>(batch) * p.flash.kv_heads + kv_head;
    k = {reinterpret_cast<uint16_t*>(p.k_int8 + kv_index * k_len * p.width), p.width / 2, true};
    k_scale = p.k_scale + kv_index * ceil_div(k_len, kQuantRows);
  }
  LDM_DEVICE KeyTile first_keys() const { return {base}; }
  LDM_DEVICE ValueTile values(int stage) const {
    return {base +
            static_cast<uint32_t>(KeyTile::bytes(C::kSlice) + stage % C::kStages * C::kStageBytes)};
  }
  LDM_DEVICE KeyTile keys(int stage) const { return {values(stage).rows_from(C::kBlockK).base}; }
  LDM_DEVICE void start_first_keys() const {
    load_tile<C::kSlice, C::kThreads>(first_keys(), k, 0, k_len, static_cast<int>(k.stride));
  }
  LDM_DEVICE void start(int stage) const {
    const int key = stage * C::kBlockK;
    if (key < key_end) {
      load_tile<C::kBlockK, C::kThreads>(values(stage), v, key, k_len, head_dim);
      load_tile<C::kBlockK, C::kThreads>(keys(stage), k, key + C::kSlice, k_len,
                                         static_cast<int>(k.stride));
    }
    copy_commit();
  }
  // Of the keys from `key` on, which may lie past the end.
  LDM_DEVICE float scale_of(int key) const {
    return key < k_len ? k_scale[key / kQuantRows] : 1.0f;
  }
};

// Rounds the queries of a block into `tile`. `terms` gets, a query, the factor that makes an
// integer score one in units of log2, but for the key's scale; and what the LSE of those scores
// lacks.
template <typename T, class C>
LDM_DEVICE void round_queries(T, const Int8Params& p, int batch, int head, int q_begin,
                              Tile<C::kKeyColumns> tile, uint32_t terms) {
  constexpr int kChunks = C::kWidth / kChunk;
  constexpr int kTurns = ceil_div(kChunks, 8);
  constexpr int kAhead = kTurns > 2 ? 2 : 4 / kTurns;  // rows a thread has under way
  constexpr int kStep = C::kThreads / 8;
  const FlashParams& f = p.flash;
  const Rows rows = rows_of(f.q, batch, head);
  float mean[kTurns][kChunk];
  const int kv_head = head / (f.heads / f.kv_heads);
  const int64_t kv_index = static_cast<int64_t>(batch) * f.kv_heads + kv_head;
  load_mean(mean, p.k_mean + kv_index * p.width, p.width);
  // a factor is positive, so that the largest integer is the largest score
  const float sign = f.scale < 0.0f ? -1.0f : 1.0f;
  LDM_ROLLED for (int begin = 0; begin < C::kBlockQ; begin += kAhead * kStep) {
    QueryRow<T, kTurns> queries[kAhead];
    LDM_UNROLL for (int i = 0; i < kAhead; ++i) {
      const int row = begin + i * kStep + thread_index() / 8;
      queries[i].load(rows, q_begin + row, f.q_len, f.head_dim);
    }
    LDM_UNROLL for (int i = 0; i < kAhead; ++i) {
      const int row = begin + i * kStep + thread_index() / 8;
      float largest, shift;
      queries[i].survey(largest, shift, mean);
      const Rounding rounding = rounding_of(largest);
      LDM_UNROLL for (int turn = 0; turn < kTurns; ++turn) {
        const int chunk = turn * 8 + thread_index() % 8;
        if (kChunks % 8 != 0 && chunk >= kChunks) continue;
        float x[kChunk];
        to_floats(T(), x, queries[i].chunks[turn]);
        const uint32_t half = static_cast<uint32_t>(chunk % 2) * sizeof(Integers);
        store_shared(tile.address(row, chunk / 2) + half, to_integers(x, sign * rounding.factor));
      }
      if (thread_index() % 8 == 0) {
        store_shared(terms + static_cast<uint32_t>(row) * 8,
                     rounding.scale * fabsf(f.scale) * kLog2e, shift * f.scale);
      }
    }
  }
}

// SoftmaxRows for scores that are integers, as kIntegerZero plus them, times a scale that the row
// and kQuantRows keys have together.
template <int kRowTiles>
struct IntegerSoftmax : SoftmaxRows<kRowTiles> {
  using Rows = SoftmaxRows<kRowTiles>;
  static constexpr float kTiny = 1e-30f;            // −inf times 0 would be NaN
  float factor[kRowTiles][2];                       // of a row, without the keys' scale
  float scale[kRowTiles][2], offset[kRowTiles][2];  // exponent = score · scale − offset

  LDM_DEVICE void load_factors(uint32_t terms, int warp_row) {
    LDM_UNROLL for (int r = 0; r < kRowTiles; ++r) {
      LDM_UNROLL for (int half = 0; half < 2; ++half) {
        const int row = warp_row + r * 16 + thread_index() % kWarp / 4 + half * 8;
        float shift;
        load_shared_pair(factor[r][half], shift, terms + static_cast<uint32_t>(row) * 8);
      }
    }
  }
  // For slices of the next kQuantRows keys.
  LDM_DEVICE void rescale(float key_scale) {
    LDM_UNROLL for (int r = 0; r < kRowTiles; ++r) {
      LDM_UNROLL for (int half = 0; half < 2; ++half) {
        const float product = factor[r][half] * key_scale;
        scale[r][half] = product < kTiny ? kTiny : product;  // NaN stays
      }
    }
    find_offsets();
  }
  // Rounds by less than one integer's worth, the same for the whole slice.
  LDM_DEVICE void find_offsets() {
    LDM_UNROLL for (int r = 0; r < kRowTiles; ++r) {
      LDM_UNROLL for (int half = 0; half < 2; ++half) {
        offset[r][half] = fmaf(kIntegerZero, scale[r][half], this->base[r][half]);
      }
    }
  }
  template <int kOutTiles>
  LDM_DEVICE void rebase(float (&out)[kRowTiles][kOutTiles][4]) {
    bool grew = false;
    LDM_UNROLL for (int r = 0; r < kRowTiles; ++r) {
      LDM_UNROLL for (int half = 0; half < 2; ++half) {
        const float above = fmaf(this->top[r][half], scale[r][half], -offset[r][half]);
        grew |= above > Rows::kSlack;
      }
    }
    if (LDM_LIKELY(!any_lane(grew))) {
      LDM_UNROLL for (int r = 0; r < kRowTiles; ++r) {
        this->top[r][0] = this->top[r][1] = -INFINITY;
      }
      return;
    }
    LDM_UNROLL for (int r = 0; r < kRowTiles; ++r) {
      LDM_UNROLL for (int half = 0; half < 2; ++half) {
        this->top[r][half] = (this->top[r][half] - kIntegerZero) * scale[r][half];
      }
    }
    Rows::rebase(out, 1.0f);
    find_offsets();
  }
  template <int kKeyTiles>
  LDM_DEVICE void exponentiate(float (&s)[kRowTiles][kKeyTiles][4], int part, int parts) {
    visit_share<kRowTiles, kKeyTiles>(part, parts, [&](int r, int n, int e) {
      s[r][n][e] = exp2_approx(fmaf(s[r][n][e], scale[r][e / 2], -offset[r][e / 2]));
      this->sum[r][e / 2] += s[r][n][e];
    });
  }
};

// Gives the LSE back what smoothing the keys took, by the lanes that wrote it.
template <class C>
LDM_DEVICE void shift_lse(float* lse, uint32_t terms, int warp_row, int row, int q_len) {
  const int lane = thread_index() % kWarp;
  LDM_UNROLL for (int i = 0; i < C::kRowTiles * 2; ++i) {
    const int at = i * 8 + lane / 4, query = row + at;
    if (lane % 4 != 0 || query >= q_len || lse[query] == -INFINITY) continue;
    float factor, shift;
    load_shared_pair(factor, shift, terms + static_cast<uint32_t>(warp_row + at) * 8);
    lse[query] += shift;
  }
}

template <typename T, class C>
LDM_KERNEL(C::kThreads, 1)
int8_fwd_kernel(LDM_PARAMS_OF(Int8Params) p) {
  static_assert(C::kSlices % 2 == 0, "slices alternate between two sets of registers");
  constexpr int kWarpRows = C::kRowTiles * 16;
  const FlashParams& f = p.flash;
  const int q_tiles = ceil_div(f.q_len, C::kBlockQ);
  const int64_t head_index = block_index() / q_tiles;
  // the last queries of a causal head have the most keys: they start first
  const int q_begin = (q_tiles - 1 - static_cast<int>(block_index() % q_tiles)) * C::kBlockQ;
  const int batch = static_cast<int>(head_index / f.heads);
  const int head = static_cast<int>(head_index % f.heads);
  const int warp_row = warp_index() * kWarpRows;
  const int row = q_begin + warp_row;
  const int key_end = key_limit(f, row + kWarpRows - 1);  // of this warp

  const uint32_t terms = shared_base();
  const Tile<C::kKeyColumns> q_tile = {terms + C::kTermBytes};
  const Int8Stages<C> stages = {p, batch, head / (f.heads / f.kv_heads),
                                q_tile.rows_from(C::kBlockQ).base,
                                key_limit(f, q_begin + C::kBlockQ - 1)};
  const auto start = [&](int stage) { stages.start(stage); };
  stages.start_first_keys();
  copy_commit();
  LDM_UNROLL for (int stage = 0; stage < steps_ahead<C::kStages>; ++stage) start(stage);
  round_queries<T, C>(T(), p, batch, head, q_begin, q_tile, terms);
  copy_wait<steps_ahead<C::kStages>>();
  sync_block();
  RowOperand<C::kKeyColumns, C::kRowTiles, C::kKept> query;
  query.load(q_tile.rows_from(warp_row));

  const auto hide = [&](Scores<C>& s, int key) {
    if (!LDM_LIKELY(key + C::kSlice <= key_limit(f, row))) hide_unseen_keys<false>(s, f, row, key);
  };
  float out[C::kRowTiles][C::kHeadDim / 8][4] = {};
  IntegerSoftmax<C::kRowTiles> softmax;
  softmax.clear();
  softmax.load_factors(terms, warp_row);
  Scores<C> slices[2];
  fill(slices[0], kIntegerZero);
  float key_scale = stages.scale_of(0);
  multiply_rows<C::kSteps>(Int8(), slices[0], query, stages.first_keys(), 0);
  hide(slices[0], 0);
  softmax.look(slices[0], 0, 1);
  LDM_ROLLED for (int stage = 0; stage * C::kBlockK < stages.key_end; ++stage) {
    await_step<C::kStages>(stage, start);
    LDM_UNROLL for (int i = 0; i < C::kSlices; ++i) {
      const int key = stage * C::kBlockK + i * C::kSlice;
      if (key >= key_end) break;
      Scores<C>&now = slices[i % 2], &next = slices[(i + 1) % 2];
      if (key % kQuantRows == 0) softmax.rescale(key_scale);
      softmax.rebase(out);
      if (key + C::kSlice < key_end) {
        if ((key + C::kSlice) % kQuantRows == 0) key_scale = stages.scale_of(key + C::kSlice);
        fill(next, kIntegerZero);
        multiply_rows<C::kSteps>(
            Int8(), next, query, stages.keys(stage), i * C::kSlice,
            [&](int part, int parts) { softmax.exponentiate(now, part, parts); });
        hide(next, key + C::kSlice);
      } else {
        softmax.exponentiate(now, 0, 1);
      }
      accumulate(T(), out, now, stages.values(stage), i * C::kSlice, 0,
                 [&](int part, int parts) { softmax.look(next, part, parts); });
    }
  }
  copy_wait<0>();
  sync_block();
  const Tile<C::kPadded> o_tile = {q_tile.base};  // no operand is needed any more
  float* lse = p.flash.lse + head_index * f.q_len;
  softmax.reduce_sums();
  finish_rows(out, softmax, lse, 1.0f, row, f.q_len);
  round_rows(T(), o_tile.rows_from(warp_row), out);
  shift_lse<C>(lse, terms, warp_row, row, f.q_len);
  sync_block();
  store_tile<C::kBlockQ, C::kThreads>(rows_of(f.o, batch, head), o_tile, q_begin, f.q_len,
                                      f.head_dim);
}

}  // namespace ldm
