// Every block size of the mma.sync kernels. Kernels contain no numbers.
//
// Narrow rows, and those for few keys, fit every GPU; of wide and joint ones a head dim has
// several, in order: the first serves with which a multiprocessor holds kEnoughWarps, two a
// scheduler. So one is for 227 KiB of shared memory (sm_90), one for 163 (sm_80), one for 99
// (sm_86, sm_89, sm_120), where these differ; where none does, the narrow one serves.
#pragma once
#include "../params.h"
#include "../types.h"

namespace ldm {

constexpr int kShared99 = 99 * 1024;
constexpr int kShared163 = 163 * 1024;
constexpr int kEnoughWarps = 8;
// KiB of shared memory an SM has: sm_86 and 89, sm_80, sm_90. A build is for some of these, one bit
// each: setup.py.
constexpr int kSharedKib[] = {100, 164, 228};
#ifndef LDM_SHARED_KINDS
#define LDM_SHARED_KINDS 7
#endif

struct FwdRow {
  int head_dim;
  int warps;
  int row_tiles;  // of 16 queries, a warp
  int slice;      // keys whose scores are in registers at once; those of two slices are
  int slices;     // a stage: 1 or an even number
  int stages;     // in flight
  bool kept;      // queries stay in registers, or are read again for every product
};

// NVIDIA H100, 2026-11-27 and 28: the fastest of some ten candidates a head dim, each timed alone
// in a graph on the shapes of benchmarks/cases.py, with as much shared memory an SM as the GPU has
// that a row is for; 48, 112 and 192, which no shape has, like their neighbours. Long sequences: 32
// queries a warp, so that every fragment of K and V serves two products.
constexpr FwdRow kFwdWide[] = {
    {16, 4, 2, 64, 2, 2, true},   {32, 4, 2, 64, 2, 2, true},   {40, 8, 2, 48, 2, 2, true},
    {48, 8, 2, 48, 2, 2, true},   {64, 4, 2, 32, 4, 2, true},   {64, 4, 2, 32, 2, 2, true},
    {64, 8, 2, 32, 2, 2, true},   {80, 8, 2, 32, 2, 2, true},   {96, 4, 2, 32, 2, 2, false},
    {96, 8, 2, 32, 1, 2, false},  {112, 8, 2, 16, 2, 2, false}, {128, 4, 2, 32, 2, 2, false},
    {128, 8, 2, 32, 2, 2, false}, {128, 8, 1, 48, 1, 2, true},  {160, 8, 2, 16, 2, 2, false},
    {160, 8, 1, 32, 1, 2, true},  {192, 4, 1, 16, 2, 2, true},
};
// Where 64 queries a block share out better: few queries, a small grid, a last wave almost empty.
constexpr FwdRow kFwdNarrow[] = {
    {16, 4, 1, 32, 2, 3, true},  {32, 4, 1, 64, 2, 2, true},  {40, 4, 1, 48, 2, 2, true},
    {48, 4, 1, 48, 2, 2, true},  {64, 4, 1, 16, 4, 2, true},  {80, 4, 1, 48, 1, 2, true},
    {96, 4, 1, 48, 1, 2, true},  {112, 4, 1, 32, 1, 2, true}, {128, 4, 1, 32, 1, 2, true},
    {160, 4, 1, 32, 1, 2, true}, {192, 4, 1, 16, 1, 2, true}, {256, 4, 1, 16, 1, 2, false},
};
// What a query costs them, of what it costs a wide tile, in full waves: every fragment of K and V
// serves half as many. NVIDIA H100, 2026-11-27, on the same shapes; 96 at 16 heads of 4096.
template <int kDim>
constexpr double kNarrowCost = kDim <= 48    ? 1.25
                               : kDim <= 64  ? 1.2
                               : kDim <= 96  ? 1.35
                               : kDim <= 128 ? 1.5
                                             : 1.15;
// Few keys: slices that 77 fill, and 16 queries a warp, for what is short waits, not for copies.
constexpr FwdRow kFwdFew[] = {
    {40, 8, 1, 16, 4, 2, true},
};

// Up to 32 queries and few keys, such as the frames of a video: a block is one warp, so that no
// warp is without queries and an SM holds as many heads as its registers do.
constexpr FwdRow kFwdOneWarp[] = {
    {16, 1, 1, 16, 1, 2, true},  {32, 1, 1, 16, 1, 2, true}, {40, 1, 1, 16, 1, 2, true},
    {64, 1, 1, 16, 1, 2, true},  {80, 1, 1, 16, 1, 2, true}, {128, 1, 1, 16, 1, 2, true},
    {160, 1, 1, 16, 1, 2, true},
};

// The large head dim: a block's warps in groups of rows by groups of columns.
template <int kDim>
struct LargeTiles {
  static constexpr int kHeadDim = kDim;
  static constexpr int kRowTiles = 2;  // of 16 queries, a warp
  static constexpr int kRowGroups = 2, kColumnGroups = 4;
  static constexpr int kThreads = kRowGroups * kColumnGroups * kWarp;
  static constexpr int kBlockQ = kRowGroups * kRowTiles * 16;
  static constexpr int kColumns = kColumnGroups * 16;  // a step of the pipeline
  static constexpr int kParts = kHeadDim / kColumns;
  static constexpr bool kSplit = true;
  static constexpr int kBlockK = kColumnGroups * 16;
  static constexpr int kStages = 3;
  static constexpr int kStepBytes = kBlockK * kColumns * 2;
  static constexpr int kTableBytes = kBlockQ * kColumnGroups * 4;
  static constexpr int kSharedBytes =
      (kParts + kStages) * kStepBytes + kBlockQ * kBlockK * 2 + kTableBytes;
  static_assert(kBlockQ == kBlockK && kStages > 1 && kSharedBytes <= kShared99,
                "queries lie in steps' tiles");
};

// Splits: where the GPU has no fewer multiprocessors than the grid blocks, the keys of one block
// are shared out to as many as one wave holds. That takes a second launch, which is worth about the
// time of a share of this many keys: 256 at d = 64. So a block has four shares of keys, or all.
constexpr int share_keys(const FlashParams& p) { return 32768 / (p.head_dim + 64); }
constexpr int kSplitFrom = 4;  // shares
constexpr int kMaxSplits = 64;
constexpr int kCombineThreads = 128;
constexpr int kCombineAhead = 8;  // splits whose parts a thread has under way
constexpr int partial_width(const FlashParams& p) { return ceil_div(p.head_dim, 8) * 8; }
constexpr int64_t partial_rows(const FlashParams& p) {
  return static_cast<int64_t>(p.batch) * p.heads * p.q_len;
}
constexpr int64_t partial_floats(const FlashParams& p) {
  return p.splits > 1 ? p.splits * partial_rows(p) * (partial_width(p) + 1) : 0;
}

// One side of the backward: rows held by a block of 4 warps, against rows met.
struct SideRow {
  int row_tiles;  // of 16 rows, a warp
  bool kept;      // held rows stay in registers, or are read again for every product
  int step;       // rows met a step
  int slice;      // of them, whose scores are in registers at once
  int parts;      // blocks that share out the columns of the sums, which else do not fit
};
struct BwdRow {
  int head_dim;
  int stages;  // steps in flight
  SideRow by_keys, by_queries;
  int warps = 4;
  int query_warps = 0;  // joint: share out the queries of dq, warps / query_warps its columns
  int shares = 1;       // warps that hold the same rows, each meets a slice and sums some columns
  bool late = false;    // joint: dq gains from a step during the next, without a barrier between
};
// NVIDIA H200, 2026-11-23, and H100, 2026-11-27: the fastest of some ten candidates a side, each
// timed alone in a graph on the shapes of benchmarks/cases.py; 48, 96, 112, 192 and 256, which no
// shape has, like their neighbours. Long sequences: 32 rows a warp, so that every fragment of the
// met rows serves two products. None for 16, where twice the warps an SM are worth more, nor where
// joint tiles serve all but the few long calls that must repeat.
constexpr BwdRow kBwdWide[] = {
    {32, 2, {2, true, 64, 32, 1}, {2, true, 64, 32, 1}},
    {64, 2, {2, false, 64, 32, 1}, {2, true, 64, 16, 1}},
};
// Short ones, masks, and head dims whose sums leave no room for more.
constexpr BwdRow kBwdNarrow[] = {
    {16, 2, {1, true, 64, 32, 1}, {1, true, 64, 64, 1}},
    {32, 2, {1, true, 64, 64, 1}, {1, true, 64, 64, 1}},
    {40, 2, {1, true, 64, 64, 1}, {1, true, 64, 64, 1}},
    {48, 2, {1, true, 64, 64, 1}, {1, true, 64, 64, 1}},
    {64, 2, {1, true, 64, 64, 1}, {1, true, 64, 64, 1}},
    {80, 2, {1, true, 64, 32, 1}, {1, true, 64, 64, 1}},
    {96, 2, {1, false, 64, 32, 1}, {1, true, 64, 32, 1}},
    {112, 2, {1, false, 64, 32, 1}, {1, true, 32, 32, 1}},
    {128, 2, {1, false, 32, 32, 1}, {1, true, 32, 32, 1}},
    {160, 2, {1, false, 32, 32, 1}, {1, true, 32, 32, 1}},
    {192, 2, {1, false, 32, 32, 2}, {1, false, 32, 32, 1}},
    {256, 1, {1, false, 32, 32, 2}, {1, false, 32, 32, 1}},
};
// Narrow, with twice the warps, two of which hold the same rows: for grids that leave an SM one
// block at most, where a warp's own work is what takes the time. NVIDIA H200, 2026-11-28.
constexpr BwdRow kBwdPaired[] = {
    {64, 1, {1, true, 64, 32, 1}, {1, true, 64, 32, 1}, 8, 0, 2},
    {128, 1, {1, true, 64, 32, 1}, {1, true, 64, 32, 1}, 8, 0, 2},
    {160, 1, {1, true, 64, 32, 1}, {1, true, 64, 32, 1}, 8, 0, 2},
};

// One block computes dk and dv of its keys and adds to dq: long sequences, wherever the order of
// these sums is free. None where the tiles above, which compute the scores twice, are faster.
constexpr BwdRow kBwdJoint[] = {
    {40, 2, {2, true, 64, 32, 1}, {}, 4, 4},
    {40, 2, {2, true, 32, 16, 1}, {}, 4, 2},
    {48, 2, {2, true, 64, 32, 1}, {}, 4, 4},
    {48, 2, {2, true, 32, 16, 1}, {}, 4, 2},
    {64, 2, {2, false, 64, 32, 1}, {}, 4, 2, 1, true},
    {64, 2, {2, false, 64, 32, 1}, {}, 8, 4, 1, true},
    {64, 2, {1, true, 64, 64, 1}, {}, 8, 4},
    {80, 2, {2, false, 64, 32, 1}, {}, 4, 4},
    {80, 2, {2, false, 64, 32, 1}, {}, 8, 4},
    {80, 2, {1, true, 64, 32, 1}, {}, 8, 4},
    {96, 2, {2, false, 64, 32, 1}, {}, 8, 2, 2},
    {96, 2, {1, true, 32, 32, 1}, {}, 8, 2},
    {112, 2, {1, false, 32, 32, 1}, {}, 8, 2},
    {128, 2, {2, false, 64, 32, 1}, {}, 8, 2, 2},
    {128, 1, {2, false, 32, 16, 1}, {}, 8, 2, 2},
    {160, 2, {2, false, 32, 16, 1}, {}, 4, 2, 2},
    {160, 2, {2, false, 32, 16, 1}, {}, 8, 2, 2},
    {160, 1, {1, false, 64, 32, 1}, {}, 8, 4, 2},
};

// Up to this many keys, narrow tiles.
constexpr int kFewKeys = 256;
// Queries that a block may keep the statistics of in shared memory, and elements that it may read
// to find them; beyond either, another launch computes them.
constexpr int kOwnQueries = 256;
constexpr int kOwnElements = 8192;
// Queries whose dq one block rounds, 16 a warp.
constexpr int kFinishedRows = 64;
// Queries whose statistics one block computes, and to whose multiple a head's are padded.
constexpr int kStatisticsRows = 128;
constexpr int padded_queries(const FlashParams& p) {
  return ceil_div(p.q_len, kStatisticsRows) * kStatisticsRows;
}
// Floats that p.statistics takes; none where each block finds its own.
constexpr int64_t statistics_floats(const FlashParams& p) {
  const int64_t queries = padded_queries(p), group = p.kv_heads ? p.heads / p.kv_heads : 0;
  const bool own = group * queries <= kOwnQueries && group * p.q_len * p.head_dim <= kOwnElements;
  return own ? 0 : 2 * queries * p.batch * p.heads;
}

template <typename Row, int kRows>
constexpr int count_rows(const Row (&table)[kRows], int head_dim) {
  int found = 0;
  for (const Row& row : table) found += row.head_dim == head_dim;
  return found;
}
// A head dim's row, by its rank among them.
template <typename Row, int kRows>
constexpr Row row_for(const Row (&table)[kRows], int head_dim, int rank = 0) {
  for (const Row& row : table) {
    if (row.head_dim == head_dim && rank-- == 0) return row;
  }
  return Row{};
}

// kGeneral: narrow, for masks and dropout, which take registers of their own.
enum class Shape { kWide, kNarrow, kFew, kGeneral, kJoint, kOneWarp, kPaired };

template <int kDim, Shape kShape, int kRank = 0>
struct FwdTiles {
  static constexpr bool kWide = kShape == Shape::kWide;
  static constexpr FwdRow kRow = kWide                       ? row_for(kFwdWide, kDim, kRank)
                                 : kShape == Shape::kNarrow  ? row_for(kFwdNarrow, kDim)
                                 : kShape == Shape::kOneWarp ? row_for(kFwdOneWarp, kDim)
                                                             : row_for(kFwdFew, kDim);
  static constexpr int kHeadDim = kDim;
  static constexpr int kPadded = ceil_div(kDim, 16) * 16;  // columns in memory and of Q·Kᵀ
  static constexpr int kSteps = kPadded / 16;
  static constexpr int kThreads = kRow.warps * kWarp;
  static constexpr int kRowTiles = kRow.row_tiles;
  static constexpr int kBlockQ = kRow.warps * kRow.row_tiles * 16;
  static constexpr int kSlice = kRow.slice;
  static constexpr int kSlices = kRow.slices;
  static constexpr int kBlockK = kSlice * kSlices;  // a stage
  static constexpr int kStages = kRow.stages;
  static constexpr bool kKept = kRow.kept;
  // without registers to spare, no splits, and no queries in them beside masks and dropout
  static constexpr bool kSplit = kShape == Shape::kNarrow || (kWide && kPadded < 96);
  static constexpr bool kGeneralKept = kKept && kPadded < 192;
  // short sequences would wait for the first maximum and the last check, narrow tiles lack
  // registers
  static constexpr bool kSteady = kWide;
  // four blocks an SM of sm_90, which the compiler misses by 8 registers a thread
  static constexpr int kResident = kShape == Shape::kNarrow && kDim == 64 ? 4 : 1;
  static constexpr int kSharedBytes = (kBlockQ + kSlice + 2 * kStages * kBlockK) * kPadded * 2;
  static_assert(kRow.head_dim == kDim && kSharedBytes <= (kWide ? kShared163 : kShared99),
                "no row, or too large a one");
};
// Up to this many keys, a head dim's tiles for few, if it has any.
constexpr int kFewFwdKeys = 128;
template <int kDim>
constexpr bool kHasFewFwd = row_for(kFwdFew, kDim).head_dim == kDim;
constexpr int kOneWarpQueries = 32;
template <int kDim>
constexpr bool kHasOneWarpFwd = row_for(kFwdOneWarp, kDim).head_dim == kDim;
template <int kDim>
constexpr int kWideFwdRows = count_rows(kFwdWide, kDim);

template <int kDim, Shape kShape, int kRank = 0>
struct BwdTiles {
  static constexpr bool kJoint = kShape == Shape::kJoint;
  static constexpr BwdRow kRow = kShape == Shape::kWide     ? row_for(kBwdWide, kDim)
                                 : kShape == Shape::kPaired ? row_for(kBwdPaired, kDim)
                                 : kJoint                   ? row_for(kBwdJoint, kDim, kRank)
                                                            : row_for(kBwdNarrow, kDim);
  static constexpr int kHeadDim = kDim;
  static constexpr int kPadded = ceil_div(kDim, 16) * 16;
  static constexpr int kThreads = kRow.warps * kWarp;

  template <bool kKeys>
  struct Side {
    static constexpr SideRow kRow = kKeys ? BwdTiles::kRow.by_keys : BwdTiles::kRow.by_queries;
    static constexpr bool kByKeys = kKeys;
    static constexpr bool kJoint = BwdTiles::kJoint;
    static constexpr int kPadded = BwdTiles::kPadded;
    static constexpr int kThreads = BwdTiles::kThreads;
    static constexpr int kStages = BwdTiles::kRow.stages;
    static constexpr int kRowTiles = kRow.row_tiles;
    static constexpr int kShares = BwdTiles::kRow.shares;
    static constexpr bool kLate = BwdTiles::kRow.late;
    static constexpr int kRows = kThreads / kWarp / kShares * kRowTiles * 16;
    static constexpr bool kFrugal = kShape == Shape::kGeneral && kPadded >= 64;
    static constexpr bool kKept = kRow.kept && !kFrugal;
    static constexpr int kSteps = kPadded / 16;
    static constexpr int kUnroll = kKept ? kSteps : kPadded > 128 ? 1 : 2;
    // loops that are kept short hold nothing between their products
    static constexpr bool kOverlapped = !kFrugal && (kKept || kPadded <= 128);
    static constexpr int kStep = kRow.step;
    static constexpr int kSlice = kFrugal ? (kPadded > 128 ? 16 : 32) : kRow.slice;
    static constexpr int kParts = kRow.parts;
    static constexpr int kColumns = kPadded / kParts;       // of the sums
    static constexpr int kSumColumns = kColumns / kShares;  // a warp's
    static constexpr int kSumTiles = kParts * kShares == 1 ? kDim / 8 : kSumColumns / 8;
    static constexpr int kStageBytes = 2 * kStep * kPadded * 2;  // q and do, or k and v
    // ds, and that of the step before, or p
    static constexpr int kScoreTiles = kLate || kShares > 1 ? 2 : kJoint ? 1 : 0;
    static constexpr int kBytes =
        2 * kRows * kPadded * 2 + kStages * kStageBytes + kScoreTiles * kRows * kStep * 2;
    static_assert(kColumns % 16 == 0 && kStep % kSlice == 0 && kSlice % 16 == 0 &&
                      kStatisticsRows % kStep == 0 && kRows <= kOwnQueries,
                  "operands are 16 wide, statistics 128 long");
    // of dq's step a warp computes kQueryTiles × kPairs blocks of 16×16
    static constexpr int kQueryWarps = kJoint ? BwdTiles::kRow.query_warps : 1;
    static constexpr int kColumnWarps = BwdTiles::kRow.warps / kQueryWarps;
    static constexpr int kQueryTiles = kStep / 16 / kQueryWarps;
    static constexpr int kPairs = ceil_div(kPadded / 16, kColumnWarps);
    static_assert(kStep / 16 % kQueryWarps == 0 && kSumColumns % 16 == 0 &&
                      (kShares == 1 || (kStep == kShares * kSlice && !kLate)),
                  "every warp has as much to do");
  };
  using ByKeys = Side<true>;
  using ByQueries = Side<kJoint>;                           // joint: there are none
  static constexpr int kStatisticsBytes = kOwnQueries * 8;  // or those of the steps in flight
  static constexpr int kSharedBytes =
      (ByKeys::kBytes > ByQueries::kBytes ? ByKeys::kBytes : ByQueries::kBytes) + kStatisticsBytes;
  static_assert(kRow.head_dim == kDim && kSharedBytes <= (kJoint ? kShared163 : kShared99),
                "no row, or too large a one");
  static_assert(kRow.stages * ByKeys::kStep * 8 <= kStatisticsBytes, "too many steps in flight");
};

// Whether wide tiles, or paired ones, exist for a head dim.
template <int kDim>
constexpr bool kHasWideBwd = row_for(kBwdWide, kDim).head_dim == kDim;
template <int kDim>
constexpr bool kHasPairedBwd = row_for(kBwdPaired, kDim).head_dim == kDim;
template <int kDim>
constexpr int kJointBwdRows = count_rows(kBwdJoint, kDim);

// Whether an SM with so much shared memory holds enough warps of a head dim's first kRows rows, by
// shared memory: the registers of all leave room for them.
template <template <int, Shape, int> class Tiles, int kDim, Shape kShape, int kRows>
constexpr bool has_enough(int kib) {
  if constexpr (kRows == 0) {
    return false;
  } else {
    using Last = Tiles<kDim, kShape, kRows - 1>;
    const int warps = kib * 1024 / (Last::kSharedBytes + 1024) * (Last::kThreads / kWarp);
    return warps >= kEnoughWarps || has_enough<Tiles, kDim, kShape, kRows - 1>(kib);
  }
}
// Whether a row is the first for a kind of GPU that this build is for: others are not compiled.
template <template <int, Shape, int> class Tiles, int kDim, Shape kShape, int kRank>
constexpr bool is_built() {
  for (int kind = 0; kind < 3; ++kind) {
    const int kib = kSharedKib[kind];
    if ((LDM_SHARED_KINDS >> kind & 1) && !has_enough<Tiles, kDim, kShape, kRank>(kib) &&
        has_enough<Tiles, kDim, kShape, kRank + 1>(kib)) {
      return true;
    }
  }
  return false;
}

}  // namespace ldm
