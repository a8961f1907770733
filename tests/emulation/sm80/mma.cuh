// csrc/sm80/mma.cuh on the CPU: the same functions, the PTX ISA's layouts spelled out.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>

#include "../../../csrc/types.h"
#include "../machine.h"

#define LDM_DEVICE inline
#define LDM_KERNEL(threads, blocks) void
#define LDM_LIKELY(condition) __builtin_expect(condition, 1)
#define LDM_PARAMS_OF(type) const type
#define LDM_PARAMS LDM_PARAMS_OF(FlashParams)
#define LDM_UNROLL
#define LDM_ROLLED

namespace ldm {

using emulation::machine;
using std::max;
using std::min;

inline uint32_t shared_base() { return 0; }
inline int thread_index() { return machine().thread_index(); }
inline int warp_index() { return thread_index() / kWarp; }
inline int64_t block_index() { return machine().block; }
inline void sync_block() { machine().barrier(); }
inline bool any_thread(bool x) { return machine().barrier(x); }

// ---- arithmetic

inline float exp2_approx(float x) { return std::exp2(x); }
inline float product(float x, float y) { return x * y; }  // -std=c++17 fuses nothing
inline float natural_log(float x) { return std::log(x); }
inline float shuffle_xor(float x, int lanes) {
  struct In {
    float x;
    int lanes;
  };
  return machine().collective<In, float>(In{x, lanes}, [](const In* in, float* out) {
    for (int lane = 0; lane < kWarp; ++lane) out[lane] = in[lane ^ in[lane].lanes].x;
  });
}
inline bool any_lane(bool x) {
  return machine().collective<bool, bool>(x, [](const bool* in, bool* out) {
    const bool any = std::count(in, in + kWarp, true) > 0;
    std::fill(out, out + kWarp, any);
  });
}
template <typename To, typename From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
inline uint32_t bits_of(float x) { return bits_as<uint32_t>(x); }
inline float to_float(Half x) { return bits_as<_Float16>(x.bits); }
inline float to_float(BFloat16 x) { return bits_as<float>(static_cast<uint32_t>(x.bits) << 16); }
inline uint16_t round_to(Half, float x) { return bits_as<uint16_t>(static_cast<_Float16>(x)); }
inline uint16_t round_to(BFloat16, float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  if (x != x) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
template <typename T>
uint32_t pack(T type, float lo, float hi) {
  return round_to(type, lo) | static_cast<uint32_t>(round_to(type, hi)) << 16;
}

// c += a · b, each lane bringing its share of the three matrices (see csrc/sm80/mma.cuh).
template <typename T>
void mma(T, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct In {
    float c[4];
    uint32_t a[4], b[2];
  };
  struct Out {
    float c[4];
  };
  const auto element = [](uint32_t word, int i) {
    return to_float(T{static_cast<uint16_t>(word >> (16 * i))});
  };
  const In mine = {{c[0], c[1], c[2], c[3]}, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  const Out out = machine().collective<In, Out>(mine, [&](const In* in, Out* outs) {
    float left[16][16], right[16][8];
    for (int lane = 0; lane < kWarp; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 2; ++i) {
        left[g][2 * t + i] = element(in[lane].a[0], i);
        left[g + 8][2 * t + i] = element(in[lane].a[1], i);
        left[g][2 * t + 8 + i] = element(in[lane].a[2], i);
        left[g + 8][2 * t + 8 + i] = element(in[lane].a[3], i);
        right[2 * t + i][g] = element(in[lane].b[0], i);
        right[2 * t + 8 + i][g] = element(in[lane].b[1], i);
      }
    }
    for (int lane = 0; lane < kWarp; ++lane) {
      for (int e = 0; e < 4; ++e) {
        const int row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
        float sum = in[lane].c[e];
        for (int k = 0; k < 16; ++k) sum += left[row][k] * right[k][column];
        outs[lane].c[e] = sum;
      }
    }
  });
  std::memcpy(c, out.c, sizeof(c));
}

// The same of four INT8 a word, where c's bits are counted up.
inline void mma(Int8, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct In {
    uint32_t c[4], a[4], b[2];
  };
  struct Out {
    uint32_t c[4];
  };
  In mine = {{}, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  std::memcpy(mine.c, c, sizeof(c));
  const Out out = machine().collective<In, Out>(mine, [](const In* in, Out* outs) {
    const auto element = [](uint32_t word, int i) { return static_cast<int8_t>(word >> (8 * i)); };
    int left[16][32], right[32][8];
    for (int lane = 0; lane < kWarp; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 16; ++i) {  // a[half of the rows + 2 · half of k], element i % 4
        left[g + i / 4 % 2 * 8][4 * t + i / 8 * 16 + i % 4] = element(in[lane].a[i / 4], i % 4);
      }
      for (int i = 0; i < 8; ++i) {
        right[4 * t + i / 4 * 16 + i % 4][g] = element(in[lane].b[i / 4], i % 4);
      }
    }
    for (int lane = 0; lane < kWarp; ++lane) {
      for (int e = 0; e < 4; ++e) {
        const int row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
        int sum = 0;
        for (int k = 0; k < 32; ++k) sum += left[row][k] * right[k][column];
        outs[lane].c[e] = in[lane].c[e] + static_cast<uint32_t>(sum);
      }
    }
  });
  std::memcpy(c, out.c, sizeof(c));
}

// ---- sums in global memory

inline void add_fragment(float* fragment, const float (&c)[4]) {
  for (int e = 0; e < 4; ++e) fragment[e * kWarp + thread_index() % kWarp] += c[e];
}
inline void load_fragment(float (&c)[4], const float* fragment) {
  for (int e = 0; e < 4; ++e) c[e] = fragment[e * kWarp + thread_index() % kWarp];
}

// ---- shared memory

struct FourMatrices {
  uint32_t words[4];
};
template <bool kTransposed>
void load_matrices_as(uint32_t (&m)[4], uint32_t address) {
  struct In {
    uint32_t address;
    uint16_t row[8];
  };
  In mine = {address, {}};
  machine().read(address, mine.row, 16);
  const auto out = machine().collective<In, FourMatrices>(mine, [](const In* in, FourMatrices* o) {
    for (int i = 0; i < 4; ++i) {
      uint32_t addresses[8];
      for (int r = 0; r < 8; ++r) addresses[r] = in[8 * i + r].address;
      machine().count_conflicts(addresses);
      for (int lane = 0; lane < kWarp; ++lane) {
        const int g = lane / 4, t = lane % 4;
        const auto at = [&](int j) {
          return kTransposed ? in[8 * i + 2 * t + j].row[g] : in[8 * i + g].row[2 * t + j];
        };
        o[lane].words[i] = at(0) | static_cast<uint32_t>(at(1)) << 16;
      }
    }
  });
  std::memcpy(m, out.words, sizeof(m));
}
inline void load_matrices(uint32_t (&m)[4], uint32_t address) {
  load_matrices_as<false>(m, address);
}
inline void load_matrices_transposed(uint32_t (&m)[4], uint32_t address) {
  load_matrices_as<true>(m, address);
}
template <typename X>
void store_shared(uint32_t address, X x) {
  machine().write(address, &x, sizeof(x));
}
inline void store_shared(uint32_t address, float x, float y) {
  const float pair[2] = {x, y};
  machine().write(address, pair, 8);
}
inline Chunk load_shared_chunk(uint32_t address) {
  Chunk x = {};
  machine().read(address, &x, 16);
  return x;
}
inline void load_shared_pair(float& x, float& y, uint32_t address) {
  float pair[2] = {};
  machine().read(address, pair, 8);
  x = pair[0];
  y = pair[1];
}
inline void load_shared_quad(float (&x)[4], uint32_t address) { machine().read(address, x, 16); }

// ---- global memory

inline void store_pair(float* target, const float (&x)[2]) { std::memcpy(target, x, sizeof(x)); }
inline void load_floats(float (&x)[8], const float* source) { std::memcpy(x, source, sizeof(x)); }

// ---- global → shared

inline void copy_async_16(uint32_t address, const void* source, bool valid) {
  machine().copy_async(address, source, 16, valid);
}
inline void copy_commit() { machine().copy_commit(); }
template <int kPending>
void copy_wait() {
  machine().copy_wait(kPending);
}

}  // namespace ldm
