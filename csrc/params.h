// What every kernel is told: plain structs, no torch and no CUDA header.
#pragma once
#include <cstdint>

typedef struct CUstream_st* cudaStream_t;  // as CUDA declares it

namespace ldm {

// One head after another, a row of `head_dim` adjacent elements a position. Strides in elements.
struct Strided {
  void* data;
  int64_t batch;
  int64_t head;
  int64_t row;
  int64_t vector;  // 1: every row starts at 16 bytes and holds whole chunks of 8 elements
};

enum MaskKind : int64_t { kNoMask = 0, kBoolMask = 1, kElementMask = 2, kFloatMask = 3 };

// B batch, H query heads, G key/value heads, Q query length, K key length, D head dim.
// Fields of 8 bytes come first, so that there is no padding to guess at.
struct FlashParams {
  Strided q;             // (B, H, Q, D)
  Strided k;             // (B, G, K, D)
  Strided v;             // (B, G, K, D)
  Strided o;             // (B, H, Q, D)
  Strided d_o;           // (B, H, Q, D)
  Strided dq;            // (B, H, Q, D)
  Strided dk;            // (B, G, K, D)
  Strided dv;            // (B, G, K, D)
  Strided mask;          // (B, H, Q, K), any stride may be 0; row: of a query
  int64_t mask_col;      // stride of a key in the mask
  float* lse;            // (B, H, Q), natural logarithm
  float* dlse;           // (B, H, Q) or null
  const uint64_t* seed;  // of dropout, on the device; null without
  float* statistics;  // (B, H, padded Q, 2): lse · log2(e), Σ_d do·o − dlse; null: blocks find them
  float* dq_sums;     // (B, H, padded Q, ⌈D / 8⌉ · 8), by fragments; null: no block adds to them
  float* partial;     // (splits, B, H, Q, ⌈D / 8⌉ · 8), then their LSE (splits, B, H, Q); or null
  int64_t mask_kind;
  int64_t bfloat16;  // 1: bfloat16, 0: float16
  int32_t batch;
  int32_t heads;
  int32_t kv_heads;
  int32_t q_len;
  int32_t k_len;
  int32_t head_dim;
  float scale;
  int32_t causal;  // 1: query i sees keys 0..i
  float dropout_p;
  int32_t repeatable;  // 1: gradients are the same bit for bit in every run
  int32_t splits;      // blocks that share out the keys of one of the forward
  int32_t reserved;
};

// Whether a call needs the kernels for masks and dropout. The plain ones fold the scale into exp2,
// which only works for a positive one.
constexpr bool is_general(const FlashParams& p) {
  return p.mask_kind != kNoMask || p.seed != nullptr || !(p.scale > 0.0f);
}

// INT8 attention: what FlashParams says, and what becomes of the keys. W: D in whole 16 bytes.
struct Int8Params {
  FlashParams flash;
  Strided q_rounded;  // (B, H, Q, D), what the rounding leaves of q
  Strided k_rounded;  // (B, G, K, D), and of k − mean
  int8_t* k_int8;     // (B, G, K, W), of k − mean
  float* k_scale;     // (B, G, ⌈K / kQuantRows⌉), k − mean ≈ scale · int8
  float* k_mean;      // (B, G, W), over the tokens
  float* k_sums;      // (B, G, parts, W), over each part of the tokens
  float* smooth_lse;  // (B, H, Q), of the scores of k − mean
  int32_t width;      // W
  int32_t parts;      // 0: every block sums all keys itself
};

// Sets p.splits; returns the floats that p.partial takes, 0 where no keys are shared out.
template <int kHeadDim>
int64_t plan_flash_fwd(FlashParams& p);

// Each returns a cudaError_t. kHeadDim is one of dispatch.h's and at least p.head_dim.
template <int kHeadDim>
int launch_flash_fwd(const FlashParams& p, cudaStream_t stream);
template <int kHeadDim>
int launch_flash_bwd(const FlashParams& p, cudaStream_t stream);
int launch_flash_combine(const FlashParams& p, cudaStream_t stream);
// Floats that p.dq_sums takes; none where no two blocks add to the same dq.
template <int kHeadDim>
int64_t dq_floats(const FlashParams& p);

// kHeadDim: one of dispatch.h's for INT8.
template <int kHeadDim>
int launch_int8_fwd(const Int8Params& p, cudaStream_t stream);
int launch_quantise_keys(const Int8Params& p, cudaStream_t stream);
int launch_round_operands(const Int8Params& p, cudaStream_t stream);

// Whether the forward's machine code runs on the current device.
template <int kHeadDim>
int probe_flash_fwd();

}  // namespace ldm
