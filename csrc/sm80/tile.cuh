// Tiles of 16-bit rows in shared memory: where a chunk lies, how copies fill it, how the operands
// of mma.m16n8k16 leave it. One xor swizzle serves every width that is a multiple of 16, without
// padding: the 8 rows of a matrix always fall into 8 different groups of 4 banks.
#pragma once
#include <sm80/mma.cuh>

#include "../params.h"

namespace ldm {

template <int kColumns>
struct Tile {
  static_assert(kColumns % 16 == 0, "an operand is 16 columns wide");
  static constexpr int kChunks = kColumns / kChunk;
  static constexpr int kSwizzleBits = kChunks % 8 == 0 ? 3 : kChunks % 4 == 0 ? 2 : 1;
  static constexpr int bytes(int rows) { return rows * kColumns * 2; }

  uint32_t base;

  static constexpr int kMask = (1 << kSwizzleBits) - 1;
  static constexpr int twist(int row) { return row >> (3 - kSwizzleBits) & kMask; }

  LDM_DEVICE uint32_t address(int row, int chunk) const {
    return base + static_cast<uint32_t>(row * kChunks + (chunk ^ twist(row))) * 16;
  }
  // address(row + lane_row, chunk + lane_chunk) for a row that is a multiple of 8, an even chunk
  // and a lane_chunk of 0 or 1: one register a tile, an xor and an offset known when compiled.
  LDM_DEVICE uint32_t lane_address(int lane_row, int lane_chunk, int row, int chunk) const {
    const uint32_t lane = address(lane_row, lane_chunk);  // bases are multiples of 128 bytes
    return (lane ^ static_cast<uint32_t>(chunk & kMask) * 16) +
           static_cast<uint32_t>(row * kChunks + (chunk & ~kMask)) * 16;
  }
  LDM_DEVICE Tile rows_from(int row) const {  // row: a multiple of 8
    return {base + static_cast<uint32_t>(row * kColumns * 2)};
  }
};

// The 16×16 corner at (row, column) as four matrices: top left, bottom left, top right, bottom
// right. Untransposed: operand A of rows, or, transposed: operand B whose k runs down the rows.
template <int kColumns>
LDM_DEVICE uint32_t corner_rows_first(Tile<kColumns> tile, int row, int column) {
  const int lane = thread_index() % kWarp;
  return tile.lane_address(lane % 16, lane / 16, row, column / kChunk);
}
// The same corner: top left, top right, bottom left, bottom right. Untransposed: operand B whose
// n runs down the rows.
template <int kColumns>
LDM_DEVICE uint32_t corner_columns_first(Tile<kColumns> tile, int row, int column) {
  const int lane = thread_index() % kWarp;
  return tile.lane_address(lane % 8 + lane / 16 * 8, lane / 8 % 2, row, column / kChunk);
}

// A(m, k) = tile[row + m][column + k]
template <int kColumns>
LDM_DEVICE void load_a(uint32_t (&a)[4], Tile<kColumns> tile, int row, int column) {
  load_matrices(a, corner_rows_first(tile, row, column));
}
// A(m, k) = tile[row + k][column + m]
template <int kColumns>
LDM_DEVICE void load_a_transposed(uint32_t (&a)[4], Tile<kColumns> tile, int row, int column) {
  load_matrices_transposed(a, corner_columns_first(tile, row, column));
}
// B(k, n) = tile[row + n][column + k], n = 0..15: b[0..1] for n < 8, b[2..3] for the rest
template <int kColumns>
LDM_DEVICE void load_b(uint32_t (&b)[4], Tile<kColumns> tile, int row, int column) {
  load_matrices(b, corner_columns_first(tile, row, column));
}
// B(k, n) = tile[row + k][column + n]
template <int kColumns>
LDM_DEVICE void load_b_transposed(uint32_t (&b)[4], Tile<kColumns> tile, int row, int column) {
  load_matrices_transposed(b, corner_rows_first(tile, row, column));
}

// The accumulators of two neighbouring column blocks are operand A of the next product.
template <typename T>
LDM_DEVICE void accumulators_to_a(T type, uint32_t (&a)[4], const float (&left)[4],
                                  const float (&right)[4]) {
  a[0] = pack(type, left[0], left[1]);
  a[1] = pack(type, left[2], left[3]);
  a[2] = pack(type, right[0], right[1]);
  a[3] = pack(type, right[2], right[3]);
}

// Writes one accumulator block (16 rows, 8 columns) into a tile, rounded.
template <typename T, int kColumns>
LDM_DEVICE void store_accumulator(T type, Tile<kColumns> tile, int row, int column,
                                  const float (&c)[4]) {
  const int lane = thread_index() % kWarp;
  const uint32_t inside = static_cast<uint32_t>(lane % 4) * 4;
  store_shared(tile.address(row + lane / 4, column / kChunk) + inside, pack(type, c[0], c[1]));
  store_shared(tile.address(row + lane / 4 + 8, column / kChunk) + inside, pack(type, c[2], c[3]));
}

// One head of a tensor: its first row, and how far apart the rows are.
struct Rows {
  uint16_t* data;
  int64_t stride;
  bool vector;
};
LDM_DEVICE Rows rows_of(const Strided& tensor, int batch, int head) {
  return {static_cast<uint16_t*>(tensor.data) + batch * tensor.batch + head * tensor.head,
          tensor.row, tensor.vector != 0};
}

// Up to 8 elements, the missing ones 0, for rows that do not start at 16 bytes.
LDM_DEVICE Chunk load_ragged_chunk(const uint16_t* source, int count) {
  Chunk chunk = {{0, 0, 0, 0}};
  LDM_UNROLL for (int i = 0; i < kChunk; ++i) {
    if (i < count) chunk.words[i / 2] |= static_cast<uint32_t>(source[i]) << (i % 2 * 16);
  }
  return chunk;
}

// 8 elements of a row, those past the head dim or of a row that does not exist 0.
LDM_DEVICE Chunk load_chunk(Rows rows, int row, int chunk, int n_rows, int head_dim) {
  const int count = row < n_rows ? head_dim - chunk * kChunk : 0;
  const uint16_t* source = rows.data + row * rows.stride + chunk * kChunk;
  if (!rows.vector) return load_ragged_chunk(source, count);
  return count > 0 ? *reinterpret_cast<const Chunk*>(source) : Chunk{{0, 0, 0, 0}};
}

// tile[i] = rows[first + i]; zeros past the last row and past the head dim. Asynchronous where the
// alignment allows: complete after copy_commit, copy_wait and sync_block.
template <int kRows, int kThreads, int kColumns>
LDM_DEVICE void load_tile(Tile<kColumns> tile, Rows rows, int first, int n_rows, int head_dim) {
  constexpr int kChunks = Tile<kColumns>::kChunks;
  const uint16_t* source = rows.data + first * rows.stride;
  if (LDM_LIKELY(rows.vector)) {
    // a thread keeps its column and walks down: one pointer, one step; a few threads may idle
    constexpr int kStep = kThreads / kChunks;
    const int row = thread_index() / kChunks, chunk = thread_index() % kChunks;
    if (kThreads % kChunks != 0 && row >= kStep) return;
    source += row * rows.stride + chunk * kChunk;
    const auto copy_rows = [&](auto is_valid) {
      LDM_UNROLL for (int i = 0; i < ceil_div(kRows, kStep); ++i) {
        const int at = row + i * kStep;
        if (kRows % kStep != 0 && at >= kRows) break;
        copy_async_16(tile.address(at, chunk), source, is_valid(at));  // reads nothing unless valid
        source += kStep * rows.stride;
      }
    };
    const bool exists = chunk * kChunk < head_dim;
    if (first + kRows <= n_rows) {  // no row to be asked
      copy_rows([&](int) { return exists; });
    } else {
      copy_rows([&](int at) { return exists && at < n_rows - first; });
    }
    return;
  }
  LDM_ROLLED for (int copy = thread_index(); copy < kRows * kChunks; copy += kThreads) {
    const int row = copy / kChunks, chunk = copy % kChunks;
    const int count = first + row < n_rows ? head_dim - chunk * kChunk : 0;
    store_shared(tile.address(row, chunk),
                 load_ragged_chunk(source + row * rows.stride + chunk * kChunk, count));
  }
}

// The first `count` elements of a chunk of a row, at once where the row's alignment allows.
LDM_DEVICE void store_chunk(Rows rows, int row, int chunk, int count, const Chunk& x) {
  uint16_t* target = rows.data + row * rows.stride + chunk * kChunk;
  if (rows.vector) {
    if (count > 0) *reinterpret_cast<Chunk*>(target) = x;
    return;
  }
  LDM_UNROLL for (int i = 0; i < kChunk; ++i) {
    if (i < count) target[i] = static_cast<uint16_t>(x.words[i / 2] >> (i % 2 * 16));
  }
}

// rows[first + i] = tile[i] for the rows and columns that exist.
template <int kRows, int kThreads, int kColumns>
LDM_DEVICE void store_tile(Rows rows, Tile<kColumns> tile, int first, int n_rows, int head_dim) {
  constexpr int kChunks = Tile<kColumns>::kChunks;
  LDM_ROLLED for (int copy = thread_index(); copy < kRows * kChunks; copy += kThreads) {
    const int row = copy / kChunks, chunk = copy % kChunks;
    if (first + row >= n_rows) continue;
    store_chunk(rows, first + row, chunk, head_dim - chunk * kChunk,
                load_shared_chunk(tile.address(row, chunk)));
  }
}

// Awaits the copies of one step of a pipeline of kStages buffers, and has a later step's started:
// start(step) copies and commits. Before step 0, start the first steps_ahead<kStages>.
template <int kStages>
constexpr int steps_ahead = kStages > 1 ? kStages - 1 : 1;
template <int kStages, typename F>
LDM_DEVICE void await_step(int step, F&& start) {
  if constexpr (kStages == 1) {
    if (step > 0) {
      sync_block();  // the one buffer is free
      start(step);
    }
    copy_wait<0>();
    sync_block();
  } else {
    copy_wait<kStages - 2>();
    sync_block();
    start(step + kStages - 1);
  }
}

}  // namespace ldm
