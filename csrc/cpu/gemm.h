// Matrix products on torch's own BLAS, in place, through the stable C interface.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/tensor.h>

namespace spade_fast {

// out [g, m, n] = beta * out + a [g, m, k] b [g, k, n]; `out` may be a strided view.
inline void batched_matmul_into(const torch::stable::Tensor& out, double beta, const torch::stable::Tensor& a,
                                const torch::stable::Tensor& b) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_baddbmm_out(out.get(), out.get(), a.get(), b.get(), beta, 1.0));
}

}  // namespace spade_fast
