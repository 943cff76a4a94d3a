// Optimal brain compression (exact SPADE): the order in which each row is pruned to the end, with no inverse of its own
// that every step rewrites (OBC, Frantar et al. 2022; SPADE, sec. 3).
//
// All rows of a layer begin with the same inverse Hessian M = H^-1 and w. Block j, the one whose loss
// w_j^T M_jj^-1 w_j / 2 is least, goes: with M_jj = L L^T its pivot vectors are V = L^-1 M_j,: , and what is left is
//
//     w <- w - (L^-1 w_j)^T V,     M <- M - V^T V.
//
// M is not updated. A row of it is what it was, less the products with the pivot vectors since; only the blocks on the
// diagonal, by which the next one is chosen, are kept up to date. Every kFoldedPivots vectors are folded into M, of which
// the lower triangle is kept, by one product. Both ways a row takes d^3 / 6 multiply-adds in all, but of those the fold
// is a product of matrices. The last block takes the place of the one that goes, so that nothing has holes.
//
// The matrix is stored negated, since products are added, in panels (kernels.h), whose lanes are columns. Threads share
// out rows, which nothing else depends on: no bit depends on their number.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <tuple>
#include <vector>

#include "../ceil_div.h"
#include "../elimination_checks.h"
#include "../pivot_noise.h"
#include "kernels.h"

namespace spade_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::parallel_for;
using torch::stable::Tensor;

constexpr int64_t kFoldedPivots = 64;
constexpr int64_t kPanels = kMostPanels;

// The lower triangle of a symmetric matrix [d, d]: three panels side by side have the rows from their first column on.
// Blocks of lanes on the diagonal are whole.
class TriangleLayout {
 public:
  TriangleLayout(int64_t columns, int64_t lanes) : lanes_(lanes), rows_(ceil_div(columns, lanes) * lanes) {}

  int64_t at(int64_t row, int64_t panel) const {
    const int64_t trio = panel / kPanels, first = trio * kPanels * lanes_;
    const int64_t before = kPanels * lanes_ * (trio * rows_ - kPanels * lanes_ * trio * (trio - 1) / 2);
    return before + panel % kPanels * panel_stride(panel) + (row - first) * lanes_;
  }
  // Between neighbours of three.
  int64_t panel_stride(int64_t panel) const { return (rows_ - panel / kPanels * kPanels * lanes_) * lanes_; }
  int64_t elements() const { return at(rows_, (rows_ / lanes_ - 1) / kPanels * kPanels + kPanels - 1); }

 private:
  int64_t lanes_, rows_;
};

// What the rows of one group of a layer share.
template <class T>
struct Shared {
  int64_t columns = 0, block_size = 1;
  std::vector<T> negated;   // -M, as TriangleLayout has it
  std::vector<T> diagonal;  // blocks on the diagonal of M, lower triangles by rows: [size * (size + 1) / 2, blocks]
  std::vector<T> least;     // pivots down to this are rounding noise, by column

  Shared() = default;
  Shared(const T* inverse, int64_t d, int64_t size) : columns(d), block_size(size), least(d) {
    const Kernels<T>& kernel = kernels<T>();
    const TriangleLayout layout(d, kernel.lanes);
    negated.resize(layout.elements());
    for (int64_t panel = 0; panel * kernel.lanes < d; ++panel) {
      const int64_t first = panel * kernel.lanes, last = std::min(first + kernel.lanes, d);
      for (int64_t row = first; row < d; ++row) {
        T* out = negated.data() + layout.at(row, panel);
        for (int64_t c = first; c < last; ++c) out[c - first] = -inverse[row * d + c];
      }
    }
    const int64_t blocks = d / size;
    for (int64_t a = 0; a < size; ++a) {
      for (int64_t b = 0; b <= a; ++b) {
        for (int64_t j = 0; j < blocks; ++j) diagonal.push_back(inverse[(j * size + a) * d + j * size + b]);
      }
    }
    const double share = least_pivot(d, std::numeric_limits<T>::epsilon());
    for (int64_t i = 0; i < d; ++i) least[i] = static_cast<T>(share * inverse[i * d + i]);
  }
};

// Prunes one row after the other, in memory of its own: about d^2 / 2 + 64 d numbers.
template <class T>
class RowEliminator {
 public:
  explicit RowEliminator(const std::vector<Shared<T>>& layers) : kernel_(kernels<T>()), lanes_(kernel_.lanes) {
    struct Part {
      T** start;
      int64_t elements;
    };
    std::vector<Part> parts{{&matrix_, 0}, {&vectors_, 0},      {&rows_, 0},   {&diagonal_, 0},
                            {&w_, 0},      {&least_, 0},        {&names_, 0},  {&lower_, 0},
                            {&steps_, 0},  {&coefficients_, 0}, {&scratch_, 0}};
    for (const Shared<T>& layer : layers) {
      const int64_t d = padded(layer.columns), size = layer.block_size, blocks = padded(layer.columns / size);
      const int64_t triangle = size * (size + 1) / 2, tiled = ceil_div(size, kernel_.rows) * kernel_.rows;
      const int64_t elements[] = {static_cast<int64_t>(layer.negated.size()),
                                  d * depth_of(size),
                                  tiled * d + std::max<int64_t>(0, size * blocks - d),  // update_blocks reads on
                                  triangle * blocks,
                                  size * blocks,
                                  d,
                                  blocks,
                                  size * size,
                                  size,
                                  padded(size) * depth_of(size),
                                  (triangle + 2 * size) * lanes_};
      for (size_t i = 0; i < parts.size(); ++i) parts[i].elements = std::max(parts[i].elements, elements[i]);
      places_.resize(std::max<size_t>(places_.size(), blocks));
    }
    constexpr int64_t kLine = 64 / sizeof(T);  // of the cache: no vector crosses two
    int64_t total = kLine;
    for (const Part& part : parts) total += ceil_div(part.elements, kLine) * kLine;
    memory_.resize(total);
    T* next = memory_.data() + (64 - reinterpret_cast<uintptr_t>(memory_.data()) % 64) / sizeof(T);
    for (const Part& part : parts) {
      *part.start = next;
      next += ceil_div(part.elements, kLine) * kLine;
    }
  }

  void run(const Shared<T>& layer, const T* weight, int32_t* order, T* losses) {
    begin(layer, weight);
    const int64_t steps = layer.columns / size_;
    for (int64_t step = 0; step < steps; ++step) {
      const T name = name_, loss = loss_ / 2;
      if (!std::isfinite(loss) || !eliminate(places_[static_cast<size_t>(name)])) {
        std::fill(order + step, order + steps, -1);
        std::fill(losses + step, losses + steps, std::numeric_limits<T>::quiet_NaN());
        return;
      }
      order[step] = static_cast<int32_t>(name);
      losses[step] = loss;
    }
  }

 private:
  static int64_t depth_of(int64_t size) { return std::max(kFoldedPivots, size); }
  int64_t padded(int64_t count) const { return ceil_div(count, lanes_) * lanes_; }
  int64_t panels(int64_t count) const { return ceil_div(count, lanes_); }
  T* at(int64_t row, int64_t panel) const { return matrix_ + layout_.at(row, panel); }
  T* vector(int64_t panel, int64_t k) const { return vectors_ + panel * panel_stride_ + k * lanes_; }
  T& weight(int64_t column) const { return w_[column % size_ * blocks_stride_ + column / size_]; }

  void begin(const Shared<T>& layer, const T* weight_row) {
    layout_ = TriangleLayout(layer.columns, lanes_);
    n_ = layer.columns;
    size_ = layer.block_size;
    filled_ = 0;
    panel_stride_ = depth_of(size_) * lanes_;
    row_stride_ = padded(n_);
    const int64_t blocks = n_ / size_;
    blocks_stride_ = padded(blocks);
    std::copy(layer.negated.begin(), layer.negated.end(), matrix_);
    std::copy(layer.least.begin(), layer.least.end(), least_);
    for (int64_t i = 0; i < size_ * (size_ + 1) / 2; ++i) {
      T* out = diagonal_ + i * blocks_stride_;
      std::fill(out + blocks, out + blocks_stride_, T(1));
      std::copy_n(layer.diagonal.begin() + i * blocks, blocks, out);
    }
    std::fill_n(w_, size_ * blocks_stride_, std::numeric_limits<T>::quiet_NaN());  // where there is no block
    std::fill_n(names_, blocks_stride_, std::numeric_limits<T>::infinity());
    for (int64_t i = 0; i < n_; ++i) weight(i) = weight_row[i];
    for (int64_t block = 0; block < blocks; ++block) {
      names_[block] = static_cast<T>(block);
      places_[block] = block;
    }
    if (size_ == 1) {
      std::fill_n(rows_, row_stride_, T(0));  // as after a pivot that changes nothing
      name_ = kernel_.sweep(rows_, vectors_, panel_stride_, coefficients_, 0, panels(n_), T(1), T(0), names_, w_,
                            diagonal_, &loss_);
    } else {
      name_ = kernel_.score_blocks(size_, w_, diagonal_, blocks_stride_, panels(blocks), names_, scratch_, &loss_);
    }
  }

  // Eliminates the block at place j, and finds the next. False where its pivot is rounding noise.
  bool eliminate(int64_t j) {
    if (!factor_pivot(j)) return false;
    if (filled_ + size_ > depth_of(size_)) fold();
    for (int64_t a = 0; a < size_; ++a) {
      fetch(j * size_ + a, rows_ + a * row_stride_);
      const T* from = vector((j * size_ + a) / lanes_, 0) + (j * size_ + a) % lanes_;
      T* to = coefficients_ + a / lanes_ * panel_stride_ + (size_ == 1 ? 0 : a % lanes_);
      const int64_t stride = size_ == 1 ? 1 : lanes_;
      for (int64_t k = 0; k < filled_; ++k) to[k * stride] = from[k * lanes_];
    }
    remove(j);
    const int64_t left = panels(n_);
    if (size_ == 1) {
      name_ = kernel_.sweep(rows_, vectors_, panel_stride_, coefficients_, filled_, left, *lower_, *steps_, names_, w_,
                            diagonal_, &loss_);
    } else {
      multiply_rows(left);
      kernel_.pivot_block(size_, lower_, rows_, row_stride_, left, vector(0, filled_), panel_stride_);
      const int64_t blocks = panels(n_ / size_);
      kernel_.update_blocks(size_, rows_, row_stride_, steps_, blocks, w_, diagonal_, blocks_stride_);
      name_ = kernel_.score_blocks(size_, w_, diagonal_, blocks_stride_, blocks, names_, scratch_, &loss_);
    }
    filled_ += size_;
    return true;
  }

  // L of the block at place j, and L^-1 w_j.
  bool factor_pivot(int64_t j) {
    for (int64_t a = 0; a < size_; ++a) {
      T* row = lower_ + a * size_;
      T rest = w_[a * blocks_stride_ + j];
      for (int64_t b = 0; b <= a; ++b) {
        const T* other = lower_ + b * size_;
        T value = diagonal_[(a * (a + 1) / 2 + b) * blocks_stride_ + j];
        for (int64_t c = 0; c < b; ++c) value -= row[c] * other[c];
        if (b == a && !(value > least_[j * size_ + a])) return false;
        row[b] = b < a ? value / other[b] : std::sqrt(value);
        if (b < a) rest -= row[b] * steps_[b];
      }
      steps_[a] = rest / row[a];
    }
    return true;
  }

  // The matrix's column.
  void fetch(int64_t column, T* out) const {
    const int64_t panel = column / lanes_, lane = column % lanes_;
    for (int64_t p = 0; p <= panel; ++p) std::copy_n(at(column, p), lanes_, out + p * lanes_);
    const T* below = at((panel + 1) * lanes_, panel) + lane;
    for (int64_t row = (panel + 1) * lanes_; row < n_; ++row, below += lanes_) out[row] = *below;
  }

  // The rows of the pivot block as they would be, had every vector been folded.
  void multiply_rows(int64_t left) const {
    for (int64_t row = 0; row < size_; row += kernel_.rows) {
      const T* of_rows = coefficients_ + row / lanes_ * panel_stride_ + row % lanes_;
      for (int64_t panel = 0; panel < left; panel += kPanels) {
        kernel_.multiply(std::min(kPanels, left - panel), of_rows, vector(panel, 0), panel_stride_, filled_,
                         rows_ + row * row_stride_ + panel * lanes_, row_stride_, lanes_);
      }
    }
  }

  // Puts the last block in the place of block j.
  void remove(int64_t j) {
    const int64_t last = n_ / size_ - 1;
    for (int64_t column = (j + 1) * size_ - 1; column >= j * size_; --column) {
      --n_;
      if (column < n_) move_column(n_, column);
    }
    for (int64_t i = 0; i < size_ * (size_ + 1) / 2; ++i) {
      diagonal_[i * blocks_stride_ + j] = diagonal_[i * blocks_stride_ + last];
    }
    for (int64_t e = 0; e < size_; ++e) w_[e * blocks_stride_ + j] = w_[e * blocks_stride_ + last];
    names_[j] = names_[last];
    places_[static_cast<size_t>(names_[j])] = j;
    w_[last] = std::numeric_limits<T>::quiet_NaN();
  }

  // Of the last column, to an earlier one.
  void move_column(int64_t last, int64_t column) {
    const int64_t panel = column / lanes_, lane = column % lanes_;
    for (int64_t p = 0; p <= panel; ++p) std::copy_n(at(last, p), lanes_, at(column, p));
    T* below = at(panel * lanes_, panel) + lane;
    for (int64_t p = panel; p <= last / lanes_; ++p) {
      const T* row = at(last, p);
      const int64_t count = std::min(lanes_, last - p * lanes_);
      for (int64_t l = 0; l < count; ++l, below += lanes_) *below = row[l];
    }
    at(column, panel)[lane] = at(last, last / lanes_)[last % lanes_];
    T* to = vector(panel, 0) + lane;
    const T* from = vector(last / lanes_, 0) + last % lanes_;
    for (int64_t k = 0; k < filled_; ++k) to[k * lanes_] = from[k * lanes_];
    for (int64_t a = 0; a < size_; ++a) rows_[a * row_stride_ + column] = rows_[a * row_stride_ + last];
    least_[column] = least_[last];
  }

  void fold() {
    const int64_t end = panels(n_);
    for (int64_t panel = 0; panel < end; panel += kPanels) {
      const int64_t stride = layout_.panel_stride(panel);
      for (int64_t row = panel * lanes_; row < n_; row += kernel_.rows) {
        const int64_t count = std::min(kPanels, row / lanes_ + 1 - panel);  // up to the diagonal
        kernel_.multiply(count, vector(row / lanes_, 0) + row % lanes_, vector(panel, 0), panel_stride_, filled_,
                         at(row, panel), lanes_, stride);
      }
    }
    filled_ = 0;
  }

  const Kernels<T>& kernel_;
  const int64_t lanes_;
  std::vector<T> memory_;  // all that follows
  T* matrix_;              // -M as of the last fold
  T* vectors_;             // pivot vectors since: [panels, depth, lanes]
  T* rows_;                // of the pivot block: [size, columns]
  T* diagonal_;            // [size * (size + 1) / 2, blocks]
  T* w_;                   // [size, blocks], NaN where there is no block
  T* least_;               // by column, as names_ by block: moved with them
  T* names_;               // where a block was at first
  T* lower_;               // [size, size]
  T* steps_;               // [size]
  T* coefficients_;        // what the block's columns have in `vectors_`: [panels of size, depth, lanes], or [depth]
  T* scratch_;
  std::vector<int64_t> places_;  // of blocks, by name
  TriangleLayout layout_{1, 1};
  int64_t n_ = 0, size_ = 1, filled_ = 0;  // columns left, columns of a block, pivot vectors
  int64_t panel_stride_ = 0, row_stride_ = 0, blocks_stride_ = 0;
  T name_ = 0, loss_ = 0;  // of the block that is next; twice its loss
};

// All layers of type T.
template <class T>
void eliminate_all(const std::vector<Tensor>& weights, const std::vector<Tensor>& inverses,
                   const std::vector<int64_t>& block_sizes, const std::vector<Tensor>& orders,
                   const std::vector<Tensor>& losses) {
  struct Group {
    const T* inverse;
    int64_t columns, block_size;
  };
  struct Row {
    size_t group;
    const T* weight;
    int32_t* order;
    T* losses;
  };
  std::vector<Group> groups;
  std::vector<Row> rows;
  constexpr ScalarType kType = sizeof(T) == 4 ? ScalarType::Float : ScalarType::Double;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor& weight = weights[i];
    if (weight.scalar_type() != kType || weight.numel() == 0) continue;
    const int64_t count = weight.size(1), d = weight.size(2), blocks = d / block_sizes[i];
    for (int64_t g = 0; g < weight.size(0); ++g) {
      for (int64_t r = g * count; r < (g + 1) * count; ++r) {
        rows.push_back({groups.size(), weight.const_data_ptr<T>() + r * d,
                        orders[i].mutable_data_ptr<int32_t>() + r * blocks,
                        losses[i].mutable_data_ptr<T>() + r * blocks});
      }
      groups.push_back({inverses[i].const_data_ptr<T>() + g * d * d, d, block_sizes[i]});
    }
  }
  if (rows.empty()) return;
  std::vector<Shared<T>> shared(groups.size());
  parallel_for(0, static_cast<int64_t>(groups.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      shared[g] = Shared<T>(groups[g].inverse, groups[g].columns, groups[g].block_size);
    }
  });
  // The longest first: no thread is left with one when the others are done.
  std::stable_sort(rows.begin(), rows.end(),
                   [&](const Row& a, const Row& b) { return groups[a.group].columns > groups[b.group].columns; });
  std::atomic<size_t> next{0};
  const auto threads = std::min<int64_t>(torch::stable::get_num_threads(), static_cast<int64_t>(rows.size()));
  parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    RowEliminator<T> eliminator(shared);
    for (size_t i = next++; i < rows.size(); i = next++) {
      eliminator.run(shared[rows[i].group], rows[i].weight, rows[i].order, rows[i].losses);
    }
  });
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>> elimination_orders(std::vector<Tensor> weights,
                                                                        std::vector<Tensor> inverses,
                                                                        std::vector<int64_t> block_sizes) {
  check_eliminations(weights, inverses, block_sizes);
  std::vector<Tensor> orders, losses;
  for (size_t i = 0; i < weights.size(); ++i) {
    const int64_t groups = weights[i].size(0), rows = weights[i].size(1), blocks = weights[i].size(2) / block_sizes[i];
    weights[i] = torch::stable::contiguous(weights[i]);
    inverses[i] = torch::stable::contiguous(inverses[i]);
    orders.push_back(torch::stable::new_empty(weights[i], {groups, rows, blocks}, ScalarType::Int));
    losses.push_back(torch::stable::new_empty(weights[i], {groups, rows, blocks}));
  }
  eliminate_all<float>(weights, inverses, block_sizes, orders, losses);
  eliminate_all<double>(weights, inverses, block_sizes, orders, losses);
  return {orders, losses};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spade_fast, CPU, m) {
  m.impl("elimination_orders", TORCH_BOX(&elimination_orders));
}

}  // namespace spade_fast
