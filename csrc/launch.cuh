// Host side of a launch. tests/emulation/launch.cuh runs the same blocks on the CPU; include this
// one as <launch.cuh>.
#pragma once
#include <cuda_runtime.h>

#include <atomic>

#include "params.h"

namespace ldm {

struct DeviceLimits {
  int processors;    // streaming multiprocessors
  int shared_bytes;  // a block may have, after opting in
};

// Asked once a device: a query costs as much as a launch.
inline const DeviceLimits& device_limits() {
  constexpr int kDevices = 64;
  static DeviceLimits limits[kDevices];
  static std::atomic<bool> known[kDevices];
  int device = 0;
  cudaGetDevice(&device);
  DeviceLimits& found = limits[device % kDevices];
  if (!known[device % kDevices].load(std::memory_order_acquire)) {
    cudaDeviceGetAttribute(&found.processors, cudaDevAttrMultiProcessorCount, device);
    cudaDeviceGetAttribute(&found.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    known[device % kDevices].store(true, std::memory_order_release);
  }
  return found;
}

template <auto kKernel>
int probe() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kKernel);
  cudaGetLastError();  // a reason to decline is no error of the next launch
  return error;
}

template <auto kKernel>
int launch(int64_t blocks, int threads, int shared_bytes, const FlashParams& p,
           cudaStream_t stream) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
  }
  kKernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace ldm
