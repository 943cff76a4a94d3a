// What the factoring operators ask of their arguments, on every device.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "check.h"

namespace spade_fast {

inline void check_hessian(const torch::stable::Tensor& hessian, double damping) {
  STD_TORCH_CHECK(
      hessian.dim() == 3 && hessian.size(1) == hessian.size(2) && hessian.size(1) > 0 && is_float_or_double(hessian),
      "hessian must be a float32 or float64 tensor [groups, columns, columns], got ", tensor_text(hessian));
  STD_TORCH_CHECK(damping >= 0, "damping must be at least 0, got ", damping);
}

}  // namespace spade_fast
