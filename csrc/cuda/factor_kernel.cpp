// Reversed Cholesky factors on a GPU: arguments, memory, and what is factored together (factor.h).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../factor_checks.h"
#include "device.h"
#include "factor.h"

namespace spade_fast::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Factors all layers of type T, whatever their sizes.
template <class T>
void factor_all(const OnDevice& device, const std::vector<Tensor>& hessians, double damping,
                const std::vector<Tensor>& factors, const std::vector<Tensor>& errors) {
  std::vector<FactorMatrix<T>> matrices;
  for (size_t i = 0; i < hessians.size(); ++i) {
    if (hessians[i].scalar_type() != kScalarType<T>) continue;
    const int64_t size = hessians[i].size(1);
    for (int64_t g = 0; g < hessians[i].size(0); ++g) {
      matrices.push_back({hessians[i].const_data_ptr<T>() + g * size * size,
                          factors[i].mutable_data_ptr<T>() + g * size * size, errors[i].mutable_data_ptr<double>() + g,
                          size});
    }
  }
  if (matrices.empty()) return;
  const FactorPlan plan(matrices);

  const Tensor& like = hessians[0];
  const auto count = static_cast<int64_t>(matrices.size());
  const int64_t strips = plan.strips.grids[0].blocks;
  const Tensor table = device.upload(matrices, like), strip_table = device.upload(plan.strips.first, like);
  const Tensor row_table = device.upload(plan.rows.first, like), update_table = device.upload(plan.updates.first, like);
  const Tensor numbers = torch::stable::new_empty(like, {count + strips * (kFactorBlock + 3)}, kScalarType<T>);
  const Tensor failed = torch::stable::new_zeros(like, {count}, ScalarType::Int);
  T* own = numbers.mutable_data_ptr<T>();
  const FactorWorkspace<T> workspace{static_cast<const FactorMatrix<T>*>(table.const_data_ptr()),
                                     static_cast<const int32_t*>(strip_table.const_data_ptr()),
                                     static_cast<const int32_t*>(row_table.const_data_ptr()),
                                     static_cast<const int32_t*>(update_table.const_data_ptr()),
                                     own,
                                     failed.mutable_data_ptr<int32_t>(),
                                     own + count,
                                     own + count + strips * kFactorBlock};
  factor_matrices(workspace, plan, damping, device.stream());
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>> factor_hessians(std::vector<Tensor> hessians, double damping) {
  std::vector<Tensor> factors, errors;
  if (hessians.empty()) return {factors, errors};
  const OnDevice device(hessians[0]);
  for (Tensor& hessian : hessians) {
    check_hessian(hessian, damping);
    device.check_here("hessian", hessian);
    hessian = torch::stable::contiguous(hessian);
    factors.push_back(torch::stable::new_empty(hessian, {hessian.size(0), hessian.size(1), hessian.size(2)}));
    errors.push_back(torch::stable::new_empty(hessian, {hessian.size(0)}, ScalarType::Double));
  }
  factor_all<float>(device, hessians, damping, factors, errors);
  factor_all<double>(device, hessians, damping, factors, errors);
  return {factors, errors};
}

std::tuple<Tensor, Tensor> factor_hessian(Tensor hessian, double damping) {
  const auto [factors, errors] = factor_hessians({hessian}, damping);
  return {factors[0], errors[0]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spade_fast, CUDA, m) {
  m.impl("factor_hessian", TORCH_BOX(&factor_hessian));
  m.impl("factor_hessians", TORCH_BOX(&factor_hessians));
}

}  // namespace spade_fast::cuda
