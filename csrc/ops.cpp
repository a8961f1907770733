// Operator schemas and torch glue on LibTorch's stable ABI: check → fill params → launch.
// The only file that sees torch; one binary serves every torch ≥ 2.10 and every Python.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>
#include <utility>

#include "check.h"
#include "dispatch.h"
#include "sm80/tiles.h"

// A CPU-only torch has no such symbol. Weak: it stays null there and the library still loads.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace ldm {
namespace {

cudaStream_t current_stream(const Tensor& tensor) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "this build of torch has no CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

void check_launch(const char* op, int error) {
  STD_TORCH_CHECK(error == cudaSuccess, op, ": ",
                  cudaGetErrorString(static_cast<cudaError_t>(error)));
}

void set_mask(FlashParams& p, const std::optional<Tensor>& attn_mask, const Tensor& query) {
  if (!attn_mask) return;
  const Tensor& mask = *attn_mask;
  const int64_t target[4] = {p.batch, p.heads, p.q_len, p.k_len};
  const int64_t missing = 4 - mask.dim();
  int64_t steps[4] = {};
  bool fits = mask.is_cuda() && mask.get_device_index() == query.get_device_index() && missing >= 0;
  for (int64_t i = missing < 0 ? 4 : missing; i < 4; ++i) {
    fits = fits && (mask.size(i - missing) == target[i] || mask.size(i - missing) == 1);
    steps[i] = step(mask, i - missing);
  }
  STD_TORCH_CHECK(fits, "attn_mask must broadcast to (", p.batch, ", ", p.heads, ", ", p.q_len,
                  ", ", p.k_len, ") on the device of query, got ", shape_of(mask));
  const ScalarType dtype = mask.scalar_type();
  p.mask_kind = dtype == ScalarType::Bool      ? kBoolMask
                : dtype == ScalarType::Float   ? kFloatMask
                : dtype == query.scalar_type() ? kElementMask
                                               : kNoMask;
  STD_TORCH_CHECK(p.mask_kind != kNoMask, "attn_mask must be bool, float32 or of query's dtype");
  p.mask = {mask.data_ptr(), steps[0], steps[1], steps[2], 0};
  p.mask_col = steps[3];
}

FlashParams make_params(const Tensor& query, const Tensor& key, const Tensor& value,
                        const std::optional<Tensor>& attn_mask, bool is_causal, double scale,
                        int64_t max_head_dim = kMaxHeadDim) {
  const ScalarType dtype = query.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
                  "query must be float16 or bfloat16");
  check_operand("query", query, query);
  check_operand("key", key, query);
  check_operand("value", value, query);
  const int64_t head_dim = query.size(3), heads = query.size(1), kv_heads = key.size(1);
  STD_TORCH_CHECK(head_dim >= 1 && head_dim <= max_head_dim, "query must have a head dim of 1 to ",
                  max_head_dim, ", got ", head_dim);
  STD_TORCH_CHECK(kv_heads > 0 ? heads % kv_heads == 0 : heads == 0,
                  "query must have a multiple of key's ", kv_heads, " heads, got ", heads);
  check_shape("key", key, query.size(0), kv_heads, key.size(2), head_dim);
  check_shape("value", value, query.size(0), kv_heads, key.size(2), head_dim);
  STD_TORCH_CHECK(query.size(0) * heads <= INT32_MAX && query.size(2) < INT32_MAX - 1024 &&
                      key.size(2) < INT32_MAX - 1024,
                  "query and key must have fewer than 2^31 heads and positions");
  FlashParams p = {};
  p.q = strided(query);
  p.k = strided(key);
  p.v = strided(value);
  p.bfloat16 = dtype == ScalarType::BFloat16;
  p.causal = is_causal;
  p.batch = static_cast<int32_t>(query.size(0));
  p.heads = static_cast<int32_t>(heads);
  p.kv_heads = static_cast<int32_t>(kv_heads);
  p.q_len = static_cast<int32_t>(query.size(2));
  p.k_len = static_cast<int32_t>(key.size(2));
  p.head_dim = static_cast<int32_t>(head_dim);
  p.scale = static_cast<float>(scale);
  set_mask(p, attn_mask, query);
  return p;
}

void set_dropout(FlashParams& p, const std::optional<Tensor>& seed, double dropout_p,
                 const Tensor& query) {
  STD_TORCH_CHECK(dropout_p >= 0.0 && dropout_p < 1.0, "dropout_p must be in [0, 1), got ",
                  dropout_p);
  if (dropout_p == 0.0) return;
  STD_TORCH_CHECK(seed && seed->is_cuda() && seed->get_device_index() == query.get_device_index() &&
                      seed->scalar_type() == ScalarType::Long && seed->numel() == 1,
                  "seed must be one int64 on the device of query");
  p.seed = static_cast<const uint64_t*>(seed->data_ptr());
  p.dropout_p = static_cast<float>(dropout_p);
}

// empty_like for (B, H, N, D). torch's is found by its name on every call; where no two elements of
// a tensor have a gap between them, its strides are those wanted.
Tensor empty_as(const Tensor& tensor) {
  int64_t *sizes = nullptr, *strides = nullptr, packed = 1;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensor.get(), &sizes));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor.get(), &strides));
  for (int found = 0; found < 4; ++found) {  // the dimension that is next in memory
    for (int i = 0; i < 4; ++i) {
      if (sizes[i] > 1 && strides[i] == packed) {
        packed *= sizes[i];
        break;
      }
    }
  }
  if (packed != tensor.numel()) return torch::stable::empty_like(tensor);
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      4, sizes, strides, dtype, aoti_torch_device_type_cuda(), tensor.get_device_index(), &made));
  return Tensor(made);
}

Tensor empty_rows(const Tensor& query) {
  return torch::stable::new_empty(query, {query.size(0), query.size(1), query.size(2)},
                                  ScalarType::Float);
}
float* floats(const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); }

std::tuple<Tensor, Tensor> flash_forward(const Tensor& query, const Tensor& key,
                                         const Tensor& value,
                                         const std::optional<Tensor>& attn_mask, bool is_causal,
                                         double scale, const std::optional<Tensor>& seed,
                                         double dropout_p) {
  FlashParams p = make_params(query, key, value, attn_mask, is_causal, scale, kMaxFwdHeadDim);
  set_dropout(p, seed, dropout_p, query);
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  Tensor out = empty_as(query);  // in the query's order of dimensions
  Tensor lse = empty_rows(query);
  p.o = strided(out);
  p.lse = floats(lse);
  const cudaStream_t stream = current_stream(query);
  std::optional<Tensor> partial;
  check_launch("flash_forward", with_fwd_head_dim(p.head_dim, [&](auto dim) {
                 if (const int64_t size = plan_flash_fwd<dim.value>(p)) {
                   partial = torch::stable::new_empty(query, {size}, ScalarType::Float);
                   p.partial = floats(*partial);
                 }
                 return launch_flash_fwd<dim.value>(p, stream);
               }));
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> flash_backward(const Tensor& dout, const Tensor& query,
                                                  const Tensor& key, const Tensor& value,
                                                  const Tensor& out, const Tensor& lse,
                                                  const std::optional<Tensor>& attn_mask,
                                                  const std::optional<Tensor>& dlse, bool is_causal,
                                                  double scale, const std::optional<Tensor>& seed,
                                                  double dropout_p, bool repeatable) {
  FlashParams p = make_params(query, key, value, attn_mask, is_causal, scale);
  set_dropout(p, seed, dropout_p, query);
  p.repeatable = repeatable;
  for (const auto& [name, tensor] : {std::pair("dout", &dout), std::pair("out", &out)}) {
    check_operand(name, *tensor, query);
    check_shape(name, *tensor, p.batch, p.heads, p.q_len, p.head_dim);
  }
  check_rows("lse", lse, query);
  if (dlse) check_rows("dlse", *dlse, query);
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  Tensor dq = empty_as(query);
  Tensor dk = empty_as(key);
  Tensor dv = empty_as(value);
  if (p.k_len == 0) return {torch::stable::zero_(dq), dk, dv};
  std::optional<Tensor> workspace;
  if (const int64_t size = statistics_floats(p)) {
    const int64_t sums = with_head_dim(p.head_dim, [&](auto dim) { return dq_floats<dim>(p); });
    workspace = torch::stable::new_empty(query, {size + sums}, ScalarType::Float);
    p.statistics = floats(*workspace);
    p.dq_sums = sums ? p.statistics + size : nullptr;
  }
  p.o = strided(out);
  p.d_o = strided(dout);
  p.dq = strided(dq);
  p.dk = strided(dk);
  p.dv = strided(dv);
  p.lse = floats(lse);
  p.dlse = dlse ? floats(*dlse) : nullptr;
  const cudaStream_t stream = current_stream(query);
  check_launch("flash_backward", with_head_dim(p.head_dim, [&](auto dim) {
                 return launch_flash_bwd<dim.value>(p, stream);
               }));
  return {dq, dk, dv};
}

// Why these kernels cannot run on a device (an old driver, no machine code for it), or "".
std::string device_error(int64_t index) {
  STD_TORCH_CHECK(index >= 0, "index must be that of a CUDA device, got ", index);
  const torch::stable::accelerator::DeviceGuard guard(static_cast<int32_t>(index));
  const int error = probe_flash_fwd<16>();
  return error == cudaSuccess ? "" : cudaGetErrorString(static_cast<cudaError_t>(error));
}

}  // namespace
}  // namespace ldm

#include "fused_ops.h"
#include "int8_ops.h"

STABLE_TORCH_LIBRARY(ldm4ts_kernels, m) {
  m.def(
      "flash_forward(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, bool is_causal, "
      "float scale, Tensor? seed=None, float dropout_p=0.0) -> (Tensor, Tensor)");
  m.def(
      "flash_backward(Tensor dout, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
      "Tensor? attn_mask, Tensor? dlse, bool is_causal, float scale, Tensor? seed=None, "
      "float dropout_p=0.0, bool repeatable=False) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "int8_forward(Tensor query, Tensor key, Tensor value, bool is_causal, float scale) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "int8_backward(Tensor dout, Tensor query, Tensor key_int8, Tensor key_scale, Tensor "
      "key_mean, "
      "Tensor value, Tensor out, Tensor lse, Tensor? dlse, bool is_causal, float scale, "
      "bool repeatable=False) "
      "-> (Tensor, Tensor, Tensor)");
  m.def("device_error(int index) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(ldm4ts_kernels, CUDA, m) {
  m.impl("flash_forward", TORCH_BOX(&ldm::flash_forward));
  m.impl("flash_backward", TORCH_BOX(&ldm::flash_backward));
  m.impl("int8_forward", TORCH_BOX(&ldm::int8_forward));
  m.impl("int8_backward", TORCH_BOX(&ldm::int8_backward));
}

STABLE_TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("_scaled_dot_product_fused_attention_overrideable", TORCH_BOX(&ldm::fused_forward));
  m.impl("_scaled_dot_product_fused_attention_overrideable_backward",
         TORCH_BOX(&ldm::fused_backward));
}

STABLE_TORCH_LIBRARY_IMPL(ldm4ts_kernels, CompositeExplicitAutograd, m) {
  m.impl("device_error", TORCH_BOX(&ldm::device_error));
}
