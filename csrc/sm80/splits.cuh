// Host side of sharing keys out: how many blocks of a forward kernel there are, and how many share
// out the keys of each. K is a kernel: its function and its tiles.
#pragma once
#include <algorithm>
#include <launch.cuh>

#include "tiles.h"

namespace ldm {

template <class K>
int64_t count_blocks(const FlashParams& p) {
  return static_cast<int64_t>(p.batch) * p.heads * ceil_div(p.q_len, K::Tiles::kBlockQ);
}

template <class K>
struct Waves {
  int processors = device_limits().processors;
  int resident =
      resident_blocks<K::kFunction>(K::Tiles::kThreads, K::Tiles::kSharedBytes);  // an SM
  int64_t size() const { return static_cast<int64_t>(resident) * processors; }
};

template <class K>
int count_splits(const FlashParams& p) {
  const int64_t blocks = count_blocks<K>(p);
  const Waves<K> waves;
  const int shares = p.k_len / share_keys(p);
  if (!K::Tiles::kSplit || shares < kSplitFrom || blocks == 0 || blocks > waves.processors)
    return 1;
  const int64_t most = std::min(shares, kMaxSplits);
  return static_cast<int>(std::max<int64_t>(1, std::min(waves.size() / blocks, most)));
}

template <class K>
int launch_splits(const FlashParams& p, cudaStream_t stream) {
  const int error = launch<K::kFunction>(count_blocks<K>(p) * p.splits, K::Tiles::kThreads,
                                         K::Tiles::kSharedBytes, p, stream);
  return error || p.splits == 1 ? error : launch_flash_combine(p, stream);
}

}  // namespace ldm
