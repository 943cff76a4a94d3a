// Grids over items of unequal size: item i has the blocks [first[i], first[i + 1]).
#pragma once

#include <cstdint>
#include <vector>

#include "divisor.h"

namespace spade_fast::cuda {

// The grids of many launches, whose tables lie one behind the other in `first`.
struct RaggedGrids {
  struct Grid {
    int64_t offset;  // of its table in `first`
    int32_t items, blocks;
  };
  std::vector<int32_t> first;
  std::vector<Grid> grids;

  // A grid of so many blocks for each item.
  template <class Blocks>
  void add(int32_t items, const Blocks& blocks) {
    Grid grid{static_cast<int64_t>(first.size()), items, 0};
    for (int32_t i = 0; i < items; ++i) {
      first.push_back(grid.blocks);
      grid.blocks += static_cast<int32_t>(blocks(i));
    }
    first.push_back(grid.blocks);
    grids.push_back(grid);
  }
};

// The item that a block belongs to.
SPADE_FAST_HOST_DEVICE int find_item(const int32_t* first, int items, int block) {
  int low = 0, high = items - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (first[middle] <= block) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

}  // namespace spade_fast::cuda
