#include <algorithm>

#include "../ceil_div.h"
#include "factor.h"

namespace spade_fast::cuda {

template <class T>
FactorPlan::FactorPlan(std::vector<FactorMatrix<T>>& matrices) {
  std::stable_sort(matrices.begin(), matrices.end(),
                   [](const FactorMatrix<T>& a, const FactorMatrix<T>& b) { return a.size > b.size; });
  const auto count = static_cast<int32_t>(matrices.size());
  const auto blocks = [&](int32_t i) { return ceil_div(matrices[i].size, kFactorBlock); };
  strips.add(count, blocks);
  for (int64_t step = 0; count > 0 && step < blocks(0); ++step) {
    // Blocks before the one that is finished.
    const auto left = [&](int32_t i) { return blocks(i) - 1 - step; };
    int32_t with_block = 0, with_left = 0;
    while (with_block < count && left(with_block) >= 0) ++with_block;
    while (with_left < count && left(with_left) > 0) ++with_left;
    active.push_back(with_block);
    rows.add(with_left, [&](int32_t i) { return ceil_div(left(i) * kFactorBlock, kFactorStrip); });
    updates.add(with_left, [&](int32_t i) { return left(i) * (left(i) + 1) / 2; });
  }
}
template FactorPlan::FactorPlan(std::vector<FactorMatrix<float>>&);
template FactorPlan::FactorPlan(std::vector<FactorMatrix<double>>&);

}  // namespace spade_fast::cuda
