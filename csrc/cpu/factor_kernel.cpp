// Factors of damped Hessians, M lower triangular with H + damping * mean(diag H) * I = M^T M: reversed, so that OBS needs
// no inverse (panel_factor.h), and what they are worth.
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
#include "panel_factor.h"
#include "side_by_side.h"

namespace spade_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::parallel_for;
using torch::stable::Tensor;

constexpr int64_t kErrorColumns = 16;  // summed side by side

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
  if (d <= kFactorBlock) {
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
