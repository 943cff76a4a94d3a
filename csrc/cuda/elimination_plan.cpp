#include <algorithm>
#include <cmath>
#include <limits>

#include "../ceil_div.h"
#include "../pivot_noise.h"
#include "elimination.h"

namespace spade_fast::cuda {
namespace {

constexpr int64_t kBlocksAtATime = 2;  // of threads, on a multiprocessor: kernels' launch bounds
constexpr int64_t kDepthStep = 64, kUsualDepth = 256;

// Folds read and write a matrix d^3 / (3 depth) times, steps read vectors d^2 depth / (4 block_size) times: a depth for
// which both are about the same. A matter of the layer alone, so that those beside it change no bit.
int64_t depth_of(int64_t columns, int64_t block_size) {
  const double balance = std::sqrt(4.0 / 3.0 * static_cast<double>(columns) * static_cast<double>(block_size));
  const auto steps = static_cast<int64_t>(balance / kDepthStep + 0.5);
  const int64_t depth = std::clamp(steps * kDepthStep, kDepthStep, kUsualDepth);
  return std::max(depth, ceil_div(block_size, kDepthStep) * kDepthStep);
}
static_assert(kUsualDepth <= kMostEliminated && kMostEliminated % kDepthStep == 0, "no depth is larger");

}  // namespace

template <class T>
EliminationPlan::EliminationPlan(std::vector<EliminationProblem<T>>& problems) {
  for (EliminationProblem<T>& problem : problems) {
    problem.depth = static_cast<int32_t>(depth_of(problem.columns, problem.block_size));
    problem.least = static_cast<T>(least_pivot(problem.columns, std::numeric_limits<T>::epsilon()));
    workspace = std::max(workspace, elimination_layout(problem.columns, problem.block_size, problem.depth).end);
    depth = std::max(depth, problem.depth);
  }
  std::stable_sort(
      problems.begin(), problems.end(),
      [](const EliminationProblem<T>& a, const EliminationProblem<T>& b) { return a.columns > b.columns; });
  rows.add(static_cast<int32_t>(problems.size()), [&](int32_t i) { return problems[i].groups * problems[i].rows; });
}
template EliminationPlan::EliminationPlan(std::vector<EliminationProblem<float>>&);
template EliminationPlan::EliminationPlan(std::vector<EliminationProblem<double>>&);

int64_t EliminationPlan::blocks(int64_t multiprocessors, int64_t bytes, int64_t bytes_of_number) const {
  const int64_t at_work = std::min<int64_t>(kBlocksAtATime * multiprocessors, rows.grids[0].blocks);
  return std::clamp<int64_t>(bytes / (workspace * bytes_of_number), 1, std::max<int64_t>(at_work, 1));
}

}  // namespace spade_fast::cuda
