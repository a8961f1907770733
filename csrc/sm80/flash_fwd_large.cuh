// Attention forward for the one large head dim, that of an autoencoder's single head: as
// flash_fwd.cuh, but the output of its 64 queries fills the registers of 8 warps. They stand in two
// groups of rows and four of columns: a warp computes the scores of its rows with a quarter of the
// keys, and, once all have left their weights in shared memory, a quarter of the columns of p v.
// Keys and values pass through one pipeline, some columns of a block of keys a step.
#pragma once
#include "flash_fwd.cuh"

namespace ldm {

// The columns of a head from one on.
LDM_DEVICE Rows columns_from(Rows rows, int column) {
  return {rows.data + column, rows.stride, rows.vector};
}

template <class C>
struct LargeStages {
  const FlashParams& p;
  Rows k, v;  // of this head
  uint32_t base;
  int key_begin, key_end;

  LDM_DEVICE Tile<C::kColumns> tile(int step) const {
    return {base + static_cast<uint32_t>(step % C::kStages * C::kStepBytes)};
  }
  // The steps of a block of keys: all columns of the keys, then all of the values.
  LDM_DEVICE void start(int step) const {
    const int key = key_begin + step / (2 * C::kParts) * C::kBlockK;
    const int part = step % C::kParts;
    if (key < key_end) {
      const Rows rows = step % (2 * C::kParts) < C::kParts ? k : v;
      load_tile<C::kBlockK, C::kThreads>(tile(step), columns_from(rows, part * C::kColumns), key,
                                         p.k_len, p.head_dim - part * C::kColumns);
    }
    copy_commit();
  }
};

// A number of each of this warp's rows from every group of columns: table[row][group].
template <class C, typename F>
LDM_DEVICE void exchange(float (&x)[C::kRowTiles][2], uint32_t table, int warp_row, int group,
                         F&& combine) {
  const int lane = thread_index() % kWarp;
  const auto at = [&](int r, int half) {
    return table + static_cast<uint32_t>((warp_row + r * 16 + lane / 4 + half * 8) * 16);
  };
  static_assert(C::kColumnGroups == 4, "a row of the table is 16 bytes");
  LDM_UNROLL for (int r = 0; r < C::kRowTiles; ++r) {
    LDM_UNROLL for (int half = 0; half < 2; ++half) {
      if (lane % 4 == 0) {
        store_shared(at(r, half) + static_cast<uint32_t>(group) * 4, bits_of(x[r][half]));
      }
    }
  }
  sync_block();
  LDM_UNROLL for (int r = 0; r < C::kRowTiles; ++r) {
    LDM_UNROLL for (int half = 0; half < 2; ++half) {
      float all[4];
      load_shared_quad(all, at(r, half));
      x[r][half] = combine(combine(all[0], all[1]), combine(all[2], all[3]));
    }
  }
}

template <typename T, class C>
LDM_KERNEL(C::kThreads, 1)
flash_fwd_large_kernel(LDM_PARAMS p) {
  const int q_tiles = ceil_div(p.q_len, C::kBlockQ);
  const int block = static_cast<int>(block_index()) / p.splits;
  const int split = static_cast<int>(block_index()) % p.splits;
  const int head_index = block / q_tiles;
  const int q_begin = (q_tiles - 1 - block % q_tiles) * C::kBlockQ;
  const int batch = head_index / p.heads, head = head_index % p.heads;
  const int kv_head = head / (p.heads / p.kv_heads);
  const int group = warp_index() % C::kColumnGroups;
  const int warp_row = warp_index() / C::kColumnGroups * C::kRowTiles * 16;
  const int row = q_begin + warp_row;
  const KeyRange keys = share_of_keys<C>(p, q_begin, split, p.splits);

  const auto q_tile = [](int part) {
    return Tile<C::kColumns>{shared_base() + static_cast<uint32_t>(part * C::kStepBytes)};
  };
  const Tile<C::kBlockK> weights_tile = {q_tile(C::kParts).base};
  const uint32_t table = weights_tile.rows_from(C::kBlockQ).base;
  const LargeStages<C> stages = {p,
                                 rows_of(p.k, batch, kv_head),
                                 rows_of(p.v, batch, kv_head),
                                 table + C::kTableBytes,
                                 keys.begin,
                                 keys.end};
  // the next copies start under the products of a step, not before them
  const auto await = [&](int step) { await_step<C::kStages>(step, [](int) {}); };
  const Rows q = rows_of(p.q, batch, head), o = rows_of(p.o, batch, head);
  LDM_ROLLED for (int part = 0; part < C::kParts; ++part) {
    load_tile<C::kBlockQ, C::kThreads>(q_tile(part), columns_from(q, part * C::kColumns), q_begin,
                                       p.q_len, p.head_dim - part * C::kColumns);
  }
  LDM_UNROLL for (int step = 0; step < C::kStages - 1; ++step) stages.start(step);

  float out[C::kRowTiles][2 * C::kParts][4] = {};
  SoftmaxRows<C::kRowTiles> softmax;
  softmax.clear();
  int step = 0;
  LDM_ROLLED for (int begin = keys.begin; begin < keys.end; begin += C::kBlockK) {
    const int key = begin + group * 16;  // of this warp
    float scores[C::kRowTiles][2][4] = {};
    LDM_ROLLED for (int part = 0; part < C::kParts; ++part, ++step) {
      await(step);
      RowOperand<C::kColumns, C::kRowTiles, false> query;
      query.load(q_tile(part).rows_from(warp_row));
      multiply_rows<C::kColumns / 16>(T(), scores, query, stages.tile(step), group * 16);
      stages.start(step + C::kStages - 1);
    }
    scale_and_mask<T, false>(scores, p, batch, head, row, key);
    if (!LDM_LIKELY(key + 16 <= key_limit(p, row))) hide_unseen_keys<false>(scores, p, row, key);
    softmax.look(scores, 0, 1);
    softmax.reduce_tops();
    exchange<C>(softmax.top, table, warp_row, group, [](float a, float b) { return fmaxf(a, b); });
    softmax.rebase(out, 1.0f);
    softmax.exponentiate(scores, 1.0f, 0, 1);
    if (p.seed) {
      for_each_element(scores, row, key, [&](float& weight, int query, int at_key) {
        if (!is_kept(p, batch, head, query, at_key)) weight = 0.0f;
      });
    }
    LDM_UNROLL for (int r = 0; r < C::kRowTiles; ++r) {
      LDM_UNROLL for (int n = 0; n < 2; ++n) {
        store_accumulator(T(), weights_tile, warp_row + r * 16, group * 16 + n * 8, scores[r][n]);
      }
    }
    RowOperand<C::kBlockK, C::kRowTiles, true> weights;
    LDM_UNROLL for (int part = 0; part < C::kParts; ++part, ++step) {
      await(step);
      if (part == 0) weights.load(weights_tile.rows_from(warp_row));
      LDM_UNROLL for (int k = 0; k < C::kBlockK / 16; ++k) {
        uint32_t b[4];
        load_b_transposed(b, stages.tile(step), k * 16, group * 16);
        LDM_UNROLL for (int r = 0; r < C::kRowTiles; ++r) {
          uint32_t a[4];
          weights.get(a, r, k);
          mma(T(), out[r][2 * part], a, b[0], b[1]);
          mma(T(), out[r][2 * part + 1], a, b[2], b[3]);
        }
      }
      stages.start(step + C::kStages - 1);
    }
  }
  copy_wait<0>();
  sync_block();
  softmax.reduce_sums();
  exchange<C>(softmax.sum, table, warp_row, group, [](float a, float b) { return a + b; });
  const auto column = [&](int n) { return n / 2 * C::kColumns + group * 16 + n % 2 * 8; };
  if (p.splits > 1) {
    finish_rows(out, softmax, partial_lse(p, split, head_index), 1.0f - p.dropout_p, row, p.q_len);
    store_partial(out, partial_out(p, split, head_index), row, p.q_len, partial_width(p), column);
    return;
  }
  float* lse = p.lse + static_cast<int64_t>(head_index) * p.q_len;
  finish_rows(out, softmax, lse, 1.0f - p.dropout_p, row, p.q_len);
  LDM_UNROLL for (int r = 0; r < C::kRowTiles; ++r) {
    LDM_UNROLL for (int n = 0; n < 2 * C::kParts; ++n) {
      store_accumulator(T(), q_tile(n / 2), warp_row + r * 16, group * 16 + n % 2 * 8, out[r][n]);
    }
  }
  sync_block();
  LDM_ROLLED for (int part = 0; part < C::kParts; ++part) {
    store_tile<C::kBlockQ, C::kThreads>(columns_from(o, part * C::kColumns), q_tile(part), q_begin,
                                        p.q_len, p.head_dim - part * C::kColumns);
  }
}

}  // namespace ldm
