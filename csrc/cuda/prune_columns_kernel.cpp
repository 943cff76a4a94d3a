// Column-wise OBS pruning on a GPU: arguments, memory, and what is pruned together (prune_columns.h).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../count_to_prune.h"
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

PruneShape shape_of(const Layers& layers, size_t i) {
  const Tensor& weight = layers.sparse[i];
  return {weight.size(0), weight.size(2), weight.size(1), std::min(layers.block_sizes[i], weight.size(1))};
}

// Prunes all layers of type T, whatever their sizes.
template <class T>
void prune_all(const OnDevice& device, const Layers& layers, bool published_count) {
  std::vector<size_t> order;
  for (size_t i = 0; i < layers.sparse.size(); ++i) {
    if (layers.sparse[i].scalar_type() == kScalarType<T> && layers.sparse[i].numel() > 0) order.push_back(i);
  }
  if (order.empty()) return;
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return shape_of(layers, a).panels() > shape_of(layers, b).panels(); });
  std::vector<PruneShape> shapes;
  int64_t weights = 0, scratch = 0;
  for (const size_t i : order) {
    shapes.push_back(shape_of(layers, i));
    weights += layers.sparse[i].numel();
    scratch += shapes.back().groups * shapes.back().rows * shapes.back().block_size;
  }
  const PrunePlan plan(shapes, sizeof(T));

  // All layers' sums, then their deltas, changes and scores.
  Tensor memory = torch::stable::new_empty(layers.sparse[order[0]], {2 * weights + 2 * scratch});
  Tensor all_sums = torch::stable::narrow(memory, 0, 0, weights);
  torch::stable::zero_(all_sums);
  T* sums = memory.mutable_data_ptr<T>();
  T* deltas = sums + weights;
  T* changes = deltas + weights;
  T* scores = changes + scratch;
  std::vector<PruneProblem<T>> problems;
  for (size_t p = 0; p < order.size(); ++p) {
    const size_t i = order[p];
    const PruneShape& shape = shapes[p];
    const int64_t block_rows = shape.groups * shape.rows, last = shape.columns % shape.block_size;
    const auto count = [&](int64_t width) {
      return static_cast<int32_t>(count_to_prune(width * block_rows, layers.sparsities[i], published_count));
    };
    problems.push_back({layers.factors[i].const_data_ptr<T>(), layers.sparse[i].mutable_data_ptr<T>(), deltas, sums,
                        changes, scores, layers.kept[i].mutable_data_ptr<bool>(),
                        layers.losses.mutable_data_ptr<double>() + i, static_cast<int32_t>(shape.groups),
                        static_cast<int32_t>(shape.rows), static_cast<int32_t>(shape.columns),
                        static_cast<int32_t>(shape.block_size), static_cast<int32_t>(shape.panel_columns()),
                        count(shape.block_size), last > 0 ? count(last) : 0, published_count});
    sums += layers.sparse[i].numel();
    deltas += layers.sparse[i].numel();
    changes += block_rows * shape.block_size;
    scores += block_rows * shape.block_size;
  }
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
