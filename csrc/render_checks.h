// What the rendering operator asks of its arguments, on every device.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "check.h"

namespace spade_fast {

inline void check_bands(const char* axis, const torch::stable::Tensor& starts, const torch::stable::Tensor& weights,
                        int64_t views, torch::headeronly::ScalarType dtype) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(
      weights.dim() == 3 && weights.size(0) == views && weights.scalar_type() == dtype && weights.is_contiguous(), axis,
      " weights must be a contiguous [views, taps, size] tensor of the image's dtype, got ", tensor_text(weights));
  STD_TORCH_CHECK(starts.dim() == 2 && starts.size(0) == views && starts.size(1) == weights.size(2) &&
                      starts.scalar_type() == ScalarType::Long && starts.is_contiguous(),
                  axis, " starts must be a contiguous int64 [views, size] tensor, got ", tensor_text(starts));
}

inline void check_views(const torch::stable::Tensor& image, const torch::stable::Tensor& row_starts,
                        const torch::stable::Tensor& row_weights, const torch::stable::Tensor& column_starts,
                        const torch::stable::Tensor& column_weights, const torch::stable::Tensor& colours) {
  STD_TORCH_CHECK(image.dim() == 3 && image.size(0) == 3 && is_float_or_double(image),
                  "image must be a float32 or float64 tensor [3, height, width], got ", tensor_text(image));
  STD_TORCH_CHECK(colours.dim() == 2 && colours.size(1) == 3 && colours.scalar_type() == image.scalar_type() &&
                      colours.is_contiguous(),
                  "colours must be a contiguous [views, 3] tensor of the image's dtype, got ", tensor_text(colours));
  check_bands("row", row_starts, row_weights, colours.size(0), image.scalar_type());
  check_bands("column", column_starts, column_weights, colours.size(0), image.scalar_type());
}

}  // namespace spade_fast
