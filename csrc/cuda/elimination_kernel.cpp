// Optimal brain compression on a GPU: arguments, memory, and what is pruned together (elimination.h).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <exception>
#include <tuple>
#include <vector>

#include "../elimination_checks.h"
#include "device.h"
#include "elimination.h"

namespace spade_fast::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMostIndex = (int64_t{1} << 31) - 1;  // columns and rows are counted in 31 bits
constexpr double kMemoryShare = 0.5;                    // of what is free, for workspaces

// Workspaces for as many blocks of threads as there is memory for.
template <class T>
Tensor new_workspaces(const OnDevice& device, const EliminationPlan& plan, int64_t& blocks, const Tensor& like) {
  const auto bytes = static_cast<int64_t>(kMemoryShare * static_cast<double>(device.free_memory()));
  blocks = plan.blocks(device.multiprocessors(), bytes, sizeof(T));
  try {
    return torch::stable::new_empty(like, {blocks * plan.workspace}, kScalarType<T>);
  } catch (const std::exception&) {
    STD_TORCH_CHECK(false, "elimination_orders needs ", plan.workspace * static_cast<int64_t>(sizeof(T)),
                    " bytes of GPU memory for each row that is pruned at a time, and did not get it for ", blocks);
  }
}

// Prunes all layers of type T, whatever their sizes.
template <class T>
void eliminate_all(const OnDevice& device, const std::vector<Tensor>& weights, const std::vector<Tensor>& inverses,
                   const std::vector<int64_t>& block_sizes, const std::vector<Tensor>& orders,
                   const std::vector<Tensor>& losses) {
  std::vector<EliminationProblem<T>> problems;
  for (size_t i = 0; i < weights.size(); ++i) {
    if (weights[i].scalar_type() != kScalarType<T> || weights[i].numel() == 0) continue;
    EliminationProblem<T> problem{};
    problem.weight = weights[i].const_data_ptr<T>();
    problem.inverse = inverses[i].const_data_ptr<T>();
    problem.order = orders[i].mutable_data_ptr<int32_t>();
    problem.losses = losses[i].mutable_data_ptr<T>();
    problem.groups = static_cast<int32_t>(weights[i].size(0));
    problem.rows = static_cast<int32_t>(weights[i].size(1));
    problem.columns = static_cast<int32_t>(weights[i].size(2));
    problem.block_size = static_cast<int32_t>(block_sizes[i]);
    problems.push_back(problem);
  }
  if (problems.empty()) return;

  const Tensor& like = weights[0];
  const EliminationPlan plan(problems);
  int64_t blocks = 0;
  const Tensor numbers = new_workspaces<T>(device, plan, blocks, like);
  const Tensor taken = torch::stable::new_zeros(like, {1}, ScalarType::Int);
  const Tensor table = device.upload(problems, like), rows = device.upload(plan.rows.first, like);
  eliminate_problems<T>({static_cast<const EliminationProblem<T>*>(table.const_data_ptr()),
                         static_cast<const int32_t*>(rows.const_data_ptr()), numbers.mutable_data_ptr<T>(),
                         taken.mutable_data_ptr<int32_t>(), static_cast<int32_t>(blocks)},
                        plan, device.stream());
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>> elimination_orders(std::vector<Tensor> weights,
                                                                        std::vector<Tensor> inverses,
                                                                        std::vector<int64_t> block_sizes) {
  check_eliminations(weights, inverses, block_sizes);
  const OnDevice device(weights[0]);
  std::vector<Tensor> orders, losses;
  int64_t all_rows = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    device.check_here("weight", weights[i]);
    device.check_here("inverse", inverses[i]);
    const int64_t groups = weights[i].size(0), rows = weights[i].size(1), columns = weights[i].size(2);
    STD_TORCH_CHECK(block_sizes[i] <= kMostEliminated, "block_size may be at most ", kMostEliminated, " on a GPU, got ",
                    block_sizes[i]);
    all_rows += groups * rows;
    STD_TORCH_CHECK(all_rows <= kMostIndex && columns <= kMostIndex, "at most ", kMostIndex,
                    " rows of as many columns can be pruned at once, got ", all_rows, " of ", columns);
    weights[i] = torch::stable::contiguous(weights[i]);
    inverses[i] = torch::stable::contiguous(inverses[i]);
    orders.push_back(torch::stable::new_empty(weights[i], {groups, rows, columns / block_sizes[i]}, ScalarType::Int));
    losses.push_back(torch::stable::new_empty(weights[i], {groups, rows, columns / block_sizes[i]}));
  }
  eliminate_all<float>(device, weights, inverses, block_sizes, orders, losses);
  eliminate_all<double>(device, weights, inverses, block_sizes, orders, losses);
  return {orders, losses};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spade_fast, CUDA, m) {
  m.impl("elimination_orders", TORCH_BOX(&elimination_orders));
}

}  // namespace spade_fast::cuda
