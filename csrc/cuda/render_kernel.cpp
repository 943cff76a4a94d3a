// Random views of an image on a GPU: arguments and memory (render.h).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <type_traits>

#include "../render_checks.h"
#include "device.h"
#include "render.h"

namespace spade_fast::cuda {
namespace {

using torch::stable::Tensor;

// Bands that leave the image are moved inside: to look at them here, the host would have to wait for the device.
Tensor render(Tensor image, Tensor row_starts, Tensor row_weights, Tensor column_starts, Tensor column_weights,
              Tensor colours) {
  check_views(image, row_starts, row_weights, column_starts, column_weights, colours);
  const OnDevice device(image);
  for (const Tensor* tensor : {&row_starts, &row_weights, &column_starts, &column_weights, &colours}) {
    device.check_here("bands and colours", *tensor);
  }
  STD_TORCH_CHECK(row_weights.size(1) <= image.size(1) && column_weights.size(1) <= image.size(2), "bands of ",
                  row_weights.size(1), " rows and ", column_weights.size(1), " columns do not fit into an image of ",
                  image.size(1), " x ", image.size(2), " pixels");
  const int64_t views = colours.size(0), height = row_weights.size(2), width = column_weights.size(2);
  Tensor pixels = torch::stable::contiguous(image);
  Tensor out = torch::stable::new_empty(image, {views, 3, height, width});
  if (out.numel() == 0) return out;
  dispatch_float_or_double(image, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    render_views(RenderArguments<T>{pixels.const_data_ptr<T>(), row_starts.const_data_ptr<int64_t>(),
                                    column_starts.const_data_ptr<int64_t>(), row_weights.const_data_ptr<T>(),
                                    column_weights.const_data_ptr<T>(), colours.const_data_ptr<T>(),
                                    out.mutable_data_ptr<T>(), image.size(1), image.size(2), views, height, width,
                                    row_weights.size(1), column_weights.size(1)},
                 device.stream());
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spade_fast, CUDA, m) {
  m.impl("render_views", TORCH_BOX(&render));
}

}  // namespace spade_fast::cuda
