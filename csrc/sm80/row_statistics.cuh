// What the backward needs to know of every query: lse · log2(e), and delta = Σ_d do·o − dlse.
#pragma once
#include "tile.cuh"
#include "tiles.h"

namespace ldm {

LDM_DEVICE float* statistics_at(const FlashParams& p, int batch, int head, int query) {
  const int64_t head_index = static_cast<int64_t>(batch) * p.heads + head;
  return p.statistics + (head_index * padded_queries(p) + query) * 2;
}

// The dq under way of 16 queries and 8 columns.
LDM_DEVICE float* dq_fragment(const FlashParams& p, int batch, int head, int query, int column) {
  const int64_t row = (static_cast<int64_t>(batch) * p.heads + head) * padded_queries(p) + query;
  const int blocks = ceil_div(p.head_dim, 8);
  return p.dq_sums + row * blocks * 8 + column * 16;
}

template <typename T>
LDM_DEVICE float dot(T, const Chunk& a, const Chunk& b) {
  float sum = 0.0f;
  LDM_UNROLL for (int i = 0; i < kChunk; ++i) {
    const int shift = i % 2 * 16;
    sum += to_float(T{static_cast<uint16_t>(a.words[i / 2] >> shift)}) *
           to_float(T{static_cast<uint16_t>(b.words[i / 2] >> shift)});
  }
  return sum;
}

// Calls store(i, lse · log2(e), delta) for `count` queries from `query` on, by the whole block. A
// row that sees no key (lse −inf) and one past the end get lse +inf: every p of theirs is 0.
template <typename T, int kColumns, int kThreads, typename F>
LDM_DEVICE void row_statistics(const FlashParams& p, int batch, int head, int query, int count,
                               F&& store) {
  constexpr int kChunks = kColumns / kChunk;
  constexpr int kLanes = kChunks >= 8 ? 8 : kChunks >= 4 ? 4 : 2;  // a row
  constexpr int kTurns = ceil_div(kChunks, kLanes);                // chunks a lane
  constexpr int kRows = kThreads / kLanes;
  constexpr int kAhead =
      kLanes * kTurns < 12 ? kLanes : 12 / kTurns;  // rows a thread has under way
  const Rows o = rows_of(p.o, batch, head), d_o = rows_of(p.d_o, batch, head);
  const int64_t head_index = static_cast<int64_t>(batch) * p.heads + head;
  const int lane = thread_index() % kLanes;
  LDM_ROLLED for (int begin = 0; begin < count; begin += kAhead * kRows) {
    Chunk a[kAhead][kTurns], b[kAhead][kTurns];
    float lse[kAhead], dlse[kAhead];
    LDM_UNROLL for (int i = 0; i < kAhead; ++i) {
      const int row = query + begin + i * kRows + thread_index() / kLanes;
      LDM_UNROLL for (int turn = 0; turn < kTurns; ++turn) {
        a[i][turn] = load_chunk(o, row, turn * kLanes + lane, p.q_len, p.head_dim);
        b[i][turn] = load_chunk(d_o, row, turn * kLanes + lane, p.q_len, p.head_dim);
      }
      const bool valid = row < p.q_len;
      lse[i] = valid ? p.lse[head_index * p.q_len + row] : -INFINITY;
      dlse[i] = valid && p.dlse ? p.dlse[head_index * p.q_len + row] : 0.0f;
    }
    LDM_UNROLL for (int i = 0; i < kAhead; ++i) {
      float delta = 0.0f;
      LDM_UNROLL for (int turn = 0; turn < kTurns; ++turn) delta +=
          dot(T(), a[i][turn], b[i][turn]);
      LDM_UNROLL for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) {
        delta += shuffle_xor(delta, lanes);
      }
      const int at = begin + i * kRows + thread_index() / kLanes;
      if (lane == 0 && at < count) {
        store(at, lse[i] == -INFINITY ? INFINITY : lse[i] * kLog2e, delta - dlse[i]);
      }
    }
  }
}

// A block per kStatisticsRows queries, for the kernels that do not compute their own.
template <typename T, class C>
LDM_KERNEL(kStatisticsRows, 1)
flash_bwd_statistics_kernel(LDM_PARAMS p) {
  const int tiles = padded_queries(p) / kStatisticsRows;
  const int64_t head_index = block_index() / tiles;
  const int query = static_cast<int>(block_index() % tiles) * kStatisticsRows;
  const int batch = static_cast<int>(head_index / p.heads);
  const int head = static_cast<int>(head_index % p.heads);
  float* target = statistics_at(p, batch, head, query);
  row_statistics<T, C::kPadded, kStatisticsRows>(p, batch, head, query, kStatisticsRows,
                                                 [&](int row, float lse, float delta) {
                                                   target[2 * row] = lse;
                                                   target[2 * row + 1] = delta;
                                                 });
  if (!p.dq_sums) return;
  Chunk* sums = reinterpret_cast<Chunk*>(dq_fragment(p, batch, head, query, 0));
  const int chunks = kStatisticsRows * ceil_div(p.head_dim, 8) * 2;  // of 4 floats
  LDM_ROLLED for (int i = thread_index(); i < chunks; i += kStatisticsRows) sums[i] = {};
}

// A block per kFinishedRows queries: the sums of dq, complete now, become dq.
template <typename T, class C>
LDM_KERNEL(kFinishedRows * 2, 1)
flash_bwd_finish_kernel(LDM_PARAMS p) {
  const int tiles = ceil_div(p.q_len, kFinishedRows);
  const int head_index = static_cast<int>(block_index() / tiles);
  const int query = static_cast<int>(block_index() % tiles) * kFinishedRows;
  const int batch = head_index / p.heads, head = head_index % p.heads;
  const int row = warp_index() * 16;
  const Tile<C::kPadded> tile = {shared_base()};
  LDM_UNROLL for (int column = 0; column < C::kPadded; column += 8) {
    if (column >= p.head_dim) break;
    float c[4];
    load_fragment(c, dq_fragment(p, batch, head, query + row, column));
    LDM_UNROLL for (int e = 0; e < 4; ++e) c[e] *= p.scale;
    store_accumulator(T(), tile, row, column, c);
  }
  sync_block();
  store_tile<kFinishedRows, kFinishedRows * 2>(rows_of(p.dq, batch, head), tile, query, p.q_len,
                                               p.head_dim);
}

}  // namespace ldm
