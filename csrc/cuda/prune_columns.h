// Column-wise OBS pruning of many layers at once on a GPU: what is launched, worked out on the host.
#pragma once

#include <cstdint>
#include <vector>

#include "ragged.h"

namespace spade_fast::cuda {

constexpr int kPanelColumns = 64;  // at most, unless a single block of columns has more; side of a tile of sums

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
  int32_t groups, rows, columns, block_size;  // a block has at most all columns
  int32_t published_count;
  double sparsity;
  // Filled in by the plan:
  int32_t panel_columns;      // whole blocks
  int32_t count, last_count;  // weights to prune of a whole block, and of the last one if it is smaller
};

// Launches that prune layers, which are brought into order: those with the most panels first. Panel t of all layers is
// pruned in step t.
struct PrunePlan {
  RaggedGrids updates;          // by step: tiles of the sums of all later columns
  std::vector<int32_t> active;  // by step: layers
  int64_t shared_scores = 0;    // for which there is shared memory: layers with more keep theirs in `scores`

  template <class T>
  explicit PrunePlan(std::vector<PruneProblem<T>>& problems);
};

// Implemented in prune_columns.cu: queues everything on the CUDA stream. `updates` is the plan's table in device
// memory.
template <class T>
void prune_problems(const PruneProblem<T>* problems, const int32_t* updates, const PrunePlan& plan, void* stream);

}  // namespace spade_fast::cuda
