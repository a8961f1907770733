// Compiled once for each LDM_HEAD_DIM: chooses the tile and the splits, launches the forward.
#include <launch.cuh>

#include "../dispatch.h"
#include "flash_fwd.cuh"
#include "splits.cuh"

namespace ldm {

// Queries that an SM passes all keys of until the last block is done, its blocks in waves.
template <class K>
double queries_an_sm(const FlashParams& p) {
  const Waves<K> waves;
  if (waves.resident == 0) return INFINITY;
  const int splits = count_splits<K>(p);
  const int64_t passed = ceil_div(count_blocks<K>(p) * splits, waves.size()) * waves.resident;
  return static_cast<double>(passed * K::Tiles::kBlockQ) / splits;
}

template <class K>
int warps_an_sm() {
  return Waves<K>().resident * K::Tiles::kThreads / kWarp;
}

template <int kHeadDim, class Wide, class Narrow>
bool prefers_narrow(const FlashParams& p) {
  return p.q_len <= Narrow::Tiles::kBlockQ ||
         kNarrowCost<kHeadDim> * queries_an_sm<Narrow>(p) < queries_an_sm<Wide>(p);
}

template <typename T, class C, bool kGeneral>
struct FwdKernel {
  using Tiles = C;
  static constexpr auto kFunction = flash_fwd_kernel<T, C, kGeneral>;
};

// Calls f with the first wide kernel of which an SM holds enough, or the narrow one.
template <int kHeadDim, class Narrow, typename T, int kRank = 0, typename F>
auto with_wide_kernel(const FlashParams& p, F&& f) {
  if constexpr (kRank < kWideFwdRows<kHeadDim>) {
    if constexpr (is_built<FwdTiles, kHeadDim, Shape::kWide, kRank>()) {
      using Wide = FwdKernel<T, FwdTiles<kHeadDim, Shape::kWide, kRank>, false>;
      if (warps_an_sm<Wide>() >= kEnoughWarps) {
        return prefers_narrow<kHeadDim, Wide, Narrow>(p) ? f(Narrow()) : f(Wide());
      }
    }
    return with_wide_kernel<kHeadDim, Narrow, T, kRank + 1>(p, f);
  } else {
    return f(Narrow());
  }
}

// Calls f with the kernel that serves a call.
template <int kHeadDim, typename F>
auto with_kernel(const FlashParams& p, F&& f) {
  return with_element(p.bfloat16, [&](auto element) {
    using T = decltype(element);
    using Narrow = FwdKernel<T, FwdTiles<kHeadDim, Shape::kNarrow>, false>;
    if (is_general(p)) return f(FwdKernel<T, typename Narrow::Tiles, true>());
    if constexpr (kHasOneWarpFwd<kHeadDim>) {
      if (p.q_len <= kOneWarpQueries && p.k_len <= kFewFwdKeys) {
        return f(FwdKernel<T, FwdTiles<kHeadDim, Shape::kOneWarp>, false>());
      }
    }
    if constexpr (kHasFewFwd<kHeadDim>) {
      if (p.k_len <= kFewFwdKeys && p.q_len > Narrow::Tiles::kBlockQ) {
        return f(FwdKernel<T, FwdTiles<kHeadDim, Shape::kFew>, false>());
      }
    }
    return with_wide_kernel<kHeadDim, Narrow, T>(p, f);
  });
}

template <int kHeadDim>
int64_t plan_flash_fwd(FlashParams& p) {
  p.splits =
      with_kernel<kHeadDim>(p, [&](auto kernel) { return count_splits<decltype(kernel)>(p); });
  return partial_floats(p);
}

template <int kHeadDim>
int launch_flash_fwd(const FlashParams& p, cudaStream_t stream) {
  return with_kernel<kHeadDim>(
      p, [&](auto kernel) { return launch_splits<decltype(kernel)>(p, stream); });
}

template <int kHeadDim>
int probe_flash_fwd() {
  return probe<flash_fwd_kernel<Half, FwdTiles<kHeadDim, Shape::kNarrow>, false>>();
}

template int probe_flash_fwd<LDM_HEAD_DIM>();
template int64_t plan_flash_fwd<LDM_HEAD_DIM>(FlashParams& p);
template int launch_flash_fwd<LDM_HEAD_DIM>(const FlashParams& p, cudaStream_t stream);

}  // namespace ldm
