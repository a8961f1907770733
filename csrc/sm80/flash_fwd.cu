// Compiled once for each LDM_HEAD_DIM: chooses the tile, launches the forward.
#include <launch.cuh>

#include "../dispatch.h"
#include "flash_fwd.cuh"

namespace ldm {

// Half-height tiles where the queries do not fill one, or the grid would not fill the GPU.
template <class Wide>
bool prefers_narrow(const FlashParams& p) {
  const int64_t blocks = static_cast<int64_t>(p.batch) * p.heads * ceil_div(p.q_len, Wide::kBlockQ);
  return p.q_len <= Wide::kBlockQ / 2 || blocks < device_limits().processors;
}

template <typename T, class C, bool kGeneral>
int launch_tiles(const FlashParams& p, cudaStream_t stream) {
  const int64_t blocks = static_cast<int64_t>(p.batch) * p.heads * ceil_div(p.q_len, C::kBlockQ);
  return launch<flash_fwd_kernel<T, C, kGeneral>>(blocks, C::kThreads, C::kSharedBytes, p, stream);
}

template <int kHeadDim>
int launch_flash_fwd(const FlashParams& p, cudaStream_t stream) {
  using Wide = FwdTiles<kHeadDim, false>;
  return with_element(p.bfloat16, [&](auto element) {
    using T = decltype(element);
    return with_flag(is_general(p), [&](auto general) {
      constexpr bool kGeneral = decltype(general)::value;
      if constexpr (!kGeneral) {
        if (!prefers_narrow<Wide>(p)) return launch_tiles<T, Wide, false>(p, stream);
      }
      return launch_tiles<T, FwdTiles<kHeadDim, true>, kGeneral>(p, stream);
    });
  });
}

template <int kHeadDim>
int probe_flash_fwd() {
  return probe<flash_fwd_kernel<Half, FwdTiles<kHeadDim, true>, false>>();
}

template int probe_flash_fwd<LDM_HEAD_DIM>();
template int launch_flash_fwd<LDM_HEAD_DIM>(const FlashParams& p, cudaStream_t stream);

}  // namespace ldm
