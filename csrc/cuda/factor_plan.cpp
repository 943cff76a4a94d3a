#include "../ceil_div.h"
#include "factor.h"

namespace spade_fast::cuda {

FactorPlan::FactorPlan(const std::vector<int64_t>& sizes) {
  const auto count = static_cast<int32_t>(sizes.size());
  const auto blocks = [&](int32_t i) { return ceil_div(sizes[i], kFactorBlock); };
  strips.add(count, blocks);
  for (int64_t step = 0; count > 0 && step < blocks(0); ++step) {
    // Blocks left of the one that is finished.
    const auto left = [&](int32_t i) { return blocks(i) - 1 - step; };
    int32_t with_block = 0, with_left = 0;
    while (with_block < count && left(with_block) >= 0) ++with_block;
    while (with_left < count && left(with_left) > 0) ++with_left;
    active.push_back(with_block);
    rows.add(with_left, [&](int32_t i) { return ceil_div(left(i) * kFactorBlock, kFactorStrip); });
    updates.add(with_left, [&](int32_t i) { return left(i) * (left(i) + 1) / 2; });
  }
}

}  // namespace spade_fast::cuda
