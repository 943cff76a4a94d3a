// Many systems with submatrices of one matrix, H_SS x = b_S: what refitting the kept weights of each row takes
// (SparseGPT, sec. 3.1).
//
// With H_SS = M^T M (panel_factor.h), M^T y = b comes for nothing: b is factored along as a column before the others.
// What is left is M x = y. Threads share out systems: no bit depends on their number.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "../ceil_div.h"
#include "../check.h"
#include "kernels.h"
#include "panel_factor.h"

namespace spade_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
class SubsetSolver {
 public:
  SubsetSolver(int64_t columns, int64_t largest)
      : d_(columns), lanes_(kernels<T>().lanes), panels_(PanelFactor<T>::elements(largest + 1)), rest_(largest + 1) {}

  // x [d], zero outside the subset [d]; NaN where the submatrix has no Cholesky factor.
  void solve(const T* matrix, const bool* subset, const T* right_side, T* x) {
    columns_.clear();
    for (int64_t c = 0; c < d_; ++c) {
      if (subset[c]) columns_.push_back(c);
    }
    std::fill(x, x + d_, T(0));
    PanelFactor<T> work(static_cast<int64_t>(columns_.size()) + 1, panels_.data());
    pack(work, matrix, right_side);
    if (work.factor_packed()) {
      substitute(work);
    } else {
      std::fill(rest_.begin(), rest_.end(), std::numeric_limits<T>::quiet_NaN());
    }
    for (size_t i = 0; i < columns_.size(); ++i) x[columns_[i]] = rest_[i + 1];
  }

 private:
  // The right side is column 0, under a diagonal that is large enough.
  void pack(PanelFactor<T>& work, const T* matrix, const T* right_side) const {
    const auto n = static_cast<int64_t>(columns_.size()) + 1;
    for (int64_t panel = 0; panel * lanes_ < n; ++panel) {
      const int64_t first = panel * lanes_, last = std::min(first + lanes_, n);
      for (int64_t row = std::max<int64_t>(first, 1); row < n; ++row) {
        const T* from = matrix + columns_[row - 1] * d_;
        T* out = work.at(row, panel);
        for (int64_t c = std::max<int64_t>(first, 1); c < std::min(last, row + 1); ++c) {
          out[c - first] = from[columns_[c - 1]];
        }
        if (panel == 0) out[0] = right_side[columns_[row - 1]];
      }
    }
    *work.at(0, 0) = std::numeric_limits<T>::max() / 4;
  }

  // M x = y, with y in column 0 of M; `rest_` becomes x.
  void substitute(const PanelFactor<T>& work) {
    const auto n = static_cast<int64_t>(columns_.size()) + 1;
    for (int64_t row = 1; row < n; ++row) rest_[row] = *work.at(row, 0);
    rest_[0] = 0;
    for (int64_t panel = 0; panel * lanes_ < n; ++panel) {
      const int64_t first = panel * lanes_, last = std::min(first + lanes_, n);
      for (int64_t row = std::max<int64_t>(first, 1); row < last; ++row) {
        const T* factors = work.at(row, panel);
        for (int64_t c = first; c < row; ++c) rest_[row] -= factors[c - first] * rest_[c];
        rest_[row] /= factors[row - first];
      }
      for (int64_t row = last; row < n; ++row) {
        const T* factors = work.at(row, panel);
        T sum = 0;
        for (int64_t lane = 0; lane < lanes_; ++lane) sum += factors[lane] * rest_[first + lane];
        rest_[row] -= sum;
      }
    }
  }

  const int64_t d_, lanes_;
  std::vector<int64_t> columns_;  // of the subset
  std::vector<T> panels_, rest_;
};

Tensor solve_subsets(Tensor matrix, Tensor subsets, Tensor right_sides) {
  STD_TORCH_CHECK(matrix.dim() == 3 && matrix.size(1) == matrix.size(2) && is_float_or_double(matrix),
                  "matrix must be a float32 or float64 tensor [groups, columns, columns], got ", tensor_text(matrix));
  const int64_t groups = matrix.size(0), d = matrix.size(1);
  STD_TORCH_CHECK(right_sides.dim() == 3 && right_sides.size(0) == groups && right_sides.size(2) == d &&
                      right_sides.scalar_type() == matrix.scalar_type(),
                  "right_sides must be a [", groups, ", systems, ", d, "] tensor of the matrix's dtype, got ",
                  tensor_text(right_sides));
  const int64_t systems = right_sides.size(1), all = groups * systems;
  STD_TORCH_CHECK(subsets.dim() == 3 && subsets.size(0) == groups && subsets.size(1) == systems &&
                      subsets.size(2) == d && subsets.scalar_type() == ScalarType::Bool,
                  "subsets must be a Bool [", groups, ", ", systems, ", ", d, "] tensor, got ", tensor_text(subsets));
  matrix = torch::stable::contiguous(matrix);
  subsets = torch::stable::contiguous(subsets);
  right_sides = torch::stable::contiguous(right_sides);
  Tensor solutions = torch::stable::new_empty(right_sides, {groups, systems, d});
  const bool* subset = subsets.const_data_ptr<bool>();
  int64_t largest = 0;
  for (int64_t i = 0; i < all; ++i) {
    largest = std::max<int64_t>(largest, std::count(subset + i * d, subset + (i + 1) * d, true));
  }
  dispatch_float_or_double(matrix, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* right_side = right_sides.const_data_ptr<T>();
    T* solution = solutions.mutable_data_ptr<T>();
    std::atomic<int64_t> next{0};
    const auto threads = std::min<int64_t>(torch::stable::get_num_threads(), all);
    torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
      SubsetSolver<T> solver(d, largest);
      for (int64_t i = next++; i < all; i = next++) {
        solver.solve(matrix.const_data_ptr<T>() + i / systems * d * d, subset + i * d, right_side + i * d,
                     solution + i * d);
      }
    });
  });
  return solutions;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spade_fast, CPU, m) {
  m.impl("solve_subsets", TORCH_BOX(&solve_subsets));
}

}  // namespace spade_fast
