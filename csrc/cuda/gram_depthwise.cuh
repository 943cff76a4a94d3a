// Depthwise sums: for every channel by itself, S = sum over positions z of a piece of x[z] x[z + shift].
//
// A warp owns kWarp neighbouring channels, one a lane, and every so-many-th row of the block's chunk of rows (of all
// images); it runs through all products of a row while the cache holds it. Grid: (ceil(channels / kWarp), chunks).
// Shared memory: the sums of every warp, [warps, sums, kWarp].
//   input     E [images, ..., channels], as DepthwiseLaunch says; float, double or BFloat16
//   products  [sums]
//   partials  Sum [chunks, sums, channels]
// The warps' sums, then the chunks' (in depthwise_reduce), are added up in their order: results are deterministic. The
// host guarantees that there are at most 31 bits of rows.
#pragma once

#include "device.cuh"
#include "gram.h"

namespace spade_fast::cuda {

template <bool kTf32, class T>
__device__ __forceinline__ T factor_of(T value) {
  if constexpr (kTf32) return to_tf32(value);
  return value;
}

template <bool kTf32>
__device__ __forceinline__ float factor_of(BFloat16 value) {
  return to_float(value);
}

template <class E, class Sum, bool kTf32>
__global__ void depthwise_rows(const E* input, const DepthwiseProduct* products, Sum* partials,
                               const __grid_constant__ DepthwiseLaunch work) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, channel = blockIdx.x * kWarp + lane;
  const bool is_channel = channel < work.channels;
  Sum* all_sums = shared_memory<Sum>();
  Sum* sums = all_sums + int64_t{warp} * work.sums * kWarp + lane;
  for (int s = 0; s < work.sums; ++s) sums[s * kWarp] = 0;

  const int begin = first_of_chunk(work.units, blockIdx.y, work.chunks);
  const int end = first_of_chunk(work.units, blockIdx.y + 1, work.chunks);
  for (int unit = begin + warp; is_channel && unit < end; unit += work.warps) {
    const int image = unit / work.rows, row = unit % work.rows;
    const E* map = input + image * work.image_step + channel;
    for (int p = 0; p < work.sums; ++p) {
      const DepthwiseProduct& product = products[p];
      if (row < product.first_row || row >= product.first_row + product.height) continue;
      const int64_t offset = (row - product.first_row) * work.y_step;
      const E* a = map + product.first + offset;
      const E* b = map + product.other_first + offset;
      Sum total = 0;
#pragma unroll 4
      for (int x = 0; x < product.width; ++x) {
        total += Sum{factor_of<kTf32>(a[x * work.x_step])} * Sum{factor_of<kTf32>(b[x * work.x_step])};
      }
      sums[p * kWarp] += total;
    }
  }
  __syncthreads();
  for (int s = warp; is_channel && s < work.sums; s += work.warps) {
    Sum total = 0;
    for (int w = 0; w < work.warps; ++w) total += all_sums[(int64_t{w} * work.sums + s) * kWarp + lane];
    partials[(int64_t{blockIdx.y} * work.sums + s) * work.channels + channel] = total;
  }
}

// A thread owns one number of sums [sums, channels]. Grid: ceil(sums * channels / blockDim).
template <class Sum>
__global__ void depthwise_reduce(const Sum* partials, Sum* sums, int64_t count, int chunks) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= count) return;
  Sum total = 0;
  for (int chunk = 0; chunk < chunks; ++chunk) total += partials[chunk * count + i];
  sums[i] += total;
}

template <class E, class Sum, bool kTf32>
void run_depthwise(const DepthwiseArguments& arguments, const DepthwiseLaunch& work, Stream stream) {
  constexpr int kThreads = 256;
  const int64_t count = int64_t{work.sums} * work.channels;
  auto* partials = static_cast<Sum*>(arguments.partials);
  const DepthwiseProduct* products = arguments.products + work.first_sum;
  Sum* sums = static_cast<Sum*>(arguments.sums) + int64_t{work.first_sum} * work.channels;
  launch(depthwise_rows<E, Sum, kTf32>, dim3((work.channels + kWarp - 1) / kWarp, work.chunks), work.warps * kWarp,
         sizeof(Sum) * work.warps * work.sums * kWarp, stream, static_cast<const E*>(arguments.input), products,
         partials, work);
  launch(depthwise_reduce<Sum>, dim3((count + kThreads - 1) / kThreads), kThreads, 0, stream,
         static_cast<const Sum*>(partials), sums, count, work.chunks);
}

inline void run_depthwise(const DepthwiseArguments& arguments, const DepthwiseLaunch& work, Stream stream) {
  switch (arguments.precision) {
    case Precision::kFloat64:
      return run_depthwise<double, double, false>(arguments, work, stream);
    case Precision::kFloat32:
      return run_depthwise<float, float, false>(arguments, work, stream);
    case Precision::kTf32:
      return run_depthwise<float, float, true>(arguments, work, stream);
    case Precision::kBFloat16:
      return run_depthwise<BFloat16, float, false>(arguments, work, stream);
  }
}

}  // namespace spade_fast::cuda
