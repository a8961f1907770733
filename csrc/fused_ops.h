// Exact attention under the names of the operator for which torch keeps a derivative in C++.
// Part of ops.cpp, where one translation unit reads torch's headers.
//
// A gradient of our own would be one in Python: the stable ABI has no autograd node. torch has one
// for aten::_scaled_dot_product_fused_attention_overrideable, which no CUDA backend of its own
// implements and scaled_dot_product_attention never chooses on CUDA.
#pragma once
#include <vector>

namespace ldm {
namespace {

using FusedResult = std::tuple<Tensor, Tensor, Tensor, Tensor, int64_t, int64_t, Tensor, Tensor,
                               Tensor>;  // output, LSE, and what this kernel has no use for

FusedResult fused_forward(const Tensor& query, const Tensor& key, const Tensor& value,
                          const std::optional<Tensor>& attn_bias, double dropout_p, bool is_causal,
                          bool return_debug_mask, std::optional<double> scale) {
  STD_TORCH_CHECK(dropout_p == 0.0, "dropout_p must be 0, got ", dropout_p);
  STD_TORCH_CHECK(!return_debug_mask, "return_debug_mask must be False");
  STD_TORCH_CHECK(scale, "scale must be given");
  const auto [out, lse] =
      flash_forward(query, key, value, attn_bias, is_causal, *scale, std::nullopt, 0.0);
  const Tensor none;
  return {out, lse, none, none, 0, 0, none, none, none};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> fused_backward(
    const Tensor& grad_out, const Tensor& query, const Tensor& key, const Tensor& value,
    const Tensor& attn_bias, const std::vector<bool>& grad_input_mask, const Tensor& out,
    const Tensor& lse, const Tensor&, const Tensor&, int64_t, int64_t, double, bool is_causal,
    const Tensor&, const Tensor&, std::optional<double> scale) {
  STD_TORCH_CHECK(scale, "scale must be given");
  const bool adjacent = grad_out.size(3) <= 1 || grad_out.stride(3) == 1;
  const Tensor dout = adjacent ? grad_out : torch::stable::contiguous(grad_out);
  const std::optional<Tensor> mask =
      attn_bias.defined() ? std::optional<Tensor>(attn_bias) : std::nullopt;
  auto [dq, dk, dv] = flash_backward(dout, query, key, value, out, lse, mask, std::nullopt,
                                     is_causal, *scale, std::nullopt, 0.0, false);
  return {dq, dk, dv, Tensor()};
}

}  // namespace
}  // namespace ldm
