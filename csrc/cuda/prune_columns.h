// Column-wise OBS pruning of many layers at once on a GPU: what is launched, worked out on the host.
#pragma once

#include <cstdint>
#include <vector>

#include "ragged.h"

namespace spade_fast::cuda {

constexpr int kPanelColumns = 64;  // at most, unless a single block of columns has more

// One layer, all in device memory, transposed so that a column of all rows is contiguous.
template <class T>
struct PruneProblem {
  const T* factor;  // [groups, columns, columns]
  T* weight;        // [groups, columns, rows]: dense before a column's turn, sparse after it
  T* delta;         // [groups, columns, rows]: dense - sparse, for finished columns
  T* sums;          // [groups, columns, rows]: sum over finished columns j of M_ij delta_j; zero at first
  T* change;        // [block_size, groups * rows], scratch
  T* scores;        // [block_size, groups * rows], scratch
  bool* kept;       // [groups, columns, rows]
  double* loss;     // zero at first
  int32_t groups, rows, columns, block_size, panel_columns;
  int32_t count, last_count;  // weights to prune of a whole block, and of the last one
  int32_t published_count;
};

struct PruneShape {
  int64_t groups, rows, columns, block_size;

  // Columns of a panel: whole blocks.
  int64_t panel_columns() const;
  int64_t panels() const;
};

// Launches that prune layers of these shapes, the number of whose panels does not ascend. Panel t of all layers is
// pruned in step t.
struct PrunePlan {
  RaggedGrids updates;          // by step: tiles of the sums of all later columns
  std::vector<int32_t> active;  // by step: layers
  int64_t shared_scores;        // for which there is shared memory: layers with more keep theirs in `scores`

  PrunePlan(const std::vector<PruneShape>& shapes, int64_t element_bytes);
};

// Implemented in prune_columns.cu: queues everything on the CUDA stream. `updates` is the plan's table in device
// memory.
template <class T>
void prune_problems(const PruneProblem<T>* problems, const int32_t* updates, const PrunePlan& plan, void* stream);

}  // namespace spade_fast::cuda
