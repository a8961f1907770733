// Launches the quantiser: one launch for few keys, two for many.
#include <launch.cuh>

#include "dispatch.h"
#include "quantize.cuh"

namespace ldm {

static_assert(kMaxColumns == kMaxHeadDim, "a row of keys is as wide as the widest head");

int launch_quantise_keys(const Int8Params& p, cudaStream_t stream) {
  const int64_t heads = static_cast<int64_t>(p.flash.batch) * p.flash.kv_heads;
  return with_element(p.flash.bfloat16, [&](auto element) {
    using T = decltype(element);
    if (const int error = launch<int8_key_sums_kernel<T>>(heads * p.parts, kQuantThreads,
                                                          kQuantBytes, p, stream)) {
      return error;
    }
    const int64_t blocks = heads * ceil_div(p.flash.k_len, kQuantRows);
    // a narrow row leaves registers for more blocks an SM
    return with_flag(p.width <= kMaxColumns / 2, [&](auto narrow) {
      constexpr int kColumns = decltype(narrow)::value ? kMaxColumns / 2 : kMaxColumns;
      return launch<int8_keys_kernel<T, kColumns>>(blocks, kQuantThreads, kQuantBytes, p, stream);
    });
  });
}

int launch_round_operands(const Int8Params& p, cudaStream_t stream) {
  const FlashParams& f = p.flash;
  const int64_t blocks = static_cast<int64_t>(f.batch) * f.heads * ceil_div(f.q_len, kRoundRows) +
                         static_cast<int64_t>(f.batch) * f.kv_heads * ceil_div(f.k_len, kRoundRows);
  return with_element(f.bfloat16, [&](auto element) {
    return launch<int8_round_kernel<decltype(element)>>(blocks, kQuantThreads, 0, p, stream);
  });
}

}  // namespace ldm
