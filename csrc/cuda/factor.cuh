// The reversed Cholesky factor of each of many matrices: M lower triangular with
// H + damping * mean(diag H) * I = M^T M.
//
//     M_rr = sqrt(H_rr - sum_{k > r} M_kr^2),   M_rc = (H_rc - sum_{k > r} M_kr M_kc) / M_rr   for c < r
//
// Blocks of kFactorBlock rows and columns, the last first, each in three launches for all matrices of whatever size:
//   factor_triangle   the block's own triangle; a block of threads owns it, in shared memory
//   factor_rows       the rest of its rows; a thread owns a column of them, in registers
//   factor_update     subtracts the rows' products from all that is left; a block of threads owns a tile
// Before them factor_trace and factor_start make the damped matrix in the place of the factor; after them factor_image,
// factor_error and factor_finish take the backward error along the vector of ones. Grids: FactorPlan. Matrices are
// float or double, sums are in the same type, that of the trace in double. Every element is the work of one thread at a
// time, in one order: results are deterministic. The host guarantees that the largest matrices come first (FactorPlan).
#pragma once

#include <cmath>

#include "../pivot_noise.h"
#include "device.cuh"
#include "factor.h"
#include "reduce.cuh"
#include "tile.cuh"

namespace spade_fast::cuda {

constexpr int kFactorThreads = 256;
static_assert(kFactorBlock == kBlock, "a block's products fill tiles");
template <class T>
constexpr T kLargest = std::numeric_limits<T>::max();
template <class T>
constexpr T kEpsilon = std::numeric_limits<T>::epsilon();

// damping[i] = share * mean of the diagonal. A block of threads owns a matrix.
template <class T>
__global__ void __launch_bounds__(kFactorThreads)
    factor_trace(const FactorMatrix<T>* matrices, double share, T* damping) {
  const FactorMatrix<T> matrix = matrices[blockIdx.x];
  double trace = 0;
  for (int64_t i = threadIdx.x; i < matrix.size; i += kFactorThreads) trace += matrix.hessian[i * matrix.size + i];
  trace = sum_of_block(trace, shared_memory<double>());
  if (threadIdx.x == 0) damping[blockIdx.x] = static_cast<T>(share * trace / static_cast<double>(matrix.size));
}

// Copies the lower triangle, damped, and writes zeros above it. A block of threads owns kFactorBlock rows.
template <class T>
__global__ void __launch_bounds__(kFactorThreads)
    factor_start(const FactorMatrix<T>* matrices, const int32_t* first, int count, const T* damping) {
  const int index = find_item(first, count, blockIdx.x);
  const FactorMatrix<T> matrix = matrices[index];
  const int64_t begin = int64_t{static_cast<int>(blockIdx.x) - first[index]} * kFactorBlock;
  for (int64_t row = begin; row < matrix.size && row < begin + kFactorBlock; ++row) {
    for (int64_t column = threadIdx.x; column < matrix.size; column += kFactorThreads) {
      T value = column <= row ? matrix.hessian[row * matrix.size + column] : T(0);
      if (column == row) value += damping[index];
      matrix.factor[row * matrix.size + column] = value;
    }
  }
}

constexpr int kTriangleStride = kFactorBlock + 1;

// Rows and columns [begin, begin + n) of a matrix in one step.
struct FactorSpan {
  int64_t begin;
  int n;
};

template <class T>
__device__ __forceinline__ FactorSpan factor_span(const FactorMatrix<T>& matrix, int step) {
  const int64_t begin = ((matrix.size - 1) / kFactorBlock - step) * kFactorBlock;
  return {begin, static_cast<int>(min(matrix.size - begin, int64_t{kFactorBlock}))};
}

// A block of threads owns the triangle of one matrix. failed[i] is set where a pivot is not positive.
template <class T>
__global__ void __launch_bounds__(kFactorThreads)
    factor_triangle(const FactorMatrix<T>* matrices, int32_t* failed, int step) {
  if (failed[blockIdx.x]) return;
  const FactorMatrix<T> matrix = matrices[blockIdx.x];
  const FactorSpan span = factor_span(matrix, step);
  T* corner = matrix.factor + span.begin * (matrix.size + 1);
  T* block = shared_memory<T>();  // [kFactorBlock, kTriangleStride]
  constexpr int kRows = kFactorThreads / kFactorBlock;
  const int column = threadIdx.x % kFactorBlock, row0 = threadIdx.x / kFactorBlock;
  for (int r = row0; r < span.n; r += kRows) {
    if (column <= r) block[r * kTriangleStride + column] = corner[r * matrix.size + column];
  }
  for (int r = span.n - 1; r >= 0; --r) {
    __syncthreads();
    const T square = block[r * kTriangleStride + r];
    if (!(square > T(0)) || square > kLargest<T>) {  // the same for all threads
      if (threadIdx.x == 0) failed[blockIdx.x] = 1;
      return;
    }
    const T pivot = sqrt(square);
    __syncthreads();
    if (row0 == 0 && column < r) block[r * kTriangleStride + column] /= pivot;
    if (threadIdx.x == 0) block[r * kTriangleStride + r] = pivot;
    __syncthreads();
    for (int i = row0; i < r; i += kRows) {
      if (column <= i) {
        block[i * kTriangleStride + column] -= block[r * kTriangleStride + i] * block[r * kTriangleStride + column];
      }
    }
  }
  for (int r = row0; r < span.n; r += kRows) {  // nothing was left to update after the last row
    if (column <= r) corner[r * matrix.size + column] = block[r * kTriangleStride + column];
  }
}

constexpr int kRowsStride = kFactorBlock + 4;  // whole vectors, of double too
constexpr int kRowsRun = 16;                   // rows that a thread holds in registers
template <class T>
constexpr size_t kRowsBytes = sizeof(T) * kFactorBlock * (kRowsStride + kFactorStrip);

// A thread owns one column left of the block: back substitution with the block's triangle, kRowsRun rows at a time.
template <class T>
__global__ void __launch_bounds__(kFactorStrip)
    factor_rows(const FactorMatrix<T>* matrices, const int32_t* first, int count, const int32_t* failed, int step) {
  const int index = find_item(first, count, blockIdx.x);
  if (failed[index]) return;
  const FactorMatrix<T> matrix = matrices[index];
  const FactorSpan span = factor_span(matrix, step);
  T* triangle = shared_memory<T>();  // [kFactorBlock, kRowsStride], the identity where the block has no rows
  T* finished = triangle + kFactorBlock * kRowsStride + threadIdx.x;  // [kFactorBlock, kFactorStrip]
  for (int i = threadIdx.x; i < kFactorBlock * kFactorBlock; i += kFactorStrip) {
    const int r = i / kFactorBlock, c = i % kFactorBlock;
    T value = r == c ? T(1) : T(0);
    if (r < span.n && c <= r) value = matrix.factor[(span.begin + r) * matrix.size + span.begin + c];
    triangle[r * kRowsStride + c] = value;
  }
  __syncthreads();
  const int64_t column = int64_t{static_cast<int>(blockIdx.x) - first[index]} * kFactorStrip + threadIdx.x;
  if (column >= span.begin) return;
  T* values = matrix.factor + span.begin * matrix.size + column;
#pragma unroll 1
  for (int run = kFactorBlock - kRowsRun; run >= 0; run -= kRowsRun) {
    const T* own = triangle + run * kRowsStride + run;
    T x[kRowsRun];
#pragma unroll
    for (int r = 0; r < kRowsRun; ++r) x[r] = run + r < span.n ? values[(run + r) * matrix.size] : T(0);
#pragma unroll 2
    for (int k = kRowsRun; run + k < kFactorBlock; ++k) {
      const T known = finished[(run + k) * kFactorStrip];
#pragma unroll
      for (int r = 0; r < kRowsRun; ++r) x[r] -= own[k * kRowsStride + r] * known;
    }
#pragma unroll
    for (int r = kRowsRun - 1; r >= 0; --r) {
      x[r] /= own[r * kRowsStride + r];
#pragma unroll
      for (int c = 0; c < r; ++c) x[c] -= own[r * kRowsStride + c] * x[r];
    }
#pragma unroll
    for (int r = 0; r < kRowsRun; ++r) {
      finished[(run + r) * kFactorStrip] = x[r];
      if (run + r < span.n) values[(run + r) * matrix.size] = x[r];
    }
  }
}

// A block of threads owns one tile on or below the diagonal of what is left.
template <class T>
__global__ void __launch_bounds__(BlockTile<T>::kThreads)
    factor_update(const FactorMatrix<T>* matrices, const int32_t* first, int count, const int32_t* failed, int step) {
  using Tile = BlockTile<T>;
  const int index = find_item(first, count, blockIdx.x);
  if (failed[index]) return;
  const FactorMatrix<T> matrix = matrices[index];
  const FactorSpan span = factor_span(matrix, step);
  const int place = blockIdx.x - first[index];
  int tile_row = static_cast<int>((sqrtf(8.0f * static_cast<float>(place) + 1.0f) - 1.0f) / 2.0f);
  while (tile_row * (tile_row + 1) / 2 > place) --tile_row;  // the root was rounded
  while ((tile_row + 1) * (tile_row + 2) / 2 <= place) ++tile_row;
  const int64_t row0 = int64_t{tile_row} * kFactorBlock;
  const int64_t column0 = int64_t{place - tile_row * (tile_row + 1) / 2} * kFactorBlock;

  T* left = shared_memory<T>();
  T* right = left + kFactorBlock * Tile::kStride;
  for (int i = threadIdx.x; i < kFactorBlock * kFactorBlock; i += Tile::kThreads) {
    const int k = i / kFactorBlock, c = i % kFactorBlock;
    const T* row = matrix.factor + (span.begin + k) * matrix.size;
    cp_async<sizeof(T)>(left + k * Tile::kStride + c, row + row0 + c, k < span.n);
    cp_async<sizeof(T)>(right + k * Tile::kStride + c, row + column0 + c, k < span.n);
  }
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  Tile result;
  multiply_block(result, left, right);
  result.for_each([&](int m, int n, T value) {
    if (row0 + m >= column0 + n) matrix.factor[(row0 + m) * matrix.size + column0 + n] -= value;
  });
}

// The larger one, NaN if either is.
template <class T>
__device__ __forceinline__ T larger(T a, T b) {
  return b > a || b != b ? b : a;
}

// image = M 1. A warp owns a row, a block of threads kFactorBlock of them.
template <class T>
__global__ void __launch_bounds__(kFactorThreads)
    factor_image(const FactorMatrix<T>* matrices, const int32_t* first, int count, T* images) {
  const int index = find_item(first, count, blockIdx.x);
  const FactorMatrix<T> matrix = matrices[index];
  const int64_t begin = int64_t{static_cast<int>(blockIdx.x) - first[index]} * kFactorBlock;
  const int lane = threadIdx.x % kWarp;
  for (int r = threadIdx.x / kWarp; r < kFactorBlock; r += kFactorThreads / kWarp) {
    if (begin + r >= matrix.size) return;  // a whole warp
    T sum = 0;
    for (int64_t c = lane; c <= begin + r; c += kWarp) sum += matrix.factor[(begin + r) * matrix.size + c];
    sum = sum_of_warp(sum);
    if (lane == 0) images[int64_t{blockIdx.x} * kFactorBlock + r] = sum;
  }
}

// Of each strip of columns the largest |(M^T M - H - damping I) 1| and row sum of |H + damping I|.
// Rows of a symmetric matrix are as good as columns. A block of threads owns kFactorBlock columns, a thread every
// so-many-th row. Into worst [strips, 3] go residual, norm and the smallest M_ii^2 / H_ii.
template <class T>
__global__ void __launch_bounds__(kFactorThreads) factor_error(const FactorMatrix<T>* matrices, const int32_t* first,
                                                               int count, const T* damping, const T* images, T* worst) {
  constexpr int kLanes = kFactorThreads / kFactorBlock;
  const int index = find_item(first, count, blockIdx.x);
  const FactorMatrix<T> matrix = matrices[index];
  const T* image = images + int64_t{first[index]} * kFactorBlock;
  const int place = threadIdx.x % kFactorBlock, lane = threadIdx.x / kFactorBlock;
  const int64_t column = int64_t{static_cast<int>(blockIdx.x) - first[index]} * kFactorBlock + place;
  T residual = 0, norm = 0;
  if (column < matrix.size) {
    for (int64_t row = lane; row < matrix.size; row += kLanes) {
      const T value = matrix.hessian[row * matrix.size + column] + (row == column ? damping[index] : T(0));
      residual -= value;
      norm += value < 0 ? -value : value;
      if (row >= column) residual += matrix.factor[row * matrix.size + column] * image[row];
    }
  }
  T pivot = kLargest<T>;
  if (lane == 0 && column < matrix.size) {
    const T root = matrix.factor[column * (matrix.size + 1)];
    pivot = root * root / (matrix.hessian[column * (matrix.size + 1)] + damping[index]);
  }
  T* sums = shared_memory<T>();  // [kLanes, 2, kFactorBlock]
  T* pivots = sums + 2 * kFactorThreads;
  sums[(lane * 2) * kFactorBlock + place] = residual;
  sums[(lane * 2 + 1) * kFactorBlock + place] = norm;
  if (lane == 0) pivots[place] = pivot;
  __syncthreads();
  if (threadIdx.x > 2) return;
  const int which = threadIdx.x;
  if (which == 2) {
    T smallest = kLargest<T>;
    for (int c = 0; c < kFactorBlock; ++c) smallest = min(smallest, pivots[c]);
    worst[int64_t{blockIdx.x} * 3 + 2] = smallest;
    return;
  }
  T largest = 0;
  for (int c = 0; c < kFactorBlock; ++c) {
    T total = 0;
    for (int l = 0; l < kLanes; ++l) total += sums[(l * 2 + which) * kFactorBlock + c];
    if (total < 0) total = -total;
    largest = larger(largest, total);
  }
  worst[int64_t{blockIdx.x} * 3 + which] = largest;
}

// The backward error in units of size * eps * ||H||, infinite where there is no factor, or one with a pivot of noise. A
// thread owns a matrix.
template <class T>
__global__ void __launch_bounds__(kFactorThreads) factor_finish(const FactorMatrix<T>* matrices, const int32_t* first,
                                                                int count, const int32_t* failed, const T* worst) {
  const int index = blockIdx.x * kFactorThreads + threadIdx.x;
  if (index >= count) return;
  T residual = 0, norm = 0, pivot = kLargest<T>;
  for (int strip = first[index]; strip < first[index + 1]; ++strip) {
    residual = larger(residual, worst[int64_t{strip} * 3]);
    norm = larger(norm, worst[int64_t{strip} * 3 + 1]);
    pivot = min(pivot, worst[int64_t{strip} * 3 + 2]);
  }
  const double unit = static_cast<double>(matrices[index].size) * kEpsilon<T>;
  const double error = static_cast<double>(residual) / (unit * static_cast<double>(norm));
  const bool stands_out = static_cast<double>(pivot) > least_pivot(matrices[index].size, kEpsilon<T>);
  const bool found = !failed[index] && error <= kLargest<double> && stands_out;
  *matrices[index].error = found ? error : HUGE_VAL;
}

template <class T>
void run_factor(const FactorWorkspace<T>& work, const FactorPlan& plan, double damping, Stream stream) {
  const RaggedGrids::Grid& all = plan.strips.grids[0];
  launch(factor_trace<T>, dim3(all.items), kFactorThreads, kFactorThreads / kWarp * sizeof(double), stream,
         work.matrices, damping, work.damping);
  launch(factor_start<T>, dim3(all.blocks), kFactorThreads, 0, stream, work.matrices, work.strips, all.items,
         work.damping);
  for (size_t t = 0; t < plan.active.size(); ++t) {
    const RaggedGrids::Grid &rows = plan.rows.grids[t], &updates = plan.updates.grids[t];
    const auto step = static_cast<int>(t);
    launch(factor_triangle<T>, dim3(plan.active[t]), kFactorThreads, sizeof(T) * kFactorBlock * kTriangleStride, stream,
           work.matrices, work.failed, step);
    launch(factor_rows<T>, dim3(rows.blocks), kFactorStrip, kRowsBytes<T>, stream, work.matrices,
           work.rows + rows.offset, rows.items, work.failed, step);
    launch(factor_update<T>, dim3(updates.blocks), BlockTile<T>::kThreads, kBlockTileBytes<T>, stream, work.matrices,
           work.updates + updates.offset, updates.items, work.failed, step);
  }
  launch(factor_image<T>, dim3(all.blocks), kFactorThreads, 0, stream, work.matrices, work.strips, all.items,
         work.images);
  launch(factor_error<T>, dim3(all.blocks), kFactorThreads, (2 * kFactorThreads + kFactorBlock) * sizeof(T), stream,
         work.matrices, work.strips, all.items, work.damping, work.images, work.worst);
  launch(factor_finish<T>, dim3((all.items + kFactorThreads - 1) / kFactorThreads), kFactorThreads, 0, stream,
         work.matrices, work.strips, all.items, work.failed, work.worst);
}

}  // namespace spade_fast::cuda
