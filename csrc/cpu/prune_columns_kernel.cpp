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
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../count_to_prune.h"
#include "../prune_checks.h"
#include "gemm.h"
#include "kernels.h"
#include "side_by_side.h"

namespace spade_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::narrow;
using torch::stable::Tensor;
using torch::stable::transpose;

constexpr int64_t kPanelColumns = 96;
constexpr int64_t kColumnCost = 500;         // of selecting and pruning in a column, in products of a sum
constexpr int64_t kSmallestHistogram = 512;  // scores for which a histogram pays
constexpr int64_t kBuckets = 2048;           // upper 12 bits of a float without its sign

template <class T>
class ColumnPruner {
 public:
  ColumnPruner(int64_t groups, int64_t rows, int64_t columns, int64_t block_size, const T* factor, T* weight, T* delta,
               bool* kept)
      : kernel_(kernels<T>()),
        groups_(groups),
        rows_(rows),
        columns_(columns),
        factor_(factor),
        weight_(weight),
        delta_(delta),
        kept_(kept),
        current_(rows),
        change_(block_size * groups * rows),
        scores_(block_size * groups * rows) {
    ordered_.reserve(scores_.size());
  }

  // Prunes columns [begin, end) of all groups, whose earlier panel starts at `panel`;
  // sums [groups, panel columns, rows] holds sum_{j < panel} M_ij delta_j. Returns the loss.
  double prune_block(int64_t panel, int64_t panel_columns, int64_t begin, int64_t end, T* sums, double sparsity,
                     bool published_count) {
    const int64_t width = end - begin, candidates = width * groups_ * rows_;
    for (int64_t g = 0; g < groups_; ++g) {
      for (int64_t i = begin; i < end; ++i) {
        T* sum = sums + (g * panel_columns + i - panel) * rows_;
        combine(g, i, panel, begin, delta(g, panel), rows_, sum);
        predict(g, begin, i, sum);
      }
    }
    const Threshold threshold =
        select(candidates, count_to_prune(candidates, sparsity, published_count), width, published_count);
    double loss = 0;
    for (int64_t g = 0; g < groups_; ++g) {
      for (int64_t i = begin; i < end; ++i) {
        T* sum = sums + (g * panel_columns + i - panel) * rows_;
        combine(g, i, begin, i, delta(g, begin), rows_, sum);
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

  // sum += sum_{j in [begin, end)} M_ij vector_j, the vectors of one group lying `stride` apart.
  void combine(int64_t g, int64_t i, int64_t begin, int64_t end, const T* vectors, int64_t stride, T* sum) const {
    kernel_.combine(factor_ + (g * columns_ + i) * columns_ + begin, vectors, stride, end - begin, rows_, sum);
  }

  // Scores of column i as if no other column of its block were pruned (forward substitution inside the block).
  // Absolute values instead of squares: the same order, and no underflow.
  void predict(int64_t g, int64_t begin, int64_t i, const T* sum) {
    T* current = current_.data();
    std::copy(sum, sum + rows_, current);
    combine(g, i, begin, i, change_.data() + slot(g, 0), groups_ * rows_, current);
    kernel_.score(weight(g, i), current, m(g, i, i), rows_, change_.data() + slot(g, i - begin),
                  scores_.data() + slot(g, i - begin));
  }

  Threshold select(int64_t candidates, int64_t count, int64_t width, bool published_count) {
    if (count == 0) return {T(-1), 0};
    const int64_t below = gather_around(candidates, count);  // scores too small to be in `ordered_`
    const auto kth = ordered_.begin() + (count - below - 1);
    std::nth_element(ordered_.begin(), kth, ordered_.end());
    const T score = *kth;
    const int64_t ties = std::count(ordered_.begin(), ordered_.end(), score);
    int64_t going = count - below - std::count_if(ordered_.begin(), kth, [=](T s) { return s < score; });
    if (published_count || going == ties) return {score, candidates};  // the published `<=` takes every tie
    // The lowest indices among the equal scores: walk rows first, then the block's columns.
    for (int64_t g = 0; g < groups_; ++g) {
      for (int64_t r = 0; r < rows_; ++r) {
        for (int64_t local = 0; local < width; ++local) {
          if (scores_[slot(g, local) + r] == score && --going == 0) return {score, (g * rows_ + r) * width + local + 1};
        }
      }
    }
    return {score, candidates};
  }

  // Fills `ordered_` with the scores among which the count-th smallest is, and tells how many are smaller than those.
  // Of many float32 scores, none of them negative, these are the ones that agree with it in exponent and three bits.
  int64_t gather_around(int64_t candidates, int64_t count) {
    const T* scores = scores_.data();
    ordered_.clear();
    if constexpr (std::is_same_v<T, float>) {
      if (candidates >= kSmallestHistogram) {
        std::array<std::array<uint32_t, kBuckets>, 2> counts{};  // two, since neighbours often share a bucket
        for (int64_t i = 0; i < candidates; ++i) ++counts[i % 2][bucket_of(scores[i])];
        int64_t below = 0;
        uint32_t bucket = 0;
        for (int64_t in_bucket = 0;; ++bucket, below += in_bucket) {
          in_bucket = counts[0][bucket] + counts[1][bucket];
          if (below + in_bucket >= count) break;
        }
        for (int64_t i = 0; i < candidates; ++i) {
          if (bucket_of(scores[i]) == bucket) ordered_.push_back(scores[i]);
        }
        return below;
      }
    }
    ordered_.assign(scores, scores + candidates);
    return 0;
  }

  static uint32_t bucket_of(float score) {
    uint32_t bits;
    std::memcpy(&bits, &score, sizeof(bits));
    return bits >> 20 & (kBuckets - 1);
  }

  double prune_column(int64_t g, int64_t i, int64_t local, int64_t width, const T* sum, Threshold threshold) {
    // The rows whose index, row * width + local, is below the threshold's: there ties go too.
    const int64_t rows_before = (std::max<int64_t>(0, threshold.index - local) + width - 1) / width - g * rows_;
    const int64_t ties = std::clamp<int64_t>(rows_before, 0, rows_);
    const auto prune = [&](int64_t begin, int64_t end, bool with_ties) {
      return kernel_.prune(sum + begin, scores_.data() + slot(g, local) + begin, threshold.score, with_ties, m(g, i, i),
                           end - begin, weight(g, i) + begin, delta(g, i) + begin, kept(g, i) + begin);
    };
    return (prune(0, ties, true) + prune(ties, rows_, false)) / 2;
  }

  const Kernels<T>& kernel_;
  const int64_t groups_, rows_, columns_;
  const T* factor_;                           // [groups, columns, columns]
  T* weight_;                                 // [groups, columns, rows]: dense before a column's turn, sparse after it
  T* delta_;                                  // [groups, columns, rows]: dense - sparse, for finished columns
  bool* kept_;                                // [groups, columns, rows]
  std::vector<T> current_;                    // [rows]
  std::vector<T> change_, scores_, ordered_;  // of one block: [block columns, groups, rows]
};

std::tuple<Tensor, Tensor, Tensor> prune_columns(Tensor weight, Tensor factor, double sparsity, int64_t block_size,
                                                 bool published_count) {
  check_problem(weight, factor, sparsity, block_size);
  const int64_t groups = weight.size(0), rows = weight.size(1), columns = weight.size(2);
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

std::tuple<std::vector<Tensor>, std::vector<Tensor>, Tensor> prune_layers(std::vector<Tensor> weights,
                                                                          std::vector<Tensor> factors,
                                                                          std::vector<double> sparsities,
                                                                          std::vector<int64_t> block_sizes,
                                                                          bool published_count) {
  check_problems(weights, factors, sparsities, block_sizes);
  const size_t layers = weights.size();
  std::vector<double> costs;
  for (size_t i = 0; i < layers; ++i) {
    costs.push_back(static_cast<double>(weights[i].numel()) * static_cast<double>(weights[i].size(2) + kColumnCost));
  }
  std::vector<Tensor> sparse(layers), kept(layers);
  Tensor losses = torch::stable::new_zeros(weights[0], {static_cast<int64_t>(layers)}, ScalarType::Double);
  double* loss = losses.mutable_data_ptr<double>();
  run_side_by_side(costs, [&](int64_t i) {
    Tensor one;
    std::tie(sparse[i], kept[i], one) =
        prune_columns(weights[i], factors[i], sparsities[i], block_sizes[i], published_count);
    loss[i] = *one.const_data_ptr<double>();
  });
  return {sparse, kept, losses};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spade_fast, CPU, m) {
  m.impl("prune_columns", TORCH_BOX(&prune_columns));
  m.impl("prune_layers", TORCH_BOX(&prune_layers));
}

}  // namespace spade_fast
