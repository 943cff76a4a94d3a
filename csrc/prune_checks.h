// What the pruning operators ask of their arguments, on every device.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

#include "check.h"

namespace spade_fast {

inline void check_problem(const torch::stable::Tensor& weight, const torch::stable::Tensor& factor, double sparsity,
                          int64_t block_size) {
  STD_TORCH_CHECK(weight.dim() == 3 && is_float_or_double(weight),
                  "weight must be a float32 or float64 tensor [groups, rows, columns], got ", tensor_text(weight));
  const int64_t groups = weight.size(0), columns = weight.size(2);
  STD_TORCH_CHECK(factor.dim() == 3 && factor.size(0) == groups && factor.size(1) == columns &&
                      factor.size(2) == columns && factor.scalar_type() == weight.scalar_type(),
                  "factor must be a [", groups, ", ", columns, ", ", columns, "] tensor of the weight's dtype, got ",
                  tensor_text(factor));
  STD_TORCH_CHECK(sparsity >= 0 && sparsity <= 1, "sparsity must lie in 0..1, got ", sparsity);
  STD_TORCH_CHECK(block_size >= 1, "block_size must be at least 1, got ", block_size);
}

inline void check_problems(const std::vector<torch::stable::Tensor>& weights,
                           const std::vector<torch::stable::Tensor>& factors, const std::vector<double>& sparsities,
                           const std::vector<int64_t>& block_sizes) {
  const size_t layers = weights.size();
  STD_TORCH_CHECK(layers > 0 && factors.size() == layers && sparsities.size() == layers && block_sizes.size() == layers,
                  "prune_layers needs a weight, factor, sparsity and block size for each layer, got ", layers, ", ",
                  factors.size(), ", ", sparsities.size(), " and ", block_sizes.size());
  for (size_t i = 0; i < layers; ++i) check_problem(weights[i], factors[i], sparsities[i], block_sizes[i]);
}

}  // namespace spade_fast
