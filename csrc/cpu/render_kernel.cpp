// Random views of an image: crop, flip and resize by banded weights, then brightness and hue, row by row of the output.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "../render_checks.h"
#include "kernels.h"

namespace spade_fast {
namespace {

using torch::stable::parallel_for;
using torch::stable::Tensor;

// Along one axis: of view v, output i is the sum over t of weights[(v * taps + t) * size + i] * input[first + t], where
// first is starts[v * size + i].
template <class T>
struct Bands {
  const int64_t* starts;
  const T* weights;
  int64_t taps, size;

  Bands(const Tensor& starts, const Tensor& weights)
      : starts(starts.const_data_ptr<int64_t>()),
        weights(weights.const_data_ptr<T>()),
        taps(weights.size(1)),
        size(weights.size(2)) {}
};

template <class T>
void render(const T* image, int64_t height, int64_t width, const Bands<T>& rows, const Bands<T>& columns,
            const T* colours, int64_t views, T* out) {
  const Kernels<T>& kernel = kernels<T>();
  parallel_for(0, views * rows.size, 16, [&](int64_t begin, int64_t end) {
    std::vector<T> blended(width), weights(rows.taps);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t view = item / rows.size, row = item % rows.size;
      const int64_t* starts = columns.starts + view * columns.size;
      const auto [least, most] = std::minmax_element(starts, starts + columns.size);
      const int64_t left = *least, seen = *most + columns.taps - left;
      for (int64_t t = 0; t < rows.taps; ++t) weights[t] = rows.weights[(view * rows.taps + t) * rows.size + row];
      T* channels[3];
      for (int64_t channel = 0; channel < 3; ++channel) {
        T* target = channels[channel] = out + ((view * 3 + channel) * rows.size + row) * columns.size;
        std::fill_n(blended.begin() + left, seen, T(0));
        kernel.combine(weights.data(), image + (channel * height + rows.starts[item]) * width + left, width, rows.taps,
                       seen, blended.data() + left);
        std::fill_n(target, columns.size, T(0));
        for (int64_t t = 0; t < columns.taps; ++t) {
          kernel.add_scattered(blended.data() + t, starts, columns.weights + (view * columns.taps + t) * columns.size,
                               columns.size, target);
        }
      }
      const T* colour = colours + view * 3;
      kernel.jitter(colour[0], colour[1], colour[2], columns.size, channels[0], channels[1], channels[2]);
    }
  });
}

// Kernels trust starts: no band may leave the image.
void check_starts(const char* axis, const Tensor& starts, const Tensor& weights, int64_t pixels) {
  const int64_t* first = starts.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < starts.numel(); ++i) {
    STD_TORCH_CHECK(first[i] >= 0 && first[i] <= pixels - weights.size(1), axis, " bands must lie within the ", pixels,
                    " pixels of the image, one of ", weights.size(1), " begins at ", first[i]);
  }
}

Tensor render_views(Tensor image, Tensor row_starts, Tensor row_weights, Tensor column_starts, Tensor column_weights,
                    Tensor colours) {
  check_views(image, row_starts, row_weights, column_starts, column_weights, colours);
  check_starts("row", row_starts, row_weights, image.size(1));
  check_starts("column", column_starts, column_weights, image.size(2));
  const int64_t views = colours.size(0);
  Tensor pixels = torch::stable::contiguous(image);
  Tensor out = torch::stable::new_empty(image, {views, 3, row_weights.size(2), column_weights.size(2)});
  if (out.numel() == 0) return out;
  dispatch_float_or_double(image, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    render(pixels.const_data_ptr<T>(), image.size(1), image.size(2), Bands<T>(row_starts, row_weights),
           Bands<T>(column_starts, column_weights), colours.const_data_ptr<T>(), views, out.mutable_data_ptr<T>());
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spade_fast, CPU, m) {
  m.impl("render_views", TORCH_BOX(&render_views));
}

}  // namespace spade_fast
