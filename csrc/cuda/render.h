// Random views of an image on a GPU.
#pragma once

#include <cstdint>

namespace spade_fast::cuda {

// All in device memory; T is float or double.
template <class T>
struct RenderArguments {
  const T* image;                             // [3, image_height, image_width]
  const int64_t *row_starts, *column_starts;  // [views, height], [views, width]
  const T *row_weights, *column_weights;      // [views, row_taps, height], [views, column_taps, width]
  const T* colours;                           // [views, 3]
  T* out;                                     // [views, 3, height, width]
  int64_t image_height, image_width, views, height, width, row_taps, column_taps;
};

// Implemented in render.cu: queues the work on the CUDA stream.
template <class T>
void render_views(const RenderArguments<T>& arguments, void* stream);

}  // namespace spade_fast::cuda
