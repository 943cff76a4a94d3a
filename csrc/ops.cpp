// The schema of every operator. Implementations register beside their kernels: cpu/, cuda/.
// Shapes: G groups, d columns (inputs of one group), r rows (outputs of one group).
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(spade_fast, m) {
  // The Gram matrix of a layer's patches, gram [G, d, d] = the sum over images and output positions of x x^T, where x
  // [d] is the patch under the kernel, its columns ordered (channel, ky, kx). It is summed in the form that is cheapest
  // for the geometry: a tensor of the first operator's shape, zero at first, to which the second adds a batch of inputs
  // [images, channels, height, width], and of which the third makes the matrix. `size` is [channels, height, width].
  // A linear layer is the 1x1 convolution of [samples, d, 1, 1]. Inputs are of the dtype of the sums, or bfloat16 with
  // float32 sums; tf32 rounds float32 inputs to ten bits of mantissa, ties away from zero, before they are multiplied.
  m.def(
      "conv2d_sums_shape(int[] size, int[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups) "
      "-> int[]");
  m.def(
      "add_conv2d_sums_(Tensor(a!) sums, Tensor input, int[] kernel_size, int[] stride, int[] padding, int[] dilation, "
      "int groups, bool tf32=False) -> ()");
  m.def(
      "conv2d_gram(Tensor sums, int[] size, int[] kernel_size, int[] stride, int[] padding, int[] dilation, int "
      "groups) "
      "-> Tensor");

  // The lower factor M [G, d, d] with H + damping * mean(diag H) * I = M^T M of each symmetric matrix, of which only
  // the lower triangle is factored, and its backward error [G], float64, in units of d eps ||H||: infinite where there
  // is no factor.
  m.def("factor_hessian(Tensor hessian, float damping) -> (Tensor, Tensor)");
  // The same for many layers, side by side.
  m.def("factor_hessians(Tensor[] hessians, float damping) -> (Tensor[], Tensor[])");

  // Column-wise OBS pruning of weight [G, r, d] given the lower factor M [G, d, d], H = M^T M.
  // Returns the sparse weight, the mask (true: kept), both [G, r, d], and the loss, float64 [].
  m.def(
      "prune_columns(Tensor weight, Tensor factor, float sparsity, int block_size, "
      "bool published_count) -> (Tensor, Tensor, Tensor)");
  // The same for many layers, side by side; losses [layers].
  m.def(
      "prune_layers(Tensor[] weights, Tensor[] factors, float[] sparsities, int[] block_sizes, bool published_count) "
      "-> (Tensor[], Tensor[], Tensor)");

  // The order in which optimal brain compression prunes each row of the weights [G, r, d] of many layers, given H^-1
  // [G, d, d]: blocks of block_size columns, which divides d, each time the one whose loss is least. Returns the blocks'
  // positions, int32, and their losses, both [G, r, d / block_size]; from a pivot that is rounding noise on, -1 and NaN.
  m.def("elimination_orders(Tensor[] weights, Tensor[] inverses, int[] block_sizes) -> (Tensor[], Tensor[])");

  // For each right side [G, systems, d] and subset S of the columns, bool [G, systems, d], the x with H_SS x_S = b_S, zero
  // outside S, of symmetric matrices [G, d, d] of which the lower triangles are read. NaN where H_SS has no Cholesky
  // factor. CPU only: elsewhere torch's own batches of systems do.
  m.def("solve_subsets(Tensor matrix, Tensor subsets, Tensor right_sides) -> Tensor");

  // Views [views, 3, height, width] of an image [3, h, w]. Along an axis, output i of a view is the sum over t of
  // weights[view, t, i] * input[starts[view, i] + t]. Colours [views, 3]: factor of all channels, clamped to 0..1, turn
  // of the hue, a second factor and clamp.
  m.def(
      "render_views(Tensor image, Tensor row_starts, Tensor row_weights, Tensor column_starts, Tensor column_weights, "
      "Tensor colours) -> Tensor");
}
