// The reversed Cholesky factor: M lower triangular with H + damping * mean(diag H) * I = M^T M, found from the last row
// upwards, so that OBS needs no inverse.
//
//     M_rr = sqrt(H_rr - sum_{k > r} M_kr^2),   M_rc = (H_rc - sum_{k > r} M_kr M_kc) / M_rr   for c < r
//
// Rows are finished in blocks: first the sums over all later blocks, one matrix product for all columns; then the
// block's own triangle; then the rest of its rows. The matrix is kept in panels (kernels.h), whose lanes are columns:
// both factors of every product are read as they lie. Threads share out columns, so no bit depends on their number.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../ceil_div.h"
#include "../factor_checks.h"
#include "../pivot_noise.h"
#include "kernels.h"
#include "side_by_side.h"

namespace spade_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::parallel_for;
using torch::stable::Tensor;

constexpr int64_t kBlock = 96;   // rows of a block: a multiple of every instruction set's lanes
constexpr int64_t kDepth = 256;  // rows of a product at a time: its panels stay in the second cache
constexpr int64_t kPanels = kMostPanels;
static_assert(kBlock % kLargestLanes == 0, "a block begins at a panel");
constexpr int64_t kUnpackedRows = 64;  // copied at a time
constexpr int64_t kErrorColumns = 16;  // summed side by side

// Turns the lower triangle of block [n, n] into its reversed factor. False where a pivot is not positive.
template <class T>
bool factor_triangle(T* block, int64_t n) {
  const Kernels<T>& kernel = kernels<T>();
  T coefficients[kBlock];
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

  // Reads the lower triangle of hessian [d, d], adds `damping` to the diagonal, factors.
  bool factor(const T* hessian, T damping) {
    pack(hessian, damping);
    for (int64_t begin = (d_ - 1) / kBlock * kBlock; begin >= 0; begin -= kBlock) {
      const int64_t end = std::min(begin + kBlock, d_);
      const int64_t groups = ceil_div(ceil_div(end, lanes_), kPanels);
      if (end < d_) {
        for_each_group(groups, [&](int64_t group) { subtract_later_rows(begin, end, group); });
      }
      if (!factor_own_triangle(begin, end)) return false;
      for_each_group(ceil_div(begin / lanes_, kPanels), [&](int64_t group) { finish_rows(begin, end, group); });
    }
    return true;
  }

  // M [d, d], zeros above its diagonal.
  void unpack(T* factor) const {
    parallel_for(0, ceil_div(d_, kUnpackedRows), 1, [&](int64_t begin, int64_t end) {
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
    parallel_for(0, ceil_div(d_, lanes_), 1, [&](int64_t begin, int64_t end) {
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

  T* at(int64_t row, int64_t panel) const { return panels_ + panel * panel_stride_ + row * lanes_; }
  int64_t panels_of(int64_t group, int64_t end) const {
    return std::min(kPanels, ceil_div(end, lanes_) - group * kPanels);
  }

  template <class Task>
  static void for_each_group(int64_t groups, const Task& task) {
    parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
      for (int64_t group = begin; group < end; ++group) task(group);
    });
  }

  // Rows [begin, end) of three panels, less the products with all rows from `end` on.
  void subtract_later_rows(int64_t begin, int64_t end, int64_t group) {
    const int64_t panels = panels_of(group, end), width = panels * lanes_;
    T sums[kBlock * kPanels * kLargestLanes];
    const int64_t rows = end - begin;  // a whole block: only the last one is smaller, and nothing is later than that
    std::fill(sums, sums + rows * width, T(0));
    for (int64_t depth = end; depth < d_; depth += kDepth) {
      for (int64_t r = 0; r < rows; r += kernel_.rows) {
        const int64_t column = begin + r;
        kernel_.multiply(panels, at(depth, column / lanes_) + column % lanes_, at(depth, group * kPanels),
                         panel_stride_, std::min(kDepth, d_ - depth), sums + r * width, width, lanes_);
      }
    }
    for (int64_t panel = 0; panel < panels; ++panel) {
      T* out = at(begin, group * kPanels + panel);
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t lane = 0; lane < lanes_; ++lane) out[r * lanes_ + lane] -= sums[r * width + panel * lanes_ + lane];
      }
    }
  }

  // Columns [begin, end) of rows [begin, end).
  bool factor_own_triangle(int64_t begin, int64_t end) {
    T block[kBlock * kBlock];
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
      T sums[kLargestLanes * kPanels * kLargestLanes] = {};
      if (last < end) {
        kernel_.multiply(panels, element(last, first), at(last, group * kPanels), panel_stride_, end - last, sums,
                         width, lanes_);
      }
      kernel_.substitute(panels, last - first, element(first, first), sums, at(first, group * kPanels), panel_stride_);
      last = first;
    }
  }

  const Kernels<T>& kernel_;
  int64_t d_, lanes_, panel_stride_;
  T* panels_;  // [panels, d, lanes]
};

// ||(M^T M - H - damping I) 1||_inf in units of d eps ||H + damping I||_inf: the backward error along one direction.
template <class T>
double backward_error(const T* hessian, T damping, const T* factor, int64_t d) {
  std::vector<T> sums(d, damping), norms(d, damping), image(d), back(d);
  parallel_for(0, d, kErrorColumns, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      T partial[kErrorColumns] = {};
      const T* values = factor + row * d;
      for (int64_t column = 0; column <= row; column += kErrorColumns) {
        const int64_t count = std::min(kErrorColumns, row + 1 - column);
        for (int64_t i = 0; i < count; ++i) partial[i] += values[column + i];
      }
      for (const T value : partial) image[row] += value;
    }
  });
  // Columns, of a symmetric matrix as good as rows, keep the additions apart.
  parallel_for(0, ceil_div(d, kErrorColumns), 1, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kErrorColumns, last = std::min(end * kErrorColumns, d);
    for (int64_t row = 0; row < d; ++row) {
      const T* values = hessian + row * d;
      for (int64_t column = first; column < last; ++column) {
        sums[column] += values[column];
        norms[column] += std::abs(values[column]);
      }
      const T scale = image[row];
      for (int64_t column = first; column < std::min(last, row + 1); ++column) {
        back[column] += factor[row * d + column] * scale;
      }
    }
  });
  T worst = 0, norm = 0;
  for (int64_t column = 0; column < d; ++column) {
    const T residual = std::abs(back[column] - sums[column]);
    if (!std::isfinite(residual)) return std::numeric_limits<double>::infinity();
    worst = std::max(worst, residual);
    norm = std::max(norm, norms[column]);
  }
  return static_cast<double>(worst) / (static_cast<double>(d) * std::numeric_limits<T>::epsilon() * norm);
}

template <class T>
T damping_of(const T* hessian, int64_t d, double damping) {
  double trace = 0;
  for (int64_t i = 0; i < d; ++i) trace += hessian[i * d + i];
  return static_cast<T>(damping * trace / static_cast<double>(d));
}

template <class T>
bool pivots_stand_out(const T* hessian, T damping, const T* factor, int64_t d) {
  const double least = least_pivot(d, std::numeric_limits<T>::epsilon());
  for (int64_t i = 0; i < d * d; i += d + 1) {
    if (!(static_cast<double>(factor[i] * factor[i] / (hessian[i] + damping)) > least)) return false;
  }
  return true;
}

// The error of a factor that was found, infinite where it has a pivot of noise.
template <class T>
double error_of(const T* hessian, T damping, const T* factor, int64_t d) {
  return pivots_stand_out(hessian, damping, factor, d) ? backward_error(hessian, damping, factor, d)
                                                       : std::numeric_limits<double>::infinity();
}

template <class T>
void factor_groups(const Tensor& hessian, double damping, Tensor& factor, double* errors) {
  const int64_t groups = hessian.size(0), d = hessian.size(1);
  const T* source = hessian.const_data_ptr<T>();
  T* target = factor.mutable_data_ptr<T>();
  constexpr double kNone = std::numeric_limits<double>::infinity();
  if (d <= kBlock) {
    parallel_for(0, groups, ceil_div(4096, d * d), [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g) {
        const T* h = source + g * d * d;
        T* m = target + g * d * d;
        const T added = damping_of(h, d, damping);
        for (int64_t r = 0; r < d; ++r) {
          for (int64_t c = 0; c < d; ++c) {
            m[r * d + c] = c > r ? T(0) : h[r * d + c] + (c == r ? added : T(0));
          }
        }
        errors[g] = factor_triangle(m, d) ? error_of(h, added, m, d) : kNone;
      }
    });
    return;
  }
  Tensor panels = torch::stable::new_empty(hessian, {PanelFactor<T>::elements(d)});
  for (int64_t g = 0; g < groups; ++g) {
    const T* h = source + g * d * d;
    PanelFactor<T> work(d, panels.mutable_data_ptr<T>());
    const T added = damping_of(h, d, damping);
    const bool found = work.factor(h, added);
    work.unpack(target + g * d * d);
    errors[g] = found ? error_of(h, added, target + g * d * d, d) : kNone;
  }
}

std::tuple<Tensor, Tensor> factor_hessian(Tensor hessian, double damping) {
  check_hessian(hessian, damping);
  Tensor source = torch::stable::contiguous(hessian);
  Tensor factor = torch::stable::new_empty(source, {source.size(0), source.size(1), source.size(2)});
  Tensor errors = torch::stable::new_empty(source, {source.size(0)}, ScalarType::Double);
  dispatch_float_or_double(source, [&](auto* type) {
    factor_groups<std::remove_pointer_t<decltype(type)>>(source, damping, factor, errors.mutable_data_ptr<double>());
  });
  return {factor, errors};
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>> factor_hessians(std::vector<Tensor> hessians, double damping) {
  std::vector<double> costs;
  for (const Tensor& hessian : hessians) {
    check_hessian(hessian, damping);
    costs.push_back(static_cast<double>(hessian.numel()) * static_cast<double>(hessian.size(1)));
  }
  std::vector<Tensor> factors(hessians.size()), errors(hessians.size());
  run_side_by_side(costs, [&](int64_t i) { std::tie(factors[i], errors[i]) = factor_hessian(hessians[i], damping); });
  return {factors, errors};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spade_fast, CPU, m) {
  m.impl("factor_hessian", TORCH_BOX(&factor_hessian));
  m.impl("factor_hessians", TORCH_BOX(&factor_hessians));
}

}  // namespace spade_fast
