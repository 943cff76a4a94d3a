// Column-wise OBS pruning on a GPU: arguments, memory, and what is pruned together (prune_columns.h).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <utility>
#include <vector>

#include "../prune_checks.h"
#include "device.h"
#include "prune_columns.h"

namespace spade_fast::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::transpose;

constexpr int64_t kMostWeights = (int64_t{1} << 31) - 1;  // of a layer: indices have 31 bits

// The layers of a call, transposed so that a column of all rows is contiguous.
struct Layers {
  std::vector<Tensor> factors;       // [groups, columns, columns], contiguous
  std::vector<Tensor> sparse, kept;  // [groups, columns, rows]
  std::vector<double> sparsities;
  std::vector<int64_t> block_sizes;
  Tensor losses;
};

// Prunes all layers of type T, whatever their sizes.
template <class T>
void prune_all(const OnDevice& device, const Layers& layers, bool published_count) {
  std::vector<PruneProblem<T>> problems;
  int64_t weights = 0, scratch = 0;
  for (size_t i = 0; i < layers.sparse.size(); ++i) {
    const Tensor& weight = layers.sparse[i];
    if (weight.scalar_type() != kScalarType<T> || weight.numel() == 0) continue;
    PruneProblem<T> problem{};
    problem.factor = layers.factors[i].const_data_ptr<T>();
    problem.weight = weight.mutable_data_ptr<T>();
    problem.kept = layers.kept[i].mutable_data_ptr<bool>();
    problem.loss = layers.losses.mutable_data_ptr<double>() + i;
    problem.groups = static_cast<int32_t>(weight.size(0));
    problem.rows = static_cast<int32_t>(weight.size(2));
    problem.columns = static_cast<int32_t>(weight.size(1));
    problem.block_size = static_cast<int32_t>(std::min(layers.block_sizes[i], weight.size(1)));
    problem.published_count = published_count;
    problem.sparsity = layers.sparsities[i];
    problems.push_back(problem);
    weights += weight.numel();
    scratch += weight.size(0) * weight.size(2) * problem.block_size;
  }
  if (problems.empty()) return;

  // All layers' sums, which begin as zeros, then their deltas, changes and scores.
  Tensor memory = torch::stable::new_empty(layers.losses, {2 * weights + 2 * scratch}, kScalarType<T>);
  Tensor all_sums = torch::stable::narrow(memory, 0, 0, weights);
  torch::stable::zero_(all_sums);
  T* next[] = {memory.mutable_data_ptr<T>(), nullptr, nullptr, nullptr};
  next[1] = next[0] + weights;
  next[2] = next[1] + weights;
  next[3] = next[2] + scratch;
  for (PruneProblem<T>& problem : problems) {
    const int64_t rows = int64_t{problem.groups} * problem.rows;
    problem.sums = std::exchange(next[0], next[0] + rows * problem.columns);
    problem.delta = std::exchange(next[1], next[1] + rows * problem.columns);
    problem.change = std::exchange(next[2], next[2] + rows * problem.block_size);
    problem.scores = std::exchange(next[3], next[3] + rows * problem.block_size);
  }
  const PrunePlan plan(problems);
  const Tensor table = device.upload(problems, memory), updates = device.upload(plan.updates.first, memory);
  prune_problems(static_cast<const PruneProblem<T>*>(table.const_data_ptr()),
                 static_cast<const int32_t*>(updates.const_data_ptr()), plan, device.stream());
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>, Tensor> prune_layers(std::vector<Tensor> weights,
                                                                          std::vector<Tensor> factors,
                                                                          std::vector<double> sparsities,
                                                                          std::vector<int64_t> block_sizes,
                                                                          bool published_count) {
  check_problems(weights, factors, sparsities, block_sizes);
  const OnDevice device(weights[0]);
  Layers layers{{}, {}, {}, sparsities, block_sizes, {}};
  layers.losses = torch::stable::new_zeros(weights[0], {static_cast<int64_t>(weights.size())}, ScalarType::Double);
  for (size_t i = 0; i < weights.size(); ++i) {
    device.check_here("weight", weights[i]);
    device.check_here("factor", factors[i]);
    STD_TORCH_CHECK(weights[i].numel() <= kMostWeights, "a layer may have at most ", kMostWeights, " weights, got ",
                    weights[i].numel());
    const int64_t groups = weights[i].size(0), rows = weights[i].size(1), columns = weights[i].size(2);
    layers.factors.push_back(torch::stable::contiguous(factors[i]));
    // A copy even where the transpose is contiguous already: the kernels overwrite it.
    Tensor sparse = torch::stable::new_empty(weights[i], {groups, columns, rows});
    torch::stable::copy_(sparse, transpose(weights[i], 1, 2));
    layers.sparse.push_back(sparse);
    layers.kept.push_back(torch::stable::new_empty(weights[i], {groups, columns, rows}, ScalarType::Bool));
  }
  prune_all<float>(device, layers, published_count);
  prune_all<double>(device, layers, published_count);
  for (size_t i = 0; i < weights.size(); ++i) {
    layers.sparse[i] = torch::stable::contiguous(transpose(layers.sparse[i], 1, 2));
    layers.kept[i] = torch::stable::contiguous(transpose(layers.kept[i], 1, 2));
  }
  return {layers.sparse, layers.kept, layers.losses};
}

std::tuple<Tensor, Tensor, Tensor> prune_columns(Tensor weight, Tensor factor, double sparsity, int64_t block_size,
                                                 bool published_count) {
  const auto [sparse, kept, losses] = prune_layers({weight}, {factor}, {sparsity}, {block_size}, published_count);
  return {sparse[0], kept[0], torch::stable::select(losses, 0, 0)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spade_fast, CUDA, m) {
  m.impl("prune_columns", TORCH_BOX(&prune_columns));
  m.impl("prune_layers", TORCH_BOX(&prune_layers));
}

}  // namespace spade_fast::cuda
