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

// Element i of a block of accumulators is visited in share i · parts / count of `parts` equal ones,
// so that a caller can spread the work on one block between the products of another.
template <int kRowTiles, int kColumnTiles, typename F>
LDM_DEVICE void visit_share(int part, int parts, F&& visit) {
  constexpr int kCount = kRowTiles * kColumnTiles * 4;
  LDM_UNROLL for (int i = 0; i < kCount; ++i) {
    if (i * parts / kCount != part) continue;
    visit(i / 4 % kRowTiles, i / 4 / kRowTiles, i % 4);
  }
}

// The softmax of the rows so far, measured from `base`: it is exact all the same, for what is
// measured from another base than the maximum is only scaled. A base that follows is at most kSlack
// below the maximum: as long as no row has grown by more, the sums of the output stay as they are.
template <int kRowTiles>
struct SoftmaxRows {
  static constexpr float kSlack = 8.0f;        // of log2: probabilities are at most 256
  static constexpr float kLowest = -3.4e38f;   // no key seen: −inf, but −inf less this is not NaN
  static constexpr float kHighest = 0x1p100f;  // of a sum
  float base[kRowTiles][2];                    // in units of log2
  float sum[kRowTiles][2];                     // this lane's part of Σ exp2(score − base)
  float top[kRowTiles][2];                     // the largest raw score of the slice to come

  LDM_DEVICE void clear() {
    LDM_UNROLL for (int r = 0; r < kRowTiles; ++r) {
      LDM_UNROLL for (int half = 0; half < 2; ++half) {
        base[r][half] = kLowest;
        sum[r][half] = 0.0f;
        top[r][half] = -INFINITY;
      }
    }
  }
  // Takes note of a share of the slice to come.
  template <int kKeyTiles>
  LDM_DEVICE void look(const float (&s)[kRowTiles][kKeyTiles][4], int part, int parts) {
    visit_share<kRowTiles, kKeyTiles>(part, parts, [&](int r, int n, int e) {
      top[r][e / 2] = fmaxf(top[r][e / 2], s[r][n][e]);
    });
  }
  // Of this lane's columns, the whole quad's.
  LDM_DEVICE void reduce_tops() {
    LDM_UNROLL for (int r = 0; r < kRowTiles; ++r) {
      LDM_UNROLL for (int half = 0; half < 2; ++half) top[r][half] = quad_max(top[r][half]);
    }
  }
  LDM_DEVICE void reduce_sums() {
    LDM_UNROLL for (int r = 0; r < kRowTiles; ++r) {
      LDM_UNROLL for (int half = 0; half < 2; ++half) sum[r][half] = quad_sum(sum[r][half]);
    }
  }
  // Brings `out` and the sums to a higher base if the slice to come needs one. scale > 0.
  template <int kOutTiles>
  LDM_DEVICE void rebase(float (&out)[kRowTiles][kOutTiles][4], float scale) {
    bool grew = false;  // a lane answers for its own columns, so that no row is reduced in vain
    LDM_UNROLL for (int r = 0; r < kRowTiles; ++r) {
      LDM_UNROLL for (int half = 0; half < 2; ++half) {
        grew |= top[r][half] * scale > base[r][half] + kSlack;
      }
    }
    if (!LDM_LIKELY(!any_lane(grew))) {
      LDM_UNROLL for (int r = 0; r < kRowTiles; ++r) {
        LDM_UNROLL for (int half = 0; half < 2; ++half) {
          const float higher = fmaxf(base[r][half], quad_max(top[r][half]) * scale);
          const float correction = exp2_approx(base[r][half] - higher);
          base[r][half] = higher;
          sum[r][half] *= correction;
          LDM_UNROLL for (int n = 0; n < kOutTiles; ++n) {
            out[r][n][2 * half] *= correction;
            out[r][n][2 * half + 1] *= correction;
          }
        }
      }
    }
    LDM_UNROLL for (int r = 0; r < kRowTiles; ++r) top[r][0] = top[r][1] = -INFINITY;
  }
  // Whether a row grew so far above its base that a sum, or `out`, may not be what it should.
  template <int kOutTiles>
  LDM_DEVICE bool is_lost(const float (&out)[kRowTiles][kOutTiles][4]) const {
    float nothing[8] = {};  // NaN where a sum is not finite; eight, which wait less for each other
    bool lost = false;
    LDM_UNROLL for (int r = 0; r < kRowTiles; ++r) {
      LDM_UNROLL for (int half = 0; half < 2; ++half) lost |= !(sum[r][half] < kHighest);
      LDM_UNROLL for (int n = 0; n < kOutTiles; ++n) {
        LDM_UNROLL for (int e = 0; e < 4; ++e) nothing[n % 2 * 4 + e] += out[r][n][e] * 0.0f;
      }
    }
    LDM_UNROLL for (int i = 1; i < 8; ++i) nothing[0] += nothing[i];
    return lost || nothing[0] != 0.0f;
  }
  // A share of the slice becomes exp2(s · scale − base).
  template <int kKeyTiles>
  LDM_DEVICE void exponentiate(float (&s)[kRowTiles][kKeyTiles][4], float scale, int part,
                               int parts) {
    visit_share<kRowTiles, kKeyTiles>(part, parts, [&](int r, int n, int e) {
      s[r][n][e] = exp2_approx(s[r][n][e] * scale - base[r][e / 2]);
      sum[r][e / 2] += s[r][n][e];
    });
  }
};

}  // namespace ldm
