// How the Gram matrix of a convolution's patches is put together from smaller ones.
//
// Output y of a convolution reads input row stride * y + o_i at tap i, o_i = i * dilation - padding. Split o_i into
// stride * q_i + r_i with 0 <= r_i < stride: the tap reads row y + q_i of phase image r_i, which holds every stride-th
// input row from r_i on. Hence the block of a pair of taps (i, j) is the product of phase image r_i with phase image
// r_j shifted by q_j - q_i, summed over the rows z = y + q_i whose output y exists and whose two taps lie inside the
// input. Pairs of equal j - i and r_i share phases and shift; their row ranges differ only near the border. So each
// such class is cut into pieces at all ends of its ranges, one small product is summed for every piece, and a block is
// the sum of the pieces in its range. The same in x; a class of the image is a class of rows and one of columns.
//
// With few channels the products are too small to be worth it: the plan is then flat, one product of whole patches.
// Nothing here depends on torch, on the instruction set or on the number of images.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

namespace spade_fast {

struct ConvGeometry {
  int64_t channels, height, width;  // of one group's input, one image
  int64_t kernel[2], stride[2], padding[2], dilation[2];
  int64_t groups;

  int64_t taps() const { return kernel[0] * kernel[1]; }
  int64_t columns() const { return channels * taps(); }
  int64_t size(int axis) const { return axis == 0 ? height : width; }
  int64_t reach(int axis) const { return dilation[axis] * (kernel[axis] - 1) + 1; }
  int64_t outputs(int axis) const { return (size(axis) + 2 * padding[axis] - reach(axis)) / stride[axis] + 1; }
};

// Pairs of taps (i, i + difference) along one axis whose first tap reads phase image `phase`.
struct AxisClass {
  int64_t difference;
  int64_t phase, other_phase;  // of tap i, of tap i + difference
  int64_t shift;               // position in the other phase image minus position in this one
  std::vector<int64_t> cuts;   // ends of the pieces: piece p covers positions [cuts[p], cuts[p + 1])
  struct Pair {
    int64_t tap;                     // i
    int64_t first_piece, end_piece;  // its range
  };
  std::vector<Pair> pairs;

  int64_t pieces() const { return cuts.empty() ? 0 : static_cast<int64_t>(cuts.size()) - 1; }
};

// What one small product multiplies: a class of rows and a class of columns.
struct GramClass {
  const AxisClass* rows;
  const AxisClass* columns;
  int64_t map, other_map;  // indices into GramPlan::maps
  int64_t first_sum;       // of rows->pieces() * columns->pieces() sums, the pieces of the columns fastest
  bool symmetric;          // a map with itself, unshifted: only its upper triangle is computed
};

// A phase image: rows y0, y0 + stride, ... and columns x0, x0 + stride, ... of the input.
struct PhaseMap {
  int64_t y0, x0, height, width;
};

struct GramPlan {
  ConvGeometry geometry;
  bool flat;  // one product of whole patches; what follows is then empty
  std::array<std::vector<AxisClass>, 2> axes;
  std::vector<PhaseMap> maps;
  std::vector<GramClass> classes;
  int64_t sums;  // number of small products that are kept apart

  explicit GramPlan(const ConvGeometry& geometry);
  GramPlan(const GramPlan&) = delete;  // the classes point into `axes`
  GramPlan& operator=(const GramPlan&) = delete;

  // Depthwise: a small product is a number for every group.
  bool depthwise() const { return geometry.channels == 1 && !flat; }
  // What holds the sums: [groups, d, d], [sums, groups] or [groups, sums, channels, channels].
  std::vector<int64_t> shape() const;
};

// A pair of taps (i, j), i not after j: its block of the Gram matrix is the sum of these of the class's sums.
struct TapPair {
  int64_t tap, other_tap;
  std::vector<int64_t> sums;
  bool symmetric;
};
std::vector<TapPair> tap_pairs(const GramPlan& plan);

// The outputs in [begin, end) whose tap at `offset` reads inside the input: 0 <= stride * y + offset < size.
struct Span {
  int64_t begin, end;
};
Span inside(int64_t offset, int64_t stride, int64_t size, int64_t outputs);

}  // namespace spade_fast
