// Tiles of matrix products A^T B in registers, from operands in shared memory: a position after the other, columns side
// by side.
#pragma once

#include "device.cuh"

namespace spade_fast::cuda {

constexpr int kDepth = 16;  // positions of a stage

// Products in T, T = float or double, on kTile x kTile. A thread owns kMicro x kMicro elements, vectors of them kTile *
// Vector::kLanes / kMicro apart. `place` is that of the thread among the kThreads of its tile: a block of threads may
// have several tiles.
template <class T, int kTileSize, int kMicro>
class ScalarTile {
 public:
  using Element = T;
  using Sum = T;
  static constexpr int kTile = kTileSize, kThreads = (kTile / kMicro) * (kTile / kMicro);
  static constexpr int kStride = kTile + Vector<T>::kLanes;  // of a position in shared memory

  __device__ __forceinline__ explicit ScalarTile(int place = threadIdx.x)
      : row_(place / kSide * kLanes), column_(place % kSide * kLanes) {
#pragma unroll
    for (int m = 0; m < kMicro; ++m) {
#pragma unroll
      for (int n = 0; n < kMicro; ++n) sums_[m][n] = T(0);
    }
  }

  // Adds the products of `kDepth` positions, a and b [kDepth, kStride].
  __device__ __forceinline__ void multiply(const T* a, const T* b) {
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      T left[kMicro], right[kMicro];
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const auto l = *reinterpret_cast<const Vector<T>*>(a + k * kStride + first(v, row_));
        const auto r = *reinterpret_cast<const Vector<T>*>(b + k * kStride + first(v, column_));
#pragma unroll
        for (int i = 0; i < kLanes; ++i) {
          left[v * kLanes + i] = l.lane[i];
          right[v * kLanes + i] = r.lane[i];
        }
      }
#pragma unroll
      for (int m = 0; m < kMicro; ++m) {
#pragma unroll
        for (int n = 0; n < kMicro; ++n) sums_[m][n] += left[m] * right[n];
      }
    }
  }

  // Calls store(row, column, value) for every element that this thread owns.
  template <class Store>
  __device__ __forceinline__ void for_each(const Store& store) const {
#pragma unroll
    for (int m = 0; m < kMicro; ++m) {
#pragma unroll
      for (int n = 0; n < kMicro; ++n) {
        store(first(m / kLanes, row_) + m % kLanes, first(n / kLanes, column_) + n % kLanes, sums_[m][n]);
      }
    }
  }

  // Calls change(row, column, vector) for every vector of elements, which lie side by side in a row, and takes what it
  // leaves there.
  template <class Change>
  __device__ __forceinline__ void change_vectors(const Change& change) {
#pragma unroll
    for (int m = 0; m < kMicro; ++m) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        Vector<T> values;
#pragma unroll
        for (int i = 0; i < kLanes; ++i) values.lane[i] = sums_[m][v * kLanes + i];
        change(first(m / kLanes, row_) + m % kLanes, first(v, column_), values);
#pragma unroll
        for (int i = 0; i < kLanes; ++i) sums_[m][v * kLanes + i] = values.lane[i];
      }
    }
  }

 private:
  static constexpr int kLanes = Vector<T>::kLanes, kVectors = kMicro / kLanes, kSide = kTile / kMicro;
  static_assert(kMicro % kLanes == 0 && kTile % kMicro == 0, "a thread owns whole vectors");

  static __device__ __forceinline__ int first(int vector, int begin) { return vector * (kTile / kVectors) + begin; }

  int row_, column_;  // of the first element
  T sums_[kMicro][kMicro];
};

// Products on tensor cores, of float rounded to TF32 or of BFloat16, which TF32 holds exactly; sums in float32. The
// warps share out the tile, two of them one above the other.
template <class E, int kTileSize>
class TensorTile {
 public:
  using Element = E;
  using Sum = float;
  static constexpr int kTile = kTileSize, kWarps = kTile / 16, kThreads = kWarps * kWarp;
  static constexpr int kStride = kTile + 32 / sizeof(E);  // lanes of four neighbouring positions hit other banks

  __device__ __forceinline__ TensorTile() {
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums_[m][n][i] = 0.0f;
      }
    }
  }

  __device__ __forceinline__ void multiply(const E* a, const E* b) {
    const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    const E* left = a + t * kStride + first_row() + g;
    const E* right = b + t * kStride + first_column() + g;
#pragma unroll
    for (int k = 0; k < kDepth; k += 8) {
      uint32_t rows[kRows][4], columns[kColumns][2];
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        rows[m][0] = operand(left[k * kStride + m * 16]);
        rows[m][1] = operand(left[k * kStride + m * 16 + 8]);
        rows[m][2] = operand(left[(k + 4) * kStride + m * 16]);
        rows[m][3] = operand(left[(k + 4) * kStride + m * 16 + 8]);
      }
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        columns[n][0] = operand(right[k * kStride + n * 8]);
        columns[n][1] = operand(right[(k + 4) * kStride + n * 8]);
      }
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
#pragma unroll
        for (int n = 0; n < kColumns; ++n) mma_m16n8k8_tf32(sums_[m][n], rows[m], columns[n]);
      }
    }
  }

  template <class Store>
  __device__ __forceinline__ void for_each(const Store& store) const {
    const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          store(first_row() + m * 16 + i / 2 * 8 + g, first_column() + n * 8 + 2 * t + i % 2, sums_[m][n][i]);
        }
      }
    }
  }

 private:
  static constexpr int kRows = kTile / 2 / 16, kColumns = kTile / (kWarps / 2) / 8;  // matrices of a warp
  static_assert(kRows * 16 * 2 == kTile && kColumns * 8 * (kWarps / 2) == kTile, "the warps cover the tile");

  static __device__ __forceinline__ int first_row() { return threadIdx.x / kWarp % 2 * (kTile / 2); }
  static __device__ __forceinline__ int first_column() { return threadIdx.x / kWarp / 2 * (kColumns * 8); }
  static __device__ __forceinline__ uint32_t operand(float value) { return tf32_operand(value); }
  static __device__ __forceinline__ uint32_t operand(BFloat16 value) { return __float_as_uint(to_float(value)); }

  float sums_[kRows][kColumns][4];
};

constexpr int kBlock = 64;  // of a blocked algorithm: rows and columns, and positions that are multiplied at once

// The tile that products of one block are taken with.
template <class T>
using BlockTile = ScalarTile<T, kBlock, sizeof(T) == 4 ? 8 : 4>;
template <class T>
constexpr size_t kBlockTileBytes = size_t{2} * kBlock * BlockTile<T>::kStride * sizeof(T);
static_assert(kBlock % kDepth == 0, "a block is multiplied in whole stages");

// a^T b for `depth` positions in shared memory, a and b [kBlock, kStride], rounded up to whole stages.
template <class T>
__device__ __forceinline__ void multiply_block(BlockTile<T>& result, const T* a, const T* b, int depth = kBlock) {
#pragma unroll 1
  for (int k = 0; k < depth; k += kDepth) {
    result.multiply(a + k * BlockTile<T>::kStride, b + k * BlockTile<T>::kStride);
  }
}

}  // namespace spade_fast::cuda
