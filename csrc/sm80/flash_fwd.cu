// Compiled once for each LDM_HEAD_DIM: chooses the tile, launches the forward.
#include <launch.cuh>

#include "../dispatch.h"
#include "flash_fwd.cuh"

namespace ldm {

template <class C>
int64_t count_blocks(const FlashParams& p) {
  return static_cast<int64_t>(p.batch) * p.heads * ceil_div(p.q_len, C::kBlockQ);
}

template <typename T, class C, bool kGeneral>
int launch_tiles(const FlashParams& p, cudaStream_t stream) {
  return launch<flash_fwd_kernel<T, C, kGeneral>>(count_blocks<C>(p), C::kThreads, C::kSharedBytes,
                                                  p, stream);
}

// Queries that an SM passes until the last block is done, its blocks in waves.
template <typename T, class C>
int64_t queries_an_sm(const FlashParams& p) {
  const int resident = resident_blocks<flash_fwd_kernel<T, C, false>>(C::kThreads, C::kSharedBytes);
  if (resident == 0) return INT32_MAX;
  const int64_t wave = static_cast<int64_t>(resident) * device_limits().processors;
  return ceil_div(count_blocks<C>(p), wave) * resident * C::kBlockQ;
}

// A narrow tile reads K and V twice as often: 1.1 of the time in full waves.
template <typename T, class Wide, class Narrow>
bool prefers_narrow(const FlashParams& p) {
  return p.q_len <= Narrow::kBlockQ ||
         11 * queries_an_sm<T, Narrow>(p) < 10 * queries_an_sm<T, Wide>(p);
}

template <int kHeadDim>
int launch_flash_fwd(const FlashParams& p, cudaStream_t stream) {
  using Wide = FwdTiles<kHeadDim, Shape::kWide>;
  using Narrow = FwdTiles<kHeadDim, Shape::kNarrow>;
  return with_element(p.bfloat16, [&](auto element) {
    using T = decltype(element);
    if (is_general(p)) return launch_tiles<T, Narrow, true>(p, stream);
    if constexpr (kHasFewFwd<kHeadDim>) {
      using Few = FwdTiles<kHeadDim, Shape::kFew>;
      if (p.k_len <= kFewFwdKeys && p.q_len > Narrow::kBlockQ) {
        return launch_tiles<T, Few, false>(p, stream);
      }
    }
    if (prefers_narrow<T, Wide, Narrow>(p)) return launch_tiles<T, Narrow, false>(p, stream);
    return launch_tiles<T, Wide, false>(p, stream);
  });
}

template <int kHeadDim>
int probe_flash_fwd() {
  return probe<flash_fwd_kernel<Half, FwdTiles<kHeadDim, Shape::kNarrow>, false>>();
}

template int probe_flash_fwd<LDM_HEAD_DIM>();
template int launch_flash_fwd<LDM_HEAD_DIM>(const FlashParams& p, cudaStream_t stream);

}  // namespace ldm
