// Host side of a launch; out of line, since its callers have a branch for every tile.
// tests/emulation/launch.cuh runs the same blocks on the CPU; include this one as <launch.cuh>.
#pragma once
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>

#include "params.h"

namespace ldm {

constexpr int kDevices = 64;

inline int device_slot() {
  int device = 0;
  cudaGetDevice(&device);
  return device % kDevices;
}

struct DeviceLimits {
  int processors;  // streaming multiprocessors
};

// Asked once a device: a query costs as much as a launch.
inline DeviceLimits device_limits() {
  static std::atomic<int> known[kDevices];
  const int slot = device_slot();
  int processors = known[slot].load(std::memory_order_relaxed);
  if (processors == 0) {
    cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, slot);
    known[slot].store(processors, std::memory_order_relaxed);
  }
  return {processors};
}

// $LDM4TS_SHARED_KIB: tiles are chosen, and blocks share an SM, as on a GPU whose SMs have so much
// shared memory: 100 (sm_86, sm_89) or 164 (sm_80). Not set, all there is.
inline int pretended_kib() {
  static const char* const text = std::getenv("LDM4TS_SHARED_KIB");
  return text ? std::atoi(text) : 0;
}

// The most that a block may ask for.
__noinline__ inline int most_shared() {
  int bytes = 0;
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device_slot());
  const int kib = pretended_kib();
  return kib ? std::min(bytes, (kib - 1) * 1024) : bytes;
}

// How many of `blocks` then share an SM, each with 1 KiB of the system's.
__noinline__ inline int pretended_blocks(int blocks, int shared_bytes) {
  const int kib = pretended_kib();
  return kib ? std::min(blocks, kib * 1024 / (shared_bytes + 1024)) : blocks;
}

// What a block must ask for so that no more of them do.
__noinline__ inline int pretended_shared(int shared_bytes) {
  if (!pretended_kib()) return shared_bytes;
  int bytes = 0;
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device_slot());
  const int blocks = pretended_blocks(INT32_MAX, shared_bytes);
  return std::max(shared_bytes, bytes / (blocks + 1) - 1024 + 128);
}

// More than 48 KiB of shared memory must be asked for, once a kernel and device.
template <auto kKernel>
cudaError_t allow_shared(int bytes) {
  static std::atomic<bool> allowed[kDevices];
  const int slot = device_slot();
  if (bytes <= 48 * 1024 || allowed[slot].load(std::memory_order_relaxed)) return cudaSuccess;
  const cudaError_t error =
      cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  allowed[slot].store(error == cudaSuccess, std::memory_order_relaxed);
  return error;
}

// How many blocks of a kernel an SM holds, 0 where one asks for more than there is; asked once a
// kernel and device.
template <auto kKernel>
__noinline__ int resident_blocks(int threads, int shared_bytes) {
  static std::atomic<int> known[kDevices];  // one more than the answer
  const int slot = device_slot();
  int found = known[slot].load(std::memory_order_relaxed);
  if (found == 0) {
    int blocks = 0;
    if (shared_bytes <= most_shared() &&
        allow_shared<kKernel>(pretended_shared(shared_bytes)) == cudaSuccess) {
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kKernel, threads, shared_bytes);
    }
    cudaGetLastError();  // a reason to take another tile is no error of the next launch
    known[slot].store(found = pretended_blocks(blocks, shared_bytes) + 1,
                      std::memory_order_relaxed);
  }
  return found - 1;
}

template <auto kKernel>
int probe() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kKernel);
  cudaGetLastError();  // a reason to decline is no error of the next launch
  return error;
}

template <auto kKernel, class Params>
__noinline__ int launch(int64_t blocks, int threads, int shared_bytes, const Params& p,
                        cudaStream_t stream) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  shared_bytes = pretended_shared(shared_bytes);
  if (const cudaError_t error = allow_shared<kKernel>(shared_bytes)) return error;
  kKernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace ldm
