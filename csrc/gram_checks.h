// What the operators on Gram sums ask of their arguments, on every device.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

#include "check.h"
#include "gram_plan.h"

namespace spade_fast {

// No size may pass this, so that no reach, number of outputs or position overflows.
constexpr int64_t kLargestSize = (int64_t{1} << 31) - 1;
// The plan of the sums grows with the square of the taps.
constexpr int64_t kMostTaps = 4096;

inline ConvGeometry geometry_of(const std::vector<int64_t>& size, const std::vector<int64_t>& kernel_size,
                                const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                                const std::vector<int64_t>& dilation, int64_t groups) {
  STD_TORCH_CHECK(size.size() == 3, "size must be [channels, height, width], got ", shape_text(size));
  for (const int64_t each : size) {
    STD_TORCH_CHECK(each >= 0 && each <= kLargestSize, "sizes must lie within 0..", kLargestSize, ", got ",
                    shape_text(size));
  }
  STD_TORCH_CHECK(groups > 0 && size[0] % groups == 0, "groups = ", groups, " must divide the ", size[0],
                  " channels of the input");
  STD_TORCH_CHECK(kernel_size.size() == 2 && stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
                  "kernel_size, stride, padding and dilation must have two values each");
  ConvGeometry g{};
  g.channels = size[0] / groups;
  g.height = size[1];
  g.width = size[2];
  g.groups = groups;
  for (int axis = 0; axis < 2; ++axis) {
    STD_TORCH_CHECK(kernel_size[axis] > 0 && stride[axis] > 0 && dilation[axis] > 0 && padding[axis] >= 0,
                    "kernel_size, stride and dilation must be positive and padding not negative, got ",
                    shape_text(kernel_size), ", ", shape_text(stride), ", ", shape_text(dilation), ", ",
                    shape_text(padding));
    for (const int64_t each : {kernel_size[axis], stride[axis], padding[axis], dilation[axis]}) {
      STD_TORCH_CHECK(each <= kLargestSize, "kernel_size, stride, padding and dilation must be at most ", kLargestSize,
                      ", got ", each);
    }
    g.kernel[axis] = kernel_size[axis];
    g.stride[axis] = stride[axis];
    g.padding[axis] = padding[axis];
    g.dilation[axis] = dilation[axis];
    STD_TORCH_CHECK(g.size(axis) + 2 * padding[axis] >= g.reach(axis), "a kernel that reaches over ", g.reach(axis),
                    " pixels does not fit into ", g.size(axis), " pixels padded by ", padding[axis]);
  }
  STD_TORCH_CHECK(g.kernel[0] <= kMostTaps && g.kernel[1] <= kMostTaps && g.taps() <= kMostTaps,
                  "kernels may have at most ", kMostTaps, " taps, got ", shape_text(kernel_size));
  STD_TORCH_CHECK(g.outputs(0) <= kLargestSize / g.outputs(1), "an image may have at most ", kLargestSize,
                  " outputs, got ", g.outputs(0), " x ", g.outputs(1));
  return g;
}

inline ConvGeometry geometry_of_input(const torch::stable::Tensor& input, const std::vector<int64_t>& kernel_size,
                                      const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                                      const std::vector<int64_t>& dilation, int64_t groups) {
  STD_TORCH_CHECK(input.dim() == 4, "input must be [images, channels, height, width], got ", shape_text(input.sizes()));
  return geometry_of({input.size(1), input.size(2), input.size(3)}, kernel_size, stride, padding, dilation, groups);
}

inline void check_sums(const GramPlan& plan, const torch::stable::Tensor& sums) {
  STD_TORCH_CHECK(is_float_or_double(sums), "sums must be float32 or float64");
  const std::vector<int64_t> shape = plan.shape();
  bool fits = sums.dim() == static_cast<int64_t>(shape.size()) && sums.is_contiguous();
  for (size_t i = 0; fits && i < shape.size(); ++i) fits = sums.size(i) == shape[i];
  STD_TORCH_CHECK(fits, "sums must be a contiguous ", shape_text(shape), " tensor, got ", tensor_text(sums));
}

inline void check_input_dtype(const torch::stable::Tensor& sums, const torch::stable::Tensor& input, bool tf32) {
  using torch::headeronly::ScalarType;
  const bool is_float = sums.scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(
      input.scalar_type() == sums.scalar_type() || (is_float && input.scalar_type() == ScalarType::BFloat16),
      "sums and input must both be float32 or both float64, or the input bfloat16 and the sums float32");
  STD_TORCH_CHECK(is_float || !tf32, "tf32 rounds float32 inputs: with float64 sums it must be off");
}

}  // namespace spade_fast
