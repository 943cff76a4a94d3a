// Sums over warps and blocks of threads, in one order whatever the timing.
#pragma once

#include "device.cuh"

namespace spade_fast::cuda {

// The sum over all lanes, in every lane. To be called by whole warps.
template <class T>
__device__ __forceinline__ T sum_of_warp(T value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(kAllLanes, value, distance);
  return value;
}

// The sum over all threads, in thread 0. `shared` holds a number for each warp, and is free again after the next
// barrier.
template <class T>
__device__ __forceinline__ T sum_of_block(T value, T* shared) {
  value = sum_of_warp(value);
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = value;
  __syncthreads();
  T total = 0;
  if (threadIdx.x == 0) {
    for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) total += shared[warp];
  }
  return total;
}

}  // namespace spade_fast::cuda
