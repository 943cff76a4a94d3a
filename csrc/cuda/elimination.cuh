// Optimal brain compression (OBC) of every row of many layers by itself. Of a row's current inverse Hessian A and
// weights w, the block b of columns goes that costs least,
//
//     score_b = w_b^T (A_bb)^-1 w_b,   loss = score_b / 2,   A_bb = L L^T,   V = L^-1 A_b:,   y = L^-1 w_b,
//     w -= y^T V,   A -= V^T V,
//
// and columns b of what is left are no more (Frantar et al. 2022, algorithm 1 and section 4). A is not rewritten at
// every step: a row has its matrix M, at first the layer's inverse, the vectors V since then, A = M - V^T V, and A's
// diagonal blocks, of which the scores are made. When there are `depth` vectors, they are folded into M. What is left
// stays without gaps: the last block takes the place of the one that goes. Names are the blocks' original positions.
//
//   eliminate   A block of threads owns a row at a time, from its first step to its last, and takes the next one of all
//               layers' when it is done; a thread owns every so-many-th column. In a fold, groups of threads own a tile
//               of M each, 64 x 64, and the block of threads a square of them.
// Grid: EliminationPlan::blocks, blocks of kEliminationThreads; shared memory: elimination_shared_bytes. M has its lower
// triangle alone, in tiles one behind the other (elimination_layout, for what else is in a workspace).
// Everything is float or double, as the layer is. Which block of threads has a row changes nothing in it, and whatever
// is added up, is in one order: results are deterministic, equal scores go by the lowest name. The host guarantees
// workspaces for the largest row, rows of the largest layers first, whole blocks, and at most kMostEliminated columns
// in one.
//
// For a row of d columns, pruned S at a time, folds are d^3 / 6 multiplications with additions, d^3 / (3 depth) numbers
// read and written; steps d^2 depth / 4 and d^2 depth / (4 S). For all of ResNet-50 in float32 that is 35 * 10^12 and
// 3.5 * 10^12 bytes, at best 1.2 s of an H100's arithmetic beside 1.0 s of its memory.
#pragma once

#include <cmath>

#include "device.cuh"
#include "elimination.h"
#include "tile.cuh"

namespace spade_fast::cuda {

constexpr int kEliminationThreads = 256;
constexpr int kEliminationWarps = kEliminationThreads / kWarp;
static_assert(kEliminationTile == kBlock, "a row's matrix is updated by tiles of kBlock");

constexpr int kFoldStage = 32;  // vectors that are multiplied while the next ones arrive
static_assert(kFoldStage % kDepth == 0 && kBlock % kFoldStage == 0, "stages are multiplied in whole, and fill a block");
template <class T>
constexpr int kFoldGroups = kEliminationThreads / BlockTile<T>::kThreads;
template <class T>
constexpr int kFoldSide = kFoldGroups<T> == 4 ? 2 : 1;  // of the square of tiles, in tiles
static_assert(kFoldSide<float> * kFoldSide<float> == kFoldGroups<float> &&
                  kFoldSide<double> * kFoldSide<double> == kFoldGroups<double>,
              "every group has a tile");
template <class T>
constexpr int kFoldOperand = kFoldStage * BlockTile<T>::kStride;  // numbers of one tile's side in a stage

constexpr int kPivotRows = 9;  // of a wide block, that are made at once: those of a 3 x 3 kernel
// Rows of a pivot in shared memory, in whole vectors.
template <class T, int kRows>
constexpr int kPivotStride = kRows == 1 ? 1 : (kRows + Vector<T>::kLanes - 1) / Vector<T>::kLanes * Vector<T>::kLanes;

constexpr int kNoName = std::numeric_limits<int>::max();
template <class T>
constexpr T kNoLoss = std::numeric_limits<T>::quiet_NaN();

constexpr int kMostAhead = 6;  // vectors that a step loads at once

// A block that may go next.
template <class T>
struct Candidate {
  T score;
  int name, place;

  __device__ __forceinline__ void keep_better(const Candidate& other) {
    if (other.score < score || (other.score == score && other.name < name)) *this = other;
  }
};

// One row, in the workspace of its block of threads.
template <class T>
struct EliminationRow {
  const T *inverse, *dense;  // of its group, and the weights it began with
  int32_t* order;
  T* losses;
  T* matrix;   // M
  T* vectors;  // V [depth, stride]
  T* weight;   // w [columns]
  T* halves;   // y [columns] of every block, were it the next
  T* blocks;   // [block_size, stride]: A's diagonal blocks, of column i the entry [c][i] with its block's column c
  T* lower;    // [block_size, stride]: their factors L in the same way
  int* names;  // [blocks]
  int64_t stride;
  int columns, size, depth;  // at first; of a block
  T least;
};

// Before a step: columns that are left, and vectors since the last fold.
template <class T>
__device__ __forceinline__ int columns_left(const EliminationRow<T>& row, int step) {
  return row.columns - step * row.size;
}
template <class T>
__device__ __forceinline__ int vectors_known(const EliminationRow<T>& row, int step) {
  return step % (row.depth / row.size) * row.size;
}

// Where M has an element, or the one across the diagonal.
__device__ __forceinline__ int64_t place_in_tiles(int one, int other) {
  const auto row = static_cast<unsigned>(max(one, other)), column = static_cast<unsigned>(min(one, other));
  const uint64_t tile = uint64_t{row / kBlock} * (row / kBlock + 1) / 2 + column / kBlock;
  return static_cast<int64_t>(tile * (kBlock * kBlock) + row % kBlock * kBlock + column % kBlock);
}

// What the threads share beside the operands of a fold, in whose place a step has its coefficients. The row lies here,
// not in registers, of which there are none to spare: every function looks up what it needs. For the same reason the
// larger ones are called, not inlined: the kernel would hold from step to step what they can work out again.
template <class T>
struct alignas(16) EliminationShared {
  EliminationRow<T> row;
  Candidate<T> warps[kEliminationWarps];
  T triangle[kPivotRows][kPivotRows];  // of L, reciprocals on the diagonal
  T halves[kPivotRows];                // of y
  int known, tiles;                    // of a fold
  int taken;
};

template <class T>
__device__ __forceinline__ EliminationShared<T>& elimination_shared() {
  return *shared_memory<EliminationShared<T>>();
}
template <class T>
__device__ __forceinline__ T* elimination_operands() {
  return reinterpret_cast<T*>(&elimination_shared<T>() + 1);
}

// Where a stage of a fold has its operands: stages take turns.
template <class T>
__device__ __forceinline__ T* fold_operands(int stage) {
  return elimination_operands<T>() + stage % 2 * (2 * kFoldSide<T> * kFoldOperand<T>);
}

template <class T>
__device__ __forceinline__ EliminationRow<T> own_row() {
  EliminationRow<T> row = elimination_shared<T>().row;
  row.inverse = in_global_memory(row.inverse);
  row.dense = in_global_memory(row.dense);
  row.order = in_global_memory(row.order);
  row.losses = in_global_memory(row.losses);
  row.matrix = in_global_memory(row.matrix);
  row.vectors = in_global_memory(row.vectors);
  row.weight = in_global_memory(row.weight);
  row.halves = in_global_memory(row.halves);
  row.blocks = in_global_memory(row.blocks);
  row.lower = in_global_memory(row.lower);
  row.names = in_global_memory(row.names);
  return row;
}

template <class T>
constexpr size_t kFoldBytes = size_t{2} * 2 * kFoldSide<T> * kFoldOperand<T> * sizeof(T);

template <class T>
constexpr size_t elimination_shared_bytes(int64_t depth) {
  const size_t coefficients = sizeof(T) * kPivotStride<T, kPivotRows> * (depth + kMostAhead);
  return sizeof(EliminationShared<T>) + (coefficients > kFoldBytes<T> ? coefficients : kFoldBytes<T>);
}
static_assert(elimination_shared_bytes<float>(256) <= (size_t{112} << 10) &&
                  elimination_shared_bytes<double>(256) <= (size_t{112} << 10),
              "two blocks of threads on a multiprocessor");
static_assert(elimination_shared_bytes<double>(kMostEliminated) <= (size_t{96} << 10), "what every GPU has");

// Begins a row: its matrix is the group's inverse.
template <class T>
__device__ __noinline__ void begin_row() {
  const EliminationRow<T> row = own_row<T>();
  const int columns = row.columns, side = (columns + kBlock - 1) / kBlock;
  T* tile = row.matrix;
  for (int tile_row = 0; tile_row < side; ++tile_row) {
    for (int tile_column = 0; tile_column <= tile_row; ++tile_column, tile += kBlock * kBlock) {
      for (int i = threadIdx.x; i < kBlock * kBlock; i += kEliminationThreads) {
        const int r = tile_row * kBlock + i / kBlock, c = tile_column * kBlock + i % kBlock;
        if (r < columns && c <= r) tile[i] = row.inverse[int64_t{r} * columns + c];
      }
    }
  }
  for (int i = threadIdx.x; i < columns; i += kEliminationThreads) {
    row.weight[i] = row.dense[i];
    const int within = i % row.size;
    for (int c = 0; c <= within; ++c) {
      row.blocks[c * row.stride + i] = row.inverse[int64_t{i} * columns + i - within + c];
    }
  }
  for (int b = threadIdx.x; b < columns / row.size; b += kEliminationThreads) row.names[b] = b;
}

// Finds the best of all threads' candidates. To be called by all threads; a barrier must come before the next call.
template <class T>
__device__ __forceinline__ void choose(Candidate<T> best) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    Candidate<T> other;
    other.score = __shfl_xor_sync(kAllLanes, best.score, distance);
    other.name = __shfl_xor_sync(kAllLanes, best.name, distance);
    other.place = __shfl_xor_sync(kAllLanes, best.place, distance);
    best.keep_better(other);
  }
  if (threadIdx.x % kWarp == 0) elimination_shared<T>().warps[threadIdx.x / kWarp] = best;
  __syncthreads();
}

// What was found, until it is looked for again: shared memory keeps it, not registers.
template <class T>
__device__ __forceinline__ Candidate<T> chosen() {
  const EliminationShared<T>& shared = elimination_shared<T>();
  Candidate<T> best = shared.warps[0];
#pragma unroll
  for (int warp = 1; warp < kEliminationWarps; ++warp) best.keep_better(shared.warps[warp]);
  return best;
}

// None yet: a score that is not finite is no better, NaN neither.
template <class T>
__device__ __forceinline__ Candidate<T> no_candidate() {
  return {T(HUGE_VAL), kNoName, 0};
}

// Chooses among blocks of a single column.
template <class T>
__device__ __noinline__ void score_columns() {
  const EliminationRow<T> row = own_row<T>();
  Candidate<T> best = no_candidate<T>();
  for (int i = threadIdx.x; i < row.columns; i += kEliminationThreads) {
    best.keep_better({row.weight[i] * row.weight[i] / row.blocks[i], i, i});
  }
  choose(best);
}

// Factors every diagonal block, one column of all of them after the other, makes their y, and chooses among them.
template <class T>
__device__ __noinline__ void score_blocks(int step) {
  const EliminationRow<T> row = own_row<T>();
  const int size = row.size, left = columns_left(row, step);
  for (int c = 0; c < size; ++c) {
    __syncthreads();
    for (int i = threadIdx.x; i < left; i += kEliminationThreads) {
      const int within = i % size, pivot = i - within + c;
      if (within < c) continue;
      // The diagonal's own thread has nothing else to make in this column: y is as one more row of the block.
      const bool diagonal = within == c;
      const T* factors = diagonal ? row.halves + i - within : row.lower + i;
      const int64_t stride = diagonal ? 1 : row.stride;
      T square = row.blocks[c * row.stride + pivot];
      T value = diagonal ? row.weight[i] : row.blocks[c * row.stride + i];
#pragma unroll 4
      for (int q = 0; q < c; ++q) {
        const T factor = row.lower[q * row.stride + pivot];
        square -= factor * factor;
        value -= factor * factors[q * stride];
      }
      const T root = sqrt(square);  // NaN is no candidate
      value /= root;
      if (diagonal) row.halves[i] = value;
      row.lower[c * row.stride + i] = diagonal ? root : value;
    }
  }
  __syncthreads();
  Candidate<T> best = no_candidate<T>();
  for (int b = threadIdx.x; b < left / size; b += kEliminationThreads) {
    T score = 0;
    for (int c = 0; c < size; ++c) score += row.halves[b * size + c] * row.halves[b * size + c];
    best.keep_better({score, row.names[b], b});
  }
  choose(best);
}

// Makes the vectors of rows [begin, begin + width) of the chosen block, width <= kRows, and takes them from the weights.
// Single columns are scored at once, and the next one chosen.
template <class T, int kRows>
__device__ __noinline__ void eliminate_rows(int step, int begin, int width) {
  EliminationShared<T>& shared = elimination_shared<T>();
  const EliminationRow<T> row = own_row<T>();
  constexpr int kStride = kPivotStride<T, kRows>;
  constexpr int kOwn = kRows == 1 ? 4 : 8 / sizeof(T), kTogether = kRows == 1 ? kOwn : 1;  // columns of a thread
  constexpr int kAhead = kRows == 1 ? 4 : kMostAhead;                                      // vectors
  T* coefficients = elimination_operands<T>();                                             // [known, kStride], and some
  const int left = columns_left(row, step), before = vectors_known(row, step), known = before + begin;
  const int pivot = chosen<T>().place * row.size, last = left - row.size;
  const int first_row = pivot + begin, moved_row = last + begin;

  // The vectors' elements in the pivot's rows, zeros after them; of the block's own vectors they are those of L^T.
  for (int i = threadIdx.x; i < (known + kAhead - 1) / kAhead * kAhead * kStride; i += kEliminationThreads) {
    const int k = i / kStride, r = i % kStride;
    T value = 0;
    if (r < width && k < before) {
      T* vector = row.vectors + k * row.stride;
      value = vector[first_row + r];
      vector[first_row + r] = vector[moved_row + r];
    } else if (r < width && k < known) {
      value = row.lower[(k - before) * row.stride + first_row + r];
    }
    coefficients[i] = value;
  }
  if constexpr (kRows == 1) {
    if (threadIdx.x == 0) {
      const T root = sqrt(row.blocks[pivot]);
      shared.triangle[0][0] = 1 / root;
      shared.halves[0] = row.weight[pivot] / root;
    }
  } else {
    for (int i = threadIdx.x; i < kRows * kRows; i += kEliminationThreads) {
      const int r = i / kRows, q = i % kRows;
      T value = 0;
      if (r < width && q <= r) value = row.lower[(begin + q) * row.stride + first_row + r];
      shared.triangle[r][q] = r < width && q == r ? 1 / value : value;
      if (q == 0) shared.halves[r] = r < width ? row.halves[first_row + r] : T(0);
    }
  }
  __syncthreads();

  Candidate<T> best = no_candidate<T>();
  for (int begin_own = threadIdx.x; begin_own < left; begin_own += kOwn * kEliminationThreads) {
    int columns[kOwn];
    T values[kOwn][kRows];
#pragma unroll
    for (int some = 0; some < kOwn; some += kTogether) {  // all their loads before a store, which would hold them up
      T moved[kTogether][kRows];
#pragma unroll
      for (int own = some; own < some + kTogether; ++own) {
        columns[own] = min(begin_own + own * kEliminationThreads, left - 1);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          values[own][r] = r < width ? row.matrix[place_in_tiles(columns[own], first_row + r)] : T(0);
          moved[own - some][r] = r < width ? row.matrix[place_in_tiles(columns[own], moved_row + r)] : T(0);
        }
      }
#pragma unroll
      for (int own = some; own < some + kTogether; ++own) {
        const int i = begin_own + own * kEliminationThreads;
        if (i >= last || (i >= pivot && i < pivot + row.size) || pivot == last) continue;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if (r < width) row.matrix[place_in_tiles(i, first_row + r)] = moved[own - some][r];
        }
      }
    }
#pragma unroll 1
    for (int k = 0; k < known; k += kAhead) {
      T elements[kAhead][kOwn];  // all on their way before the first is needed
#pragma unroll
      for (int ahead = 0; ahead < kAhead; ++ahead) {
#pragma unroll
        for (int own = 0; own < kOwn; ++own) {
          elements[ahead][own] = k + ahead < known ? row.vectors[(k + ahead) * row.stride + columns[own]] : T(0);
        }
      }
#pragma unroll
      for (int ahead = 0; ahead < kAhead; ++ahead) {
        T factors[kStride];
        if constexpr (kRows == 1) {
          factors[0] = coefficients[k + ahead];
        } else {
#pragma unroll
          for (int v = 0; v < kStride; v += Vector<T>::kLanes) {
            const auto some = *reinterpret_cast<const Vector<T>*>(coefficients + (k + ahead) * kStride + v);
#pragma unroll
            for (int i = 0; i < Vector<T>::kLanes; ++i) factors[v + i] = some.lane[i];
          }
        }
#pragma unroll
        for (int own = 0; own < kOwn; ++own) {
#pragma unroll
          for (int r = 0; r < kRows; ++r) values[own][r] -= factors[r] * elements[ahead][own];
        }
      }
    }
#pragma unroll
    for (int own = 0; own < kOwn; ++own) {
      const int i = begin_own + own * kEliminationThreads;
      if (i >= left || (i >= pivot && i < pivot + row.size)) continue;
      const int target = i < last ? i : i - last + pivot;
      T change = 0;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        T value = values[own][r];
#pragma unroll
        for (int q = 0; q < r; ++q) value -= shared.triangle[r][q] * values[own][q];
        value *= shared.triangle[r][r];
        values[own][r] = value;
        change += shared.halves[r] * value;
        if (r < width) {
          row.vectors[(known + r) * row.stride + i] = value;  // where later rows of the pivot look for it
          if (target != i) row.vectors[(known + r) * row.stride + target] = value;
        }
      }
      const T weight = row.weight[begin == 0 ? i : target] - change;  // later rows find it moved
      row.weight[target] = weight;
      if constexpr (kRows == 1) {
        const T square = row.blocks[i] - values[own][0] * values[own][0];
        const int name = row.names[i];
        row.blocks[target] = square;
        if (target != i) row.names[target] = name;
        best.keep_better({weight * weight / square, name, target});
      }
    }
  }
  if constexpr (kRows == 1) choose(best);
}

// Takes the block's vectors, which are the last `size` ones, from the other diagonal blocks. The last block has already
// moved, but for what is changed here.
template <class T>
__device__ __noinline__ void update_blocks(int step) {
  const EliminationRow<T> row = own_row<T>();
  const int size = row.size, last = columns_left(row, step) - size, pivot = chosen<T>().place * size;
  const T* vectors = row.vectors + vectors_known(row, step) * row.stride;
  for (int i = threadIdx.x; i < last; i += kEliminationThreads) {
    const int within = i % size, first = i - within, source = first == pivot ? last + within : i;
    for (int c = 0; c <= within; ++c) {
      T value = row.blocks[c * row.stride + source];
#pragma unroll 4
      for (int r = 0; r < size; ++r) value -= vectors[r * row.stride + i] * vectors[r * row.stride + first + c];
      row.blocks[c * row.stride + i] = value;
    }
  }
  if (threadIdx.x == 0) row.names[pivot / size] = row.names[last / size];
}

// Starts copying kFoldStage vectors, zeros where there are no more, of two lists of kFoldSide tiles.
template <class T>
__device__ __forceinline__ void stage_fold(int stage, int tile_row, int tile_column) {
  using Tile = BlockTile<T>;
  constexpr int kLanes = Vector<T>::kLanes, kVectors = kBlock / kLanes, kRowsAtATime = kEliminationThreads / kVectors;
  static_assert(kFoldStage % kRowsAtATime == 0, "the threads copy whole vectors");
  const EliminationRow<T> row = own_row<T>();
  const int known = elimination_shared<T>().known;
  const int lane = threadIdx.x % kVectors * kLanes, first = threadIdx.x / kVectors;
  T* operands = fold_operands<T>(stage) + lane;
#pragma unroll 1  // or registers would be taken for all the addresses
  for (int list = 0; list < 2 * kFoldSide<T>; ++list) {
    const int tile = list < kFoldSide<T> ? tile_row + list : tile_column + list - kFoldSide<T>;
    const int64_t column = int64_t{tile} * kBlock + lane;
#pragma unroll
    for (int ahead = 0; ahead < kFoldStage; ahead += kRowsAtATime) {
      const int k = stage * kFoldStage + first + ahead;
      cp_async<16>(operands + list * kFoldOperand<T> + (first + ahead) * Tile::kStride,
                   row.vectors + k * row.stride + column, k < known && column < row.stride);
    }
  }
  cp_async_commit();
}

// M -= V^T V, if the step has filled up V. A tile takes most of the registers: the rest is looked up again and
// again.
template <class T>
__device__ __noinline__ void fold(int step) {
  using Tile = BlockTile<T>;
  constexpr int kSide = kFoldSide<T>;
  EliminationShared<T>& shared = elimination_shared<T>();
  if (vectors_known(shared.row, step + 1) > 0) return;
  if (threadIdx.x == 0) {
    shared.known = vectors_known(shared.row, step) + shared.row.size;
    shared.tiles = (columns_left(shared.row, step + 1) + kBlock - 1) / kBlock;
  }
  __syncthreads();  // the last vectors are written too, and the coefficients read
  const int group_row = threadIdx.x / Tile::kThreads / kSide, group_column = threadIdx.x / Tile::kThreads % kSide;
  const auto own_tile = [&](int tile_row, int tile_column) {
    return own_row<T>().matrix + place_in_tiles((tile_row + group_row) * kBlock, (tile_column + group_column) * kBlock);
  };
  for (int tile_row = 0; tile_row < shared.tiles; tile_row += kSide) {
    for (int tile_column = 0; tile_column <= tile_row; tile_column += kSide) {
      const bool owns =
          tile_row + group_row < shared.tiles && tile_column + group_column <= tile_row + group_row;  // a whole group
      Tile result(threadIdx.x % Tile::kThreads);
      stage_fold<T>(0, tile_row, tile_column);
      if (owns) {  // -M, on which the products are added: it arrives together with the vectors
        const T* tile = own_tile(tile_row, tile_column);
        result.change_vectors([&](int m, int n, Vector<T>& values) {
          values = *reinterpret_cast<const Vector<T>*>(tile + m * kBlock + n);
#pragma unroll
          for (int i = 0; i < Vector<T>::kLanes; ++i) values.lane[i] = -values.lane[i];
        });
      }
      for (int stage = 0; stage * kFoldStage < shared.known; ++stage) {
        if ((stage + 1) * kFoldStage < shared.known) {
          stage_fold<T>(stage + 1, tile_row, tile_column);
          cp_async_wait<1>();
        } else {
          cp_async_wait<0>();
        }
        __syncthreads();
        if (owns) {
          const T* operands = fold_operands<T>(stage);
          multiply_block(result, operands + group_row * kFoldOperand<T>,
                         operands + (kSide + group_column) * kFoldOperand<T>,
                         min(shared.known - stage * kFoldStage, kFoldStage));
        }
        __syncthreads();
      }
      if (owns) {
        T* tile = own_tile(tile_row, tile_column);
        result.change_vectors([&](int m, int n, Vector<T>& values) {
#pragma unroll
          for (int i = 0; i < Vector<T>::kLanes; ++i) values.lane[i] = -values.lane[i];
          *reinterpret_cast<Vector<T>*>(tile + m * kBlock + n) = values;
        });
      }
    }
  }
}

// Whether the chosen block can go: pivots that stand out of rounding noise, and a loss that is a number. The same in all
// threads.
template <class T>
__device__ __forceinline__ bool is_sound(const EliminationRow<T>& row, const Candidate<T>& next) {
  const T loss = next.score;
  const bool finite = loss < T(HUGE_VAL) && loss > -T(HUGE_VAL);
  if (!finite) return false;  // perhaps none was chosen
  bool sound = true;
#pragma unroll 1
  for (int c = 0; c < row.size; ++c) {
    const int i = next.place * row.size + c;
    const T root = row.size == 1 ? T(0) : row.lower[c * row.stride + i];
    const T square = row.size == 1 ? row.blocks[i] : root * root;
    sound = sound && square > row.least * row.inverse[(int64_t{next.name} * row.size + c) * (row.columns + 1)];
  }
  return sound;
}

// Writes down the chosen block, and whether there is another step. From one that is not sound on, the order is -1 and
// the losses are NaN.
template <class T>
__device__ __noinline__ bool record_step(int step) {
  const EliminationRow<T> row = own_row<T>();
  const Candidate<T> next = chosen<T>();
  const int steps = row.columns / row.size;
  if (!is_sound(row, next)) {
    for (int i = step + threadIdx.x; i < steps; i += kEliminationThreads) {
      row.order[i] = -1;
      row.losses[i] = kNoLoss<T>;
    }
    return false;
  }
  if (threadIdx.x == 0) {
    row.order[step] = next.name;
    row.losses[step] = next.score / 2;
  }
  return step + 1 < steps;
}

// Prunes the row to its end.
template <class T>
__device__ __forceinline__ void eliminate_row() {
  const EliminationRow<T>& row = elimination_shared<T>().row;
  begin_row<T>();
  __syncthreads();
  if (row.size == 1) {
    score_columns<T>();
  } else {
    score_blocks<T>(0);
  }
  for (int step = 0; record_step<T>(step); ++step) {
    if (row.size == 1) {
      eliminate_rows<T, 1>(step, 0, 1);
      fold<T>(step);
    } else {
      for (int begin = 0; begin < row.size; begin += kPivotRows) {
        eliminate_rows<T, kPivotRows>(step, begin, min(row.size - begin, kPivotRows));
        __syncthreads();
      }
      update_blocks<T>(step);
      fold<T>(step);
      score_blocks<T>(step + 1);
    }
  }
}

// A block of threads owns the row of its own number, then those that nobody has taken yet.
template <class T>
__global__ void __launch_bounds__(kEliminationThreads, 2)
    eliminate(const EliminationProblem<T>* problems, const int32_t* first, int count, int32_t* taken, T* workspaces,
              int64_t workspace) {
  EliminationShared<T>& shared = elimination_shared<T>();
  T* numbers = workspaces + int64_t{blockIdx.x} * workspace;
  for (int item = blockIdx.x; item < first[count];) {
    const int index = find_item(first, count, item);
    if (threadIdx.x == 0) {
      const EliminationProblem<T> problem = problems[index];
      const EliminationLayout layout = elimination_layout(problem.columns, problem.block_size, problem.depth);
      const int64_t place = item - first[index], group = place / problem.rows;
      const int64_t steps = problem.columns / problem.block_size;
      EliminationRow<T>& row = shared.row;
      row.inverse = problem.inverse + group * problem.columns * problem.columns;
      row.dense = problem.weight + place * problem.columns;
      row.order = problem.order + place * steps;
      row.losses = problem.losses + place * steps;
      row.matrix = numbers;
      row.vectors = numbers + layout.vectors;
      row.weight = numbers + layout.weight;
      row.halves = numbers + layout.halves;
      row.blocks = numbers + layout.blocks;
      row.lower = numbers + layout.lower;
      row.names = reinterpret_cast<int*>(numbers + layout.names);
      row.stride = layout.stride;
      row.columns = problem.columns;
      row.size = problem.block_size;
      row.depth = problem.depth;
      row.least = problem.least;
    }
    __syncthreads();
    eliminate_row<T>();
    if (threadIdx.x == 0) shared.taken = atomicAdd(taken, 1);
    __syncthreads();
    item = static_cast<int>(gridDim.x) + shared.taken;
  }
}

template <class T>
void run_eliminate(const EliminationWorkspace<T>& workspace, const EliminationPlan& plan, Stream stream) {
  const RaggedGrids::Grid& grid = plan.rows.grids[0];
  launch(eliminate<T>, dim3(workspace.blocks), kEliminationThreads, elimination_shared_bytes<T>(plan.depth), stream,
         workspace.problems, workspace.rows + grid.offset, grid.items, workspace.taken, workspace.numbers,
         plan.workspace);
}

}  // namespace spade_fast::cuda
