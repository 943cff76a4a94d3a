// Gram matrices of layer inputs, gram += X^T X, one sum over all samples.
//
// Only the block upper triangle is multiplied (half the arithmetic); it is mirrored once a call, so the
// result is exactly symmetric. Convolutions gather their patches into a buffer of about
// kPatchBytes (one row of outputs at least) and multiply it away: no call holds the patches of a whole batch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../check.h"
#include "gemm.h"

namespace spade_fast {
namespace {

using torch::stable::narrow;
using torch::stable::Tensor;
using torch::stable::transpose;

constexpr int64_t kPatchBytes = int64_t{32} << 20;
constexpr int64_t kSmallestPanel = 64, kLargestPanel = 512;  // rows of the Gram matrix that one product updates
constexpr int64_t kMirrorTile = 64;  // square tile of the mirror: two of them fit in the L1 cache
constexpr int64_t kGrain = 1 << 15;  // elements that are worth a thread

struct Conv2d {
  int64_t channels, height, width;  // of one group's input, one image
  int64_t kernel[2], stride[2], padding[2], dilation[2];
  int64_t out_height, out_width;
  int64_t groups;

  int64_t columns() const { return channels * kernel[0] * kernel[1]; }
};

// gram [d, d] += a a^T for a [d, samples], upper block triangle only.
void add_upper_product(Tensor& gram, Tensor& a) {
  const int64_t d = a.size(0);
  // Panels of a sixth waste a twelfth of the arithmetic; thinner ones would cost more in each product.
  const int64_t panel_rows = std::clamp(d / 6, kSmallestPanel, kLargestPanel);
  for (int64_t begin = 0; begin < d; begin += panel_rows) {
    const int64_t rows = std::min(panel_rows, d - begin);
    Tensor panel = narrow(gram, 0, begin, rows);
    Tensor tail = narrow(a, 0, begin, d - begin);
    matmul_into(narrow(panel, 1, begin, d - begin), 1.0, narrow(a, 0, begin, rows), transpose(tail, 0, 1));
  }
}

// Copies the upper triangle of each matrix of gram [matrices, d, d] onto its lower one.
template <class T>
void mirror_upper(T* gram, int64_t matrices, int64_t d) {
  const int64_t tiles = (d + kMirrorTile - 1) / kMirrorTile;
  const int64_t grain = std::max<int64_t>(1, kGrain / (kMirrorTile * d));
  torch::stable::parallel_for(0, matrices * tiles, grain, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      T* matrix = gram + item / tiles * d * d;
      const int64_t row0 = item % tiles * kMirrorTile, row1 = std::min(row0 + kMirrorTile, d);
      for (int64_t col0 = 0; col0 <= row0; col0 += kMirrorTile) {
        for (int64_t row = row0; row < row1; ++row) {
          const int64_t col1 = std::min(col0 + kMirrorTile, row);
          for (int64_t col = col0; col < col1; ++col) matrix[row * d + col] = matrix[col * d + row];
        }
      }
    }
  });
}

void mirror_upper(const Tensor& gram) {
  dispatch_float_or_double(gram, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    mirror_upper(gram.mutable_data_ptr<T>(), gram.size(0), gram.size(1));
  });
}

// The outputs x in [begin, end) whose tap reads inside the input: 0 <= stride * x + offset < size.
struct Span {
  int64_t begin, end;
};
Span inside(int64_t offset, int64_t stride, int64_t size, int64_t outputs) {
  const int64_t begin = offset >= 0 ? 0 : (-offset + stride - 1) / stride;
  const int64_t end = size > offset ? (size - offset - 1) / stride + 1 : 0;
  return {std::min(begin, outputs), std::max(std::min(begin, outputs), std::min(end, outputs))};
}

// Gathers output rows [unit0, unit1), numbered image * out_height + y, into
// patches [groups * columns, (unit1 - unit0) * out_width].
template <class T>
void gather_patches(const Tensor& input, const Conv2d& conv, int64_t unit0, int64_t unit1, T* patches) {
  const T* data = input.const_data_ptr<T>();
  const int64_t image_stride = input.stride(0), channel_stride = input.stride(1);
  const int64_t row_stride = input.stride(2), column_stride = input.stride(3);
  const int64_t taps = conv.kernel[0] * conv.kernel[1];
  const int64_t positions = (unit1 - unit0) * conv.out_width;
  const int64_t grain = std::max<int64_t>(1, kGrain / positions);
  torch::stable::parallel_for(0, conv.groups * conv.columns(), grain, [&](int64_t begin, int64_t end) {
    for (int64_t column = begin; column < end; ++column) {
      const int64_t ky = column % taps / conv.kernel[1], kx = column % conv.kernel[1];
      const T* channel = data + column / taps * channel_stride;
      const int64_t x_offset = kx * conv.dilation[1] - conv.padding[1];
      const Span span = inside(x_offset, conv.stride[1], conv.width, conv.out_width);
      const int64_t step = conv.stride[1] * column_stride;
      T* out = patches + column * positions;
      for (int64_t unit = unit0; unit < unit1; ++unit, out += conv.out_width) {
        const int64_t image = unit / conv.out_height;
        const int64_t y = unit % conv.out_height * conv.stride[0] + ky * conv.dilation[0] - conv.padding[0];
        if (y < 0 || y >= conv.height) {
          std::fill(out, out + conv.out_width, T(0));
          continue;
        }
        // The base is formed at the first tap inside, so that no pointer ever leaves the image.
        const T* row = channel + image * image_stride + y * row_stride;
        const int64_t first = (span.begin * conv.stride[1] + x_offset) * column_stride;
        std::fill(out, out + span.begin, T(0));
        for (int64_t x = span.begin; x < span.end; ++x) out[x] = row[first + (x - span.begin) * step];
        std::fill(out + span.end, out + conv.out_width, T(0));
      }
    }
  });
}

void check_gram(const Tensor& gram, const Tensor& input, int64_t groups, int64_t columns) {
  STD_TORCH_CHECK(is_float_or_double(gram) && gram.scalar_type() == input.scalar_type(),
                  "gram and input must both be float32 or both float64");
  STD_TORCH_CHECK(gram.dim() == 3 && gram.size(0) == groups && gram.size(1) == columns && gram.size(2) == columns &&
                      gram.is_contiguous(),
                  "gram must be a contiguous [", groups, ", ", columns, ", ", columns, "] tensor, got ",
                  shape_text(gram.sizes()));
}

void add_linear_gram(Tensor gram, Tensor input) {
  Tensor matrix = torch::stable::select(gram, 0, 0);
  Tensor a = transpose(input, 0, 1);
  add_upper_product(matrix, a);
  mirror_upper(gram);
}

void linear_gram_(Tensor gram, Tensor input) {
  STD_TORCH_CHECK(input.dim() == 2, "input must be [samples, columns], got ", shape_text(input.sizes()));
  check_gram(gram, input, 1, input.size(1));
  if (input.numel() == 0) return;
  add_linear_gram(gram, input);
}

Conv2d conv2d_of(const Tensor& input, const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride,
                 const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups) {
  STD_TORCH_CHECK(input.dim() == 4, "input must be [images, channels, height, width], got ", shape_text(input.sizes()));
  STD_TORCH_CHECK(groups > 0 && input.size(1) % groups == 0, "groups = ", groups, " must divide the ", input.size(1),
                  " channels of the input");
  Conv2d conv{};
  conv.channels = input.size(1) / groups;
  conv.height = input.size(2);
  conv.width = input.size(3);
  conv.groups = groups;
  int64_t outputs[2];
  for (int axis = 0; axis < 2; ++axis) {
    STD_TORCH_CHECK(kernel_size.size() == 2 && stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
                    "kernel_size, stride, padding and dilation must have two values each");
    STD_TORCH_CHECK(kernel_size[axis] > 0 && stride[axis] > 0 && dilation[axis] > 0 && padding[axis] >= 0,
                    "kernel_size, stride and dilation must be positive and padding not negative, got ",
                    shape_text(kernel_size), ", ", shape_text(stride), ", ", shape_text(dilation), ", ",
                    shape_text(padding));
    conv.kernel[axis] = kernel_size[axis];
    conv.stride[axis] = stride[axis];
    conv.padding[axis] = padding[axis];
    conv.dilation[axis] = dilation[axis];
    const int64_t reach = dilation[axis] * (kernel_size[axis] - 1) + 1;
    const int64_t room = input.size(2 + axis) + 2 * padding[axis] - reach;
    STD_TORCH_CHECK(room >= 0, "a kernel that reaches over ", reach, " pixels does not fit into ", input.size(2 + axis),
                    " pixels padded by ", padding[axis]);
    outputs[axis] = room / stride[axis] + 1;
  }
  conv.out_height = outputs[0];
  conv.out_width = outputs[1];
  return conv;
}

// [images, channels, height, width] stored channels last is one [samples, channels] matrix.
bool is_matrix_of_pixels(const Tensor& input) {
  const int64_t channels = input.size(1), width = input.size(3), height = input.size(2);
  return input.stride(1) == 1 && input.stride(3) == channels && input.stride(2) == channels * width &&
         input.stride(0) == channels * width * height;
}

void conv2d_gram_(Tensor gram, Tensor input, std::vector<int64_t> kernel_size, std::vector<int64_t> stride,
                  std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups) {
  const Conv2d conv = conv2d_of(input, kernel_size, stride, padding, dilation, groups);
  const int64_t d = conv.columns(), all_columns = groups * d;
  check_gram(gram, input, groups, d);
  if (input.numel() == 0) return;

  const bool every_pixel_once =
      kernel_size[0] * kernel_size[1] == 1 && stride[0] * stride[1] == 1 && padding[0] + padding[1] == 0 && groups == 1;
  if (every_pixel_once && is_matrix_of_pixels(input)) {
    Tensor pixels = torch::stable::transpose(input, 1, 3);  // [images, width, height, channels], strides reversed
    pixels = torch::stable::transpose(pixels, 1, 2);        // [images, height, width, channels], contiguous
    add_linear_gram(gram, torch::stable::view(pixels, {input.size(0) * conv.height * conv.width, d}));
    return;
  }

  dispatch_float_or_double(input, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int64_t units = input.size(0) * conv.out_height;
    const int64_t unit_bytes = all_columns * conv.out_width * static_cast<int64_t>(sizeof(T));
    const int64_t chunk = std::clamp<int64_t>(kPatchBytes / unit_bytes, 1, units);
    Tensor buffer = torch::stable::new_empty(input, {all_columns * chunk * conv.out_width});
    for (int64_t unit = 0; unit < units; unit += chunk) {
      const int64_t count = std::min(chunk, units - unit), positions = count * conv.out_width;
      gather_patches(input, conv, unit, unit + count, buffer.mutable_data_ptr<T>());
      Tensor used = narrow(buffer, 0, 0, all_columns * positions);
      if (groups == 1) {
        Tensor matrix = torch::stable::select(gram, 0, 0);
        Tensor patches = torch::stable::view(used, {d, positions});
        add_upper_product(matrix, patches);
      } else {
        Tensor patches = torch::stable::view(used, {groups, d, positions});
        batched_matmul_into(gram, 1.0, patches, transpose(patches, 1, 2));
      }
    }
  });
  mirror_upper(gram);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spade_fast, CPU, m) {
  m.impl("linear_gram_", TORCH_BOX(&linear_gram_));
  m.impl("conv2d_gram_", TORCH_BOX(&conv2d_gram_));
}

}  // namespace spade_fast
