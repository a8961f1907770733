// Compiled once for each LDM_HEAD_DIM: launches the backward, in one launch where the keys allow.
#include <algorithm>
#include <launch.cuh>

#include "../dispatch.h"
#include "flash_bwd_dq.cuh"
#include "flash_bwd_sums.cuh"

namespace ldm {

template <class C>
int64_t query_blocks(const FlashParams& p) {
  return static_cast<int64_t>(p.batch) * p.heads * ceil_div(p.q_len, C::kBlockQ);
}

template <typename T, int kHeadDim, bool kHasMask>
int launch_passes(const FlashParams& p, cudaStream_t stream) {
  using C = BwdTiles<kHeadDim>;
  using Dq = DqTiles<kHeadDim>;
  const int64_t heads = static_cast<int64_t>(p.batch) * p.kv_heads;
  const int64_t blocks = heads * (p.dq_mode == kInTurn ? p.splits : ceil_div(p.k_len, C::kBlockK));
  const int turns = p.dq_mode == kInTurn ? ceil_div(p.k_len, C::kBlockK) : 1;
  int error = 0;
  if (p.dq_mode != kInTurn) {
    error = launch<flash_bwd_prepare_kernel<T, C>>(query_blocks<C>(p), C::kThreads, 0, p, stream);
  }
  FlashParams turn = p;
  for (turn.turn = 0; turn.turn < turns && !error; ++turn.turn) {
    error = launch<flash_bwd_kernel<T, C, kHasMask>>(blocks, C::kThreads, C::kSharedBytes, turn,
                                                     stream);
  }
  if (error) return error;
  if (p.dq_mode == kAtomic) {
    return launch<flash_bwd_round_kernel<T, C>>(query_blocks<C>(p), C::kThreads, 0, p, stream);
  }
  if (p.dq_mode == kSeparateKernel) {
    return launch<flash_bwd_dq_kernel<T, Dq, kHasMask>>(query_blocks<Dq>(p), Dq::kThreads,
                                                        Dq::kSharedBytes, p, stream);
  }
  if (p.splits == 1) return 0;
  return launch<flash_bwd_sum_kernel<T, C>>(heads, C::kThreads, 0, p, stream);
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
int64_t plan_flash_bwd(FlashParams& p, bool deterministic) {
  using C = BwdTiles<kHeadDim>;
  const int64_t heads = static_cast<int64_t>(p.batch) * p.kv_heads;
  const int64_t processors = device_limits().processors;
  const int k_tiles = ceil_div(p.k_len, C::kBlockK);
  p.splits = 1;
  if (k_tiles > kTurns && !(deterministic && heads >= processors)) {
    p.dq_mode = deterministic ? kSeparateKernel : kAtomic;
    return deterministic ? 0 : query_blocks<C>(p) * C::kDqFloats;
  }
  p.dq_mode = kInTurn;
  if (k_tiles > 1) return query_blocks<C>(p) * C::kDqFloats;
  // one tile of keys: heads alone may be too few blocks for the GPU
  const int64_t steps =
      static_cast<int64_t>(p.heads / std::max(p.kv_heads, 1)) * ceil_div(p.q_len, C::kBlockQ);
  const int64_t wanted = 2 * processors / std::max<int64_t>(heads, 1);
  p.splits = static_cast<int32_t>(
      std::clamp<int64_t>(steps / kSplitSteps, 1, std::max<int64_t>(wanted, 1)));
  return p.splits > 1 ? heads * p.splits * C::kDkvFloats : 0;
}

template int launch_flash_bwd<LDM_HEAD_DIM>(const FlashParams& p, cudaStream_t stream);
template int64_t plan_flash_bwd<LDM_HEAD_DIM>(FlashParams& p, bool deterministic);

}  // namespace ldm
