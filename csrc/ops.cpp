// The schema of every operator. Implementations register beside their kernels: cpu/, cuda/.
// Shapes: G groups, d columns (inputs of one group), r rows (outputs of one group).
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(spade_fast, m) {
  // gram [1, d, d] += X^T X for inputs X [samples, d].
  m.def("linear_gram_(Tensor(a!) gram, Tensor input) -> ()");

  // gram [G, d, d] += the sum over output positions of x x^T, where x [d] is the patch of `input`
  // [images, channels, height, width] under the kernel, its columns ordered (channel, ky, kx).
  m.def(
      "conv2d_gram_(Tensor(a!) gram, Tensor input, int[] kernel_size, int[] stride, int[] padding, "
      "int[] dilation, int groups) -> ()");

  // Column-wise OBS pruning of weight [G, r, d] given the lower factor M [G, d, d], H = M^T M.
  // Returns the sparse weight, the mask (true: kept), both [G, r, d], and the loss, float64 [].
  m.def(
      "prune_columns(Tensor weight, Tensor factor, float sparsity, int block_size, "
      "bool published_count) -> (Tensor, Tensor, Tensor)");
}
