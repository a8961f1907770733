// Which keys a query sees, and what an attention mask adds to its scores.
#pragma once
#include <sm80/mma.cuh>

#include "params.h"

namespace ldm {

// Visits every element of a block of accumulators with its row and column in the matrix.
template <int kRowTiles, int kColumnTiles, typename F>
LDM_DEVICE void for_each_element(float (&c)[kRowTiles][kColumnTiles][4], int row, int column,
                                 F&& visit) {
  const int lane = thread_index() % kWarp;
  LDM_UNROLL for (int r = 0; r < kRowTiles; ++r) {
    LDM_UNROLL for (int n = 0; n < kColumnTiles; ++n) {
      LDM_UNROLL for (int e = 0; e < 4; ++e) {
        visit(c[r][n][e], row + r * 16 + lane / 4 + e / 2 * 8,
              column + n * 8 + lane % 4 * 2 + e % 2);
      }
    }
  }
}

// One past the last key that a query sees.
LDM_DEVICE int key_limit(const FlashParams& p, int query) {
  return p.causal && query + 1 < p.k_len ? query + 1 : p.k_len;
}

// What the mask adds to a score in units of log2: 0 or −inf for a boolean, else value · log2(e).
template <typename T>
LDM_DEVICE float mask_term(const FlashParams& p, int batch, int head, int query, int key) {
  if (p.mask_kind == kNoMask) return 0.0f;
  const int64_t at =
      batch * p.mask.batch + head * p.mask.head + query * p.mask.row + key * p.mask_col;
  if (p.mask_kind == kBoolMask) {
    return static_cast<const uint8_t*>(p.mask.data)[at] ? 0.0f : -INFINITY;
  }
  if (p.mask_kind == kFloatMask) return static_cast<const float*>(p.mask.data)[at] * kLog2e;
  return to_float(static_cast<const T*>(p.mask.data)[at]) * kLog2e;
}

// Scores in units of log2 with the mask in them; elements outside the matrix are left alone. Rows
// of the scores are queries and columns keys, or, transposed, the other way round.
template <typename T, bool kTransposed, int kRowTiles, int kColumnTiles>
LDM_DEVICE void scale_and_mask(float (&s)[kRowTiles][kColumnTiles][4], const FlashParams& p,
                               int batch, int head, int row, int column) {
  for_each_element(s, row, column, [&](float& score, int at_row, int at_column) {
    const int query = kTransposed ? at_column : at_row, key = kTransposed ? at_row : at_column;
    score *= p.scale * kLog2e;
    if (query < p.q_len && key < p.k_len) score += mask_term<T>(p, batch, head, query, key);
  });
}

template <bool kTransposed, int kRowTiles, int kColumnTiles>
LDM_DEVICE void hide_unseen_keys(float (&s)[kRowTiles][kColumnTiles][4], const FlashParams& p,
                                 int row, int column) {
  for_each_element(s, row, column, [&](float& score, int at_row, int at_column) {
    const int query = kTransposed ? at_column : at_row, key = kTransposed ? at_row : at_column;
    if (key >= key_limit(p, query)) score = -INFINITY;
  });
}

}  // namespace ldm
