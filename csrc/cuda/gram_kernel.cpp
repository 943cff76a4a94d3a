// Gram sums and matrices on a GPU: arguments, memory, and which kernels run (gram.h).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "../gram_checks.h"
#include "../gram_plan.h"
#include "device.h"
#include "gram.h"

namespace spade_fast::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The input with the channels of a position side by side: itself, or a copy.
Tensor with_channels_inside(const Tensor& input) {
  if (input.stride(1) == 1 || input.size(1) == 1) return input;
  const Tensor turned = torch::stable::transpose(torch::stable::transpose(input, 1, 2), 2, 3);
  const Tensor copy = torch::stable::contiguous(turned);
  return torch::stable::transpose(torch::stable::transpose(copy, 2, 3), 1, 2);
}

int64_t element_bytes(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return 8;
    case ScalarType::BFloat16:
      return 2;
    default:
      return 4;
  }
}

MapLayout layout_of(const Tensor& input) {
  const auto step = [&](int axis) { return input.size(axis) == 1 ? 0 : input.stride(axis); };
  return {input.size(0), step(0), step(2), step(3)};
}

bool has_vectors(const GramPlan& plan, const Tensor& input) {
  return has_vectors(plan, layout_of(input), input.const_data_ptr(), element_bytes(input));
}

Precision precision_of(const Tensor& input, bool tf32) {
  if (input.scalar_type() == ScalarType::Double) return Precision::kFloat64;
  if (input.scalar_type() == ScalarType::BFloat16) return Precision::kBFloat16;
  return tf32 ? Precision::kTf32 : Precision::kFloat32;
}

void add_batch(const OnDevice& device, const GramPlan& plan, const Tensor& sums, const Tensor& input, bool tf32) {
  const MapLayout layout = layout_of(input);
  if (plan.depthwise()) {
    const Tensor table = device.upload(depthwise_products(plan, layout), input);
    const auto* products = static_cast<const DepthwiseProduct*>(table.const_data_ptr());
    for (const DepthwiseLaunch& launch :
         depthwise_launches(plan, layout, element_bytes(sums), device.multiprocessors())) {
      const Tensor partials = torch::stable::new_empty(sums, {launch.chunks, launch.sums, launch.channels});
      add_depthwise({precision_of(input, tf32), input.const_data_ptr(), products, sums.mutable_data_ptr(),
                     partials.mutable_data_ptr()},
                    launch, device.stream());
    }
    return;
  }
  const Precision precision = precision_of(input, tf32);
  const bool vectors = has_vectors(plan, input);
  const int64_t size = plan.flat ? plan.geometry.columns() : plan.geometry.channels;
  const int tile = gram_tile(size, precision, vectors);
  for (const GramLaunch& launch : gram_launches(plan, layout, tile, precision, device.multiprocessors())) {
    const Tensor partials = torch::stable::new_empty(sums, {launch.partial_tiles, tile, tile});
    add_gram({precision, input.const_data_ptr(), vectors, sums.mutable_data_ptr(), partials.mutable_data_ptr(), tile},
             launch, device.stream());
  }
}

void add_conv2d_sums_(Tensor sums, Tensor input, std::vector<int64_t> kernel_size, std::vector<int64_t> stride,
                      std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups, bool tf32) {
  const GramPlan plan(geometry_of_input(input, kernel_size, stride, padding, dilation, groups));
  check_sums(plan, sums);
  check_input_dtype(sums, input, tf32);
  const OnDevice device(sums);
  device.check_here("input", input);
  if (input.numel() == 0) return;
  input = with_channels_inside(input);
  if (input.scalar_type() == ScalarType::BFloat16 && !plan.depthwise() && !has_vectors(plan, input)) {
    // TF32 holds its values exactly. The copy may lie otherwise than the original.
    input = with_channels_inside(torch::stable::to(input, ScalarType::Float));
    tf32 = true;
  }
  const ConvGeometry& g = plan.geometry;
  const int64_t positions = std::max({int64_t{1}, g.height * g.width, g.outputs(0) * g.outputs(1)});
  STD_TORCH_CHECK(positions <= kMostPositions, "maps of more than ", kMostPositions,
                  " positions are not supported, got ", positions);
  const int64_t at_a_time = kMostPositions / positions;
  for (int64_t image = 0; image < input.size(0); image += at_a_time) {
    const int64_t count = std::min(at_a_time, input.size(0) - image);
    add_batch(device, plan, sums, torch::stable::narrow(input, 0, image, count), tf32);
  }
}

Tensor conv2d_gram(Tensor sums, std::vector<int64_t> size, std::vector<int64_t> kernel_size,
                   std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                   int64_t groups) {
  const GramPlan plan(geometry_of(size, kernel_size, stride, padding, dilation, groups));
  check_sums(plan, sums);
  const OnDevice device(sums);
  const int64_t d = plan.geometry.columns();
  Tensor gram = plan.flat ? torch::stable::clone(sums) : torch::stable::new_empty(sums, {groups, d, d});
  const AssemblyTables tables(plan);
  const Tensor pairs = device.upload(tables.pairs, sums), pieces = device.upload(tables.sums, sums);
  dispatch_float_or_double(sums, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (plan.flat) return mirror_upper(gram.mutable_data_ptr<T>(), groups, d, device.stream());
    const AssemblyArguments<T> arguments{groups,
                                         plan.geometry.channels,
                                         plan.geometry.taps(),
                                         plan.sums,
                                         static_cast<int64_t>(tables.pairs.size()),
                                         sums.const_data_ptr<T>(),
                                         static_cast<const AssembledPair*>(pairs.const_data_ptr()),
                                         static_cast<const int32_t*>(pieces.const_data_ptr()),
                                         gram.mutable_data_ptr<T>()};
    assemble_gram(arguments, plan.depthwise(), device.stream());
  });
  return gram;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spade_fast, CUDA, m) {
  m.impl("add_conv2d_sums_", TORCH_BOX(&add_conv2d_sums_));
  m.impl("conv2d_gram", TORCH_BOX(&conv2d_gram));
}

}  // namespace spade_fast::cuda
