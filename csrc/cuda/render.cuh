// Random views of an image: crop, flip and resize by banded weights, then brightness and hue.
//
//     out[v, c, y, x] = colour(sum over s, t of R[v, s, y] C[v, t, x] image[c, first_row + s, first_column + t])
//
// A thread owns one pixel of every so-many-th view, all three channels. Grid: (ceil(height * width / kRenderThreads),
// views, but no more than CUDA allows). Arrays are those of RenderArguments; sums are in their type. Bands that leave
// the image are moved inside.
#pragma once

#include <algorithm>
#include <cmath>

#include "device.cuh"
#include "render.h"

namespace spade_fast::cuda {

constexpr int kRenderThreads = 256;

template <class T>
__device__ __forceinline__ T clamp_to_unit(T value) {
  value = value < 0 ? T(0) : value;
  return value > 1 ? T(1) : value;
}

// One channel of a colour given by its hue in sixths of a turn, value and chroma:
// value - chroma * clamp(min(k, 4 - k), 0, 1) at k = hue_and_corner mod 6, where 0 <= hue_and_corner < 18.
template <class T>
__device__ __forceinline__ T channel_of(T hue_and_corner, T value, T chroma) {
  T k = hue_and_corner;
  k = k >= 6 ? k - 6 : k;
  k = k >= 6 ? k - 6 : k;
  return value - chroma * clamp_to_unit(k < 4 - k ? k : 4 - k);
}

template <class T>
__device__ __forceinline__ void render_pixel(const RenderArguments<T>& arguments, int64_t view, int64_t place) {
  const int64_t height = arguments.height, width = arguments.width;
  const int64_t y = place / width, x = place % width;
  const int64_t last_row = arguments.image_height - arguments.row_taps;
  const int64_t last_column = arguments.image_width - arguments.column_taps;
  const int64_t first_row = max(int64_t{0}, min(arguments.row_starts[view * height + y], last_row));
  const int64_t first_column = max(int64_t{0}, min(arguments.column_starts[view * width + x], last_column));
  const T* row_weights = arguments.row_weights + view * arguments.row_taps * height + y;
  const T* column_weights = arguments.column_weights + view * arguments.column_taps * width + x;

  T pixel[3] = {0, 0, 0};
  const int64_t channel_step = arguments.image_height * arguments.image_width;
  for (int64_t s = 0; s < arguments.row_taps; ++s) {
    const T* from = arguments.image + (first_row + s) * arguments.image_width + first_column;
    T row[3] = {0, 0, 0};
    for (int64_t t = 0; t < arguments.column_taps; ++t) {
      const T weight = column_weights[t * width];
#pragma unroll
      for (int c = 0; c < 3; ++c) row[c] += weight * from[c * channel_step + t];
    }
    const T weight = row_weights[s * height];
#pragma unroll
    for (int c = 0; c < 3; ++c) pixel[c] += weight * row[c];
  }

  const T before = arguments.colours[view * 3], turn = arguments.colours[view * 3 + 1];
  const T after = arguments.colours[view * 3 + 2];
  const T red = clamp_to_unit(pixel[0] * before), green = clamp_to_unit(pixel[1] * before);
  const T blue = clamp_to_unit(pixel[2] * before);
  const T value = max(red, max(green, blue)), chroma = value - min(red, min(green, blue));
  const T safe = chroma > 0 ? chroma : T(1);
  T hue = value == red ? (green - blue) / safe : value == green ? 2 + (blue - red) / safe : 4 + (red - green) / safe;
  hue += 6 * (turn - floor(turn));  // -1..11
  T* out = arguments.out + view * 3 * height * width + place;
  out[0] = clamp_to_unit(channel_of(hue + 5, value, chroma) * after);
  out[height * width] = clamp_to_unit(channel_of(hue + 3, value, chroma) * after);
  out[2 * height * width] = clamp_to_unit(channel_of(hue + 1, value, chroma) * after);
}

template <class T>
__global__ void __launch_bounds__(kRenderThreads) render_pixels(const RenderArguments<T> arguments) {
  const int64_t place = int64_t{blockIdx.x} * kRenderThreads + threadIdx.x;
  if (place >= arguments.height * arguments.width) return;
  for (int64_t view = blockIdx.y; view < arguments.views; view += gridDim.y) render_pixel(arguments, view, place);
}

template <class T>
void run_render(const RenderArguments<T>& arguments, Stream stream) {
  constexpr int64_t kMostGridRows = 65535;
  const int64_t pixels = arguments.height * arguments.width;
  const dim3 grid((pixels + kRenderThreads - 1) / kRenderThreads, std::min(arguments.views, kMostGridRows));
  launch(render_pixels<T>, grid, kRenderThreads, 0, stream, arguments);
}

}  // namespace spade_fast::cuda
