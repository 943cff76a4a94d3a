#include <algorithm>

#include "../ceil_div.h"
#include "prune_columns.h"

namespace spade_fast::cuda {
namespace {

constexpr int64_t kSharedScoreBytes = int64_t{64} << 10;

}  // namespace

int64_t PruneShape::panel_columns() const {
  return std::max<int64_t>(block_size, kPanelColumns / block_size * block_size);
}

int64_t PruneShape::panels() const {
  return ceil_div(columns, panel_columns());
}

PrunePlan::PrunePlan(const std::vector<PruneShape>& shapes, int64_t element_bytes) : shared_scores(0) {
  const auto count = static_cast<int32_t>(shapes.size());
  for (const PruneShape& shape : shapes) {
    const int64_t scores = shape.groups * shape.rows * shape.block_size;
    if (scores * element_bytes <= kSharedScoreBytes) shared_scores = std::max(shared_scores, scores);
  }
  for (int64_t step = 0; count > 0 && step < shapes[0].panels(); ++step) {
    int32_t with_panel = 0;
    while (with_panel < count && step < shapes[with_panel].panels()) ++with_panel;
    active.push_back(with_panel);
    updates.add(with_panel, [&](int32_t i) {
      const PruneShape& shape = shapes[i];
      const int64_t later = std::max<int64_t>(0, shape.columns - (step + 1) * shape.panel_columns());
      return shape.groups * ceil_div(later, kPanelColumns) * ceil_div(shape.rows, kPanelColumns);
    });
  }
}

}  // namespace spade_fast::cuda
