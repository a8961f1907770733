// 16-bit elements as the kernels see them: bits with a type. Arithmetic happens in float.
#pragma once
#include <cstdint>

namespace ldm {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};
struct Int8 {
  int8_t bits;
};

// One 16-byte chunk: the unit of every copy.
struct alignas(16) Chunk {
  uint32_t words[4];
};

// 8 elements of a row rounded to INT8.
struct alignas(8) Integers {
  uint32_t words[2];
};

constexpr int kWarp = 32;
constexpr int kChunk = 8;  // elements a chunk

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// 1.5 · 2^23. Adding an integer n to its bits adds n to its value while |n| < 2^22, and a number of
// that size that is added to its value leaves its nearest integer, half to even, in the lower bits.
constexpr float kIntegerZero = 12582912.0f;

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace ldm
