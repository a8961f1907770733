// The forward of head dims between kMaxHeadDim and kMaxFwdHeadDim, in the latter's kernel.
#include <launch.cuh>

#include "../dispatch.h"
#include "flash_fwd_large.cuh"
#include "splits.cuh"

namespace ldm {

template <typename T>
struct LargeKernel {
  using Tiles = LargeTiles<kMaxFwdHeadDim>;
  static constexpr auto kFunction = flash_fwd_large_kernel<T, Tiles>;
};

template <>
int64_t plan_flash_fwd<kMaxFwdHeadDim>(FlashParams& p) {
  p.splits = with_element(
      p.bfloat16, [&](auto element) { return count_splits<LargeKernel<decltype(element)>>(p); });
  return partial_floats(p);
}

template <>
int launch_flash_fwd<kMaxFwdHeadDim>(const FlashParams& p, cudaStream_t stream) {
  return with_element(p.bfloat16, [&](auto element) {
    return launch_splits<LargeKernel<decltype(element)>>(p, stream);
  });
}

}  // namespace ldm
