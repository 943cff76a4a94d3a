// Every CUDA kernel on small shapes, for ThreadSanitizer to watch; the numbers themselves are tested by test_simt.py.
// Usage: simt_races KERNELS ORDER, with KERNELS one of gram, factor, prune, eliminate, render, ORDER as for set_thread_order.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "emulated.h"

namespace spade_fast::cuda {
namespace {

template <class T>
std::vector<T> random_values(size_t count) {
  static std::mt19937 generator(0);
  std::normal_distribution<double> normal;
  std::vector<T> values(count);
  for (T& value : values) value = static_cast<T>(normal(generator));
  return values;
}

template <class T>
void expect_finite_and_not_all_zero(const std::vector<T>& values) {
  double total = 0;
  for (const T value : values) total += value < 0 ? -value : value;
  if (!(total > 0 && total < 1e30)) {
    std::printf("results add up to %g\n", total);
    std::exit(1);
  }
}

template <class T>
void run_gram_of(const ConvGeometry& geometry, Precision precision) {
  const GramPlan plan(geometry);
  const int64_t images = 3, d = geometry.columns();
  std::vector<T> maps =
      random_values<T>(images * geometry.height * geometry.width * geometry.channels * geometry.groups);
  int64_t size = 1;
  for (const int64_t side : plan.shape()) size *= side;
  std::vector<T> sums(size);
  emulated::add_sums(plan, maps.data(), images, precision, sums.data());
  std::vector<T> gram(geometry.groups * d * d);
  if (plan.flat) gram = sums;
  emulated::make_gram(plan, sums.data(), gram.data());
  expect_finite_and_not_all_zero(gram);
}

void run_grams() {
  const ConvGeometry shifted{64, 4, 5, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 1};
  const ConvGeometry patches{3, 7, 7, {3, 3}, {2, 2}, {1, 1}, {1, 1}, 1};
  const ConvGeometry plain{68, 26, 26, {1, 1}, {1, 1}, {0, 0}, {1, 1}, 1};  // two tiles, several chunks
  const ConvGeometry depthwise{1, 6, 7, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 40};
  run_gram_of<float>(shifted, Precision::kFloat32);
  run_gram_of<float>(shifted, Precision::kTf32);
  run_gram_of<double>(shifted, Precision::kFloat64);
  run_gram_of<float>(patches, Precision::kFloat32);
  run_gram_of<float>(plain, Precision::kFloat32);
  run_gram_of<float>(depthwise, Precision::kFloat32);
}

template <class T>
void run_factors() {
  std::vector<std::vector<T>> hessians, factors;
  std::vector<double> errors(4);
  std::vector<FactorMatrix<T>> matrices;
  const int64_t sizes[] = {70, 9, 200, 64};
  for (const int64_t size : sizes) {
    const std::vector<T> inputs = random_values<T>(size * size);
    std::vector<T>& hessian = hessians.emplace_back(size * size);
    for (int64_t i = 0; i < size; ++i) {
      for (int64_t j = 0; j < size; ++j) {
        T sum = i == j ? T(1) : T(0);
        for (int64_t k = 0; k < size; ++k) sum += inputs[i * size + k] * inputs[j * size + k];
        hessian[i * size + j] = sum;
      }
    }
  }
  hessians[1][0] = -100;  // has no factor
  for (size_t i = 0; i < hessians.size(); ++i) {
    factors.emplace_back(hessians[i].size());
    matrices.push_back({hessians[i].data(), nullptr, &errors[i], sizes[i]});
  }
  for (size_t i = 0; i < factors.size(); ++i) matrices[i].factor = factors[i].data();
  emulated::factor(matrices, 0.01);
  for (const size_t i : {0, 2, 3}) expect_finite_and_not_all_zero(factors[i]);
}

template <class T>
void run_pruning() {
  struct Shape {
    int32_t groups, rows, columns, block_size;
  };
  const Shape shapes[] = {{1, 600, 5, 1}, {1, 20, 135, 9}, {3, 4, 9, 9}, {1, 3, 100, 80}};
  std::vector<std::vector<T>> factors, weights;
  std::vector<std::vector<char>> kept;
  std::vector<double> losses(4);
  std::vector<PruneProblem<T>> problems;
  for (const Shape& shape : shapes) {
    factors.push_back(random_values<T>(shape.groups * shape.columns * shape.columns));
    for (T& value : factors.back()) value /= static_cast<T>(shape.columns);
    for (int64_t g = 0; g < shape.groups; ++g) {
      for (int64_t i = 0; i < shape.columns; ++i) factors.back()[(g * shape.columns + i) * shape.columns + i] = 1;
    }
    weights.push_back(random_values<T>(shape.groups * shape.rows * shape.columns));
    for (size_t i = 0; i < weights.back().size(); i += 3) weights.back()[i] = 0;  // ties
    kept.emplace_back(weights.back().size());
  }
  for (size_t i = 0; i < weights.size(); ++i) {
    PruneProblem<T> problem{};
    problem.factor = factors[i].data();
    problem.weight = weights[i].data();
    problem.kept = reinterpret_cast<bool*>(kept[i].data());
    problem.loss = &losses[i];
    problem.groups = shapes[i].groups;
    problem.rows = shapes[i].rows;
    problem.columns = shapes[i].columns;
    problem.block_size = shapes[i].block_size;
    problem.sparsity = 0.3;
    problems.push_back(problem);
  }
  emulated::prune(problems);
  for (const std::vector<T>& weight : weights) expect_finite_and_not_all_zero(weight);
}

template <class T>
void run_elimination() {
  struct Shape {
    int32_t groups, rows, columns, block_size;
  };
  const Shape shapes[] = {{1, 2, 130, 1}, {1, 3, 81, 9}, {2, 1, 50, 25}, {1, 2, 8, 4}};
  std::vector<std::vector<T>> weights, inverses, losses;
  std::vector<std::vector<int32_t>> orders;
  std::vector<EliminationProblem<T>> problems;
  for (const Shape& shape : shapes) {
    const int64_t d = shape.columns, steps = d / shape.block_size;
    inverses.push_back(random_values<T>(shape.groups * d * d));
    for (int64_t i = 0; i < shape.groups * d * d; ++i) {  // of which the lower triangle is read
      inverses.back()[i] = i % (d * d) % (d + 1) == 0 ? T(1) : inverses.back()[i] / static_cast<T>(4 * d);
    }
    weights.push_back(random_values<T>(shape.groups * shape.rows * d));
    for (size_t i = 0; i < weights.back().size(); i += 3) weights.back()[i] = 0;  // ties
    losses.emplace_back(shape.groups * shape.rows * steps);
    orders.emplace_back(shape.groups * shape.rows * steps);
  }
  for (size_t i = 0; i < weights.size(); ++i) {
    EliminationProblem<T> problem{};
    problem.weight = weights[i].data();
    problem.inverse = inverses[i].data();
    problem.order = orders[i].data();
    problem.losses = losses[i].data();
    problem.groups = shapes[i].groups;
    problem.rows = shapes[i].rows;
    problem.columns = shapes[i].columns;
    problem.block_size = shapes[i].block_size;
    problems.push_back(problem);
  }
  emulated::eliminate(problems);
  for (const std::vector<T>& loss : losses) expect_finite_and_not_all_zero(loss);
}

void run_rendering() {
  const std::vector<float> image = random_values<float>(3 * 6 * 7), weights(2 * 2 * 20, 0.5f), colours(2 * 3, 0.7f);
  const std::vector<int64_t> starts(2 * 20, 3);
  std::vector<float> out(2 * 3 * 20 * 20);
  run_render(RenderArguments<float>{image.data(), starts.data(), starts.data(), weights.data(), weights.data(),
                                    colours.data(), out.data(), 6, 7, 2, 20, 20, 2, 2},
             nullptr);
  expect_finite_and_not_all_zero(out);
}

}  // namespace
}  // namespace spade_fast::cuda

int main(int argc, char** argv) {
  using namespace spade_fast::cuda;
  if (argc != 3) {
    std::puts("usage: simt_races gram|factor|prune|eliminate|render ORDER");
    return 2;
  }
  spade_fast::simt::set_thread_order(static_cast<unsigned>(std::atoi(argv[2])));
  const auto is = [&](const char* name) { return std::strcmp(argv[1], name) == 0; };
  if (is("gram")) run_grams();
  if (is("factor")) run_factors<float>();
  if (is("factor")) run_factors<double>();
  if (is("prune")) run_pruning<float>();
  if (is("prune")) run_pruning<double>();
  if (is("eliminate")) run_elimination<float>();
  if (is("eliminate")) run_elimination<double>();
  if (is("render")) run_rendering();
  std::puts("done");
  return 0;
}
