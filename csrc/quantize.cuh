// INT8 keys, a scale every kQuantRows of them, after the keys of a head lost their mean:
//     k ← k − mean over tokens of k     scale = max |k| / 127     int8 = round(k / scale)
// The softmax does not see what all keys have in common, but the largest value of a block does
// (SageAttention, arXiv 2410.02367, section 4.2). Queries are rounded where they are used.
#pragma once
#include "rounding.cuh"
#include "sm80/int8_tiles.h"

namespace ldm {

// How a block shares out rows of W columns: a thread keeps its 8 columns and walks down.
struct Walk {
  int width, slots, slot, chunk;  // rows a step, and which of them is this thread's

  LDM_DEVICE explicit Walk(int row_width) : width(row_width) {
    const int chunks = width / kChunk;
    slots = kQuantThreads / chunks;
    slot = thread_index() / chunks;
    chunk = thread_index() % chunks;
  }
  LDM_DEVICE bool takes_part() const { return slot < slots; }
};

struct KeyHead {
  int64_t index;  // of B · G
  Rows rows;
};
LDM_DEVICE KeyHead key_head(const Int8Params& p, int64_t index) {
  const int batch = static_cast<int>(index / p.flash.kv_heads);
  return {index, rows_of(p.flash.k, batch, static_cast<int>(index % p.flash.kv_heads))};
}

// Sums rows from `first` to before `end` into W floats at `target` in shared memory, in an order
// that depends on nothing else. Uses kScratchBytes at `scratch`.
template <typename T>
LDM_DEVICE void sum_rows(T, const Int8Params& p, Rows rows, int first, int end, uint32_t scratch,
                         uint32_t target) {
  constexpr int kAhead = 4;  // rows a thread has under way
  const Walk walk(p.width);
  float sum[kChunk] = {};
  if (walk.takes_part()) {
    LDM_ROLLED for (int row = first + walk.slot; row < end; row += kAhead * walk.slots) {
      Chunk chunks[kAhead];
      LDM_UNROLL for (int i = 0; i < kAhead; ++i) {
        chunks[i] = load_chunk(rows, row + i * walk.slots, walk.chunk, end, p.flash.head_dim);
      }
      LDM_UNROLL for (int i = 0; i < kAhead; ++i) {
        float x[kChunk];
        to_floats(T(), x, chunks[i]);
        LDM_UNROLL for (int j = 0; j < kChunk; ++j) sum[j] += x[j];
      }
    }
    LDM_UNROLL for (int j = 0; j < kChunk; j += 2) {
      const int at = walk.slot * p.width + walk.chunk * kChunk + j;
      store_shared(scratch + static_cast<uint32_t>(at) * 4, sum[j], sum[j + 1]);
    }
  }
  sync_block();
  if (2 * thread_index() < p.width) {
    float x = 0.0f, y = 0.0f;
    LDM_ROLLED for (int first_slot = 0; first_slot < walk.slots; first_slot += kAhead) {
      float pairs[kAhead][2] = {};
      LDM_UNROLL for (int i = 0; i < kAhead; ++i) {
        const int at = (first_slot + i) * p.width + 2 * thread_index();
        if (first_slot + i < walk.slots) {
          load_shared_pair(pairs[i][0], pairs[i][1], scratch + static_cast<uint32_t>(at) * 4);
        }
      }
      LDM_UNROLL for (int i = 0; i < kAhead; ++i) {
        x += pairs[i][0];
        y += pairs[i][1];
      }
    }
    store_shared(target + static_cast<uint32_t>(thread_index()) * 8, x, y);
  }
  sync_block();
}

// A block per head and part of the tokens.
template <typename T>
LDM_KERNEL(kQuantThreads, 1)
int8_key_sums_kernel(LDM_PARAMS_OF(Int8Params) p) {
  const KeyHead head = key_head(p, block_index() / p.parts);
  const int rows_a_part = ceil_div(p.flash.k_len, p.parts);
  const int first = static_cast<int>(block_index() % p.parts) * rows_a_part;
  const uint32_t total = shared_base() + kScratchBytes;
  sum_rows(T(), p, head.rows, first, min(first + rows_a_part, p.flash.k_len), shared_base(), total);
  if (2 * thread_index() < p.width) {
    float* target = p.k_sums + block_index() * p.width + 2 * thread_index();
    load_shared_pair(target[0], target[1], total + static_cast<uint32_t>(thread_index()) * 8);
  }
}

// Leaves the mean of a head's keys in shared memory and, once a head, in p.k_mean.
template <typename T>
LDM_DEVICE void find_mean(T, const Int8Params& p, const KeyHead& head, uint32_t mean, bool store) {
  if (p.parts == 0) sum_rows(T(), p, head.rows, 0, p.flash.k_len, shared_base(), mean);
  if (2 * thread_index() < p.width) {
    const uint32_t at = mean + static_cast<uint32_t>(thread_index()) * 8;
    float x = 0.0f, y = 0.0f;
    if (p.parts == 0) load_shared_pair(x, y, at);
    const float* sums = p.k_sums + head.index * p.parts * p.width + 2 * thread_index();
    LDM_UNROLL for (int part = 0; part < kMostParts; ++part) {  // all loads under way at once
      if (part < p.parts) {
        x += sums[part * p.width];
        y += sums[part * p.width + 1];
      }
    }
    x /= static_cast<float>(p.flash.k_len);
    y /= static_cast<float>(p.flash.k_len);
    store_shared(at, x, y);
    if (store) {
      float* target = p.k_mean + head.index * p.width + 2 * thread_index();
      target[0] = x;
      target[1] = y;
    }
  }
  sync_block();
}

// The largest of what all threads bring. `scratch`: 8 bytes a warp.
LDM_DEVICE float largest_of_block(float x, uint32_t scratch) {
  x = largest_of_lanes<kWarp>(x);
  if (thread_index() % kWarp == 0) {
    store_shared(scratch + static_cast<uint32_t>(thread_index() / kWarp) * 8, x, x);
  }
  sync_block();
  float largest = 0.0f;
  LDM_UNROLL for (int warp = 0; warp < kQuantThreads / kWarp; ++warp) {
    float of_warp[2];
    load_shared_pair(of_warp[0], of_warp[1], scratch + warp * 8);
    largest = larger(largest, of_warp[0]);
  }
  return largest;
}

// A block per kQuantRows keys of a head, which have at most kColumns columns.
template <typename T, int kColumns>
LDM_KERNEL(kQuantThreads, kColumns == kMaxColumns ? 2 : 3)
int8_keys_kernel(LDM_PARAMS_OF(Int8Params) p) {
  constexpr int kTurns = kQuantRows * kColumns / kChunk / kQuantThreads;
  const int blocks = ceil_div(p.flash.k_len, kQuantRows);
  const KeyHead head = key_head(p, block_index() / blocks);
  const int first = static_cast<int>(block_index() % blocks) * kQuantRows;
  const uint32_t mean_at = shared_base() + kScratchBytes;
  const Walk walk(p.width);
  const auto exists = [&](int turn) {
    const int row = turn * walk.slots + walk.slot;
    return walk.takes_part() && row < kQuantRows && first + row < p.flash.k_len;
  };
  Chunk chunks[kTurns];
  LDM_UNROLL for (int turn = 0; turn < kTurns; ++turn) {
    if (exists(turn)) {
      chunks[turn] = load_chunk(head.rows, first + turn * walk.slots + walk.slot, walk.chunk,
                                p.flash.k_len, p.flash.head_dim);
    }
  }
  find_mean(T(), p, head, mean_at, first == 0);
  float mean[kChunk] = {}, largest = 0.0f;
  if (walk.takes_part()) {
    LDM_UNROLL for (int j = 0; j < kChunk; j += 2) {
      load_shared_pair(mean[j], mean[j + 1],
                       mean_at + static_cast<uint32_t>(walk.chunk * kChunk + j) * 4);
    }
  }
  const auto smooth = [&](float (&x)[kChunk], int turn) {
    to_floats(T(), x, chunks[turn]);
    LDM_UNROLL for (int j = 0; j < kChunk; ++j) x[j] -= mean[j];
  };
  LDM_UNROLL for (int turn = 0; turn < kTurns; ++turn) {
    if (!exists(turn)) continue;
    float x[kChunk];
    smooth(x, turn);
    largest = larger(largest, largest_of(x));
  }
  const Rounding rounding = rounding_of(largest_of_block(largest, mean_at + kMaxColumns * 4));
  if (thread_index() == 0) p.k_scale[block_index()] = rounding.scale;
  LDM_UNROLL for (int turn = 0; turn < kTurns; ++turn) {
    if (!exists(turn)) continue;
    float x[kChunk];
    smooth(x, turn);
    const int64_t row = head.index * p.flash.k_len + first + turn * walk.slots + walk.slot;
    *reinterpret_cast<Integers*>(p.k_int8 + row * p.width + walk.chunk * kChunk) =
        to_integers(x, rounding.factor);
  }
}

// One query: what its rounding leaves of it, and the LSE of its scores without the mean key.
template <typename T>
LDM_DEVICE void round_query(T type, const Int8Params& p, int64_t head_index, int row) {
  constexpr int kTurns = kMaxColumns / kChunk / 8;
  const FlashParams& f = p.flash;
  const int batch = static_cast<int>(head_index / f.heads);
  const int head = static_cast<int>(head_index % f.heads);
  const int64_t kv_index = static_cast<int64_t>(batch) * f.kv_heads + head / (f.heads / f.kv_heads);
  float mean[kTurns][kChunk], largest, shift;
  load_mean(mean, p.k_mean + kv_index * p.width, p.width);
  QueryRow<T, kTurns> query;
  query.load(rows_of(f.q, batch, head), row, f.q_len, f.head_dim);
  query.survey(largest, shift, mean);
  if (row >= f.q_len) return;
  const Rounding rounding = rounding_of(largest);
  LDM_UNROLL for (int turn = 0; turn < kTurns; ++turn) {
    float x[kChunk];
    to_floats(type, x, query.chunks[turn]);
    LDM_UNROLL for (int i = 0; i < kChunk; ++i) {
      x[i] = (rounded(x[i], rounding.factor) - kIntegerZero) * rounding.scale;
    }
    const int chunk = turn * 8 + thread_index() % 8;
    store_chunk(rows_of(p.q_rounded, batch, head), row, chunk, f.head_dim - chunk * kChunk,
                to_chunk(type, x));
  }
  const int64_t at = head_index * f.q_len + row;
  if (thread_index() % 8 == 0) {
    p.smooth_lse[at] = f.lse[at] == -INFINITY ? -INFINITY : f.lse[at] - shift * f.scale;
  }
}

// One key out of its INT8, by 8 lanes.
template <typename T>
LDM_DEVICE void round_key(T type, const Int8Params& p, int64_t kv_index, int row) {
  const FlashParams& f = p.flash;
  if (row >= f.k_len) return;
  const Rows target = rows_of(p.k_rounded, static_cast<int>(kv_index / f.kv_heads),
                              static_cast<int>(kv_index % f.kv_heads));
  const float scale = p.k_scale[kv_index * ceil_div(f.k_len, kQuantRows) + row / kQuantRows];
  const int8_t* source = p.k_int8 + (kv_index * f.k_len + row) * p.width;
  LDM_ROLLED for (int chunk = thread_index() % 8; chunk * kChunk < f.head_dim; chunk += 8) {
    const Integers integers = *reinterpret_cast<const Integers*>(source + chunk * kChunk);
    float x[kChunk];
    LDM_UNROLL for (int i = 0; i < kChunk; ++i) {
      const auto integer = static_cast<int8_t>(integers.words[i / 4] >> (i % 4 * 8));
      x[i] = static_cast<float>(integer) * scale;
    }
    store_chunk(target, row, chunk, f.head_dim - chunk * kChunk, to_chunk(type, x));
  }
}

constexpr int kRoundRows = kQuantThreads / 8;  // a block

// For the backward: queries and keys as the forward saw them, in 16 bits. A block per kRoundRows
// rows of the query, then of the key.
template <typename T>
LDM_KERNEL(kQuantThreads, 1)
int8_round_kernel(LDM_PARAMS_OF(Int8Params) p) {
  const int q_blocks = ceil_div(p.flash.q_len, kRoundRows);
  const int64_t of_queries = static_cast<int64_t>(p.flash.batch) * p.flash.heads * q_blocks;
  const int inside = thread_index() / 8;
  if (block_index() < of_queries) {
    const int row = static_cast<int>(block_index() % q_blocks) * kRoundRows + inside;
    round_query(T(), p, block_index() / q_blocks, row);
  } else {
    const int64_t block = block_index() - of_queries;
    const int k_blocks = ceil_div(p.flash.k_len, kRoundRows);
    const int row = static_cast<int>(block % k_blocks) * kRoundRows + inside;
    round_key(T(), p, block / k_blocks, row);
  }
}

}  // namespace ldm
