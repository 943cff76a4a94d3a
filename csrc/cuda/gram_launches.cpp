#include <algorithm>
#include <iterator>
#include <limits>

#include "../ceil_div.h"
#include "gram.h"

namespace spade_fast::cuda {
namespace {

constexpr int64_t kLeastPositions = 512;  // of a chunk: fewer are not worth a tile's start and end
constexpr int64_t kMostInTensorChunk =
    8192;                           // tensor cores cut sums off, they do not round them: chunks are added by others
constexpr int64_t kStripShare = 4;  // a product with fewer than a fourth of the most positions is a strip
constexpr int64_t kAccumulatorBytes = int64_t{96} << 10;
constexpr int64_t kWarp = 32;
constexpr int64_t kMostWarps = 8;

GramProduct product_of(const GramPlan& plan, const MapLayout& layout, const GramClass& entry, int64_t row_piece,
                       int64_t column_piece) {
  const ConvGeometry& g = plan.geometry;
  const AxisClass& rows = *entry.rows;
  const AxisClass& columns = *entry.columns;
  const int64_t y = rows.cuts[row_piece], x = columns.cuts[column_piece];
  const int64_t height = rows.cuts[row_piece + 1] - y, width = columns.cuts[column_piece + 1] - x;
  const auto offset = [&](int64_t map, int64_t row, int64_t column) {
    const PhaseMap& phase = plan.maps[map];
    return (phase.y0 + g.stride[0] * row) * layout.row_step + (phase.x0 + g.stride[1] * column) * layout.column_step;
  };
  GramProduct product{};
  product.first = offset(entry.map, y, x);
  product.other_first = offset(entry.other_map, y + rows.shift, x + columns.shift);
  product.width = Divisor(width);
  product.area = Divisor(height * width);
  product.positions = static_cast<int32_t>(layout.images * height * width);
  product.sum = static_cast<int32_t>(entry.first_sum + row_piece * columns.pieces() + column_piece);
  product.symmetric = entry.symmetric;
  return product;
}

std::vector<GramProduct> products_of(const GramPlan& plan, const MapLayout& layout) {
  std::vector<GramProduct> products;
  if (plan.flat) {
    const ConvGeometry& g = plan.geometry;
    GramProduct product{};
    product.width = Divisor(g.outputs(1));
    product.area = Divisor(g.outputs(0) * g.outputs(1));
    product.positions = static_cast<int32_t>(layout.images * g.outputs(0) * g.outputs(1));
    product.symmetric = 1;
    products.push_back(product);
  }
  for (const GramClass& entry : plan.classes) {
    for (int64_t row = 0; row < entry.rows->pieces(); ++row) {
      for (int64_t column = 0; column < entry.columns->pieces(); ++column) {
        products.push_back(product_of(plan, layout, entry, row, column));
      }
    }
  }
  // Whole maps first, strips after them.
  std::stable_sort(products.begin(), products.end(),
                   [](const GramProduct& a, const GramProduct& b) { return a.positions > b.positions; });
  return products;
}

void add_sections(GramLaunch& launch, int products, int64_t groups, int64_t blocks_wanted, int64_t most_in_chunk) {
  const int64_t most = launch.products[0].positions, side = launch.tiles_per_side;
  int strips = 0;
  while (strips < products && launch.products[strips].positions * kStripShare >= most) ++strips;
  int64_t blocks = 0, partials = 0;
  const int ends[kSections] = {strips, products};
  for (int s = 0; s < kSections; ++s) {
    GramSection& section = launch.sections[s];
    section.first_product = s == 0 ? 0 : ends[0];
    section.end_product = ends[s];
    section.first_block = section.first_product < section.end_product ? static_cast<int32_t>(blocks)
                                                                      : std::numeric_limits<int32_t>::max();
    int64_t tiles = 0;
    for (int p = section.first_product; p < section.end_product; ++p) {
      launch.products[p].first_tile = static_cast<int32_t>(tiles);
      tiles += groups * (launch.products[p].symmetric ? side * (side + 1) / 2 : side * side);
    }
    if (tiles == 0) continue;
    const int64_t positions = launch.products[section.first_product].positions;
    const int64_t useful = std::min(ceil_div(blocks_wanted, tiles), ceil_div(positions, kLeastPositions));
    const int64_t chunks = std::max({int64_t{1}, useful, ceil_div(positions, most_in_chunk)});
    section.tiles = static_cast<int32_t>(tiles);
    section.chunks = static_cast<int32_t>(chunks);
    section.first_partial = static_cast<int32_t>(partials);
    blocks += tiles * chunks;
    if (chunks > 1) partials += tiles * chunks;
  }
  launch.blocks = static_cast<int32_t>(blocks);
  launch.partial_tiles = static_cast<int32_t>(partials);
}

}  // namespace

bool has_vectors(const GramPlan& plan, const MapLayout& layout, const void* input, int64_t element_bytes) {
  const ConvGeometry& g = plan.geometry;
  if (plan.flat && (g.taps() > 1 || g.padding[0] > 0 || g.padding[1] > 0)) return false;
  const int64_t lanes = 16 / element_bytes;
  return g.channels % lanes == 0 && layout.image_step % lanes == 0 && layout.row_step % lanes == 0 &&
         layout.column_step % lanes == 0 && reinterpret_cast<uintptr_t>(input) % 16 == 0;
}

int gram_tile(int64_t size, Precision precision, bool vectors) {
  // Larger tiles do more work for each number that they load, smaller ones less for nothing at the edges.
  struct Choice {
    int tile;
    double speed;
  };
  constexpr Choice kChoices[] = {{128, 1.25}, {64, 1.0}, {32, 0.6}};
  if (precision == Precision::kFloat64) return 64;
  const auto cost = [&](const Choice& choice) {
    const double side = static_cast<double>(ceil_div(size, choice.tile) * choice.tile);
    return side * side / choice.speed;
  };
  const Choice* first = vectors ? std::begin(kChoices) : std::begin(kChoices) + 1;
  return std::min_element(first, std::end(kChoices),
                          [&](const Choice& a, const Choice& b) { return cost(a) < cost(b); })
      ->tile;
}

std::vector<GramLaunch> gram_launches(const GramPlan& plan, const MapLayout& layout, int tile, Precision precision,
                                      int multiprocessors) {
  const ConvGeometry& g = plan.geometry;
  GramLaunch common{};
  common.size = static_cast<int32_t>(plan.flat ? g.columns() : g.channels);
  common.tiles_per_side = static_cast<int32_t>(ceil_div(common.size, tile));
  common.sums = static_cast<int32_t>(plan.flat ? 1 : plan.sums);
  common.image_step = layout.image_step;
  common.y_step = g.stride[0] * layout.row_step;
  common.x_step = g.stride[1] * layout.column_step;
  // Without patches a column is a channel, and no position lies outside.
  common.taps = Divisor(plan.flat ? g.taps() : 1);
  common.kernel_width = Divisor(plan.flat ? g.kernel[1] : 1);
  common.row_step = layout.row_step;
  common.column_step = layout.column_step;
  common.channels = static_cast<int32_t>(g.channels);
  for (int axis = 0; axis < 2; ++axis) {
    common.stride[axis] = static_cast<int32_t>(g.stride[axis]);
    common.dilation[axis] = static_cast<int32_t>(g.dilation[axis]);
    common.padding[axis] = plan.flat ? static_cast<int32_t>(g.padding[axis]) : 0;
    common.input_size[axis] = plan.flat ? static_cast<int32_t>(g.size(axis)) : std::numeric_limits<int32_t>::max();
  }
  // A few waves of what a multiprocessor holds at once.
  const int64_t blocks_wanted = int64_t{multiprocessors} * (tile == 128 ? 8 : tile == 64 ? 24 : 48);

  const bool tensor_cores = precision == Precision::kTf32 || precision == Precision::kBFloat16;
  const int64_t most_in_chunk = tensor_cores ? kMostInTensorChunk : kMostPositions;

  std::vector<GramLaunch> launches;
  const std::vector<GramProduct> products = products_of(plan, layout);
  for (size_t first = 0; first < products.size(); first += kMostProducts) {
    const size_t count = std::min<size_t>(kMostProducts, products.size() - first);
    GramLaunch launch = common;
    std::copy_n(products.begin() + first, count, launch.products);
    add_sections(launch, static_cast<int>(count), g.groups, blocks_wanted, most_in_chunk);
    launches.push_back(launch);
  }
  return launches;
}

std::vector<DepthwiseProduct> depthwise_products(const GramPlan& plan, const MapLayout& layout) {
  std::vector<DepthwiseProduct> products;
  for (const GramClass& entry : plan.classes) {
    for (int64_t row = 0; row < entry.rows->pieces(); ++row) {
      for (int64_t column = 0; column < entry.columns->pieces(); ++column) {
        const GramProduct product = product_of(plan, layout, entry, row, column);
        const auto begin = static_cast<int32_t>(entry.rows->cuts[row]);
        const auto height = static_cast<int32_t>(product.area.divisor / product.width.divisor);
        const auto width = static_cast<int32_t>(product.width.divisor);
        products.push_back({product.first, product.other_first, begin, height, width});
      }
    }
  }
  return products;
}

std::vector<DepthwiseLaunch> depthwise_launches(const GramPlan& plan, const MapLayout& layout, int64_t element_bytes,
                                                int multiprocessors) {
  const ConvGeometry& g = plan.geometry;
  DepthwiseLaunch common{};
  common.channels = static_cast<int32_t>(g.groups);
  for (const PhaseMap& map : plan.maps) common.rows = std::max(common.rows, static_cast<int32_t>(map.height));
  common.units = static_cast<int32_t>(layout.images) * common.rows;
  common.image_step = layout.image_step;
  common.y_step = g.stride[0] * layout.row_step;
  common.x_step = g.stride[1] * layout.column_step;
  const int64_t sum_bytes = kWarp * element_bytes, most = kAccumulatorBytes / sum_bytes;
  std::vector<DepthwiseLaunch> launches;
  for (int64_t first = 0; first < plan.sums; first += most) {
    DepthwiseLaunch launch = common;
    launch.first_sum = static_cast<int32_t>(first);
    launch.sums = static_cast<int32_t>(std::min(most, plan.sums - first));
    launch.warps = static_cast<int32_t>(std::min(kMostWarps, most / launch.sums));
    const int64_t slices = ceil_div(g.groups, kWarp), wanted = ceil_div(int64_t{multiprocessors} * 16, slices);
    launch.chunks =
        static_cast<int32_t>(std::max<int64_t>(1, std::min(wanted, ceil_div(launch.units, 4 * launch.warps))));
    launches.push_back(launch);
  }
  return launches;
}

AssemblyTables::AssemblyTables(const GramPlan& plan) {
  for (const TapPair& pair : tap_pairs(plan)) {
    pairs.push_back({static_cast<int32_t>(pair.tap), static_cast<int32_t>(pair.other_tap),
                     static_cast<int32_t>(sums.size()), static_cast<int32_t>(pair.sums.size()), pair.symmetric});
    sums.insert(sums.end(), pair.sums.begin(), pair.sums.end());
  }
}

}  // namespace spade_fast::cuda
