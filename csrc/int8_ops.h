// The INT8 operators. Part of ops.cpp, where one translation unit reads torch's headers.
#pragma once
#include "sm80/int8_tiles.h"

namespace ldm {
namespace {

Int8Params make_int8_params(const FlashParams& flash) {
  Int8Params p = {};
  p.flash = flash;
  p.width = static_cast<int32_t>(ceil_div(flash.head_dim, 16) * 16);
  p.parts = key_parts(flash.k_len);
  return p;
}

// The output and its LSE, and what the backward needs of the key: INT8, scales and mean.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> int8_forward(const Tensor& query,
                                                                const Tensor& key,
                                                                const Tensor& value, bool is_causal,
                                                                double scale) {
  Int8Params p = make_int8_params(make_params(query, key, value, std::nullopt, is_causal, scale));
  const FlashParams& f = p.flash;
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  const auto for_heads = [&](int64_t rows, int64_t columns, ScalarType dtype) {
    return torch::stable::new_empty(key, {f.batch, f.kv_heads, rows, columns}, dtype);
  };
  Tensor out = empty_as(query);
  Tensor lse = empty_rows(query);
  Tensor key_int8 = for_heads(f.k_len, p.width, ScalarType::Char);
  Tensor key_scale = for_heads(ceil_div(f.k_len, kQuantRows), 1, ScalarType::Float);
  Tensor key_mean = for_heads(1, p.width, ScalarType::Float);
  const Tensor key_sums = for_heads(p.parts, p.width, ScalarType::Float);
  p.flash.o = strided(out);
  p.flash.lse = floats(lse);
  p.k_int8 = static_cast<int8_t*>(key_int8.data_ptr());
  p.k_scale = floats(key_scale);
  p.k_mean = floats(key_mean);
  p.k_sums = floats(key_sums);
  const cudaStream_t stream = current_stream(query);
  check_launch("int8_forward", launch_quantise_keys(p, stream));
  check_launch("int8_forward", with_int8_head_dim(f.head_dim, [&](auto dim) {
                 return launch_int8_fwd<dim.value>(p, stream);
               }));
  return {out, lse, key_int8, key_scale, key_mean};
}

// A tensor that the forward made and kept for the backward.
void check_kept(const char* name, const Tensor& tensor, const Tensor& query, ScalarType dtype,
                int64_t count) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == query.get_device_index() &&
                      tensor.scalar_type() == dtype && tensor.is_contiguous() &&
                      tensor.numel() == count,
                  name, " must be what int8_forward returned for these shapes");
}

// The gradients of softmax(scale · q̂ k̂ᵀ) v by the exact backward, where q̂ and k̂ are what the
// forward saw: with its LSE their weights sum to 1. `dlse` weighs the LSE of k̂, without the mean
// key.
std::tuple<Tensor, Tensor, Tensor> int8_backward(const Tensor& dout, const Tensor& query,
                                                 const Tensor& key_int8, const Tensor& key_scale,
                                                 const Tensor& key_mean, const Tensor& value,
                                                 const Tensor& out, const Tensor& lse,
                                                 const std::optional<Tensor>& dlse, bool is_causal,
                                                 double scale, bool repeatable) {
  // value has the shape and dtype that the key had
  Int8Params p = make_int8_params(make_params(query, value, value, std::nullopt, is_causal, scale));
  const int64_t heads = static_cast<int64_t>(p.flash.batch) * p.flash.kv_heads;
  const int64_t blocks = ceil_div(p.flash.k_len, kQuantRows);
  check_kept("key_int8", key_int8, query, ScalarType::Char, heads * p.flash.k_len * p.width);
  check_kept("key_scale", key_scale, query, ScalarType::Float, heads * blocks);
  check_kept("key_mean", key_mean, query, ScalarType::Float, heads * p.width);
  check_rows("lse", lse, query);
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  Tensor rounded_query = empty_as(query);
  Tensor rounded_key = empty_as(value);
  Tensor smooth_lse = torch::stable::empty_like(lse);
  p.flash.lse = floats(lse);
  p.q_rounded = strided(rounded_query);
  p.k_rounded = strided(rounded_key);
  p.k_int8 = static_cast<int8_t*>(key_int8.data_ptr());
  p.k_scale = floats(key_scale);
  p.k_mean = floats(key_mean);
  p.smooth_lse = floats(smooth_lse);
  check_launch("int8_backward", launch_round_operands(p, current_stream(query)));
  return flash_backward(dout, rounded_query, rounded_key, value, out, smooth_lse, std::nullopt,
                        dlse, is_causal, scale, std::nullopt, 0.0, repeatable);
}

}  // namespace
}  // namespace ldm
