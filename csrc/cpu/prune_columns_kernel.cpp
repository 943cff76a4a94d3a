// Column-wise optimal brain surgeon (FastSPADE), one Cholesky factor, no inverse.
//
// With H = M^T M, M lower triangular, and delta = w - q for finished columns, what OBS error propagation
// makes of column i is
//     c_i = w_i + (1 / M_ii) sum_{j < i} M_ij delta_j,     score_i = (c_i M_ii)^2,
// q_i = 0 where pruned and c_i where kept, and pruning costs score_i / 2 (SparseGPT, eq. 4 and 5; SPADE, sec. 3).
// Inside one block of columns the scores count every earlier column of the block as kept: they are taken
// before any error propagates inside the block.
//
// Columns go in panels: one batched product brings in all earlier panels, then the panel is finished column by
// column. Everything is stored transposed, so that a column of all rows is contiguous.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <tuple>
#include <vector>

#include "../check.h"
#include "gemm.h"

namespace spade_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::narrow;
using torch::stable::Tensor;
using torch::stable::transpose;

constexpr int64_t kPanelColumns = 96;

// How many of `candidates` weights of one block are pruned. Both rules are evaluated in double, as Python would.
int64_t count_to_prune(int64_t candidates, double sparsity, bool published_count) {
  const double exact = static_cast<double>(candidates) * sparsity;
  // The published rule prunes all scores up to and including the int(n s)-th smallest: one more than asked for.
  const int64_t count =
      published_count ? static_cast<int64_t>(exact) + 1 : static_cast<int64_t>(std::floor(exact + 0.5));
  return std::clamp<int64_t>(count, 0, candidates);
}

template <class T>
class ColumnPruner {
 public:
  ColumnPruner(int64_t groups, int64_t rows, int64_t columns, int64_t block_size, const T* factor, T* weight, T* delta,
               bool* kept)
      : groups_(groups),
        rows_(rows),
        columns_(columns),
        factor_(factor),
        weight_(weight),
        delta_(delta),
        kept_(kept),
        current_(block_size * groups * rows),
        change_(block_size * groups * rows),
        scores_(block_size * groups * rows) {}

  // Prunes columns [begin, end) of all groups, whose earlier panel starts at `panel`;
  // sums [groups, panel columns, rows] holds sum_{j < panel} M_ij delta_j. Returns the loss.
  double prune_block(int64_t panel, int64_t panel_columns, int64_t begin, int64_t end, T* sums, double sparsity,
                     bool published_count) {
    const int64_t width = end - begin, candidates = width * groups_ * rows_;
    for (int64_t g = 0; g < groups_; ++g) {
      for (int64_t i = begin; i < end; ++i) {
        T* sum = sums + (g * panel_columns + i - panel) * rows_;
        for (int64_t j = panel; j < begin; ++j) add_multiple(m(g, i, j), delta(g, j), sum);
        predict(g, begin, i, sum);
      }
    }
    const Threshold threshold =
        select(candidates, count_to_prune(candidates, sparsity, published_count), width, published_count);
    double loss = 0;
    for (int64_t g = 0; g < groups_; ++g) {
      for (int64_t i = begin; i < end; ++i) {
        T* sum = sums + (g * panel_columns + i - panel) * rows_;
        for (int64_t j = begin; j < i; ++j) add_multiple(m(g, i, j), delta(g, j), sum);
        loss += prune_column(g, i, i - begin, width, sum, threshold);
      }
    }
    return loss;
  }

 private:
  // Weights below `score` go, and those that equal it while their index, row * width + column, is below `index`.
  struct Threshold {
    T score;
    int64_t index;
  };

  T m(int64_t g, int64_t i, int64_t j) const { return factor_[(g * columns_ + i) * columns_ + j]; }
  T* weight(int64_t g, int64_t i) const { return weight_ + (g * columns_ + i) * rows_; }
  T* delta(int64_t g, int64_t i) const { return delta_ + (g * columns_ + i) * rows_; }
  bool* kept(int64_t g, int64_t i) const { return kept_ + (g * columns_ + i) * rows_; }
  int64_t slot(int64_t g, int64_t local) const { return (local * groups_ + g) * rows_; }

  void add_multiple(T factor, const T* __restrict source, T* __restrict target) const {
    for (int64_t r = 0; r < rows_; ++r) target[r] += factor * source[r];
  }

  // Scores of column i as if no other column of its block were pruned (forward substitution inside the block).
  // Absolute values instead of squares: the same order, and no underflow.
  void predict(int64_t g, int64_t begin, int64_t i, const T* sum) {
    T* __restrict current = current_.data() + slot(g, i - begin);
    T* __restrict change = change_.data() + slot(g, i - begin);
    T* __restrict score = scores_.data() + slot(g, i - begin);
    std::copy(sum, sum + rows_, current);
    for (int64_t j = begin; j < i; ++j) add_multiple(m(g, i, j), change_.data() + slot(g, j - begin), current);
    const T pivot = m(g, i, i);
    const T* __restrict w = weight(g, i);
    for (int64_t r = 0; r < rows_; ++r) {
      current[r] = w[r] + current[r] / pivot;
      change[r] = w[r] - current[r];
      const T value = std::abs(current[r] * pivot);
      score[r] = std::isnan(value) ? std::numeric_limits<T>::infinity() : value;  // NaN has no place in an order
    }
  }

  Threshold select(int64_t candidates, int64_t count, int64_t width, bool published_count) {
    if (count == 0) return {T(-1), 0};
    ordered_.assign(scores_.begin(), scores_.begin() + candidates);
    std::nth_element(ordered_.begin(), ordered_.begin() + (count - 1), ordered_.end());
    const T score = ordered_[count - 1];
    if (published_count) return {score, std::numeric_limits<int64_t>::max()};  // its `<=` takes every tie
    int64_t equal = count - std::count_if(ordered_.begin(), ordered_.begin() + count, [=](T s) { return s < score; });
    // The lowest indices among the equal scores: walk rows first, then the block's columns.
    for (int64_t g = 0; g < groups_; ++g) {
      for (int64_t r = 0; r < rows_; ++r) {
        for (int64_t local = 0; local < width; ++local) {
          if (scores_[slot(g, local) + r] == score && --equal == 0) return {score, (g * rows_ + r) * width + local + 1};
        }
      }
    }
    return {score, candidates};
  }

  double prune_column(int64_t g, int64_t i, int64_t local, int64_t width, const T* __restrict sum,
                      Threshold threshold) {
    const T pivot = m(g, i, i);
    const T* __restrict score = scores_.data() + slot(g, local);
    T* __restrict w = weight(g, i);
    T* __restrict d = delta(g, i);
    bool* __restrict keep = kept(g, i);
    double loss = 0;
    for (int64_t r = 0; r < rows_; ++r) {
      const T c = w[r] + sum[r] / pivot;
      const bool tie_goes = (g * rows_ + r) * width + local < threshold.index;
      const bool pruned = score[r] < threshold.score || (score[r] == threshold.score && tie_goes);
      const T q = pruned ? T(0) : c;
      const double cost = pruned ? static_cast<double>(c) * static_cast<double>(pivot) : 0.0;
      loss += cost * cost;
      keep[r] = !pruned;
      d[r] = w[r] - q;
      w[r] = q;
    }
    return loss / 2;
  }

  const int64_t groups_, rows_, columns_;
  const T* factor_;  // [groups, columns, columns]
  T* weight_;        // [groups, columns, rows]: dense before a column's turn, sparse after it
  T* delta_;         // [groups, columns, rows]: dense - sparse, for finished columns
  bool* kept_;       // [groups, columns, rows]
  // Scratch of one block, [block columns, groups, rows] each.
  std::vector<T> current_, change_, scores_, ordered_;
};

std::tuple<Tensor, Tensor, Tensor> prune_columns(Tensor weight, Tensor factor, double sparsity, int64_t block_size,
                                                 bool published_count) {
  STD_TORCH_CHECK(weight.dim() == 3 && is_float_or_double(weight),
                  "weight must be a float32 or float64 tensor [groups, rows, columns], got ",
                  shape_text(weight.sizes()));
  const int64_t groups = weight.size(0), rows = weight.size(1), columns = weight.size(2);
  STD_TORCH_CHECK(factor.dim() == 3 && factor.size(0) == groups && factor.size(1) == columns &&
                      factor.size(2) == columns && factor.scalar_type() == weight.scalar_type(),
                  "factor must be a [", groups, ", ", columns, ", ", columns, "] tensor of the weight's dtype, got ",
                  shape_text(factor.sizes()));
  STD_TORCH_CHECK(sparsity >= 0 && sparsity <= 1, "sparsity must lie in 0..1, got ", sparsity);
  STD_TORCH_CHECK(block_size >= 1, "block_size must be at least 1, got ", block_size);

  Tensor lower = torch::stable::contiguous(factor);
  Tensor swapped = transpose(weight, 1, 2);
  // A copy even where the transpose is contiguous already: the loop overwrites it.
  Tensor sparse = torch::stable::new_empty(weight, {groups, columns, rows});
  torch::stable::copy_(sparse, swapped);
  Tensor delta = torch::stable::new_empty(weight, {groups, columns, rows});
  Tensor kept = torch::stable::new_empty(weight, {groups, columns, rows}, ScalarType::Bool);
  Tensor loss = torch::stable::new_zeros(weight, {}, ScalarType::Double);

  if (weight.numel() > 0)
    dispatch_float_or_double(weight, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      const int64_t block = std::min(block_size, columns);
      const int64_t panel_size = std::max(block, kPanelColumns / block * block);
      ColumnPruner<T> pruner(groups, rows, columns, block, lower.const_data_ptr<T>(), sparse.mutable_data_ptr<T>(),
                             delta.mutable_data_ptr<T>(), kept.mutable_data_ptr<bool>());
      double total = 0;
      for (int64_t panel = 0; panel < columns; panel += panel_size) {
        const int64_t width = std::min(panel_size, columns - panel);
        Tensor sums = panel == 0 ? torch::stable::new_zeros(weight, {groups, width, rows})
                                 : torch::stable::new_empty(weight, {groups, width, rows});
        if (panel > 0) {
          Tensor rows_of_factor = narrow(lower, 1, panel, width);
          batched_matmul_into(sums, 0.0, narrow(rows_of_factor, 2, 0, panel), narrow(delta, 1, 0, panel));
        }
        for (int64_t begin = panel; begin < panel + width; begin += block) {
          total += pruner.prune_block(panel, width, begin, std::min(begin + block, panel + width),
                                      sums.mutable_data_ptr<T>(), sparsity, published_count);
        }
      }
      *loss.mutable_data_ptr<double>() = total;
    });
  return {torch::stable::contiguous(transpose(sparse, 1, 2)), torch::stable::contiguous(transpose(kept, 1, 2)), loss};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spade_fast, CPU, m) {
  m.impl("prune_columns", TORCH_BOX(&prune_columns));
}

}  // namespace spade_fast
