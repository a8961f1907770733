// Compiled once for each LDM_HEAD_DIM: chooses the tiles, launches the backward.
#include <launch.cuh>

#include "../dispatch.h"
#include "flash_bwd.cuh"

namespace ldm {

template <class C>
int64_t backward_blocks(const FlashParams& p) {
  using Keys = typename C::ByKeys;
  using Queries = typename C::ByQueries;
  const int64_t by_keys =
      static_cast<int64_t>(p.batch) * p.kv_heads * ceil_div(p.k_len, Keys::kRows) * Keys::kParts;
  const int64_t by_queries =
      static_cast<int64_t>(p.batch) * p.heads * ceil_div(p.q_len, Queries::kRows) * Queries::kParts;
  return C::kJoint ? by_keys : by_keys + by_queries;
}

template <typename T, class C, bool kGeneral>
int launch_tiles(const FlashParams& p, cudaStream_t stream) {
  return launch<flash_bwd_kernel<T, C, kGeneral>>(backward_blocks<C>(p), C::kThreads,
                                                  C::kSharedBytes, p, stream);
}

template <typename T, int kHeadDim>
int launch_statistics(const FlashParams& p, cudaStream_t stream) {
  if (!p.statistics) return 0;
  const int64_t blocks =
      static_cast<int64_t>(p.batch) * p.heads * (padded_queries(p) / kStatisticsRows);
  return launch<flash_bwd_statistics_kernel<T, BwdTiles<kHeadDim, Shape::kNarrow>>>(
      blocks, kStatisticsRows, 0, p, stream);
}

// Calls f with the first joint tiles of which an SM holds enough warps; returns f's result, or 0.
template <typename T, int kHeadDim, int kRank = 0, typename F>
int with_joint_tiles(F&& f) {
  if constexpr (kRank < kJointBwdRows<kHeadDim>) {
    if constexpr (is_built<BwdTiles, kHeadDim, Shape::kJoint, kRank>()) {
      using Joint = BwdTiles<kHeadDim, Shape::kJoint, kRank>;
      const int resident =
          resident_blocks<flash_bwd_kernel<T, Joint, false>>(Joint::kThreads, Joint::kSharedBytes);
      if (resident * Joint::kThreads / kWarp >= kEnoughWarps) return f(Joint(), resident);
    }
    return with_joint_tiles<T, kHeadDim, kRank + 1>(f);
  }
  return 0;
}

template <typename T, int kHeadDim>
int launch_joint(const FlashParams& p, cudaStream_t stream) {
  const int error = with_joint_tiles<T, kHeadDim>(
      [&](auto joint, int) { return launch_tiles<T, decltype(joint), false>(p, stream); });
  if (error) return error;
  using C = BwdTiles<kHeadDim, Shape::kNarrow>;
  const int64_t blocks = static_cast<int64_t>(p.batch) * p.heads * ceil_div(p.q_len, kFinishedRows);
  return launch<flash_bwd_finish_kernel<T, C>>(blocks, kFinishedRows * 2,
                                               kFinishedRows * C::kPadded * 2, p, stream);
}

template <int kHeadDim>
int launch_flash_bwd(const FlashParams& p, cudaStream_t stream) {
  return with_element(p.bfloat16, [&](auto element) {
    using T = decltype(element);
    if (const int error = launch_statistics<T, kHeadDim>(p, stream)) return error;
    if constexpr (kJointBwdRows<kHeadDim> > 0) {
      if (p.dq_sums) return launch_joint<T, kHeadDim>(p, stream);
    }
    return with_flag(is_general(p), [&](auto general) {
      constexpr bool kGeneral = decltype(general)::value;
      if constexpr (!kGeneral && kHasWideBwd<kHeadDim>) {
        using Wide = BwdTiles<kHeadDim, Shape::kWide>;
        // few keys: a block meets all queries, so that the smaller one is done sooner; and fewer
        // than two blocks an SM would leave it waiting
        if (p.k_len > kFewKeys && backward_blocks<Wide>(p) >= 2 * device_limits().processors) {
          return launch_tiles<T, Wide, false>(p, stream);
        }
      }
      if constexpr (!kGeneral && kHasPairedBwd<kHeadDim>) {
        using Paired = BwdTiles<kHeadDim, Shape::kPaired>;
        if (backward_blocks<Paired>(p) <= device_limits().processors) {
          return launch_tiles<T, Paired, false>(p, stream);
        }
      }
      constexpr Shape kShape = kGeneral ? Shape::kGeneral : Shape::kNarrow;
      return launch_tiles<T, BwdTiles<kHeadDim, kShape>, kGeneral>(p, stream);
    });
  });
}

// Joint blocks have the most to do, so that a last wave that is almost empty costs the most.
template <typename T, int kHeadDim>
bool are_joint(const FlashParams& p) {
  if (p.repeatable || is_general(p) || p.k_len <= kFewKeys || !statistics_floats(p)) return false;
  return with_joint_tiles<T, kHeadDim>([&](auto joint, int resident) {
    const int64_t wave = static_cast<int64_t>(device_limits().processors) * resident;
    const int64_t blocks = backward_blocks<decltype(joint)>(p);
    return 4 * blocks >= 3 * ceil_div(blocks, wave) * wave;
  });
}

template <int kHeadDim>
int64_t dq_floats(const FlashParams& p) {
  const bool joint =
      with_element(p.bfloat16, [&](auto x) { return are_joint<decltype(x), kHeadDim>(p); });
  if (!joint) return 0;
  return static_cast<int64_t>(padded_queries(p)) * ceil_div(p.head_dim, 8) * 8 * p.batch * p.heads;
}

template int64_t dq_floats<LDM_HEAD_DIM>(const FlashParams& p);
template int launch_flash_bwd<LDM_HEAD_DIM>(const FlashParams& p, cudaStream_t stream);

}  // namespace ldm
