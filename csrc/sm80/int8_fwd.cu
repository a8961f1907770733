// Compiled once for each LDM_INT8_HEAD_DIM: launches the INT8 forward.
#include <launch.cuh>

#include "../dispatch.h"
#include "int8_fwd.cuh"

namespace ldm {

template <int kHeadDim>
int launch_int8_fwd(const Int8Params& p, cudaStream_t stream) {
  using C = Int8Tiles<kHeadDim>;
  const FlashParams& f = p.flash;
  const int64_t blocks = static_cast<int64_t>(f.batch) * f.heads * ceil_div(f.q_len, C::kBlockQ);
  return with_element(f.bfloat16, [&](auto element) {
    return launch<int8_fwd_kernel<decltype(element), C>>(blocks, C::kThreads, C::kSharedBytes, p,
                                                         stream);
  });
}

template int launch_int8_fwd<LDM_INT8_HEAD_DIM>(const Int8Params& p, cudaStream_t stream);

}  // namespace ldm
