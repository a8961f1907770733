// Attention backward (Dao 2023, algorithm 2), each gradient by the rows that own it. A block holds
// rows of one side in shared memory and meets all rows of the other side:
//   by keys:     pᵀ = exp(scale · k qᵀ − lse)     dsᵀ = pᵀ ∘ (v doᵀ − delta)
//                dv += pᵀ do                      dk += scale · dsᵀ q
//   by queries:  p = exp(scale · q kᵀ − lse)      ds = p ∘ (do vᵀ − delta)     dq += scale · ds k
// Both compute the scores, so there are 7 products where 5 would do. In return the sums stay in
// registers and so do p and ds, which are operand A of the next product as they are: no atomics, no
// float32 dq, no second pass over it, one launch with twice the blocks, the same result every time.
//   shared:      two warps hold the same rows. Each computes p and ds for half the rows met, and
//                sums half the columns from what both have left in shared memory.
//   joint:       by keys, and ds goes through shared memory into dq, to which all blocks add in
//                float32 by atomics: 5 products, for long sequences; of a wide head, shared.
#pragma once
#include "../dropout.cuh"
#include "../mask.cuh"
#include "products.cuh"
#include "sweep.cuh"

namespace ldm {

// lse and delta of the rows a lane holds, by queries, or of the columns it meets, by keys.
template <class S>
struct ScoreStatistics {
  float lse_log2[S::kRowTiles][2], delta[S::kRowTiles][2];
  uint32_t met;

  LDM_DEVICE void load_held(const Sweep<S>& sweep, int warp_row) {
    const FlashParams& p = sweep.p;
    const int lane = thread_index() % kWarp;
    LDM_UNROLL for (int r = 0; r < S::kRowTiles; ++r) {
      LDM_UNROLL for (int half = 0; half < 2; ++half) {
        const int row = warp_row + r * 16 + lane / 4 + half * 8;
        if (p.statistics) {
          const float* x = statistics_at(p, sweep.batch, sweep.head, sweep.row + row);
          lse_log2[r][half] = x[0];
          delta[r][half] = x[1];
        } else {
          load_shared_pair(lse_log2[r][half], delta[r][half], sweep.statistics + row * 8);
        }
      }
    }
  }
  // Visits the elements of a slice's accumulators with their query's statistics, a share at a time.
  template <typename F>
  LDM_DEVICE void for_share(int part, int parts, F&& visit) const {
    constexpr int kTiles = S::kSlice / 8;
    LDM_UNROLL for (int n = 0; n < kTiles; ++n) {
      if (n * parts / kTiles != part) continue;
      float met_pair[4];
      if constexpr (S::kByKeys) {
        load_shared_quad(met_pair, met + (n * 8 + thread_index() % 4 * 2) * 8);
      }
      LDM_UNROLL for (int r = 0; r < S::kRowTiles; ++r) {
        LDM_UNROLL for (int e = 0; e < 4; ++e) {
          visit(r, n, e, S::kByKeys ? met_pair[e % 2 * 2] : lse_log2[r][e / 2],
                S::kByKeys ? met_pair[e % 2 * 2 + 1] : delta[r][e / 2]);
        }
      }
    }
  }
};

// What a mask adds to the scores, for the rows and columns from these on, and what it hides.
template <typename T, class S, bool kGeneral, int kTiles>
LDM_DEVICE void mask_scores(float (&s)[S::kRowTiles][kTiles][4], const Sweep<S>& sweep, int row,
                            int column) {
  const FlashParams& p = sweep.p;
  if constexpr (kGeneral) {
    scale_and_mask<T, S::kByKeys>(s, p, sweep.batch, sweep.head, row, column);
  }
  // keys past the end are rows that nobody stores, unless they add to dq, or columns to hide;
  // queries past it have p = 0
  const int end = row + S::kRowTiles * 16;
  const bool whole = S::kByKeys ? (!p.causal || end <= column + 1) && (!S::kJoint || end <= p.k_len)
                                : column + kTiles * 8 <= key_limit(p, row);
  if (!LDM_LIKELY(whole)) hide_unseen_keys<S::kByKeys>(s, p, row, column);
}

template <class S>
using Sums = float[S::kRowTiles][S::kSumTiles][4];

// The sums leave the block as rows, through the held tiles, which no product needs any more.
template <typename T, class S>
LDM_DEVICE void store_sums(T type, Sums<S>& sums, Tile<S::kPadded> held, const Strided& target,
                           const Sweep<S>& sweep, int warp_row, float scale) {
  const Tile<S::kColumns> tile = {held.base};
  const int column = sum_column<S>();
  const FlashParams& p = sweep.p;
  LDM_UNROLL for (int r = 0; r < S::kRowTiles; ++r) {
    LDM_UNROLL for (int n = 0; n < S::kSumTiles; ++n) {
      LDM_UNROLL for (int e = 0; e < 4; ++e) sums[r][n][e] *= scale;
      store_accumulator(type, tile, warp_row + r * 16, column + n * 8, sums[r][n]);
    }
  }
  sync_block();
  Rows rows = rows_of(target, sweep.batch, S::kByKeys ? sweep.kv_head : sweep.head);
  rows.data += sweep.column;
  store_tile<S::kRows, S::kThreads>(rows, tile, sweep.row, S::kByKeys ? p.k_len : p.q_len,
                                    p.head_dim - sweep.column);
}

// What the statistics of the met queries, or of the held ones, need before the first step.
template <typename T, class S>
LDM_DEVICE void compute_statistics(const Sweep<S>& sweep) {
  const FlashParams& p = sweep.p;
  const int rows = S::kByKeys ? padded_queries(p) : S::kRows;
  const int heads = S::kByKeys ? p.heads / p.kv_heads : 1;
  LDM_ROLLED for (int i = 0; i < heads; ++i) {
    const int head = S::kByKeys ? sweep.kv_head * heads + i : sweep.head;
    const uint32_t target = sweep.statistics + static_cast<uint32_t>(i * rows) * 8;
    row_statistics<T, S::kPadded, S::kThreads>(
        p, sweep.batch, head, S::kByKeys ? 0 : sweep.row, rows,
        [&](int row, float lse, float delta) { store_shared(target + row * 8, lse, delta); });
  }
}

template <class S>
struct Operands {
  RowOperand<S::kPadded, S::kRowTiles, S::kKept> held, held_too;
  ScoreStatistics<S> statistics;
};

// With dropout: dp becomes ds = p ∘ (d ∘ dp − delta), and p the weights d ∘ p of the output, where
// d is 0 for a dropped weight and 1 / (1 − dropout_p) for one that is kept.
template <class S, int kTiles>
LDM_DEVICE void differentiate_dropped(float (&s)[S::kRowTiles][kTiles][4],
                                      float (&dp)[S::kRowTiles][kTiles][4],
                                      const ScoreStatistics<S>& statistics, const Sweep<S>& sweep,
                                      int row, int column) {
  const int lane = thread_index() % kWarp;
  statistics.for_share(0, 1, [&](int r, int n, int e, float, float delta) {
    const int at_row = row + r * 16 + lane / 4 + e / 2 * 8;
    const int at_column = column + n * 8 + lane % 4 * 2 + e % 2;
    const bool kept = is_kept(sweep.p, sweep.batch, sweep.head, S::kByKeys ? at_column : at_row,
                              S::kByKeys ? at_row : at_column);
    const float d = kept ? 1.0f / (1.0f - sweep.p.dropout_p) : 0.0f;
    dp[r][n][e] = s[r][n][e] * (d * dp[r][n][e] - delta);
    s[r][n][e] *= d;
  });
}

// Joint: what the keys of this block add to dq of a step's queries. All warps have stored its ds.
template <typename T, class S>
LDM_DEVICE void add_to_queries(T type, const Sweep<S>& sweep, int step) {
  const FlashParams& p = sweep.p;
  const int warp = warp_index();
  const int query = warp / S::kColumnWarps * S::kQueryTiles * 16;
  const int column = warp % S::kColumnWarps * S::kPairs * 16;
  float dq[S::kQueryTiles][2 * S::kPairs][4] = {};
#pragma unroll 2
  for (int key = 0; key < S::kRows; key += 16) {
    uint32_t a[S::kQueryTiles][4];
    LDM_UNROLL for (int r = 0; r < S::kQueryTiles; ++r) {
      load_a_transposed(a[r], sweep.ds(step), key, query + r * 16);
    }
    LDM_UNROLL for (int n = 0; n < S::kPairs; ++n) {
      if (S::kPairs * S::kColumnWarps * 16 > S::kPadded && column + n * 16 >= S::kPadded) break;
      uint32_t b[4];
      load_b_transposed(b, sweep.held, key, column + n * 16);
      LDM_UNROLL for (int r = 0; r < S::kQueryTiles; ++r) {
        mma(type, dq[r][2 * n], a[r], b[0], b[1]);
        mma(type, dq[r][2 * n + 1], a[r], b[2], b[3]);
      }
    }
  }
  LDM_UNROLL for (int r = 0; r < S::kQueryTiles; ++r) {
    const int at = sweep.met_row(step) + query + r * 16;
    float* target = dq_fragment(p, sweep.batch, sweep.head, at, column);
    LDM_UNROLL for (int n = 0; n < 2 * S::kPairs; ++n) {
      if (column + n * 8 < p.head_dim) add_fragment(target + n * 128, dq[r][n]);
    }
  }
}

template <typename T, class S, int kTiles>
LDM_DEVICE void store_scores(T type, Tile<S::kStep> tile, int column,
                             const float (&c)[S::kRowTiles][kTiles][4]) {
  LDM_UNROLL for (int r = 0; r < S::kRowTiles; ++r) {
    LDM_UNROLL for (int n = 0; n < kTiles; ++n) {
      store_accumulator(type, tile, held_row<S>() + r * 16, column + n * 8, c[r][n]);
    }
  }
}

// One slice of one step: sums (dk, or dq) and values (dv) gain from some of the rows met. What is
// not a product is done between those of the next one.
template <typename T, class S, bool kGeneral>
LDM_DEVICE void meet(Sums<S>& sums, Sums<S>& values, const Operands<S>& operands,
                     const Sweep<S>& sweep, int step, int at, int row) {
  const auto met = sweep.met(step), met_too = sweep.met_too(step);
  const float scale = kGeneral ? 1.0f : sweep.p.scale * kLog2e;
  float s[S::kRowTiles][S::kSlice / 8][4] = {}, dp[S::kRowTiles][S::kSlice / 8][4] = {};
  const auto exponentiate = [&](int part, int parts) {  // p = exp2(scale · s + mask − lse)
    operands.statistics.for_share(part, parts, [&](int r, int n, int e, float lse, float) {
      s[r][n][e] = exp2_approx(s[r][n][e] * scale - lse);
    });
  };
  const auto differentiate = [&](int part, int parts) {  // ds = p ∘ (dp − delta)
    operands.statistics.for_share(part, parts, [&](int r, int n, int e, float, float delta) {
      dp[r][n][e] = s[r][n][e] * (dp[r][n][e] - delta);
    });
  };
  multiply_rows<S::kUnroll>(T(), s, operands.held, met, at);
  mask_scores<T, S, kGeneral>(s, sweep, row, sweep.met_row(step) + at);
  if constexpr (S::kOverlapped) {
    multiply_rows<S::kSteps>(T(), dp, operands.held_too, met_too, at, exponentiate);
  } else {
    exponentiate(0, 1);
    multiply_rows<S::kUnroll>(T(), dp, operands.held_too, met_too, at);
  }
  if (kGeneral && sweep.p.seed) {
    differentiate_dropped(s, dp, operands.statistics, sweep, row, sweep.met_row(step) + at);
    if constexpr (S::kByKeys) accumulate(T(), values, s, met_too, at, sweep.column);
  } else if constexpr (S::kByKeys) {
    accumulate(T(), values, s, met_too, at, sweep.column, differentiate);
  } else {
    differentiate(0, 1);
  }
  if constexpr (S::kJoint) {
    store_scores<T, S>(T(), sweep.ds(step), at, dp);
  }
  accumulate(T(), sums, dp, met, at, sweep.column);
}

// One step of warps that share their rows: the scores of this warp's slice, then all sums.
template <typename T, class S>
LDM_DEVICE void meet_shared(Sums<S>& sums, Sums<S>& values, Operands<S>& operands,
                            const Sweep<S>& sweep, int step) {
  const auto met = sweep.met(step), met_too = sweep.met_too(step);
  const int at = warp_index() % S::kShares * S::kSlice, row = held_row<S>();
  operands.statistics.met = sweep.statistics_of(step) + at * 8;
  {
    float s[S::kRowTiles][S::kSlice / 8][4] = {}, dp[S::kRowTiles][S::kSlice / 8][4] = {};
    const float scale = sweep.p.scale * kLog2e;
    multiply_rows<S::kUnroll>(T(), s, operands.held, met, at);
    mask_scores<T, S, false>(s, sweep, sweep.row + row, sweep.met_row(step) + at);
    multiply_rows<S::kSteps>(T(), dp, operands.held_too, met_too, at, [&](int part, int parts) {
      operands.statistics.for_share(part, parts, [&](int r, int n, int e, float lse, float) {
        s[r][n][e] = exp2_approx(s[r][n][e] * scale - lse);
      });
    });
    if constexpr (S::kByKeys) store_scores<T, S>(T(), sweep.shared_p(), at, s);
    operands.statistics.for_share(0, 1, [&](int r, int n, int e, float, float delta) {
      dp[r][n][e] = s[r][n][e] * (dp[r][n][e] - delta);
    });
    store_scores<T, S>(T(), sweep.ds(step), at, dp);
  }
  sync_block();
  const int column = sum_column<S>();
  if constexpr (S::kByKeys) {
    accumulate_tile(T(), values, sweep.shared_p().rows_from(row), met_too, column);
  }
  accumulate_tile(T(), sums, sweep.ds(step).rows_from(row), met, column);
  if constexpr (S::kJoint) add_to_queries(T(), sweep, step);
}

template <typename T, class S, bool kGeneral>
LDM_DEVICE void sweep_block(const FlashParams& p, int block) {
  Sweep<S> sweep(p, block);
  const int warp_row = held_row<S>();
  const auto start = [&](int step) { sweep.start(step); };
  sweep.start_held();
  LDM_UNROLL for (int step = 0; step < steps_ahead<S::kStages>; ++step) start(step);
  if (!p.statistics) compute_statistics<T>(sweep);
  copy_wait<steps_ahead<S::kStages>>();
  sync_block();
  Operands<S> operands;
  operands.held.load(sweep.held.rows_from(warp_row));
  operands.held_too.load(sweep.held_too.rows_from(warp_row));
  if constexpr (!S::kByKeys) operands.statistics.load_held(sweep, warp_row);

  Sums<S> sums = {}, values = {};  // dk and dv, or dq and nothing
  while (true) {
    LDM_ROLLED for (int step = 0; step < sweep.steps; ++step) {
      await_step<S::kStages>(step, start);
      if constexpr (S::kShares > 1) {
        meet_shared<T, S>(sums, values, operands, sweep, step);
      } else {
        if constexpr (S::kLate) {
          if (step > 0) add_to_queries(T(), sweep, step - 1);
        }
        LDM_ROLLED for (int at = 0; at < S::kStep; at += S::kSlice) {
          operands.statistics.met = sweep.statistics_of(step) + at * 8;
          meet<T, S, kGeneral>(sums, values, operands, sweep, step, at, sweep.row + warp_row);
        }
        if constexpr (S::kJoint && !S::kLate) {
          sync_block();
          add_to_queries(T(), sweep, step);
        }
      }
    }
    if constexpr (S::kLate) {
      sync_block();
      if (sweep.steps > 0) add_to_queries(T(), sweep, sweep.steps - 1);
    }
    if (!sweep.next_head()) break;
    sync_block();
    LDM_UNROLL for (int step = 0; step < steps_ahead<S::kStages>; ++step) start(step);
  }
  copy_wait<0>();
  sync_block();
  store_sums<T, S>(T(), sums, sweep.held, S::kByKeys ? p.dk : p.dq, sweep, warp_row, p.scale);
  if constexpr (S::kByKeys) {
    store_sums<T, S>(T(), values, sweep.held_too, p.dv, sweep, warp_row, 1.0f);
  }
}

template <class S>
LDM_DEVICE int sweep_blocks(const FlashParams& p) {  // launch() checks that they fit
  const int heads = S::kByKeys ? p.kv_heads : p.heads;
  return p.batch * heads * ceil_div(S::kByKeys ? p.k_len : p.q_len, S::kRows) * S::kParts;
}

template <typename T, class C, bool kGeneral>
LDM_KERNEL(C::kThreads, 1)
flash_bwd_kernel(LDM_PARAMS p) {
  const int block = static_cast<int>(block_index());
  const int by_keys = sweep_blocks<typename C::ByKeys>(p);
  if (C::kJoint || block < by_keys) {
    sweep_block<T, typename C::ByKeys, kGeneral>(p, block);
  } else if constexpr (!C::kJoint) {
    sweep_block<T, typename C::ByQueries, kGeneral>(p, block - by_keys);
  }
}

}  // namespace ldm
