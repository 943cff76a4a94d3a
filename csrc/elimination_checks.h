// What the elimination operator asks of its arguments, on every device.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

#include "check.h"

namespace spade_fast {

inline void check_eliminations(const std::vector<torch::stable::Tensor>& weights,
                               const std::vector<torch::stable::Tensor>& inverses,
                               const std::vector<int64_t>& block_sizes) {
  const size_t layers = weights.size();
  STD_TORCH_CHECK(layers > 0 && inverses.size() == layers && block_sizes.size() == layers,
                  "elimination_orders needs a weight, an inverse and a block size for each layer, got ", layers, ", ",
                  inverses.size(), " and ", block_sizes.size());
  for (size_t i = 0; i < layers; ++i) {
    const torch::stable::Tensor &weight = weights[i], &inverse = inverses[i];
    STD_TORCH_CHECK(weight.dim() == 3 && is_float_or_double(weight),
                    "weight must be a float32 or float64 tensor [groups, rows, columns], got ", tensor_text(weight));
    const int64_t groups = weight.size(0), columns = weight.size(2);
    STD_TORCH_CHECK(inverse.dim() == 3 && inverse.size(0) == groups && inverse.size(1) == columns &&
                        inverse.size(2) == columns && inverse.scalar_type() == weight.scalar_type(),
                    "inverse must be a [", groups, ", ", columns, ", ", columns, "] tensor of the weight's dtype, got ",
                    tensor_text(inverse));
    STD_TORCH_CHECK(block_sizes[i] >= 1 && columns % block_sizes[i] == 0, "block_size must divide the ", columns,
                    " columns, got ", block_sizes[i]);
  }
}

}  // namespace spade_fast
