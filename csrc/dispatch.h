// The only door from run-time values to template arguments.
#pragma once
#include <type_traits>

#include "types.h"

// Head dims with kernels of their own; any other runs in the next one up, with predicated loads.
// setup.py reads these lists: sources that mention LDM_HEAD_DIM are compiled once for each.
#define LDM_HEAD_DIMS(X) \
  X(16) X(32) X(40) X(48) X(64) X(80) X(96) X(112) X(128) X(160) X(192) X(256)

// INT8 products are 32 wide and pay on long rows, so there are fewer: LDM_INT8_HEAD_DIM likewise.
#define LDM_INT8_HEAD_DIMS(X) X(64) X(80) X(128) X(160) X(256)

namespace ldm {

constexpr int kMaxHeadDim = 256;
constexpr int kMaxFwdHeadDim = 512;  // without a gradient

// Calls f with the smallest compiled head dim that holds `head_dim`.
#define LDM_CASE(kDim) \
  if (head_dim <= kDim) return f(std::integral_constant<int, kDim>());
template <typename F>
auto with_head_dim(int head_dim, F&& f) {
  LDM_HEAD_DIMS(LDM_CASE)
  return f(std::integral_constant<int, kMaxHeadDim>());
}
// The forward's.
template <typename F>
auto with_fwd_head_dim(int head_dim, F&& f) {
  if (head_dim > kMaxHeadDim) return f(std::integral_constant<int, kMaxFwdHeadDim>());
  return with_head_dim(head_dim, f);
}
template <typename F>
auto with_int8_head_dim(int head_dim, F&& f) {
  LDM_INT8_HEAD_DIMS(LDM_CASE)
  return f(std::integral_constant<int, kMaxHeadDim>());
}
#undef LDM_CASE

template <typename F>
auto with_element(bool bfloat16, F&& f) {
  return bfloat16 ? f(BFloat16()) : f(Half());
}

template <typename F>
auto with_flag(bool flag, F&& f) {
  return flag ? f(std::true_type()) : f(std::false_type());
}

}  // namespace ldm
