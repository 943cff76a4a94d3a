// The inner loops, compiled for several instruction sets; the best one of this machine is chosen when first needed.
//
// Matrices come as panels: `lanes` columns side by side, panel[k * lanes + l] being row k of column l. Lanes
// of the last panel behind the last column may hold anything: what is made of them is never used.
#pragma once

#include <cstdint>
#include <string>

namespace spade_fast {

// What no instruction set exceeds: sizes of buffers for a tile.
constexpr int64_t kLargestLanes = 16, kMostRows = 8, kMostPanels = 3;

template <class T>
struct Kernels {
  int64_t lanes;   // columns of a panel: one vector
  int64_t rows;    // rows of an output tile; divides `lanes`
  int64_t panels;  // panels of an output tile, at most

  // out[r * out_stride + p * out_panel_stride + l] +=
  //   sum_{k < count} a[k * lanes + r] * b[p * panel_stride + k * lanes + l]
  // for all r < rows, p < panels (at most the above), l < lanes.
  void (*multiply)(int64_t panels, const T* a, const T* b, int64_t panel_stride, int64_t count, T* out,
                   int64_t out_stride, int64_t out_panel_stride);

  // Back substitution, the last row first, for r < rows (at most the above) and p < panels:
  // out[p * panel_stride + r * lanes + l] becomes (itself - sums[r * panels * lanes + p * lanes + l]
  //   - sum_{r < k < rows} m[k * lanes + r] * out[p * panel_stride + k * lanes + l]) / m[r * lanes + r].
  void (*substitute)(int64_t panels, int64_t rows, const T* m, const T* sums, T* out, int64_t panel_stride);

  // out[l] += sum_{k < count} a[k * lanes + l] * b[k * lanes + l] for all l < lanes.
  void (*correlate)(const T* a, const T* b, int64_t count, T* out);

  // out[k * out_step + l] = from[k * from_step + l] for all k < count, l < lanes.
  void (*copy)(const T* from, int64_t from_step, int64_t count, T* out, int64_t out_step);

  // out[k * out_step + l] = from[l * lane_step + k] for all k < count, l < lanes.
  void (*transpose)(const T* from, int64_t lane_step, int64_t count, T* out, int64_t out_step);

  // out[r] += sum_{j < count} coefficients[j] * vectors[j * stride + r] for all r < rows.
  void (*combine)(const T* coefficients, const T* vectors, int64_t stride, int64_t count, int64_t rows, T* out);

  // A column as it would be without being pruned, current = weight + sum / pivot, the change to that from `weight`, and
  // its score |current * pivot|, infinite instead of NaN, for all r < rows.
  void (*score)(const T* weight, const T* sum, T pivot, int64_t rows, T* change, T* score);

  // Prunes the column's weights of scores below the threshold, and those equal to it if `ties`: weight becomes
  // 0 or what error propagation made of it, delta what it lost. Returns the sum of (current * pivot)^2 over the pruned.
  double (*prune)(const T* sum, const T* score, T threshold, bool ties, T pivot, int64_t rows, T* weight, T* delta,
                  bool* kept);

  // One pivot of optimal brain surgery on a row of `panels` panels of columns, weights w and diagonal g of their inverse.
  // The pivot's vector, v = -(row + sum_{k < count} coefficients[k] * vectors[k]) / root with vectors[k] at
  // vectors[p * panel_stride + k * lanes + l], is written behind the last of these; w -= step * v and g -= v^2. Returns
  // the name of the column with the least w^2 / g, and that; of equal ones the lowest name; infinity where there is
  // none. Where w is NaN there is no column.
  T (*sweep)(const T* row, T* vectors, int64_t panel_stride, const T* coefficients, int64_t count, int64_t panels,
             T root, T step, const T* names, T* w, T* g, T* least);

  // The same for a pivot of `size` columns in three steps. Its vectors, from the rows [size, row_stride] without the
  // products and the Cholesky factor L [size, size] of its block, v[a] = -(row[a] + sum_{c < a} L[a][c] v[c]) / L[a][a]
  // with c < a negated, are written to vectors[p * panel_stride + a * lanes + l] and in place of the rows.
  void (*pivot_block)(int64_t size, const T* lower, T* rows, int64_t row_stride, int64_t panels, T* vectors,
                      int64_t panel_stride);

  // w[e][b] -= sum_a step[a] * rows[a][b * size + e], for all blocks b < `panels` panels of them, w [size, stride], which
  // reads `rows` up to the last panel's last block; and the blocks' diagonals [size * (size + 1) / 2, stride], lower triangles by rows, lose the rows' products.
  void (*update_blocks)(int64_t size, const T* rows, int64_t row_stride, const T* step, int64_t panels, T* w,
                        T* diagonal, int64_t stride);

  // As what sweep returns, of the blocks: the least w^T D^-1 w. `scratch` holds size * (size + 5) / 2 vectors.
  T (*score_blocks)(int64_t size, const T* w, const T* diagonal, int64_t stride, int64_t panels, const T* names,
                    T* scratch, T* least);

  // out[i] += weights[i] * from[starts[i]] for all i < count.
  void (*add_scattered)(const T* from, const int64_t* starts, const T* weights, int64_t count, T* out);

  // Colours of `count` pixels: each channel times `before`, clamped to 0..1; then the hue turned by `turn`, 1 being the
  // whole circle, while saturation and value stay; then times `after` and clamped again.
  void (*jitter)(T before, T turn, T after, int64_t count, T* red, T* green, T* blue);
};

// Kernels for this machine's best instruction set; the environment variable SPADE_FAST_CPU_CAPABILITY
// ("default", "avx2" or "avx512") asks for a lesser one. Throws std::runtime_error where that cannot be met.
template <class T>
const Kernels<T>& kernels();

// What kernels() has chosen. Throws as it does.
const char* cpu_capability();
// All that this machine can run, the least first, separated by blanks.
std::string cpu_capabilities();

// One table for each instruction set, in kernels_<set>.cpp; null where the compiler's target does not have it.
template <class T>
const Kernels<T>* default_kernels();
template <class T>
const Kernels<T>* avx2_kernels();
template <class T>
const Kernels<T>* avx512_kernels();

}  // namespace spade_fast
