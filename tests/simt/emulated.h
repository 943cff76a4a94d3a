// The GPU's operators on host memory: the same tables and launches as on a GPU, the kernels run through
// csrc/simt/simt.h. Every array has memory of its own, so that a sanitizer sees where it ends.
#pragma once

#include <algorithm>
#include <cstdint>
#include <deque>
#include <limits>
#include <vector>

#include "../../csrc/cuda/elimination.cuh"
#include "../../csrc/cuda/factor.cuh"
#include "../../csrc/cuda/gram.cuh"
#include "../../csrc/cuda/gram_assemble.cuh"
#include "../../csrc/cuda/gram_depthwise.cuh"
#include "../../csrc/cuda/prune_columns.cuh"
#include "../../csrc/cuda/render.cuh"

namespace spade_fast::cuda::emulated {

// Few enough that small inputs take several waves, enough that they are cut into several chunks.
constexpr int kMultiprocessors = 4;

// What nobody has written yet is not a number.
template <class T>
std::vector<T> unwritten(int64_t count) {
  return std::vector<T>(count, std::numeric_limits<T>::quiet_NaN());
}

// Adds maps [images, height, width, channels] to the sums of a plan.
template <class Sum>
void add_sums(const GramPlan& plan, const void* maps, int64_t images, Precision precision, Sum* sums) {
  const ConvGeometry& g = plan.geometry;
  const int64_t channels = g.channels * g.groups;
  const MapLayout layout{images, g.height * g.width * channels, g.width * channels, channels};
  if (plan.depthwise()) {
    const std::vector<DepthwiseProduct> products = depthwise_products(plan, layout);
    for (const DepthwiseLaunch& launch : depthwise_launches(plan, layout, sizeof(Sum), kMultiprocessors)) {
      std::vector<Sum> partials = unwritten<Sum>(int64_t{launch.chunks} * launch.sums * g.groups);
      run_depthwise({precision, maps, products.data(), sums, partials.data()}, launch, nullptr);
    }
    return;
  }
  const int64_t bytes = precision == Precision::kFloat64 ? 8 : precision == Precision::kBFloat16 ? 2 : 4;
  const bool vectors = has_vectors(plan, layout, maps, bytes);
  const int tile = gram_tile(plan.flat ? g.columns() : g.channels, precision, vectors);
  for (const GramLaunch& launch : gram_launches(plan, layout, tile, precision, kMultiprocessors)) {
    std::vector<Sum> partials = unwritten<Sum>(int64_t{launch.partial_tiles} * tile * tile);
    run_gram({precision, maps, vectors, sums, partials.data(), tile}, launch, nullptr);
  }
}

// gram [groups, d, d], which for a flat plan holds the sums.
template <class T>
void make_gram(const GramPlan& plan, const T* sums, T* gram) {
  const int64_t groups = plan.geometry.groups;
  if (plan.flat) {
    run_mirror(gram, groups, plan.geometry.columns(), nullptr);
    return;
  }
  const AssemblyTables tables(plan);
  run_assemble<T>({groups, plan.geometry.channels, plan.geometry.taps(), plan.sums,
                   static_cast<int64_t>(tables.pairs.size()), sums, tables.pairs.data(), tables.sums.data(), gram},
                  plan.depthwise(), nullptr);
}

template <class T>
void factor(std::vector<FactorMatrix<T>> matrices, double damping) {
  const FactorPlan plan(matrices);
  const int64_t strips = plan.strips.grids[0].blocks;
  std::vector<T> dampings = unwritten<T>(matrices.size()), images = unwritten<T>(strips * kFactorBlock);
  std::vector<T> worst = unwritten<T>(strips * 3);
  std::vector<int32_t> failed(matrices.size());
  run_factor<T>({matrices.data(), plan.strips.first.data(), plan.rows.first.data(), plan.updates.first.data(),
                 dampings.data(), failed.data(), images.data(), worst.data()},
                plan, damping, nullptr);
}

// Prunes layers whose own arrays are given; scratch memory is made here.
template <class T>
void prune(std::vector<PruneProblem<T>> problems) {
  std::deque<std::vector<T>> memory;
  for (PruneProblem<T>& problem : problems) {
    const int64_t rows = int64_t{problem.groups} * problem.rows;
    problem.sums = memory.emplace_back(rows * problem.columns).data();
    problem.delta = memory.emplace_back(unwritten<T>(rows * problem.columns)).data();
    problem.change = memory.emplace_back(unwritten<T>(rows * problem.block_size)).data();
    problem.scores = memory.emplace_back(unwritten<T>(rows * problem.block_size)).data();
  }
  const PrunePlan plan(problems);
  run_prune(problems.data(), plan.updates.first.data(), plan, nullptr);
}

// Prunes every row of layers to its end, in two workspaces whatever their memory.
template <class T>
void eliminate(std::vector<EliminationProblem<T>> problems) {
  const EliminationPlan plan(problems);
  const int64_t blocks = plan.blocks(kMultiprocessors, 2 * plan.workspace * sizeof(T), sizeof(T));
  int32_t taken = 0;
  // Of whole vectors, so that it is aligned as theirs.
  std::vector<Vector<T>> numbers(blocks * plan.workspace / Vector<T>::kLanes);
  for (Vector<T>& vector : numbers) std::fill_n(vector.lane, Vector<T>::kLanes, std::numeric_limits<T>::quiet_NaN());
  run_eliminate<T>({problems.data(), plan.rows.first.data(), reinterpret_cast<T*>(numbers.data()), &taken,
                    static_cast<int32_t>(blocks)},
                   plan, nullptr);
}

}  // namespace spade_fast::cuda::emulated
