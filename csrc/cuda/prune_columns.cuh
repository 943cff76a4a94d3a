// Column-wise optimal brain surgeon (FastSPADE) on many layers at once. With H = M^T M, M lower triangular, and
// delta = w - q for finished columns,
//
//     c_i = w_i + (1 / M_ii) sum_{j < i} M_ij delta_j,     score_i = |c_i M_ii|,
//
// q_i = 0 where pruned and c_i where kept, and pruning costs score_i^2 / 2 (SparseGPT, eq. 4 and 5; SPADE, sec. 3).
// Inside one block of columns the scores count every earlier column of the block as kept.
//
// Columns go in panels, each in two launches for all layers:
//   prune_panel   A block of threads owns one layer, a thread every so-many-th row of it; the panel's part of M lies in
//                 shared memory, where it fits. One threshold for all rows of a block of columns is found by radix
//                 selection on the bits of the scores, a histogram of eight bits at a time. Grid: layers that have
//                 this panel.
//   prune_update  Sums of all later columns += M[later, panel] delta[panel]. A block of threads owns a tile, [columns,
//                 rows]. Grid: PrunePlan::updates.
// Weights, sums and scores are float or double, the loss double. What a row adds up, it adds up in one order, and
// selection counts whole numbers: results are deterministic. The host guarantees that layers with the most panels come
// first (PrunePlan), and that a layer has fewer than 2^31 weights.
#pragma once

#include <cmath>

#include "device.cuh"
#include "prune_columns.h"
#include "reduce.cuh"
#include "tile.cuh"

namespace spade_fast::cuda {

constexpr int kPruneThreads = 512;
static_assert(kPanelColumns == kBlock, "sums are updated by tiles of kPanelColumns");
constexpr int kPruneWarps = kPruneThreads / kWarp;
constexpr int kFactorStride = kPanelColumns + 1;  // of the panel's part of M in shared memory

// Bits of scores, none of them negative: in the order of the scores, the sign bit shifted out.
__device__ __forceinline__ uint32_t key_of(float score) {
  return __float_as_uint(score) << 1;
}
__device__ __forceinline__ uint64_t key_of(double score) {
  return static_cast<uint64_t>(__double_as_longlong(score)) << 1;
}

template <class T>
using KeyOf = decltype(key_of(T(0)));

// Scores with lower keys go, and those of this key while their index, row * width + column, is below `index`.
template <class T>
struct Threshold {
  KeyOf<T> key;
  int64_t index;

  __device__ __forceinline__ bool prunes(T score, int64_t at) const {
    const KeyOf<T> own = key_of(score);
    return own < key || (own == key && at < index);
  }
};

// What the threads of prune_panel share beside the factor and the scores.
struct alignas(16) PruneShared {
  uint32_t histogram[256];
  uint32_t warps[kPruneWarps];
  uint32_t digit, below, inside;  // what find_digit found
  int64_t index;
  double losses[kPruneWarps];
};

// The bin of the histogram that holds its wanted-th entry, how many entries lie below it and in it. To be called by all
// threads; a barrier must come before the histogram is filled anew.
__device__ __forceinline__ void find_digit(PruneShared& shared, uint32_t wanted) {
  constexpr int kBins = 256 / kWarp;
  if (threadIdx.x < kWarp) {
    uint32_t counts[kBins], total = 0;
#pragma unroll
    for (int i = 0; i < kBins; ++i) total += counts[i] = shared.histogram[threadIdx.x * kBins + i];
    uint32_t up_to = total;  // of all lanes up to this one
#pragma unroll
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const uint32_t before = __shfl_up_sync(kAllLanes, up_to, distance);
      if (static_cast<int>(threadIdx.x) >= distance) up_to += before;
    }
    uint32_t below = up_to - total;
#pragma unroll
    for (int i = 0; i < kBins; ++i) {
      if (below < wanted && wanted <= below + counts[i]) {  // one bin of one lane
        shared.digit = threadIdx.x * kBins + i;
        shared.below = below;
        shared.inside = counts[i];
      }
      below += counts[i];
    }
  }
  __syncthreads();
}

// Of numbers that the threads own, the sum over all threads before this one. To be called by all threads; a barrier
// must come before the next call.
__device__ __forceinline__ uint32_t sum_before(PruneShared& shared, uint32_t own, uint32_t& total) {
  const int lane = threadIdx.x % kWarp;
  uint32_t up_to = own;
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const uint32_t before = __shfl_up_sync(kAllLanes, up_to, distance);
    if (lane >= distance) up_to += before;
  }
  if (lane == kWarp - 1) shared.warps[threadIdx.x / kWarp] = up_to;
  __syncthreads();
  uint32_t before = up_to - own;
  total = 0;
  for (int warp = 0; warp < kPruneWarps; ++warp) {
    if (warp < static_cast<int>(threadIdx.x) / kWarp) before += shared.warps[warp];
    total += shared.warps[warp];
  }
  return before;
}

// The index below which equal scores go, so that `going` of them do: rows first, then the block's columns.
template <class T>
__device__ int64_t index_of_tie(PruneShared& shared, const T* scores, int rows, int width, KeyOf<T> key,
                                uint32_t going) {
  for (int row0 = 0; row0 < rows; row0 += kPruneThreads) {
    const int row = row0 + threadIdx.x;
    uint32_t own = 0, total;
    for (int c = 0; row < rows && c < width; ++c) own += key_of(scores[int64_t{c} * rows + row]) == key;
    uint32_t before = sum_before(shared, own, total);
    if (before < going && going <= before + own) {  // one thread of all
      int c = 0;
      for (;; ++c) {
        before += key_of(scores[int64_t{c} * rows + row]) == key;
        if (before == going) break;
      }
      shared.index = int64_t{row} * width + c + 1;
    }
    __syncthreads();
    if (going <= total) break;
    going -= total;
  }
  return shared.index;
}

// The threshold under which `count` of the scores [width, rows] go; with `all_ties` all that equal the last of them,
// too.
template <class T>
__device__ Threshold<T> select(PruneShared& shared, const T* scores, int rows, int width, uint32_t count,
                               bool all_ties) {
  using Key = KeyOf<T>;
  const int64_t candidates = int64_t{rows} * width;
  if (count == 0) return {0, 0};
  Key known = 0, mask = 0;  // the digits found so far, and where they are
  for (int shift = 8 * static_cast<int>(sizeof(Key)) - 8; shift >= 0; shift -= 8) {
    for (int bin = threadIdx.x; bin < 256; bin += kPruneThreads) shared.histogram[bin] = 0;
    __syncthreads();
    for (int row = threadIdx.x; row < rows; row += kPruneThreads) {
      for (int c = 0; c < width; ++c) {
        const Key key = key_of(scores[int64_t{c} * rows + row]);
        if (((key ^ known) & mask) == 0) atomicAdd(&shared.histogram[key >> shift & 255], 1u);
      }
    }
    __syncthreads();
    find_digit(shared, count);
    known |= static_cast<Key>(shared.digit) << shift;
    mask |= static_cast<Key>(255) << shift;
    count -= shared.below;
    if (count == shared.inside) return {static_cast<Key>(known | ~mask), candidates};  // all that begin like this
  }
  if (all_ties) return {known, candidates};
  return {known, index_of_tie(shared, scores, rows, width, known, count)};
}

template <class T>
size_t prune_shared_bytes(int64_t scores) {
  return sizeof(PruneShared) + sizeof(T) * (kPanelColumns * kFactorStride + scores);
}

template <class T>
__global__ void __launch_bounds__(kPruneThreads, sizeof(T) == 4 ? 2 : 1)
    prune_panel(const PruneProblem<T>* problems, int step, int64_t shared_scores) {
  const PruneProblem<T> problem = problems[blockIdx.x];
  PruneShared& shared = *shared_memory<PruneShared>();
  T* own_factor = reinterpret_cast<T*>(&shared + 1);
  const int rows = problem.groups * problem.rows, columns = problem.columns;
  T* scores =
      int64_t{problem.block_size} * rows <= shared_scores ? own_factor + kPanelColumns * kFactorStride : problem.scores;
  const int panel = step * problem.panel_columns, panel_end = min(panel + problem.panel_columns, columns);
  const bool is_shared = problem.groups == 1 && panel_end - panel <= kPanelColumns;
  if (is_shared) {
    for (int i = threadIdx.x; i < kPanelColumns * kPanelColumns; i += kPruneThreads) {
      const int r = i / kPanelColumns, c = i % kPanelColumns;
      if (c <= r && panel + r < panel_end) {
        own_factor[r * kFactorStride + c] = problem.factor[int64_t{panel + r} * columns + panel + c];
      }
    }
  }
  __syncthreads();

  // A thread's view of one row: M and the row's column, both from the panel's first column on.
  struct Row {
    const T* factor;
    int64_t factor_stride, first;
  };
  const auto row_of = [&](int row) -> Row {
    const int group = row / problem.rows;
    const int64_t first = (int64_t{group} * columns + panel) * problem.rows + row % problem.rows;
    if (is_shared) return {own_factor, kFactorStride, first};
    return {problem.factor + (int64_t{group} * columns + panel) * columns + panel, columns, first};
  };

  double loss = 0;
  for (int begin = panel; begin < panel_end; begin += problem.block_size) {
    const int width = min(problem.block_size, panel_end - begin), before = begin - panel;
    for (int row = threadIdx.x; row < rows; row += kPruneThreads) {
      const Row at = row_of(row);
      for (int local = 0; local < width; ++local) {
        const int i = before + local;
        const T* m = at.factor + i * at.factor_stride;
        T sum = problem.sums[at.first + int64_t{i} * problem.rows];
#pragma unroll 8
        for (int j = 0; j < before; ++j) sum += m[j] * problem.delta[at.first + int64_t{j} * problem.rows];
        problem.sums[at.first + int64_t{i} * problem.rows] = sum;
        for (int j = 0; j < local; ++j) sum += m[before + j] * problem.change[int64_t{j} * rows + row];
        const T shift = sum / m[i];
        const T signed_score = (problem.weight[at.first + int64_t{i} * problem.rows] + shift) * m[i];
        const T score = signed_score > 0 ? signed_score : 0 - signed_score;  // of -0 too it is 0
        problem.change[int64_t{local} * rows + row] = -shift;
        scores[int64_t{local} * rows + row] = score == score ? score : T(HUGE_VAL);  // NaN has no place in an order
      }
    }
    const uint32_t count = width == problem.block_size ? problem.count : problem.last_count;
    const Threshold<T> threshold = select(shared, scores, rows, width, count, problem.published_count != 0);
    for (int row = threadIdx.x; row < rows; row += kPruneThreads) {
      const Row at = row_of(row);
      for (int local = 0; local < width; ++local) {
        const int i = before + local;
        const T* m = at.factor + i * at.factor_stride;
        const int64_t place = at.first + int64_t{i} * problem.rows;
        T sum = problem.sums[place];
        for (int j = before; j < i; ++j) sum += m[j] * problem.delta[at.first + int64_t{j} * problem.rows];
        const T weight = problem.weight[place], current = weight + sum / m[i];
        const bool pruned = threshold.prunes(scores[int64_t{local} * rows + row], int64_t{row} * width + local);
        const double cost = pruned ? static_cast<double>(current) * static_cast<double>(m[i]) : 0.0;
        loss += cost * cost;
        problem.kept[place] = !pruned;
        problem.delta[place] = pruned ? weight : weight - current;
        problem.weight[place] = pruned ? T(0) : current;
      }
    }
  }
  loss = sum_of_block(loss, shared.losses);
  if (threadIdx.x == 0) *problem.loss += loss / 2;
}

template <class T>
__global__ void __launch_bounds__(BlockTile<T>::kThreads)
    prune_update(const PruneProblem<T>* problems, const int32_t* first, int count, int step) {
  using Tile = BlockTile<T>;
  const int index = find_item(first, count, blockIdx.x);
  const PruneProblem<T> problem = problems[index];
  const int64_t panel = int64_t{step} * problem.panel_columns, panel_end = panel + problem.panel_columns;
  const int row_tiles = (problem.rows + kBlock - 1) / kBlock;
  const int column_tiles = static_cast<int>((problem.columns - panel_end + kBlock - 1) / kBlock);
  const int place = blockIdx.x - first[index], group = place / (row_tiles * column_tiles);
  const int64_t column0 = panel_end + int64_t{place / row_tiles % column_tiles} * kBlock;
  const int64_t row0 = int64_t{place % row_tiles} * kBlock;
  const T* factor = problem.factor + int64_t{group} * problem.columns * problem.columns;
  const T* delta = problem.delta + int64_t{group} * problem.columns * problem.rows;

  T* left = shared_memory<T>();
  T* right = left + kBlock * Tile::kStride;
  Tile result;
  for (int64_t begin = panel; begin < panel_end; begin += kBlock) {
    const int depth = static_cast<int>(min(panel_end - begin, int64_t{kBlock}));
    const int filled = (depth + kDepth - 1) / kDepth * kDepth;  // with zeros from `depth` on
    for (int i = threadIdx.x; i < kBlock * kBlock; i += Tile::kThreads) {
      // Eight numbers of each of four rows of M: four whole sectors are read, and all banks are written.
      const int within = i % kWarp, group_of_eight = i / kWarp;
      const int k = group_of_eight % (kBlock / 8) * 8 + within % 8, m = group_of_eight / (kBlock / 8) * 4 + within / 8;
      if (k < filled) {
        cp_async<sizeof(T)>(left + k * Tile::kStride + m, factor + (column0 + m) * problem.columns + begin + k,
                            k < depth && column0 + m < problem.columns);
      }
      const int d = i / kBlock, n = i % kBlock;
      if (d < filled) {
        cp_async<sizeof(T)>(right + d * Tile::kStride + n, delta + (begin + d) * problem.rows + row0 + n,
                            d < depth && row0 + n < problem.rows);
      }
    }
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    multiply_block(result, left, right, depth);
    __syncthreads();
  }
  T* sums = problem.sums + int64_t{group} * problem.columns * problem.rows;
  result.for_each([&](int m, int n, T value) {
    if (column0 + m < problem.columns && row0 + n < problem.rows) {
      sums[(column0 + m) * problem.rows + row0 + n] += value;
    }
  });
}

template <class T>
void run_prune(const PruneProblem<T>* problems, const int32_t* updates, const PrunePlan& plan, Stream stream) {
  for (size_t t = 0; t < plan.active.size(); ++t) {
    const RaggedGrids::Grid& grid = plan.updates.grids[t];
    const auto step = static_cast<int>(t);
    launch(prune_panel<T>, dim3(plan.active[t]), kPruneThreads, prune_shared_bytes<T>(plan.shared_scores), stream,
           problems, step, plan.shared_scores);
    launch(prune_update<T>, dim3(grid.blocks), BlockTile<T>::kThreads, kBlockTileBytes<T>, stream, problems,
           updates + grid.offset, grid.items, step);
  }
}

}  // namespace spade_fast::cuda
