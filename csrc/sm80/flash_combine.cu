// The second launch of a forward whose keys were shared out (p.splits > 1):
//     out = Σ_s exp(lse_s − lse) · out_s,   lse = log Σ_s exp(lse_s)
// in the order of the splits, so that every run gives the same bits.
#include <launch.cuh>

#include "../dispatch.h"
#include "../softmax.cuh"
#include "tile.cuh"
#include "tiles.h"

namespace ldm {

// A thread combines one chunk of a row. It has the parts of several splits under way at once.
template <typename T>
LDM_KERNEL(kCombineThreads, 1)
flash_combine_kernel(LDM_PARAMS p) {
  const int chunks = partial_width(p) / kChunk;
  const int64_t at = block_index() * kCombineThreads + thread_index();
  const int64_t rows = partial_rows(p);
  const int64_t row = at / chunks;
  const int chunk = static_cast<int>(at % chunks);
  if (row >= rows) return;
  const float* parts = p.partial + at * kChunk;
  const float* lses = p.partial + p.splits * rows * partial_width(p) + row;

  float base = SoftmaxRows<1>::kLowest, sum = 0.0f, out[kChunk] = {};  // base: of log2
  LDM_ROLLED for (int first = 0; first < p.splits; first += kCombineAhead) {
    float lse[kCombineAhead], part[kCombineAhead][kChunk];
    LDM_UNROLL for (int i = 0; i < kCombineAhead; ++i) {
      const int64_t split = min(first + i, p.splits - 1);
      lse[i] = first + i < p.splits ? lses[split * rows] * kLog2e : -INFINITY;
      load_floats(part[i], parts + split * rows * partial_width(p));
    }
    float higher = base;
    LDM_UNROLL for (int i = 0; i < kCombineAhead; ++i) higher = fmaxf(higher, lse[i]);
    const float correction = exp2_approx(base - higher);
    base = higher;
    sum *= correction;
    LDM_UNROLL for (int e = 0; e < kChunk; ++e) out[e] *= correction;
    LDM_UNROLL for (int i = 0; i < kCombineAhead; ++i) {
      const float weight = exp2_approx(lse[i] - base);
      sum += weight;
      LDM_UNROLL for (int e = 0; e < kChunk; ++e) out[e] += weight * part[i][e];
    }
  }
  const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
  if (chunk == 0) p.lse[row] = sum == 0.0f ? -INFINITY : base * kLn2 + natural_log(sum);
  Chunk rounded;
  LDM_UNROLL for (int i = 0; i < 4; ++i) {
    rounded.words[i] = pack(T(), out[2 * i] * inverse, out[2 * i + 1] * inverse);
  }
  const int head_index = static_cast<int>(row / p.q_len);
  store_chunk(rows_of(p.o, head_index / p.heads, head_index % p.heads),
              static_cast<int>(row % p.q_len), chunk, p.head_dim - chunk * kChunk, rounded);
}

int launch_flash_combine(const FlashParams& p, cudaStream_t stream) {
  const int64_t threads = partial_rows(p) * (partial_width(p) / kChunk);
  return with_element(p.bfloat16, [&](auto element) {
    return launch<flash_combine_kernel<decltype(element)>>(
        ceil_div(threads, int64_t{kCombineThreads}), kCombineThreads, 0, p, stream);
  });
}

}  // namespace ldm
