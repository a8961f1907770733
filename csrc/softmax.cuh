// The online softmax (Milakov & Gimelshein 2018; Dao 2023, algorithm 1) on accumulator fragments:
// a lane holds parts of the rows g = lane / 4 and g + 8 of each row tile.
#pragma once
#include <sm80/mma.cuh>

namespace ldm {

LDM_DEVICE float quad_max(float x) {
  x = fmaxf(x, shuffle_xor(x, 1));
  return fmaxf(x, shuffle_xor(x, 2));
}
LDM_DEVICE float quad_sum(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}

template <int kRowTiles>
struct SoftmaxRows {
  float max[kRowTiles][2];  // of the raw scores
  float sum[kRowTiles][2];  // this lane's part of Σ exp

  LDM_DEVICE void clear() {
    LDM_UNROLL for (int r = 0; r < kRowTiles; ++r) {
      LDM_UNROLL for (int half = 0; half < 2; ++half) {
        max[r][half] = -INFINITY;
        sum[r][half] = 0.0f;
      }
    }
  }
};

// s becomes exp2(s·scale − max·scale); `out` is brought to the new maximum. scale > 0. A row that
// has seen no key keeps max −inf and sum 0.
template <int kRowTiles, int kKeyTiles, int kOutTiles>
LDM_DEVICE void online_softmax(float (&s)[kRowTiles][kKeyTiles][4],
                               float (&out)[kRowTiles][kOutTiles][4], SoftmaxRows<kRowTiles>& rows,
                               float scale) {
  LDM_UNROLL for (int r = 0; r < kRowTiles; ++r) {
    LDM_UNROLL for (int half = 0; half < 2; ++half) {
      float top = rows.max[r][half];
      LDM_UNROLL for (int n = 0; n < kKeyTiles; ++n) {
        top = fmaxf(top, fmaxf(s[r][n][2 * half], s[r][n][2 * half + 1]));
      }
      top = quad_max(top);
      // −inf − −inf would be NaN: a row without keys is measured from 0
      const float base = top == -INFINITY ? 0.0f : top * scale;
      const float correction = exp2_approx(rows.max[r][half] * scale - base);
      rows.max[r][half] = top;
      float sum = rows.sum[r][half] * correction;
      LDM_UNROLL for (int n = 0; n < kKeyTiles; ++n) {
        LDM_UNROLL for (int e = 2 * half; e < 2 * half + 2; ++e) {
          s[r][n][e] = exp2_approx(s[r][n][e] * scale - base);
          sum += s[r][n][e];
        }
      }
      rows.sum[r][half] = sum;
      LDM_UNROLL for (int n = 0; n < kOutTiles; ++n) {
        out[r][n][2 * half] *= correction;
        out[r][n][2 * half + 1] *= correction;
      }
    }
  }
}

}  // namespace ldm
