// Every block size of the mma.sync kernels. Kernels contain no numbers.
//
// Chosen by the offline compile (no spills; two blocks an SM where registers allow), not yet by
// timing: no GPU has run them. Each row fits 99 KiB (sm_86, sm_89) unless its table says 163
// (sm_80, and sm_90 through the same kernels).
#pragma once
#include "../types.h"

namespace ldm {

constexpr int kShared99 = 99 * 1024;
constexpr int kShared163 = 163 * 1024;

struct FwdRow {
  int head_dim;
  int warps;
  int row_tiles;  // of 16 queries, a warp
  int block_k;
  int slots;  // of the ring that K and V tiles pass through, in turn
  bool query_in_registers;
};

// Long sequences: 32 queries a warp, so that every fragment of K and V serves two products.
constexpr FwdRow kFwdWide[] = {
    {16, 4, 2, 64, 4, true},   {32, 4, 2, 64, 4, true},   {40, 4, 2, 64, 4, true},
    {48, 4, 2, 64, 4, true},   {64, 4, 2, 64, 4, true},   {80, 4, 2, 64, 4, true},
    {96, 4, 2, 64, 4, false},  {112, 4, 2, 64, 3, false}, {128, 4, 2, 64, 3, false},
    {160, 8, 1, 64, 2, true},  {192, 8, 1, 64, 2, true},  {256, 8, 1, 32, 2, false},
};
// Few queries, or a grid too small for the GPU: 64 queries a block; 80 keys, so that 77 are one tile.
constexpr FwdRow kFwdNarrow[] = {
    {16, 4, 1, 80, 4, true},  {32, 4, 1, 80, 4, true},  {40, 4, 1, 80, 4, true},
    {48, 4, 1, 80, 4, true},  {64, 4, 1, 80, 4, true},  {80, 4, 1, 80, 3, true},
    {96, 4, 1, 80, 3, true},  {112, 4, 1, 80, 3, true}, {128, 4, 1, 80, 2, true},
    {160, 4, 1, 80, 2, true}, {192, 4, 1, 64, 2, true}, {256, 4, 1, 32, 2, true},
};

struct BwdRow {
  int head_dim;
  int key_warps;     // warps that share out the keys
  int column_warps;  // warps that share out the columns of dK and dV, for the same keys
  int row_tiles;     // of 16 keys, a warp
  int block_q;
  int stages;  // tiles of Q and dO in flight
};
constexpr BwdRow kBwd99[] = {
    {16, 4, 1, 2, 32, 2},  {32, 4, 1, 2, 32, 2},  {40, 4, 1, 2, 32, 2},
    {48, 4, 1, 2, 32, 2},  {64, 4, 1, 2, 32, 2},  {80, 4, 1, 1, 64, 2},
    {96, 4, 1, 1, 64, 2},  {112, 4, 1, 1, 32, 2}, {128, 4, 1, 1, 32, 2},
    {160, 4, 2, 1, 32, 2}, {192, 4, 2, 1, 32, 1}, {256, 2, 4, 1, 32, 2},
};

template <typename Row, int kRows>
constexpr Row row_for(const Row (&table)[kRows], int head_dim) {
  for (int i = 0; i < kRows; ++i) {
    if (table[i].head_dim == head_dim) return table[i];
  }
  return Row{};
}

template <int kDim, bool kNarrow>
struct FwdTiles {
  static constexpr FwdRow kRow = row_for(kNarrow ? kFwdNarrow : kFwdWide, kDim);
  static constexpr int kHeadDim = kDim;
  static constexpr int kPadded = ceil_div(kDim, 16) * 16;  // columns in memory and of Q·Kᵀ
  static constexpr int kThreads = kRow.warps * kWarp;
  static constexpr int kRowTiles = kRow.row_tiles;
  static constexpr int kBlockQ = kRow.warps * kRow.row_tiles * 16;
  static constexpr int kBlockK = kRow.block_k;
  static constexpr int kSlots = kRow.slots;
  static constexpr bool kQueryInRegisters = kRow.query_in_registers;
  static constexpr int kSharedBytes = (kBlockQ + kSlots * kBlockK) * kPadded * 2;
  static_assert(kRow.head_dim == kDim && kSharedBytes <= kShared99, "no row, or too large a one");
};

}  // namespace ldm
