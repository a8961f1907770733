// csrc/launch.cuh on the CPU: the blocks of a launch, one after the other.
#pragma once
#include <algorithm>

#include "../../csrc/params.h"
#include "machine.h"

namespace ldm {

struct DeviceLimits {
  int processors;
  int shared_bytes;
};
inline DeviceLimits& device_limits() {
  static DeviceLimits limits = {1, 163 * 1024};
  return limits;
}

template <auto kKernel>
int resident_blocks(int, int shared_bytes) {
  return std::min(2, device_limits().shared_bytes / shared_bytes);
}

template <auto kKernel>
int probe() {
  return 0;
}

template <auto kKernel, class Params>
int launch(int64_t blocks, int threads, int shared_bytes, const Params& p, cudaStream_t) {
  if (shared_bytes > device_limits().shared_bytes) return 1;
  emulation::machine().run(blocks, threads, shared_bytes, [&] { kKernel(p); });
  return 0;
}

}  // namespace ldm
