// The two products that attention is made of, on tiles in shared memory:
//     scores = rows · columnsᵀ       sums += scores · columns
#pragma once
#include "tile.cuh"

namespace ldm {

// The rows of one warp as operand A, kept in registers or read again for every product.
template <int kColumns, int kRowTiles, bool kKept>
struct RowOperand {
  static constexpr int kSteps = kColumns / 16;
  uint32_t kept[kKept ? kSteps : 1][kRowTiles][4];
  Tile<kColumns> tile;  // this warp's rows

  LDM_DEVICE void load(Tile<kColumns> rows) {
    tile = rows;
    if constexpr (kKept) {
      LDM_UNROLL for (int k = 0; k < kSteps; ++k) {
        LDM_UNROLL for (int r = 0; r < kRowTiles; ++r) load_a(kept[k][r], tile, r * 16, k * 16);
      }
    }
  }
  LDM_DEVICE void get(uint32_t (&a)[4], int r, int k) const {
    if constexpr (kKept) {
      LDM_UNROLL for (int i = 0; i < 4; ++i) a[i] = kept[k][r][i];
    } else {
      load_a(a, tile, r * 16, k * 16);
    }
  }
};

// Accumulators that start a product anew.
template <int kRowTiles, int kColumnTiles>
LDM_DEVICE void fill(float (&c)[kRowTiles][kColumnTiles][4], float value) {
  LDM_UNROLL for (int r = 0; r < kRowTiles; ++r) {
    LDM_UNROLL for (int n = 0; n < kColumnTiles; ++n) {
      LDM_UNROLL for (int e = 0; e < 4; ++e) c[r][n][e] = value;
    }
  }
}

// What the products leave the other units to do in the meantime: nothing.
struct Nothing {
  LDM_DEVICE void operator()(int, int) const {}
};

// c += a bᵀ for the rows of b from `row` on, over all columns. Between the products,
// meanwhile(part, parts) is called for each part; without it, the loop may be kept short, where all
// of it would spill.
template <int kUnroll, typename T, int kRowTiles, int kColumnTiles, int kColumns, bool kKept,
          typename F = Nothing>
LDM_DEVICE void multiply_rows(T type, float (&c)[kRowTiles][kColumnTiles][4],
                              const RowOperand<kColumns, kRowTiles, kKept>& a_rows,
                              Tile<kColumns> b_tile, int row, F&& meanwhile = F()) {
  constexpr int kPairs = kColumnTiles / 2, kSteps = kColumns / 16;
#pragma unroll kUnroll
  for (int k = 0; k < kSteps; ++k) {
    uint32_t a[kRowTiles][4];
    LDM_UNROLL for (int r = 0; r < kRowTiles; ++r) a_rows.get(a[r], r, k);
    LDM_UNROLL for (int n = 0; n < kPairs; ++n) {
      uint32_t b[4];
      load_b(b, b_tile, row + n * 16, k * 16);
      LDM_UNROLL for (int r = 0; r < kRowTiles; ++r) {
        mma(type, c[r][2 * n], a[r], b[0], b[1]);
        mma(type, c[r][2 * n + 1], a[r], b[2], b[3]);
      }
      meanwhile(k * kPairs + n, kSteps * kPairs);
    }
  }
}

// sum += scores · tile[row.., column..]; the sums' columns may end within the last 16. operand(a,
// r, k) gives the scores of 16 rows and columns as operand A.
template <int kSteps, typename T, int kRowTiles, int kSumTiles, int kColumns, typename A,
          typename F = Nothing>
LDM_DEVICE void accumulate_operands(T type, float (&sum)[kRowTiles][kSumTiles][4], A&& operand,
                                    Tile<kColumns> tile, int row, int column, F&& meanwhile = F()) {
  constexpr int kPairs = ceil_div(kSumTiles, 2);
  LDM_UNROLL for (int k = 0; k < kSteps; ++k) {
    uint32_t a[kRowTiles][4];
    LDM_UNROLL for (int r = 0; r < kRowTiles; ++r) operand(a[r], r, k);
    LDM_UNROLL for (int n = 0; n < kPairs; ++n) {
      uint32_t b[4];
      load_b_transposed(b, tile, row + k * 16, column + n * 16);
      LDM_UNROLL for (int r = 0; r < kRowTiles; ++r) {
        mma(type, sum[r][2 * n], a[r], b[0], b[1]);
        if (2 * n + 1 < kSumTiles) mma(type, sum[r][2 * n + 1], a[r], b[2], b[3]);
      }
      meanwhile(k * kPairs + n, kSteps * kPairs);
    }
  }
}

// Of scores in registers, as accumulators.
template <typename T, int kRowTiles, int kScoreTiles, int kSumTiles, int kColumns,
          typename F = Nothing>
LDM_DEVICE void accumulate(T type, float (&sum)[kRowTiles][kSumTiles][4],
                           const float (&scores)[kRowTiles][kScoreTiles][4], Tile<kColumns> tile,
                           int row, int column, F&& meanwhile = F()) {
  const auto operand = [&](uint32_t (&a)[4], int r, int k) {
    accumulators_to_a(type, a, scores[r][2 * k], scores[r][2 * k + 1]);
  };
  accumulate_operands<kScoreTiles / 2>(type, sum, operand, tile, row, column, meanwhile);
}

// Of scores in a tile, whose first rows these are.
template <typename T, int kRowTiles, int kSumTiles, int kScoreColumns, int kColumns>
LDM_DEVICE void accumulate_tile(T type, float (&sum)[kRowTiles][kSumTiles][4],
                                Tile<kScoreColumns> scores, Tile<kColumns> tile, int column) {
  const auto operand = [&](uint32_t (&a)[4], int r, int k) { load_a(a, scores, r * 16, k * 16); };
  accumulate_operands<kScoreColumns / 16>(type, sum, operand, tile, 0, column);
}

}  // namespace ldm
