// Every block size of the INT8 kernels, in the manner of tiles.h.
#pragma once
#include "tiles.h"

namespace ldm {

// NVIDIA H100, 2026-11-27: the fastest of three to seven candidates a head dim, each timed alone in
// a graph on the shapes of benchmarks/cases.py; at 64 that of three equal ones with which two
// blocks fit an SM of sm_86; 256, which no shape has, by registers and shared memory.
constexpr FwdRow kInt8Fwd[] = {
    {64, 4, 2, 32, 2, 3, true},  {80, 4, 2, 32, 2, 2, true},   {128, 4, 1, 32, 2, 2, true},
    {160, 4, 1, 32, 2, 2, true}, {256, 8, 1, 16, 2, 2, false},
};
constexpr int kQuantRows = 64;  // keys that share a scale

template <int kDim>
struct Int8Tiles {
  static constexpr FwdRow kRow = row_for(kInt8Fwd, kDim);
  static constexpr int kHeadDim = kDim;
  static constexpr int kPadded = ceil_div(kDim, 16) * 16;
  static constexpr int kWidth = ceil_div(kDim, 32) * 32;  // bytes of a row of INT8
  static constexpr int kKeyColumns = kWidth / 2;          // of 16 bits: where tiles see pairs
  static constexpr int kSteps = kWidth / 32;              // along a row
  static constexpr int kThreads = kRow.warps * kWarp;
  static constexpr int kRowTiles = kRow.row_tiles;
  static constexpr int kBlockQ = kRow.warps * kRow.row_tiles * 16;
  static constexpr int kSlice = kRow.slice;
  static constexpr int kSlices = kRow.slices;
  static constexpr int kBlockK = kSlice * kSlices;
  static constexpr int kStages = kRow.stages;
  static constexpr bool kKept = kRow.kept;
  static constexpr int kTermBytes = kBlockQ * 8;  // a query's factor, and what its LSE lacks
  static constexpr int kStageBytes = kBlockK * (kWidth + kPadded * 2);
  static constexpr int kSharedBytes =
      kTermBytes + (kBlockQ + kSlice) * kWidth + kStages * kStageBytes;
  static_assert(kRow.head_dim == kDim && kSharedBytes <= kShared99, "no row, or too large a one");
  static_assert(kTermBytes + kBlockQ * kPadded * 2 <= kSharedBytes,
                "the output leaves through shared memory");
  static_assert(kQuantRows % kSlice == 0, "a slice has one scale");
};

// Whether INT8 kernels exist for a head dim, not only for the next one up.
template <int kDim>
constexpr bool kHasInt8 = row_for(kInt8Fwd, kDim).head_dim == kDim;

// The quantiser: a block of it, and how wide its rows are at most.
constexpr int kQuantThreads = 256;
constexpr int kMaxColumns = 256;
// Of such a block: partial sums, one row of means, a number a warp.
constexpr int kScratchBytes = kQuantThreads * kChunk * 4;
constexpr int kQuantBytes = kScratchBytes + kMaxColumns * 4 + kQuantThreads / kWarp * 8;
// Up to this many keys a block sums all of them; of more, another launch sums that many a part, or
// as many as make no more parts than this.
constexpr int kOwnKeys = 256;
constexpr int kMostParts = 16;
constexpr int key_parts(int k_len) {
  const int parts = ceil_div(k_len, kOwnKeys);
  return parts <= 1 ? 0 : parts < kMostParts ? parts : kMostParts;
}

}  // namespace ldm
