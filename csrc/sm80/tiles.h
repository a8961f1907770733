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
    {16, 4, 2, 64, 4, true},  {32, 4, 2, 64, 4, true},   {40, 4, 2, 64, 4, true},
    {48, 4, 2, 64, 4, true},  {64, 4, 2, 64, 4, true},   {80, 4, 2, 64, 4, false},
    {96, 4, 2, 64, 4, false}, {112, 4, 2, 48, 3, false}, {128, 4, 2, 48, 3, false},
    {160, 8, 1, 64, 2, true}, {192, 8, 1, 32, 2, true},  {256, 8, 1, 32, 2, false},
};
// Few queries, or a grid too small for the GPU: 64 queries a block; 80 keys, so that 77 are one
// tile.
constexpr FwdRow kFwdNarrow[] = {
    {16, 4, 1, 80, 4, true},  {32, 4, 1, 80, 4, true},  {40, 4, 1, 80, 4, true},
    {48, 4, 1, 80, 4, true},  {64, 4, 1, 80, 4, true},  {80, 4, 1, 80, 3, true},
    {96, 4, 1, 80, 3, true},  {112, 4, 1, 80, 3, true}, {128, 4, 1, 80, 2, true},
    {160, 4, 1, 48, 2, true}, {192, 4, 1, 32, 2, true}, {256, 4, 1, 32, 2, false},
};

struct BwdRow {
  int head_dim;
  int key_warps;     // warps that share out the keys
  int column_warps;  // warps that share out the columns of dK and dV, for the same keys
  int row_tiles;     // of 16 keys, a warp
  int block_q;
  int stages;   // tiles of Q and dO in flight
  int dq_keys;  // the kernel for dQ alone: keys a tile
  int dq_stages;
};
constexpr BwdRow kBwd[] = {
    {16, 4, 1, 2, 32, 2, 64, 2},  {32, 4, 1, 2, 32, 2, 64, 2},  {40, 8, 1, 1, 64, 2, 64, 2},
    {48, 8, 1, 1, 64, 2, 64, 2},  {64, 4, 2, 2, 32, 2, 64, 2},  {80, 8, 1, 1, 32, 2, 64, 2},
    {96, 8, 1, 1, 32, 2, 64, 2},  {112, 8, 1, 1, 16, 2, 32, 2}, {128, 4, 2, 1, 32, 2, 32, 2},
    {160, 4, 2, 1, 32, 2, 32, 2}, {192, 4, 2, 1, 32, 1, 32, 2}, {256, 2, 2, 1, 32, 1, 16, 1},
};

// Up to this many tiles of keys, the backward takes them in turn rather than at once with atomics.
constexpr int kTurns = 2;
// A block that shares the queries of a head with others has at least this many steps to do.
constexpr int kSplitSteps = 4;

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

template <int kDim>
struct BwdTiles {
  static constexpr BwdRow kRow = row_for(kBwd, kDim);
  static constexpr int kHeadDim = kDim;
  static constexpr int kPadded = ceil_div(kDim, 16) * 16;
  static constexpr int kKeyWarps = kRow.key_warps;
  static constexpr int kColumnWarps = kRow.column_warps;
  static constexpr int kWarps = kKeyWarps * kColumnWarps;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kRowTiles = kRow.row_tiles;
  static constexpr int kWarpKeys = kRowTiles * 16;
  static constexpr int kBlockK = kKeyWarps * kWarpKeys;
  static constexpr int kBlockQ = kRow.block_q;
  static constexpr int kStages = kRow.stages;
  static constexpr int kWarpQueries = kBlockQ / kColumnWarps;  // columns of Sᵀ, a warp
  static constexpr int kWarpColumns = kPadded / kColumnWarps;  // of dK and dV, a warp
  static constexpr int kDqRowWarps = kBlockQ / 16 < kWarps ? kBlockQ / 16 : kWarps;
  static constexpr int kDqColumns = ceil_div(kPadded / 16, kWarps / kDqRowWarps) * 16;
  static constexpr int kDqFloats = kWarps * 16 * kDqColumns;     // of one query tile
  static constexpr int kDkvFloats = 2 * kBlockK * kPadded;       // of one block's dK and dV
  static constexpr int kStageBytes = 2 * kBlockQ * kPadded * 2;  // Q, dO
  static constexpr int kScoreBytes = kBlockK * kBlockQ * 2;      // dS; P where warps share it
  static constexpr int kSharedBytes = 2 * kBlockK * kPadded * 2 + kStages * kStageBytes +
                                      (kColumnWarps > 1 ? 2 : 1) * kScoreBytes +
                                      kStages * 2 * kBlockQ * 4;  // lse, delta
  static_assert(kRow.head_dim == kDim && kSharedBytes <= kShared99, "no row, or too large a one");
  static_assert(kWarpQueries % 16 == 0 && kWarpColumns % 16 == 0, "an operand is 16 wide");
  static_assert(kWarps % kDqRowWarps == 0 && kDqRowWarps * 16 == kBlockQ, "dQ is not covered");
};

template <int kDim>
struct DqTiles {
  static constexpr BwdRow kRow = row_for(kBwd, kDim);
  static constexpr int kHeadDim = kDim;
  static constexpr int kPadded = ceil_div(kDim, 16) * 16;
  static constexpr int kThreads = 4 * kWarp;
  static constexpr int kBlockQ = 64;
  static constexpr int kBlockK = kRow.dq_keys;
  static constexpr int kStages = kRow.dq_stages;
  static constexpr int kSharedBytes = 2 * (kBlockQ + kStages * kBlockK) * kPadded * 2;
  static_assert(kRow.head_dim == kDim && kSharedBytes <= kShared99, "no row, or too large a one");
};

}  // namespace ldm
