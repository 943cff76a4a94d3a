#include "gram_plan.h"

#include <algorithm>
#include <map>
#include <utility>

#include "ceil_div.h"

namespace spade_fast {
namespace {

// Work of a product in multiply-adds of nominal vectors, for choosing between plans alike on every machine.
constexpr int64_t kNominalLanes = 16, kNominalRows = 8;
constexpr double kGatherCost = 1.5;  // of one gathered element, in the same unit

double full_cost(int64_t n) {
  return static_cast<double>(ceil_div(n, kNominalRows) * kNominalRows) *
         static_cast<double>(ceil_div(n, kNominalLanes));
}
double triangle_cost(int64_t n) {
  return full_cost(n) * (n + kNominalLanes) / (2.0 * n);
}
double gather_cost(int64_t n) {
  return kGatherCost * static_cast<double>(ceil_div(n, kNominalLanes) * kNominalLanes);
}

std::vector<AxisClass> axis_classes(const ConvGeometry& g, int axis) {
  const int64_t taps = g.kernel[axis], stride = g.stride[axis], outputs = g.outputs(axis);
  const auto offset = [&](int64_t tap) { return tap * g.dilation[axis] - g.padding[axis]; };
  const auto phase = [&](int64_t tap) { return ((offset(tap) % stride) + stride) % stride; };
  const auto quotient = [&](int64_t tap) { return (offset(tap) - phase(tap)) / stride; };

  std::map<std::pair<int64_t, int64_t>, AxisClass> found;  // by (difference, phase)
  std::map<std::pair<int64_t, int64_t>, std::vector<Span>> ranges;
  for (int64_t i = 0; i < taps; ++i) {
    for (int64_t j = 0; j < taps; ++j) {
      const Span first = inside(offset(i), stride, g.size(axis), outputs);
      const Span second = inside(offset(j), stride, g.size(axis), outputs);
      const int64_t begin = std::max(first.begin, second.begin), end = std::min(first.end, second.end);
      const auto key = std::make_pair(j - i, phase(i));
      AxisClass& entry =
          found.try_emplace(key, AxisClass{j - i, phase(i), phase(j), quotient(j) - quotient(i), {}, {}}).first->second;
      entry.pairs.push_back({i, 0, 0});
      ranges[key].push_back(begin < end ? Span{begin + quotient(i), end + quotient(i)} : Span{0, 0});
    }
  }

  std::vector<AxisClass> classes;
  for (auto& [key, entry] : found) {
    for (const Span& range : ranges[key]) {
      if (range.begin < range.end) entry.cuts.insert(entry.cuts.end(), {range.begin, range.end});
    }
    std::sort(entry.cuts.begin(), entry.cuts.end());
    entry.cuts.erase(std::unique(entry.cuts.begin(), entry.cuts.end()), entry.cuts.end());
    for (size_t p = 0; p < entry.pairs.size(); ++p) {
      const Span& range = ranges[key][p];
      if (range.begin >= range.end) continue;
      const auto piece = [&](int64_t cut) {
        return std::lower_bound(entry.cuts.begin(), entry.cuts.end(), cut) - entry.cuts.begin();
      };
      entry.pairs[p].first_piece = piece(range.begin);
      entry.pairs[p].end_piece = piece(range.end);
    }
    classes.push_back(std::move(entry));
  }
  return classes;
}

}  // namespace

Span inside(int64_t offset, int64_t stride, int64_t size, int64_t outputs) {
  const int64_t begin = offset >= 0 ? 0 : ceil_div(-offset, stride);
  const int64_t end = size > offset ? (size - offset - 1) / stride + 1 : 0;
  return {std::min(begin, outputs), std::max(std::min(begin, outputs), std::min(end, outputs))};
}

GramPlan::GramPlan(const ConvGeometry& g) : geometry(g), flat(g.taps() == 1), sums(0) {
  if (flat) return;
  axes = {axis_classes(g, 0), axis_classes(g, 1)};
  std::map<std::pair<int64_t, int64_t>, int64_t> map_index;
  const auto map_of = [&](int64_t phase_y, int64_t phase_x) {
    const auto [place, is_new] = map_index.try_emplace({phase_y, phase_x}, static_cast<int64_t>(maps.size()));
    // A phase beyond the input's size belongs to taps that only ever read padding: its map is empty.
    const int64_t rows = std::max<int64_t>(0, ceil_div(g.height - phase_y, g.stride[0]));
    const int64_t columns = std::max<int64_t>(0, ceil_div(g.width - phase_x, g.stride[1]));
    if (is_new) maps.push_back({phase_y, phase_x, rows, columns});
    return place->second;
  };
  double cost = 0;
  for (const AxisClass& rows : axes[0]) {
    for (const AxisClass& columns : axes[1]) {
      // The blocks of the opposite differences are the transposes of these.
      if (rows.difference < 0 || (rows.difference == 0 && columns.difference < 0)) continue;
      const int64_t map = map_of(rows.phase, columns.phase);
      const int64_t other_map = map_of(rows.other_phase, columns.other_phase);
      const bool symmetric = rows.difference == 0 && columns.difference == 0;
      classes.push_back({&rows, &columns, map, other_map, sums, symmetric});
      sums += rows.pieces() * columns.pieces();
      cost += symmetric ? triangle_cost(g.channels) : full_cost(g.channels);
    }
  }
  cost += static_cast<double>(maps.size()) * gather_cost(g.channels);
  if (g.channels == 1 && g.groups > 1) return;  // depthwise has no matrix products to speak of
  if (cost < triangle_cost(g.columns()) + gather_cost(g.columns())) return;
  flat = true;
  axes = {};
  maps.clear();
  classes.clear();
  sums = 0;
}

std::vector<int64_t> GramPlan::shape() const {
  if (flat) return {geometry.groups, geometry.columns(), geometry.columns()};
  if (depthwise()) return {sums, geometry.groups};
  return {geometry.groups, sums, geometry.channels, geometry.channels};
}

std::vector<TapPair> tap_pairs(const GramPlan& plan) {
  const ConvGeometry& g = plan.geometry;
  std::vector<TapPair> pairs;
  for (const GramClass& entry : plan.classes) {
    for (const AxisClass::Pair& y : entry.rows->pairs) {
      for (const AxisClass::Pair& x : entry.columns->pairs) {
        const int64_t other_y = y.tap + entry.rows->difference, other_x = x.tap + entry.columns->difference;
        TapPair pair{y.tap * g.kernel[1] + x.tap, other_y * g.kernel[1] + other_x, {}, entry.symmetric};
        for (int64_t row = y.first_piece; row < y.end_piece; ++row) {
          for (int64_t column = x.first_piece; column < x.end_piece; ++column) {
            pair.sums.push_back(entry.first_sum + row * entry.columns->pieces() + column);
          }
        }
        pairs.push_back(std::move(pair));
      }
    }
  }
  return pairs;
}

}  // namespace spade_fast
