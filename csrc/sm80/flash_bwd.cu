// Compiled once for each LDM_HEAD_DIM: launches the backward, in one launch where the keys allow.
#include <launch.cuh>

#include "../dispatch.h"
#include "flash_bwd.cuh"
#include "flash_bwd_dq.cuh"

namespace ldm {

template <class C>
int64_t query_blocks(const FlashParams& p) {
  return static_cast<int64_t>(p.batch) * p.heads * ceil_div(p.q_len, C::kBlockQ);
}

template <typename T, int kHeadDim, bool kHasMask>
int launch_passes(const FlashParams& p, cudaStream_t stream) {
  using C = BwdTiles<kHeadDim>;
  using Dq = DqTiles<kHeadDim>;
  int error = 0;
  if (!p.fused_delta) {
    error = launch<flash_bwd_prepare_kernel<T, C>>(query_blocks<C>(p), C::kThreads, 0, p, stream);
    if (error) return error;
  }
  const int64_t key_blocks =
      static_cast<int64_t>(p.batch) * p.kv_heads * ceil_div(p.k_len, C::kBlockK);
  error =
      launch<flash_bwd_kernel<T, C, kHasMask>>(key_blocks, C::kThreads, C::kSharedBytes, p, stream);
  if (error || p.dq_mode == kStoreOnce) return error;
  if (p.dq_mode == kAtomic) {
    return launch<flash_bwd_round_kernel<T, C>>(query_blocks<C>(p), C::kThreads, 0, p, stream);
  }
  return launch<flash_bwd_dq_kernel<T, Dq, kHasMask>>(query_blocks<Dq>(p), Dq::kThreads,
                                                      Dq::kSharedBytes, p, stream);
}

template <int kHeadDim>
int launch_flash_bwd(const FlashParams& p, cudaStream_t stream) {
  return with_element(p.bfloat16, [&](auto element) {
    return with_flag(p.mask_kind != kNoMask, [&](auto has_mask) {
      return launch_passes<decltype(element), kHeadDim, decltype(has_mask)::value>(p, stream);
    });
  });
}

template <int kHeadDim>
int flash_bwd_block_keys() {
  return BwdTiles<kHeadDim>::kBlockK;
}

template <int kHeadDim>
int64_t flash_bwd_workspace(const FlashParams& p) {
  return query_blocks<BwdTiles<kHeadDim>>(p) * BwdTiles<kHeadDim>::kDqFloats;
}

template int launch_flash_bwd<LDM_HEAD_DIM>(const FlashParams& p, cudaStream_t stream);
template int flash_bwd_block_keys<LDM_HEAD_DIM>();
template int64_t flash_bwd_workspace<LDM_HEAD_DIM>(const FlashParams& p);

}  // namespace ldm
