#include <algorithm>

#include "../ceil_div.h"
#include "../count_to_prune.h"
#include "prune_columns.h"

namespace spade_fast::cuda {
namespace {

constexpr int64_t kSharedScoreBytes = int64_t{64} << 10;

template <class T>
int64_t panels_of(const PruneProblem<T>& problem) {
  return ceil_div(problem.columns, problem.panel_columns);
}

// Narrower for tall layers: inside a panel a row's sum goes over all columns before, and the layer with the longest panel
// holds up a step of all. A matter of the layer alone, so that those beside it change no bit.
int64_t columns_wanted(int64_t rows) {
  return rows <= 512 ? kPanelColumns : rows <= 1024 ? kPanelColumns / 2 : kPanelColumns / 4;
}

template <class T>
void fill_in(PruneProblem<T>& problem) {
  const int64_t rows = int64_t{problem.groups} * problem.rows, last = problem.columns % problem.block_size;
  const auto count = [&](int64_t width) {
    return static_cast<int32_t>(count_to_prune(width * rows, problem.sparsity, problem.published_count != 0));
  };
  problem.panel_columns =
      static_cast<int32_t>(std::max<int64_t>(1, columns_wanted(rows) / problem.block_size) * problem.block_size);
  problem.count = count(problem.block_size);
  problem.last_count = last > 0 ? count(last) : 0;
}

}  // namespace

template <class T>
PrunePlan::PrunePlan(std::vector<PruneProblem<T>>& problems) {
  const auto count = static_cast<int32_t>(problems.size());
  for (PruneProblem<T>& problem : problems) {
    fill_in(problem);
    const int64_t scores = int64_t{problem.groups} * problem.rows * problem.block_size;
    if (scores * static_cast<int64_t>(sizeof(T)) <= kSharedScoreBytes) shared_scores = std::max(shared_scores, scores);
  }
  std::stable_sort(problems.begin(), problems.end(),
                   [](const PruneProblem<T>& a, const PruneProblem<T>& b) { return panels_of(a) > panels_of(b); });
  for (int64_t step = 0; count > 0 && step < panels_of(problems[0]); ++step) {
    int32_t with_panel = 0;
    while (with_panel < count && step < panels_of(problems[with_panel])) ++with_panel;
    active.push_back(with_panel);
    updates.add(with_panel, [&](int32_t i) {
      const PruneProblem<T>& problem = problems[i];
      const int64_t later = std::max<int64_t>(0, problem.columns - (step + 1) * problem.panel_columns);
      return problem.groups * ceil_div(later, kPanelColumns) * ceil_div(problem.rows, kPanelColumns);
    });
  }
}
template PrunePlan::PrunePlan(std::vector<PruneProblem<float>>&);
template PrunePlan::PrunePlan(std::vector<PruneProblem<double>>&);

}  // namespace spade_fast::cuda
