// Rounding to INT8: x ≈ scale · int8, where scale = max |x| / 127 over the values that share it.
#pragma once
#include "sm80/tile.cuh"

namespace ldm {

constexpr float kLargest = 127.0f;
constexpr float kSmallest = 1e-30f;  // its reciprocal is finite; below it, values count as zeros

template <typename T>
LDM_DEVICE void to_floats(T, float (&x)[kChunk], const Chunk& chunk) {
  LDM_UNROLL for (int i = 0; i < kChunk; ++i) {
    x[i] = to_float(T{static_cast<uint16_t>(chunk.words[i / 2] >> (i % 2 * 16))});
  }
}
template <typename T>
LDM_DEVICE Chunk to_chunk(T type, const float (&x)[kChunk]) {
  Chunk chunk;
  LDM_UNROLL for (int i = 0; i < kChunk / 2; ++i) {
    chunk.words[i] = pack(type, x[2 * i], x[2 * i + 1]);
  }
  return chunk;
}

// A maximum that keeps NaN, which fmaxf drops.
LDM_DEVICE float larger(float x, float y) { return x > y || x != x ? x : y; }
LDM_DEVICE float largest_of(const float (&x)[kChunk]) {
  float largest = 0.0f;
  LDM_UNROLL for (int i = 0; i < kChunk; ++i) largest = larger(fabsf(x[i]), largest);
  return largest;
}
template <int kLanes>
LDM_DEVICE float largest_of_lanes(float x) {
  LDM_UNROLL for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) {
    x = larger(x, shuffle_xor(x, lanes));
  }
  return x;
}

struct Rounding {
  float scale;   // NaN where a value is not finite
  float factor;  // its reciprocal
};
LDM_DEVICE Rounding rounding_of(float largest) {
  largest = largest < kSmallest ? kSmallest : largest;
  return {largest / kLargest + (largest - largest), kLargest / largest};
}

// The integer nearest to x · factor, half to even, as kIntegerZero plus it.
LDM_DEVICE float rounded(float x, float factor) { return product(x, factor) + kIntegerZero; }
LDM_DEVICE Integers to_integers(const float (&x)[kChunk], float factor) {
  Integers integers = {{0, 0}};
  LDM_UNROLL for (int i = 0; i < kChunk; ++i) {
    integers.words[i / 4] |= (bits_of(rounded(x[i], factor)) & 255u) << (i % 4 * 8);
  }
  return integers;
}

// A row of the query, shared out among 8 lanes: chunk `lane + 8 · turn` of it.
template <typename T, int kTurns>
struct QueryRow {
  static constexpr int kLanes = 8;
  Chunk chunks[kTurns];

  LDM_DEVICE void load(Rows rows, int row, int n_rows, int head_dim) {
    LDM_UNROLL for (int turn = 0; turn < kTurns; ++turn) {
      const int chunk = turn * kLanes + thread_index() % kLanes;
      chunks[turn] = load_chunk(rows, row, chunk, n_rows, head_dim);
    }
  }
  // Its largest value, and its product with the mean of the keys, of which a lane has its share.
  LDM_DEVICE void survey(float& largest, float& shift, const float (&mean)[kTurns][kChunk]) const {
    largest = shift = 0.0f;
    LDM_UNROLL for (int turn = 0; turn < kTurns; ++turn) {
      float x[kChunk];
      to_floats(T(), x, chunks[turn]);
      largest = larger(largest, largest_of(x));
      LDM_UNROLL for (int i = 0; i < kChunk; ++i) shift += x[i] * mean[turn][i];
    }
    largest = largest_of_lanes<kLanes>(largest);
    LDM_UNROLL for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) {
      shift += shuffle_xor(shift, lanes);
    }
  }
};

// This lane's share of a head's mean key, zeros past its end.
template <int kTurns>
LDM_DEVICE void load_mean(float (&mean)[kTurns][kChunk], const float* source, int width) {
  LDM_UNROLL for (int turn = 0; turn < kTurns; ++turn) {
    const int column = (turn * 8 + thread_index() % 8) * kChunk;
    LDM_UNROLL for (int i = 0; i < kChunk; ++i) {
      mean[turn][i] = column < width ? source[column + i] : 0.0f;
    }
  }
}

}  // namespace ldm
