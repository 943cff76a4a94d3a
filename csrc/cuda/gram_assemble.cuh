// Gram matrices [groups, d, d] from the sums of ../gram_plan.h, d = size * taps, columns in the order (channel, tap).
//
// assemble: block (c, e) of a pair of taps is the sum of the pair's pieces; a thread owns one element of one pair and
// writes it and its mirror. Grid: (ceil(size^2 / kAssembleThreads), pairs, groups).
//   values  T [groups, sums, size, size], of symmetric ones only the upper triangle is read
// assemble_depthwise: the same where a sum is a number. Grid: (ceil(groups / kAssembleThreads), pairs).
//   values  T [sums, groups]
// Every element is written once, by one thread.
#pragma once

#include "device.cuh"
#include "gram.h"

namespace spade_fast::cuda {

constexpr int kAssembleThreads = 256;

template <class T>
__global__ void __launch_bounds__(kAssembleThreads)
    assemble(const T* values, const AssembledPair* pairs, const int32_t* pieces, T* gram, int64_t sums, int64_t size,
             int64_t taps) {
  const int64_t place = int64_t{blockIdx.x} * kAssembleThreads + threadIdx.x, area = size * size;
  if (place >= area) return;
  const AssembledPair pair = pairs[blockIdx.y];
  const int64_t c = place / size, e = place % size, d = size * taps, group = blockIdx.z;
  if (pair.symmetric && e < c) return;
  T total = 0;
  for (int i = 0; i < pair.count; ++i) total += values[(group * sums + pieces[pair.first + i]) * area + place];
  T* matrix = gram + group * d * d;
  const int64_t row = c * taps + pair.tap, column = e * taps + pair.other_tap;
  matrix[row * d + column] = total;
  matrix[column * d + row] = total;
}

template <class T>
__global__ void __launch_bounds__(kAssembleThreads)
    assemble_depthwise(const T* values, const AssembledPair* pairs, const int32_t* pieces, T* gram, int64_t groups,
                       int64_t taps) {
  const int64_t group = int64_t{blockIdx.x} * kAssembleThreads + threadIdx.x;
  if (group >= groups) return;
  const AssembledPair pair = pairs[blockIdx.y];
  T total = 0;
  for (int i = 0; i < pair.count; ++i) total += values[pieces[pair.first + i] * groups + group];
  T* matrix = gram + group * taps * taps;
  matrix[pair.tap * taps + pair.other_tap] = total;
  matrix[pair.other_tap * taps + pair.tap] = total;
}

constexpr int kMirrorTile = 32, kMirrorRows = 8;  // a thread owns kMirrorTile / kMirrorRows elements

// Copies the upper triangle of matrices [count, size, size] onto the lower one, in place. A block owns one tile of the
// upper triangle. Grid: (tiles of a side, tiles of a side, count); tiles below the diagonal have nothing to do.
template <class T>
__global__ void __launch_bounds__(kMirrorTile* kMirrorRows) mirror(T* matrices, int64_t size) {
  const int64_t row0 = int64_t{blockIdx.y} * kMirrorTile, column0 = int64_t{blockIdx.x} * kMirrorTile;
  if (column0 < row0) return;
  T* matrix = matrices + blockIdx.z * size * size;
  T* tile = shared_memory<T>();  // [kMirrorTile, kMirrorTile + 1]
  const int x = threadIdx.x % kMirrorTile, y = threadIdx.x / kMirrorTile;
  for (int i = y; i < kMirrorTile; i += kMirrorRows) {
    if (row0 + i < size && column0 + x < size) {
      tile[i * (kMirrorTile + 1) + x] = matrix[(row0 + i) * size + column0 + x];
    }
  }
  __syncthreads();
  for (int i = y; i < kMirrorTile; i += kMirrorRows) {
    const int64_t row = column0 + i, column = row0 + x;  // of the mirrored tile
    if (row < size && column < row) matrix[row * size + column] = tile[x * (kMirrorTile + 1) + i];
  }
}

template <class T>
void run_assemble(const AssemblyArguments<T>& arguments, bool depthwise, Stream stream) {
  const int64_t owned = depthwise ? arguments.groups : arguments.size * arguments.size;
  const dim3 grid((owned + kAssembleThreads - 1) / kAssembleThreads, arguments.pairs, depthwise ? 1 : arguments.groups);
  if (depthwise) {
    launch(assemble_depthwise<T>, grid, kAssembleThreads, 0, stream, arguments.values, arguments.pair_table,
           arguments.sum_table, arguments.gram, arguments.groups, arguments.taps);
  } else {
    launch(assemble<T>, grid, kAssembleThreads, 0, stream, arguments.values, arguments.pair_table, arguments.sum_table,
           arguments.gram, arguments.sums, arguments.size, arguments.taps);
  }
}

template <class T>
void run_mirror(T* matrices, int64_t count, int64_t size, Stream stream) {
  const auto tiles = static_cast<unsigned>((size + kMirrorTile - 1) / kMirrorTile);
  launch(mirror<T>, dim3(tiles, tiles, count), kMirrorTile * kMirrorRows, sizeof(T) * kMirrorTile * (kMirrorTile + 1),
         stream, matrices, size);
}

}  // namespace spade_fast::cuda
