// Optimal brain compression of many layers at once on a GPU: what is launched, worked out on the host.
#pragma once

#include <cstdint>
#include <vector>

#include "../host_device.h"
#include "ragged.h"

namespace spade_fast::cuda {

constexpr int kEliminationTile = 64;       // side of a tile of a row's matrix
constexpr int64_t kMostEliminated = 1024;  // columns of a block that is pruned at once, and pivot vectors kept

// One layer, in device memory.
template <class T>
struct EliminationProblem {
  const T* weight;   // [groups, rows, columns]
  const T* inverse;  // [groups, columns, columns], of which the lower triangle is read
  int32_t* order;    // [groups, rows, columns / block_size]
  T* losses;         // the same
  int32_t groups, rows, columns, block_size;
  // Filled in by the plan:
  int32_t depth;  // pivot vectors that are kept before they are folded into the matrix, at most
  T least;        // share of the inverse's diagonal above which a pivot is more than rounding noise
};

// Where the parts of a row's workspace begin, in numbers of the layer's type; every one at a whole vector.
struct EliminationLayout {
  int64_t stride;   // of a pivot vector: columns, rounded up to whole tiles
  int64_t vectors;  // [depth, stride]
  int64_t weight;   // [stride]
  int64_t halves;   // [stride]
  int64_t blocks;   // [block_size, stride]
  int64_t lower;    // [block_size, stride]
  int64_t names;    // int32 [stride]
  int64_t end;
};

// Tiles of a lower triangle, in rows of tiles.
SPADE_FAST_HOST_DEVICE int64_t elimination_tiles(int64_t side) {
  return side * (side + 1) / 2;
}

SPADE_FAST_HOST_DEVICE EliminationLayout elimination_layout(int64_t columns, int64_t block_size, int64_t depth) {
  const int64_t side = (columns + kEliminationTile - 1) / kEliminationTile;
  EliminationLayout layout{};
  layout.stride = side * kEliminationTile;
  layout.vectors = elimination_tiles(side) * kEliminationTile * kEliminationTile;
  layout.weight = layout.vectors + depth * layout.stride;
  layout.halves = layout.weight + layout.stride;
  layout.blocks = layout.halves + layout.stride;
  layout.lower = layout.blocks + block_size * layout.stride;
  layout.names = layout.lower + block_size * layout.stride;
  layout.end = layout.names + layout.stride;
  return layout;
}

// The one launch for all layers, which are brought into order: those with the most columns first.
struct EliminationPlan {
  RaggedGrids rows;       // one grid: rows of every layer
  int64_t workspace = 0;  // numbers that a block of threads needs, whichever row it owns
  int32_t depth = 0;      // the largest of all layers

  template <class T>
  explicit EliminationPlan(std::vector<EliminationProblem<T>>& problems);

  // Blocks of threads to launch, one at least: no more than are at work at a time, and than have workspaces in so many
  // bytes.
  int64_t blocks(int64_t multiprocessors, int64_t bytes, int64_t bytes_of_number) const;
};

// Device memory that the launch needs beside the layers' own.
template <class T>
struct EliminationWorkspace {
  const EliminationProblem<T>* problems;
  const int32_t* rows;  // the plan's table
  T* numbers;           // [blocks, plan.workspace], aligned to 16 bytes
  int32_t* taken;       // rows that blocks of threads took beside their first ones, zero at first
  int32_t blocks;
};

// Implemented in elimination.cu: queues everything on the CUDA stream.
template <class T>
void eliminate_problems(const EliminationWorkspace<T>& workspace, const EliminationPlan& plan, void* stream);

}  // namespace spade_fast::cuda
