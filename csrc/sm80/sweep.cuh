// How a block of the backward goes through the rows that it meets, and where its tiles lie.
#pragma once
#include "row_statistics.cuh"
#include "tiles.h"

namespace ldm {

// Which rows a block holds, which it meets, and where both lie. A step is one tile of met rows.
template <class S>
struct Sweep {
  using InputTile = Tile<S::kPadded>;
  const FlashParams& p;
  int batch, kv_head, head;  // head: of the queries; by keys the one under way
  int row, column;           // the first row held, and the first column of this block's sums
  int first, steps;          // the first tile met of a head, and how many
  InputTile held, held_too;  // k and v, or q and do
  uint32_t stages, statistics, scores;

  LDM_DEVICE Sweep(const FlashParams& params, int block) : p(params) {
    const int length = S::kByKeys ? p.k_len : p.q_len, heads = S::kByKeys ? p.kv_heads : p.heads;
    const int tiles = ceil_div(length, S::kRows), group = p.heads / p.kv_heads;
    const int place = block % (tiles * S::kParts), head_index = block / (tiles * S::kParts);
    const int at_head = head_index % heads;
    batch = head_index / heads;
    kv_head = S::kByKeys ? at_head : at_head / group;
    head = S::kByKeys ? kv_head * group : at_head;
    column = place % S::kParts * S::kColumns;
    // of a causal head, the first keys and the last queries have the most to do: they start first
    const int tile = place / S::kParts;
    row = (S::kByKeys ? tile : tiles - 1 - tile) * S::kRows;
    first = S::kByKeys && p.causal ? row / S::kStep : 0;
    const int end = S::kByKeys ? p.q_len : key_limit(p, row + S::kRows - 1);
    steps = max(ceil_div(end, S::kStep) - first, 0);
    held = {shared_base()};
    held_too = held.rows_from(S::kRows);
    stages = held_too.rows_from(S::kRows).base;
    statistics = stages + S::kStages * S::kStageBytes;
    scores = statistics + kOwnQueries * 8;
  }
  LDM_DEVICE int met_row(int step) const { return (first + step) * S::kStep; }
  LDM_DEVICE InputTile met(int step) const {
    return {stages + static_cast<uint32_t>(step % S::kStages) * S::kStageBytes};
  }
  LDM_DEVICE InputTile met_too(int step) const { return met(step).rows_from(S::kStep); }
  // Joint: dsᵀ of a step, there until the next one or, late, the one after that; shared, pᵀ too.
  LDM_DEVICE Tile<S::kStep> ds(int step) const {
    const int place = S::kShares > 1 ? 1 : S::kLate ? step % 2 : 0;
    return {scores + static_cast<uint32_t>(place) * Tile<S::kStep>::bytes(S::kRows)};
  }
  LDM_DEVICE Tile<S::kStep> shared_p() const { return {scores}; }
  // Of the first query of a step, by keys: computed for all before the first step, or copied.
  LDM_DEVICE uint32_t statistics_of(int step) const {
    const int at = p.statistics ? step % S::kStages * S::kStep : met_row(step);
    return statistics + static_cast<uint32_t>(at) * 8;
  }
  // To the next head that reads these keys; false after the last.
  LDM_DEVICE bool next_head() {
    if (!S::kByKeys || ++head % (p.heads / p.kv_heads) == 0) return false;
    if (!p.statistics) statistics += static_cast<uint32_t>(padded_queries(p)) * 8;
    return true;
  }
  LDM_DEVICE void start_held() const {
    const Strided &one = S::kByKeys ? p.k : p.q, &two = S::kByKeys ? p.v : p.d_o;
    const int at_head = S::kByKeys ? kv_head : head, end = S::kByKeys ? p.k_len : p.q_len;
    load_tile<S::kRows, S::kThreads>(held, rows_of(one, batch, at_head), row, end, p.head_dim);
    load_tile<S::kRows, S::kThreads>(held_too, rows_of(two, batch, at_head), row, end, p.head_dim);
    copy_commit();
  }
  LDM_DEVICE void start(int step) const {
    if (step < steps) {
      // pointers are found anew each time: they cost registers
      const Strided &one = S::kByKeys ? p.q : p.k, &two = S::kByKeys ? p.d_o : p.v;
      const int at_head = S::kByKeys ? head : kv_head, end = S::kByKeys ? p.q_len : p.k_len;
      const int at = met_row(step);
      load_tile<S::kStep, S::kThreads>(met(step), rows_of(one, batch, at_head), at, end,
                                       p.head_dim);
      load_tile<S::kStep, S::kThreads>(met_too(step), rows_of(two, batch, at_head), at, end,
                                       p.head_dim);
      if (S::kByKeys && p.statistics && thread_index() < S::kStep / 2) {
        const float* source = statistics_at(p, batch, head, at) + thread_index() * 4;
        copy_async_16(statistics_of(step) + thread_index() * 16, source, true);
      }
    }
    copy_commit();
  }
};

// The rows of the block that a warp holds, and the first of the block's columns that it sums.
template <class S>
LDM_DEVICE int held_row() {
  return warp_index() / S::kShares * S::kRowTiles * 16;
}
template <class S>
LDM_DEVICE int sum_column() {
  return warp_index() % S::kShares * S::kSumColumns;
}

}  // namespace ldm
