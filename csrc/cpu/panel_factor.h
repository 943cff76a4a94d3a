// The reversed Cholesky factor in panels, for the operators that factor: M lower triangular with H = M^T M, found from the
// last row upwards.
//
//     M_rr = sqrt(H_rr - sum_{k > r} M_kr^2),   M_rc = (H_rc - sum_{k > r} M_kr M_kc) / M_rr   for c < r
//
// Rows are finished in blocks: first the sums over all later blocks, one matrix product for all columns; then the
// block's own triangle; then the rest of its rows. The matrix is kept in panels (kernels.h), whose lanes are columns:
// both factors of every product are read as they lie. Threads share out columns, so no bit depends on their number.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "../ceil_div.h"
#include "kernels.h"

namespace spade_fast {

constexpr int64_t kFactorBlock = 96;   // rows of a block: a multiple of every instruction set's lanes
constexpr int64_t kFactorDepth = 256;  // rows of a product at a time: its panels stay in the second cache
static_assert(kFactorBlock % kLargestLanes == 0, "a block begins at a panel");
constexpr int64_t kUnpackedRows = 64;  // copied at a time

// Turns the lower triangle of block [n, n] into its reversed factor. False where a pivot is not positive.
template <class T>
bool factor_triangle(T* block, int64_t n) {
  const Kernels<T>& kernel = kernels<T>();
  T coefficients[kFactorBlock];
  for (int64_t r = n - 1; r >= 0; --r) {
    T* row = block + r * n;
    const int64_t later = n - r - 1;
    for (int64_t k = 0; k < later; ++k) coefficients[k] = -block[(r + 1 + k) * n + r];
    kernel.combine(coefficients, row + n, n, later, r + 1, row);
    if (!(row[r] > T(0)) || !std::isfinite(row[r])) return false;
    const T pivot = std::sqrt(row[r]);
    row[r] = pivot;
    for (int64_t c = 0; c < r; ++c) row[c] /= pivot;
  }
  return true;
}

template <class T>
class PanelFactor {
 public:
  PanelFactor(int64_t columns, T* panels)
      : kernel_(kernels<T>()), d_(columns), lanes_(kernel_.lanes), panel_stride_(columns * lanes_), panels_(panels) {}

  static int64_t elements(int64_t columns) {
    const int64_t lanes = kernels<T>().lanes;
    return ceil_div(columns, lanes) * lanes * columns;
  }

  // Reads the lower triangle of hessian [d, d], adds `damping` to the diagonal, factors. False where a pivot is not
  // positive.
  bool factor(const T* hessian, T damping) {
    pack(hessian, damping);
    return factor_packed();
  }

  // Factors what has been written to at().
  bool factor_packed() {
    for (int64_t begin = (d_ - 1) / kFactorBlock * kFactorBlock; begin >= 0; begin -= kFactorBlock) {
      const int64_t end = std::min(begin + kFactorBlock, d_);
      const int64_t groups = ceil_div(ceil_div(end, lanes_), kMostPanels);
      if (end < d_) {
        for_each_group(groups, [&](int64_t group) { subtract_later_rows(begin, end, group); });
      }
      if (!factor_own_triangle(begin, end)) return false;
      for_each_group(ceil_div(begin / lanes_, kMostPanels), [&](int64_t group) { finish_rows(begin, end, group); });
    }
    return true;
  }

  // Lanes of a row of a panel: at first of the matrix, whose lower triangle alone is read, then of M.
  T* at(int64_t row, int64_t panel) const { return panels_ + panel * panel_stride_ + row * lanes_; }

  // M [d, d], zeros above its diagonal.
  void unpack(T* factor) const {
    torch::stable::parallel_for(0, ceil_div(d_, kUnpackedRows), 1, [&](int64_t begin, int64_t end) {
      for (int64_t row0 = begin * kUnpackedRows; row0 < std::min(end * kUnpackedRows, d_); row0 += kUnpackedRows) {
        const int64_t rows = std::min(kUnpackedRows, d_ - row0), panels = ceil_div(row0 + rows, lanes_);
        for (int64_t panel = 0; panel < panels; ++panel) {
          const int64_t column = panel * lanes_;
          if (column + lanes_ <= d_) {
            kernel_.copy(at(row0, panel), lanes_, rows, factor + row0 * d_ + column, d_);
          } else {
            for (int64_t r = 0; r < rows; ++r) {
              std::copy(at(row0 + r, panel), at(row0 + r, panel) + d_ - column, factor + (row0 + r) * d_ + column);
            }
          }
        }
        for (int64_t row = row0; row < row0 + rows; ++row) {
          std::fill(factor + row * d_ + std::min(panels * lanes_, d_), factor + (row + 1) * d_, T(0));
        }
      }
    });
  }

 private:
  // Rows from the panel's own diagonal on; what is above it is zero there, and never read further up.
  void pack(const T* hessian, T damping) {
    torch::stable::parallel_for(0, ceil_div(d_, lanes_), 1, [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; ++panel) {
        const int64_t column = panel * lanes_, below = std::min(column + lanes_, d_);
        for (int64_t row = 0; row < below; ++row) {
          T* out = at(row, panel);
          std::fill(out, out + lanes_, T(0));
          for (int64_t c = column; c <= row; ++c) out[c - column] = hessian[row * d_ + c] + (c == row ? damping : T(0));
        }
        if (below < d_) {
          kernel_.copy(hessian + below * d_ + column, d_, d_ - below, at(below, panel), lanes_);
        }
      }
    });
  }

  int64_t panels_of(int64_t group, int64_t end) const {
    return std::min(kMostPanels, ceil_div(end, lanes_) - group * kMostPanels);
  }

  template <class Task>
  static void for_each_group(int64_t groups, const Task& task) {
    torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
      for (int64_t group = begin; group < end; ++group) task(group);
    });
  }

  // Rows [begin, end) of three panels, less the products with all rows from `end` on.
  void subtract_later_rows(int64_t begin, int64_t end, int64_t group) {
    const int64_t panels = panels_of(group, end), width = panels * lanes_;
    T sums[kFactorBlock * kMostPanels * kLargestLanes];
    const int64_t rows = end - begin;  // a whole block: only the last one is smaller, and nothing is later than that
    std::fill(sums, sums + rows * width, T(0));
    for (int64_t depth = end; depth < d_; depth += kFactorDepth) {
      for (int64_t r = 0; r < rows; r += kernel_.rows) {
        const int64_t column = begin + r;
        kernel_.multiply(panels, at(depth, column / lanes_) + column % lanes_, at(depth, group * kMostPanels),
                         panel_stride_, std::min(kFactorDepth, d_ - depth), sums + r * width, width, lanes_);
      }
    }
    for (int64_t panel = 0; panel < panels; ++panel) {
      T* out = at(begin, group * kMostPanels + panel);
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t lane = 0; lane < lanes_; ++lane) out[r * lanes_ + lane] -= sums[r * width + panel * lanes_ + lane];
      }
    }
  }

  // Columns [begin, end) of rows [begin, end).
  bool factor_own_triangle(int64_t begin, int64_t end) {
    T block[kFactorBlock * kFactorBlock];
    const int64_t n = end - begin;
    for (int64_t r = 0; r < n; ++r) {
      for (int64_t c = 0; c <= r; ++c) block[r * n + c] = *element(begin + r, begin + c);
    }
    if (!factor_triangle(block, n)) return false;
    for (int64_t r = 0; r < n; ++r) {
      for (int64_t c = 0; c < n; ++c) *element(begin + r, begin + c) = c <= r ? block[r * n + c] : T(0);
      for (int64_t c = end; c < ceil_div(end, lanes_) * lanes_; ++c) *element(begin + r, c) = T(0);
    }
    return true;
  }

  T* element(int64_t row, int64_t column) const { return at(row, column / lanes_) + column % lanes_; }

  // Rows [begin, end) of three panels left of the block's triangle, from the last row up, a tile of rows at a time.
  void finish_rows(int64_t begin, int64_t end, int64_t group) {
    const int64_t panels = panels_of(group, begin), width = panels * lanes_;
    for (int64_t last = end; last > begin;) {
      const int64_t first = begin + (last - 1 - begin) / kernel_.rows * kernel_.rows;
      T sums[kLargestLanes * kMostPanels * kLargestLanes] = {};
      if (last < end) {
        kernel_.multiply(panels, element(last, first), at(last, group * kMostPanels), panel_stride_, end - last, sums,
                         width, lanes_);
      }
      kernel_.substitute(panels, last - first, element(first, first), sums, at(first, group * kMostPanels),
                         panel_stride_);
      last = first;
    }
  }

  const Kernels<T>& kernel_;
  int64_t d_, lanes_, panel_stride_;
  T* panels_;  // [panels, d, lanes]
};

}  // namespace spade_fast
