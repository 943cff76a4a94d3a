// Bodies of the inner loops. Each kernels_<set>.cpp defines
//   SPADE_FAST_TARGET        attribute of every function here, so that the compiler may use the instruction set
//   SPADE_FAST_VECTOR_BYTES  bytes of one vector
//   SPADE_FAST_TILE_ROWS, SPADE_FAST_TILE_PANELS  rows * panels accumulators must fit the registers
// and includes this once. Nothing from the standard library is called here: an inline function compiled for a larger
// instruction set could be what the linker keeps for all.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace spade_fast {
namespace {

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(SPADE_FAST_VECTOR_BYTES), aligned(sizeof(T)), may_alias));
};
template <class T>
using Vector = typename VectorOf<T>::type;
template <class T>
constexpr int kLanes = SPADE_FAST_VECTOR_BYTES / sizeof(T);
template <int kBytes>
struct IntegerOfBytes;
template <>
struct IntegerOfBytes<4> {
  using type = int32_t;
};
template <>
struct IntegerOfBytes<8> {
  using type = int64_t;
};
template <int kBytes>
using IntegerOf = typename IntegerOfBytes<kBytes>::type;
// 0, 1, ..., kCount - 1 as template arguments.
template <int64_t... kIndex>
struct Indices {};
template <int64_t kCount, int64_t... kIndex>
struct IndicesUpTo : IndicesUpTo<kCount - 1, kCount - 1, kIndex...> {};
template <int64_t... kIndex>
struct IndicesUpTo<0, kIndex...> {
  using type = Indices<kIndex...>;
};
constexpr int kTileRows = SPADE_FAST_TILE_ROWS, kTilePanels = SPADE_FAST_TILE_PANELS;
static_assert(kLanes<float> <= kLargestLanes && kTilePanels <= kMostPanels && kTileRows <= kMostRows,
              "buffers of a tile are made for these");

template <class T, int kPanels>
SPADE_FAST_TARGET void multiply_panels(const T* a, const T* b, int64_t panel_stride, int64_t count, T* out,
                                       int64_t out_stride, int64_t out_panel_stride) {
  Vector<T> sums[kTileRows][kPanels] = {};
  for (int64_t k = 0; k < count; ++k) {
    Vector<T> right[kPanels];
    for (int p = 0; p < kPanels; ++p) {
      right[p] = *reinterpret_cast<const Vector<T>*>(b + p * panel_stride + k * kLanes<T>);
    }
    for (int r = 0; r < kTileRows; ++r) {
      const T left = a[k * kLanes<T> + r];
      for (int p = 0; p < kPanels; ++p) sums[r][p] += left * right[p];
    }
  }
  for (int r = 0; r < kTileRows; ++r) {
    for (int p = 0; p < kPanels; ++p) {
      *reinterpret_cast<Vector<T>*>(out + r * out_stride + p * out_panel_stride) += sums[r][p];
    }
  }
}

template <class T>
SPADE_FAST_TARGET void multiply(int64_t panels, const T* a, const T* b, int64_t panel_stride, int64_t count, T* out,
                                int64_t out_stride, int64_t out_panel_stride) {
  static_assert(kTilePanels == 3 && kLanes<T> % kTileRows == 0, "a tile's rows lie in one panel");
  if (panels == 3) return multiply_panels<T, 3>(a, b, panel_stride, count, out, out_stride, out_panel_stride);
  if (panels == 2) return multiply_panels<T, 2>(a, b, panel_stride, count, out, out_stride, out_panel_stride);
  multiply_panels<T, 1>(a, b, panel_stride, count, out, out_stride, out_panel_stride);
}

template <class T>
SPADE_FAST_TARGET void substitute(int64_t panels, int64_t rows, const T* m, const T* sums, T* out,
                                  int64_t panel_stride) {
  for (int64_t p = 0; p < panels; ++p) {
    auto* row = reinterpret_cast<Vector<T>*>(out + p * panel_stride);
    for (int64_t r = rows - 1; r >= 0; --r) {
      Vector<T> rest = row[r] - *reinterpret_cast<const Vector<T>*>(sums + (r * panels + p) * kLanes<T>);
      for (int64_t k = r + 1; k < rows; ++k) rest -= m[k * kLanes<T> + r] * row[k];
      row[r] = rest / m[r * kLanes<T> + r];
    }
  }
}

template <class T>
SPADE_FAST_TARGET void correlate(const T* a, const T* b, int64_t count, T* out) {
  constexpr int kChains = 4;  // additions in flight: one chain would wait for each
  Vector<T> sums[kChains] = {};
  const auto* left = reinterpret_cast<const Vector<T>*>(a);
  const auto* right = reinterpret_cast<const Vector<T>*>(b);
  int64_t k = 0;
  for (; k + kChains <= count; k += kChains) {
    for (int c = 0; c < kChains; ++c) sums[c] += left[k + c] * right[k + c];
  }
  for (; k < count; ++k) sums[0] += left[k] * right[k];
  *reinterpret_cast<Vector<T>*>(out) += (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

template <class T>
SPADE_FAST_TARGET void copy(const T* from, int64_t from_step, int64_t count, T* out, int64_t out_step) {
  for (int64_t k = 0; k < count; ++k) {
    *reinterpret_cast<Vector<T>*>(out + k * out_step) = *reinterpret_cast<const Vector<T>*>(from + k * from_step);
  }
}

// {a0, b0, a1, b1, ...} from the lower halves of two vectors, or from the upper ones.
template <class T, bool kUpper, int64_t... kIndex>
SPADE_FAST_TARGET inline Vector<T> interleave(Vector<T> a, Vector<T> b, Indices<kIndex...>) {
  constexpr int64_t kFirst = kUpper ? kLanes<T> / 2 : 0;
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (kFirst + kIndex / 2 + kIndex % 2 * kLanes<T>)...);
#else
  typedef IntegerOf<sizeof(T)> Mask __attribute__((vector_size(SPADE_FAST_VECTOR_BYTES)));
  return __builtin_shuffle(a, b, Mask{(kFirst + kIndex / 2 + kIndex % 2 * kLanes<T>)...});
#endif
}

template <class T>
SPADE_FAST_TARGET void transpose(const T* from, int64_t lane_step, int64_t count, T* out, int64_t out_step) {
  constexpr int kHalf = kLanes<T> / 2;
  using All = typename IndicesUpTo<kLanes<T>>::type;
  int64_t k = 0;
  for (; k + kLanes<T> <= count; k += kLanes<T>) {
    Vector<T> block[kLanes<T>], shuffled[kLanes<T>];
    for (int l = 0; l < kLanes<T>; ++l) block[l] = *reinterpret_cast<const Vector<T>*>(from + l * lane_step + k);
    // Each perfect shuffle of all elements turns the row and column bits of their places on by one.
    for (int round = 1; round < kLanes<T>; round *= 2) {
      for (int l = 0; l < kHalf; ++l) {
        shuffled[2 * l] = interleave<T, false>(block[l], block[l + kHalf], All{});
        shuffled[2 * l + 1] = interleave<T, true>(block[l], block[l + kHalf], All{});
      }
      for (int l = 0; l < kLanes<T>; ++l) block[l] = shuffled[l];
    }
    for (int l = 0; l < kLanes<T>; ++l) *reinterpret_cast<Vector<T>*>(out + (k + l) * out_step) = block[l];
  }
  for (; k < count; ++k) {
    for (int l = 0; l < kLanes<T>; ++l) out[k * out_step + l] = from[l * lane_step + k];
  }
}

template <class T>
SPADE_FAST_TARGET void combine(const T* coefficients, const T* vectors, int64_t stride, int64_t count, int64_t rows,
                               T* out) {
  constexpr int kVectors = 4;
  int64_t r = 0;
  for (; r + kVectors * kLanes<T> <= rows; r += kVectors * kLanes<T>) {
    Vector<T> sums[kVectors];
    for (int v = 0; v < kVectors; ++v) sums[v] = *reinterpret_cast<Vector<T>*>(out + r + v * kLanes<T>);
    for (int64_t j = 0; j < count; ++j) {
      const T* vector = vectors + j * stride + r;
      for (int v = 0; v < kVectors; ++v) {
        sums[v] += coefficients[j] * *reinterpret_cast<const Vector<T>*>(vector + v * kLanes<T>);
      }
    }
    for (int v = 0; v < kVectors; ++v) *reinterpret_cast<Vector<T>*>(out + r + v * kLanes<T>) = sums[v];
  }
  if (r == rows) return;
  for (int64_t j = 0; j < count; ++j) {
    for (int64_t rest = r; rest < rows; ++rest) out[rest] += coefficients[j] * vectors[j * stride + rest];
  }
}

template <class T>
SPADE_FAST_TARGET void score(const T* __restrict weight, const T* __restrict sum, T pivot, int64_t rows,
                             T* __restrict change, T* __restrict score) {
  for (int64_t r = 0; r < rows; ++r) {
    const T shift = sum[r] / pivot;
    const T signed_score = (weight[r] + shift) * pivot;
    const T value = signed_score > 0 ? signed_score : 0 - signed_score;  // of -0 too it is 0
    change[r] = -shift;
    score[r] = value == value ? value : T(__builtin_inf());  // NaN has no place in an order
  }
}

template <class T>
SPADE_FAST_TARGET double prune(const T* __restrict sum, const T* __restrict score, T threshold, bool ties, T pivot,
                               int64_t rows, T* __restrict weight, T* __restrict delta, bool* __restrict kept) {
  constexpr int kPartial = 8;  // sums in flight: one would wait for each addition
  double losses[kPartial] = {};
  double loss = 0;
  for (int64_t begin = 0; begin < rows; begin += kPartial) {
    const int64_t end = begin + kPartial < rows ? begin + kPartial : rows;
    for (int64_t r = begin; r < end; ++r) {
      const T current = weight[r] + sum[r] / pivot;
      const bool pruned = ties ? score[r] <= threshold : score[r] < threshold;
      const T sparse = pruned ? T(0) : current;
      const double cost = pruned ? static_cast<double>(current) * static_cast<double>(pivot) : 0.0;
      losses[r - begin] += cost * cost;
      kept[r] = !pruned;
      delta[r] = weight[r] - sparse;
      weight[r] = sparse;
    }
  }
  for (int i = 0; i < kPartial; ++i) loss += losses[i];
  return loss;
}

// The least score of what each lane has seen, and its name: of equal scores the lowest name.
template <class T>
struct Lowest {
  Vector<T> score = Vector<T>{} + T(__builtin_inf()), name = Vector<T>{} + T(__builtin_inf());

  SPADE_FAST_TARGET inline void see(Vector<T> other, Vector<T> other_name) {
    const auto lower = (other < score) | ((other == score) & (other_name < name));
    score = lower ? other : score;
    name = lower ? other_name : name;
  }

  SPADE_FAST_TARGET inline T name_of_least(T* least) const {
    T best = score[0], best_name = name[0];
    for (int l = 1; l < kLanes<T>; ++l) {
      if (score[l] < best || (score[l] == best && name[l] < best_name)) {
        best = score[l];
        best_name = name[l];
      }
    }
    *least = best;
    return best_name;
  }
};

template <class T, int kPanels>
SPADE_FAST_TARGET inline void sweep_panels(const T* row, T* vectors, int64_t panel_stride, const T* coefficients,
                                           int64_t count, T root, T step, const T* names, T* w, T* g,
                                           Lowest<T>& lowest) {
  Vector<T> sums[kPanels];
  for (int p = 0; p < kPanels; ++p) sums[p] = *reinterpret_cast<const Vector<T>*>(row + p * kLanes<T>);
  for (int64_t k = 0; k < count; ++k) {
    const T coefficient = coefficients[k];
    for (int p = 0; p < kPanels; ++p) {
      sums[p] += coefficient * *reinterpret_cast<const Vector<T>*>(vectors + p * panel_stride + k * kLanes<T>);
    }
  }
  for (int p = 0; p < kPanels; ++p) {
    const Vector<T> vector = sums[p] / -root;
    *reinterpret_cast<Vector<T>*>(vectors + p * panel_stride + count * kLanes<T>) = vector;
    auto& weights = *reinterpret_cast<Vector<T>*>(w + p * kLanes<T>);
    auto& diagonal = *reinterpret_cast<Vector<T>*>(g + p * kLanes<T>);
    weights -= step * vector;
    diagonal -= vector * vector;
    lowest.see(weights * weights / diagonal, *reinterpret_cast<const Vector<T>*>(names + p * kLanes<T>));
  }
}

template <class T>
SPADE_FAST_TARGET T sweep(const T* row, T* vectors, int64_t panel_stride, const T* coefficients, int64_t count,
                          int64_t panels, T root, T step, const T* names, T* w, T* g, T* least) {
  constexpr int kTogether = 4;  // sums in flight: one would wait for each addition
  Lowest<T> lowest;
  int64_t p = 0;
  for (; p + kTogether <= panels; p += kTogether) {
    const int64_t at = p * kLanes<T>;
    sweep_panels<T, kTogether>(row + at, vectors + p * panel_stride, panel_stride, coefficients, count, root, step,
                               names + at, w + at, g + at, lowest);
  }
  for (; p < panels; ++p) {
    const int64_t at = p * kLanes<T>;
    sweep_panels<T, 1>(row + at, vectors + p * panel_stride, panel_stride, coefficients, count, root, step, names + at,
                       w + at, g + at, lowest);
  }
  return lowest.name_of_least(least);
}

template <class T>
SPADE_FAST_TARGET void pivot_block(int64_t size, const T* lower, T* rows, int64_t row_stride, int64_t panels,
                                   T* vectors, int64_t panel_stride) {
  for (int64_t p = 0; p < panels; ++p) {
    auto* out = reinterpret_cast<Vector<T>*>(vectors + p * panel_stride);
    for (int64_t a = 0; a < size; ++a) {
      auto& row = *reinterpret_cast<Vector<T>*>(rows + a * row_stride + p * kLanes<T>);
      Vector<T> rest = -row;
      for (int64_t c = 0; c < a; ++c) rest -= lower[a * size + c] * out[c];
      row = out[a] = rest / lower[a * size + a];
    }
  }
}

// Element e of each of the blocks from `block` on.
template <class T>
SPADE_FAST_TARGET inline Vector<T> of_blocks(const T* row, int64_t block, int64_t size, int64_t e) {
  Vector<T> values;
  for (int l = 0; l < kLanes<T>; ++l) values[l] = row[(block + l) * size + e];
  return values;
}

template <class T>
SPADE_FAST_TARGET void update_blocks(int64_t size, const T* rows, int64_t row_stride, const T* step, int64_t panels,
                                     T* w, T* diagonal, int64_t stride) {
  constexpr int64_t kTogether = 16;  // elements of a block whose values are held at a time
  for (int64_t p = 0; p < panels; ++p) {
    const int64_t block = p * kLanes<T>;
    for (int64_t a = 0; a < size; ++a) {
      const T* row = rows + a * row_stride;
      for (int64_t begin = 0; begin < size; begin += kTogether) {
        const int64_t end = begin + kTogether < size ? begin + kTogether : size;
        Vector<T> held[kTogether];
        for (int64_t e = begin; e < end; ++e) {
          held[e - begin] = of_blocks(row, block, size, e);
          *reinterpret_cast<Vector<T>*>(w + e * stride + block) -= step[a] * held[e - begin];
        }
        for (int64_t e = begin; e < size; ++e) {
          const Vector<T> left = e < end ? held[e - begin] : of_blocks(row, block, size, e);
          T* out = diagonal + e * (e + 1) / 2 * stride + block;
          for (int64_t f = begin; f < (e + 1 < end ? e + 1 : end); ++f) {
            *reinterpret_cast<Vector<T>*>(out + f * stride) -= left * held[f - begin];
          }
        }
      }
    }
  }
}

template <class T>
SPADE_FAST_TARGET T score_blocks(int64_t size, const T* w, const T* diagonal, int64_t stride, int64_t panels,
                                 const T* names, T* scratch, T* least) {
  auto* lower = reinterpret_cast<Vector<T>*>(scratch);  // L of D = L P L^T by rows, with 1 / P on its diagonal
  Vector<T>* half = lower + size * (size + 1) / 2;      // L^-1 w
  Vector<T>* scaled = half + size;                      // a row of L P
  Lowest<T> lowest;
  for (int64_t p = 0; p < panels; ++p) {
    const T* from = diagonal + p * kLanes<T>;
    Vector<T> score{};
    for (int64_t a = 0; a < size; ++a) {
      Vector<T>* row = lower + a * (a + 1) / 2;
      Vector<T> rest = *reinterpret_cast<const Vector<T>*>(w + a * stride + p * kLanes<T>);
      const T* elements = from + a * (a + 1) / 2 * stride;
      Vector<T> pivot = *reinterpret_cast<const Vector<T>*>(elements + a * stride);
      for (int64_t b = 0; b < a; ++b) {
        const Vector<T>* other = lower + b * (b + 1) / 2;
        Vector<T> value = *reinterpret_cast<const Vector<T>*>(elements + b * stride);
        for (int64_t c = 0; c < b; ++c) value -= scaled[c] * other[c];
        scaled[b] = value;
        row[b] = value * other[b];
        pivot -= value * row[b];
        rest -= row[b] * half[b];
      }
      row[a] = pivot > T(0) ? T(1) / pivot : Vector<T>{} + T(__builtin_nan(""));
      half[a] = rest;
      score += rest * rest * row[a];
    }
    lowest.see(score, *reinterpret_cast<const Vector<T>*>(names + p * kLanes<T>));
  }
  return lowest.name_of_least(least);
}

template <class T>
SPADE_FAST_TARGET void add_scattered(const T* __restrict from, const int64_t* __restrict starts,
                                     const T* __restrict weights, int64_t count, T* __restrict out) {
  for (int64_t i = 0; i < count; ++i) out[i] += weights[i] * from[starts[i]];
}

template <class T>
SPADE_FAST_TARGET inline T clamp_to_unit(T value) {
  value = value < 0 ? T(0) : value;
  return value > 1 ? T(1) : value;
}

// One channel of a colour given by its hue in sixths of a turn, value and chroma:
// value - chroma * clamp(min(k, 4 - k), 0, 1) at k = (hue + corner) mod 6, where 0 <= hue + corner < 18.
template <class T>
SPADE_FAST_TARGET inline T channel_of(T hue_and_corner, T value, T chroma) {
  T k = hue_and_corner;
  k = k >= 6 ? k - 6 : k;
  k = k >= 6 ? k - 6 : k;
  return value - chroma * clamp_to_unit(k < 4 - k ? k : 4 - k);
}

template <class T>
SPADE_FAST_TARGET void jitter(T before, T turn, T after, int64_t count, T* __restrict red, T* __restrict green,
                              T* __restrict blue) {
  const T shift = 6 * (turn - __builtin_floor(turn));
  for (int64_t i = 0; i < count; ++i) {
    const T r = clamp_to_unit(red[i] * before), g = clamp_to_unit(green[i] * before),
            b = clamp_to_unit(blue[i] * before);
    const T larger = r > g ? r : g, smaller = r < g ? r : g;
    const T value = larger > b ? larger : b, chroma = value - (smaller < b ? smaller : b);
    const T safe = chroma > 0 ? chroma : T(1);
    const T from_green = 2 + (b - r) / safe, from_blue = 4 + (r - g) / safe, from_red = (g - b) / safe;
    const T hue = (value == r ? from_red : value == g ? from_green : from_blue) + shift;  // -1..11
    red[i] = clamp_to_unit(channel_of(hue + 5, value, chroma) * after);
    green[i] = clamp_to_unit(channel_of(hue + 3, value, chroma) * after);
    blue[i] = clamp_to_unit(channel_of(hue + 1, value, chroma) * after);
  }
}

template <class T>
constexpr Kernels<T> kTable = {kLanes<T>,        kTileRows, kTilePanels,    multiply<T>,      substitute<T>,
                               correlate<T>,     copy<T>,   transpose<T>,   combine<T>,       score<T>,
                               prune<T>,         sweep<T>,  pivot_block<T>, update_blocks<T>, score_blocks<T>,
                               add_scattered<T>, jitter<T>};

}  // namespace
}  // namespace spade_fast
