// Argument checks that name the argument, and tensors as the kernels see them.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <string>

#include "params.h"

namespace ldm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_of(const Tensor& tensor) {
  std::string text = "(";
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    text += (i ? ", " : "") + std::to_string(tensor.size(i));
  }
  return text + ")";
}

// A (B, H, N, D) tensor of the query's dtype and device whose last dimension is contiguous.
inline void check_operand(const char* name, const Tensor& tensor, const Tensor& query) {
  STD_TORCH_CHECK(tensor.dim() == 4, name, " must have 4 dimensions (B, H, N, D), got ",
                  shape_of(tensor));
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == query.get_device_index(), name,
                  " must be on the CUDA device of query");
  STD_TORCH_CHECK(tensor.scalar_type() == query.scalar_type(), name,
                  " must have the dtype of query");
  STD_TORCH_CHECK(tensor.size(3) <= 1 || tensor.stride(3) == 1, name,
                  " must be contiguous in its last dimension, got stride ", tensor.stride(3));
}

inline void check_shape(const char* name, const Tensor& tensor, int64_t batch, int64_t heads,
                        int64_t length, int64_t head_dim) {
  const bool same = tensor.size(0) == batch && tensor.size(1) == heads &&
                    tensor.size(2) == length && tensor.size(3) == head_dim;
  STD_TORCH_CHECK(same, name, " must have shape (", batch, ", ", heads, ", ", length, ", ",
                  head_dim, "), got ", shape_of(tensor));
}

// A contiguous float32 (B, H, Q) tensor.
inline void check_rows(const char* name, const Tensor& tensor, const Tensor& query) {
  const bool same = tensor.dim() == 3 && tensor.size(0) == query.size(0) &&
                    tensor.size(1) == query.size(1) && tensor.size(2) == query.size(2);
  STD_TORCH_CHECK(same, name, " must have shape (", query.size(0), ", ", query.size(1), ", ",
                  query.size(2), "), got ", shape_of(tensor));
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == query.get_device_index() &&
                      tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous(),
                  name, " must be contiguous float32 on the device of query");
}

// A dimension of size 1 is never stepped along: its stride may be anything, and counts as 0.
inline int64_t step(const Tensor& tensor, int64_t dim) {
  return tensor.size(dim) > 1 ? tensor.stride(dim) : 0;
}

inline Strided strided(const Tensor& tensor) {
  Strided view = {tensor.data_ptr(), step(tensor, 0), step(tensor, 1), step(tensor, 2), 0};
  const bool whole_chunks = reinterpret_cast<uintptr_t>(view.data) % 16 == 0 &&
                            (view.batch | view.head | view.row | tensor.size(3)) % 8 == 0;
  view.vector = whole_chunks ? 1 : 0;
  return view;
}

}  // namespace ldm
