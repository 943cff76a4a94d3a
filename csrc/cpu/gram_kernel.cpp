// Gram matrices of layer inputs, X^T X summed over all samples, by the plan of gram_plan.h.
//
// Input is packed into panels (kernels.h), a chunk of images or of output rows at a time, then every thread finishes
// tiles of the output by itself: no sum depends on the number of threads. Of products of a map with itself, tiles
// below the diagonal are left out. No call ever holds the patches of a whole batch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "../ceil_div.h"
#include "../check.h"
#include "../gram_checks.h"
#include "../gram_plan.h"
#include "kernels.h"

namespace spade_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::parallel_for;
using torch::stable::Tensor;

constexpr int64_t kRunPositions = 256;  // positions per product: the panels of a tile stay in the first caches
constexpr int64_t kPackedBytes = int64_t{1} << 20;       // of a flat plan's chunk: stays in the second caches
constexpr int64_t kMostPackedPixels = int64_t{1} << 23;  // of images that are packed together, unless one has more
constexpr int64_t kPackedImageBytes = int64_t{1} << 19;  // of the images of a depthwise panel that are packed together
constexpr int64_t kLargestTile = kMostRows * kMostPanels * kLargestLanes;  // elements
constexpr int64_t kAssembleBlock = 16;  // channels: a block of the Gram matrix and its mirror fit the cache

// One lane of a packed map: rows y0, y0 + stride, ... and columns x0, x0 + stride, ... of one input channel.
struct Lane {
  int64_t channel, y0, x0;
};

// Packs rows of up to `lanes` lanes of one image, zeros where they leave the input. Lanes that do not exist get zeros
// or what follows in the input.
template <class T>
class Packer {
 public:
  Packer(const Tensor& input, const ConvGeometry& geometry, const Kernels<T>& kernel)
      : data_(input.const_data_ptr<T>()),
        image_stride_(input.stride(0)),
        channel_stride_(input.stride(1)),
        row_stride_(input.stride(2)),
        column_stride_(input.stride(3)),
        geometry_(geometry),
        kernel_(kernel) {}

  // Row `row` of width `width` to out[x * step + lane].
  void pack_row(const std::vector<Lane>& lanes, int64_t image, int64_t row, int64_t width, int64_t step, T* out) const {
    const auto count = static_cast<int64_t>(lanes.size());
    const int64_t from_step = geometry_.stride[1] * column_stride_;
    const Window window = window_of(lanes[0], image, row, width);
    const bool all_inside = window.begin == 0 && window.end == width && is_one_window(lanes);
    if (all_inside && channel_stride_ == 1) return pack_positions(window.first, from_step, width, count, step, out);
    if (all_inside && count == kernel_.lanes && from_step == 1) {
      return kernel_.transpose(window.first, channel_stride_, width, out, step);
    }
    for (int64_t lane = 0; lane < kernel_.lanes; ++lane) {
      pack_lane(lane < count ? window_of(lanes[lane], image, row, width) : Window{nullptr, 0, 0}, width, step,
                out + lane);
    }
  }

 private:
  // The columns [begin, end) of a row that lie inside the input, and where the first of them is.
  struct Window {
    const T* first;
    int64_t begin, end;
  };

  Window window_of(const Lane& lane, int64_t image, int64_t row, int64_t width) const {
    const int64_t y = lane.y0 + row * geometry_.stride[0];
    const Span span = inside(lane.x0, geometry_.stride[1], geometry_.width, width);
    if (y < 0 || y >= geometry_.height || span.begin == span.end) return {nullptr, 0, 0};
    const int64_t x = lane.x0 + span.begin * geometry_.stride[1];
    const T* first = data_ + image * image_stride_ + lane.channel * channel_stride_ + y * row_stride_;
    return {first + x * column_stride_, span.begin, span.end};
  }

  // Position x has `count` lanes side by side from first[x * from_step] on.
  void pack_positions(const T* first, int64_t from_step, int64_t width, int64_t count, int64_t step, T* out) const {
    // Whole vectors reach into what follows the lanes, up to the last lane of the last position.
    const int64_t room = (width - 1) * from_step + count - kernel_.lanes;
    const int64_t whole = room < 0 ? 0 : std::min(width, room / std::max<int64_t>(1, from_step) + 1);
    kernel_.copy(first, from_step, whole, out, step);
    for (int64_t x = whole; x < width; ++x) {
      const T* position = first + x * from_step;
      std::fill(std::copy(position, position + count, out + x * step), out + x * step + kernel_.lanes, T(0));
    }
  }

  void pack_lane(const Window& window, int64_t width, int64_t step, T* out) const {
    const int64_t from_step = geometry_.stride[1] * column_stride_;
    for (int64_t x = 0; x < window.begin; ++x) out[x * step] = T(0);
    for (int64_t x = window.begin; x < window.end; ++x) out[x * step] = window.first[(x - window.begin) * from_step];
    for (int64_t x = window.end; x < width; ++x) out[x * step] = T(0);
  }

  // Whether the lanes are the same window of neighbouring channels.
  static bool is_one_window(const std::vector<Lane>& lanes) {
    return lanes.front().channel + static_cast<int64_t>(lanes.size()) - 1 == lanes.back().channel &&
           lanes.front().y0 == lanes.back().y0 && lanes.front().x0 == lanes.back().x0;
  }

  const T* data_;
  int64_t image_stride_, channel_stride_, row_stride_, column_stride_;
  ConvGeometry geometry_;
  const Kernels<T>& kernel_;
};

// Tile of an output matrix: rows from `row` on, panels from `panel` on.
struct Tile {
  int64_t group, row, panel, panels;
};

template <class T>
std::vector<Tile> tiles_of(const Kernels<T>& kernel, int64_t groups, int64_t n, bool upper_only) {
  std::vector<Tile> tiles;
  const int64_t panels = ceil_div(n, kernel.lanes);
  for (int64_t group = 0; group < groups; ++group) {
    for (int64_t panel = 0; panel < panels; panel += kernel.panels) {
      const int64_t end = std::min(panel + kernel.panels, panels);
      const int64_t rows = upper_only ? std::min(n, end * kernel.lanes) : n;
      for (int64_t row = 0; row < rows; row += kernel.rows) {
        const int64_t first = upper_only ? std::max(panel, row / kernel.lanes) : panel;
        tiles.push_back({group, row, first, end - first});
      }
    }
  }
  return tiles;
}

// out [n, n] += a^T b on one tile, where `a` points at the tile's first row in its panel, `b` at its first panel.
template <class T>
void multiply_tile(const Kernels<T>& kernel, const Tile& tile, const T* a, const T* b, int64_t panel_stride,
                   int64_t count, T* out, int64_t n) {
  const int64_t column = tile.panel * kernel.lanes;
  T* corner = out + tile.row * n + column;
  const int64_t rows = std::min(kernel.rows, n - tile.row);
  const int64_t columns = std::min(tile.panels * kernel.lanes, n - column);
  if (rows == kernel.rows && columns == tile.panels * kernel.lanes) {
    kernel.multiply(tile.panels, a, b, panel_stride, count, corner, n, kernel.lanes);
    return;
  }
  T whole[kLargestTile] = {};
  const int64_t stride = tile.panels * kernel.lanes;
  kernel.multiply(tile.panels, a, b, panel_stride, count, whole, stride, kernel.lanes);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) corner[r * n + c] += whole[r * stride + c];
  }
}

// Calls task(item) for all items, each thread taking every so-many-th one: neighbours cost alike.
template <class Task>
void for_each_interleaved(int64_t items, const Task& task) {
  const int64_t workers = std::min<int64_t>(torch::stable::get_num_threads(), items);
  parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t item = worker; item < items; item += workers) task(item);
    }
  });
}

template <class T>
void add_flat(const GramPlan& plan, const Tensor& input, T* gram) {
  const ConvGeometry& g = plan.geometry;
  const Kernels<T>& kernel = kernels<T>();
  const int64_t d = g.columns(), panels = ceil_div(d, kernel.lanes), all_panels = g.groups * panels;
  const int64_t height = g.outputs(0), width = g.outputs(1);
  const int64_t units = input.size(0) * height;  // output rows

  std::vector<std::vector<Lane>> lanes(all_panels);
  for (int64_t group = 0; group < g.groups; ++group) {
    for (int64_t column = 0; column < d; ++column) {
      const int64_t channel = column / g.taps(), ky = column % g.taps() / g.kernel[1], kx = column % g.kernel[1];
      lanes[group * panels + column / kernel.lanes].push_back(
          {group * g.channels + channel, ky * g.dilation[0] - g.padding[0], kx * g.dilation[1] - g.padding[1]});
    }
  }

  const Packer<T> packer(input, g, kernel);
  const std::vector<Tile> tiles = tiles_of(kernel, g.groups, d, true);
  const int64_t position_bytes = all_panels * kernel.lanes * static_cast<int64_t>(sizeof(T));
  const int64_t chunk = std::clamp(std::max(kPackedBytes / position_bytes, kRunPositions) / width, int64_t{1}, units);
  const int64_t panel_stride = chunk * width * kernel.lanes;
  Tensor buffer = torch::stable::new_empty(input, {all_panels * panel_stride});
  T* packed = buffer.mutable_data_ptr<T>();
  for (int64_t unit0 = 0; unit0 < units; unit0 += chunk) {
    const int64_t count = std::min(chunk, units - unit0);
    parallel_for(0, all_panels * count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t panel = item / count, unit = unit0 + item % count;
        T* out = packed + panel * panel_stride + item % count * width * kernel.lanes;
        packer.pack_row(lanes[panel], unit / height, unit % height, width, kernel.lanes, out);
      }
    });
    const int64_t positions = count * width;
    for_each_interleaved(static_cast<int64_t>(tiles.size()), [&](int64_t item) {
      const Tile& tile = tiles[item];
      const int64_t first = tile.group * panels;
      const T* a = packed + (first + tile.row / kernel.lanes) * panel_stride + tile.row % kernel.lanes;
      const T* b = packed + (first + tile.panel) * panel_stride;
      for (int64_t begin = 0; begin < positions; begin += kRunPositions) {
        multiply_tile(kernel, tile, a + begin * kernel.lanes, b + begin * kernel.lanes, panel_stride,
                      std::min(kRunPositions, positions - begin), gram + tile.group * d * d, d);
      }
    });
  }
}

// Positions [begin, end) along an axis that piece `piece` of a class covers.
Span piece_of(const AxisClass& axis, int64_t piece) {
  return {axis.cuts[piece], axis.cuts[piece + 1]};
}

// The piece of a class that holds a position, -1 if none does.
int64_t find_piece(const AxisClass& axis, int64_t position) {
  if (axis.cuts.empty() || position < axis.cuts.front() || position >= axis.cuts.back()) return -1;
  return std::upper_bound(axis.cuts.begin(), axis.cuts.end(), position) - axis.cuts.begin() - 1;
}

// All maps of some images, packed: of map m, panel p, row y, column x and image i the lanes begin at
// offsets[m] + (((p * height + y) * width + x) * images + i) * lanes.
struct PackedMaps {
  std::vector<int64_t> offsets;
  int64_t elements = 0;

  PackedMaps(const GramPlan& plan, int64_t panels, int64_t images, int64_t lanes) {
    for (const PhaseMap& map : plan.maps) {
      offsets.push_back(elements);
      elements += panels * map.height * map.width * images * lanes;
    }
  }
};

// Calls run(sum, a, b, count) for every contiguous run of positions that row y of the classes' first maps begins:
// `count` positions from offset a of a panel of the first map go with those from offset b of the other map's.
template <class Run>
void for_each_run(const GramPlan& plan, int64_t y, int64_t images, int64_t lanes, const Run& run) {
  for (const GramClass& entry : plan.classes) {
    const int64_t row_piece = find_piece(*entry.rows, y);
    if (row_piece < 0) continue;
    const int64_t width = plan.maps[entry.map].width, other_width = plan.maps[entry.other_map].width;
    const int64_t step = images * lanes;
    for (int64_t piece = 0; piece < entry.columns->pieces(); ++piece) {
      const Span span = piece_of(*entry.columns, piece);
      run(entry, entry.first_sum + row_piece * entry.columns->pieces() + piece, (y * width + span.begin) * step,
          ((y + entry.rows->shift) * other_width + span.begin + entry.columns->shift) * step,
          (span.end - span.begin) * images);
    }
  }
}

int64_t tallest_map(const GramPlan& plan) {
  int64_t rows = 0;
  for (const PhaseMap& map : plan.maps) rows = std::max(rows, map.height);
  return rows;
}

// Images that are packed together, so that one row of them makes a run of about kRunPositions.
int64_t images_at_a_time(const GramPlan& plan, int64_t images) {
  const ConvGeometry& g = plan.geometry;
  const int64_t few =
      std::max<int64_t>(1, kMostPackedPixels / std::max<int64_t>(1, g.groups * g.channels * g.height * g.width));
  const int64_t wanted =
      std::clamp(kRunPositions / std::max<int64_t>(1, plan.maps[0].width), int64_t{1}, std::min(few, images));
  return ceil_div(images, ceil_div(images, wanted));
}

template <class T>
void add_shifted(const GramPlan& plan, const Tensor& input, T* sums) {
  const ConvGeometry& g = plan.geometry;
  const Kernels<T>& kernel = kernels<T>();
  const int64_t n = g.channels, panels = ceil_div(n, kernel.lanes), all_panels = g.groups * panels;
  const int64_t images = input.size(0), chunk = images_at_a_time(plan, images), rows = tallest_map(plan);
  const Packer<T> packer(input, g, kernel);
  const std::vector<Tile> tiles = tiles_of(kernel, g.groups, n, false);

  std::vector<std::vector<Lane>> lanes(plan.maps.size() * all_panels);  // by map, then panel
  struct Row {
    int64_t map, panel, y;
  };
  std::vector<Row> to_pack;
  for (size_t map = 0; map < plan.maps.size(); ++map) {
    for (int64_t panel = 0; panel < all_panels; ++panel) {
      const int64_t first = panel % panels * kernel.lanes, end = std::min(n, first + kernel.lanes);
      for (int64_t channel = first; channel < end; ++channel) {
        lanes[map * all_panels + panel].push_back({panel / panels * n + channel, plan.maps[map].y0, plan.maps[map].x0});
      }
      for (int64_t y = 0; y < plan.maps[map].height; ++y) to_pack.push_back({static_cast<int64_t>(map), panel, y});
    }
  }

  Tensor buffer = torch::stable::new_empty(input, {PackedMaps(plan, all_panels, chunk, kernel.lanes).elements});
  T* packed = buffer.mutable_data_ptr<T>();
  for (int64_t image0 = 0; image0 < images; image0 += chunk) {
    const int64_t count = std::min(chunk, images - image0);
    const PackedMaps layout(plan, all_panels, count, kernel.lanes);
    const auto panel_of = [&](int64_t map, int64_t panel) {
      const PhaseMap& shape = plan.maps[map];
      return packed + layout.offsets[map] + panel * shape.height * shape.width * count * kernel.lanes;
    };
    parallel_for(0, static_cast<int64_t>(to_pack.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const auto [map, panel, y] = to_pack[item];
        const int64_t width = plan.maps[map].width;
        T* row = panel_of(map, panel) + y * width * count * kernel.lanes;
        for (int64_t image = 0; image < count; ++image) {
          packer.pack_row(lanes[map * all_panels + panel], image0 + image, y, width, count * kernel.lanes,
                          row + image * kernel.lanes);
        }
      }
    });
    for_each_interleaved(static_cast<int64_t>(tiles.size()), [&](int64_t item) {
      const Tile& tile = tiles[item];
      const int64_t a_panel = tile.group * panels + tile.row / kernel.lanes, b_panel = tile.group * panels + tile.panel;
      const bool below_diagonal = (tile.panel + tile.panels) * kernel.lanes <= tile.row;
      for (int64_t y = 0; y < rows; ++y) {
        for_each_run(plan, y, count, kernel.lanes,
                     [&](const GramClass& entry, int64_t sum, int64_t a, int64_t b, int64_t positions) {
                       if (entry.symmetric && below_diagonal) return;
                       const PhaseMap& other = plan.maps[entry.other_map];
                       multiply_tile(kernel, tile, panel_of(entry.map, a_panel) + a + tile.row % kernel.lanes,
                                     panel_of(entry.other_map, b_panel) + b,
                                     other.height * other.width * count * kernel.lanes, positions,
                                     sums + (tile.group * plan.sums + sum) * n * n, n);
                     });
      }
    });
  }
}

// Depthwise: lanes are groups. A thread packs a panel of them and finishes it by itself.
template <class T>
void add_depthwise(const GramPlan& plan, const Tensor& input, T* sums) {
  const ConvGeometry& g = plan.geometry;
  const Kernels<T>& kernel = kernels<T>();
  const int64_t images = input.size(0), rows = tallest_map(plan);
  const int64_t image_bytes = PackedMaps(plan, 1, 1, kernel.lanes).elements * static_cast<int64_t>(sizeof(T));
  const int64_t chunk =
      std::clamp(kPackedImageBytes / std::max<int64_t>(1, image_bytes), int64_t{1}, images_at_a_time(plan, images));
  const PackedMaps layout(plan, 1, chunk, kernel.lanes);
  const int64_t workers = std::min<int64_t>(torch::stable::get_num_threads(), ceil_div(g.groups, kernel.lanes));
  Tensor buffer = torch::stable::new_empty(input, {workers, layout.elements + plan.sums * kernel.lanes});
  const Packer<T> packer(input, g, kernel);
  parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      T* packed = buffer.mutable_data_ptr<T>() + worker * (layout.elements + plan.sums * kernel.lanes);
      T* panel_sums = packed + layout.elements;  // [sums, lanes]
      for (int64_t first = worker * kernel.lanes; first < g.groups; first += workers * kernel.lanes) {
        const int64_t groups = std::min(kernel.lanes, g.groups - first);
        std::fill(panel_sums, panel_sums + plan.sums * kernel.lanes, T(0));
        for (int64_t image0 = 0; image0 < images; image0 += chunk) {
          const int64_t count = std::min(chunk, images - image0);
          const PackedMaps filled(plan, 1, count, kernel.lanes);
          for (size_t map = 0; map < plan.maps.size(); ++map) {
            const PhaseMap& shape = plan.maps[map];
            std::vector<Lane> lanes;
            for (int64_t group = 0; group < groups; ++group) lanes.push_back({first + group, shape.y0, shape.x0});
            for (int64_t y = 0; y < shape.height; ++y) {
              for (int64_t image = 0; image < count; ++image) {
                T* out = packed + filled.offsets[map] + (y * shape.width * count + image) * kernel.lanes;
                packer.pack_row(lanes, image0 + image, y, shape.width, count * kernel.lanes, out);
              }
            }
          }
          for (int64_t y = 0; y < rows; ++y) {
            for_each_run(plan, y, count, kernel.lanes,
                         [&](const GramClass& entry, int64_t sum, int64_t a, int64_t b, int64_t positions) {
                           kernel.correlate(packed + filled.offsets[entry.map] + a,
                                            packed + filled.offsets[entry.other_map] + b, positions,
                                            panel_sums + sum * kernel.lanes);
                         });
          }
        }
        for (int64_t sum = 0; sum < plan.sums; ++sum) {
          for (int64_t group = 0; group < groups; ++group) {
            sums[sum * g.groups + first + group] += panel_sums[sum * kernel.lanes + group];
          }
        }
      }
    }
  });
}

// Copies the upper triangle of each matrix of gram [matrices, d, d] onto its lower one.
template <class T>
void mirror_upper(T* gram, int64_t matrices, int64_t d) {
  constexpr int64_t kTile = 64;  // square tile: two of them fit in the first cache
  const int64_t tiles = ceil_div(d, kTile);
  parallel_for(0, matrices * tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      T* matrix = gram + item / tiles * d * d;
      const int64_t row0 = item % tiles * kTile, row1 = std::min(row0 + kTile, d);
      for (int64_t col0 = 0; col0 <= row0; col0 += kTile) {
        for (int64_t row = row0; row < row1; ++row) {
          const int64_t col1 = std::min(col0 + kTile, row);
          for (int64_t col = col0; col < col1; ++col) matrix[row * d + col] = matrix[col * d + row];
        }
      }
    }
  });
}

// block[c - c0][e - e0] = the sum over `pieces` of matrices[piece][c][e], matrices [sums, n, n].
template <class T>
void add_pieces(const T* matrices, const std::vector<int64_t>& pieces, int64_t n, int64_t c0, int64_t c1, int64_t e0,
                int64_t e1, T (&block)[kAssembleBlock][kAssembleBlock]) {
  for (int64_t c = c0; c < c1; ++c) {
    T* out = block[c - c0];
    std::fill(out, out + kAssembleBlock, T(0));
    for (const int64_t piece : pieces) {
      const T* row = matrices + (piece * n + c) * n;
      for (int64_t e = e0; e < e1; ++e) out[e - e0] += row[e];
    }
  }
}

// gram [groups, d, d] from sums [groups, plan.sums, channels, channels].
template <class T>
void assemble(const GramPlan& plan, const T* sums, T* gram) {
  const ConvGeometry& g = plan.geometry;
  const std::vector<TapPair> pairs = tap_pairs(plan);
  const int64_t n = g.channels, taps = g.taps(), d = g.columns(), blocks = ceil_div(n, kAssembleBlock);
  parallel_for(0, g.groups * blocks * blocks, 1, [&](int64_t begin, int64_t end) {
    T block[kAssembleBlock][kAssembleBlock];
    for (int64_t item = begin; item < end; ++item) {
      const T* group_sums = sums + item / (blocks * blocks) * plan.sums * n * n;
      T* out = gram + item / (blocks * blocks) * d * d;
      const int64_t c0 = item / blocks % blocks * kAssembleBlock, c1 = std::min(c0 + kAssembleBlock, n);
      const int64_t e0 = item % blocks * kAssembleBlock, e1 = std::min(e0 + kAssembleBlock, n);
      for (const TapPair& pair : pairs) {
        add_pieces(group_sums, pair.sums, n, c0, c1, e0, e1, block);
        T* corner = out + (c0 * taps + pair.tap) * d + e0 * taps + pair.other_tap;
        T* mirror = out + (e0 * taps + pair.other_tap) * d + c0 * taps + pair.tap;
        for (int64_t c = 0; c < c1 - c0; ++c) {
          // Below the diagonal a symmetric sum is not computed: that part is the mirror of the other one.
          const int64_t begin = pair.symmetric ? std::max<int64_t>(0, c0 + c - e0) : 0;
          for (int64_t e = begin; e < e1 - e0; ++e) {
            corner[c * taps * d + e * taps] = mirror[e * taps * d + c * taps] = block[c][e];
          }
        }
      }
    }
  });
}

// gram [groups, taps, taps] from sums [plan.sums, groups].
template <class T>
void assemble_depthwise(const GramPlan& plan, const T* sums, T* gram) {
  const int64_t groups = plan.geometry.groups, taps = plan.geometry.taps();
  const std::vector<TapPair> pairs = tap_pairs(plan);
  for (int64_t group = 0; group < groups; ++group) {
    T* out = gram + group * taps * taps;
    for (const TapPair& pair : pairs) {
      T total = 0;
      for (const int64_t sum : pair.sums) total += sums[sum * groups + group];
      out[pair.tap * taps + pair.other_tap] = out[pair.other_tap * taps + pair.tap] = total;
    }
  }
}

std::vector<int64_t> conv2d_sums_shape(std::vector<int64_t> size, std::vector<int64_t> kernel_size,
                                       std::vector<int64_t> stride, std::vector<int64_t> padding,
                                       std::vector<int64_t> dilation, int64_t groups) {
  return GramPlan(geometry_of(size, kernel_size, stride, padding, dilation, groups)).shape();
}

// A copy of float32 values rounded to TF32, ten bits of mantissa, ties away from zero.
Tensor rounded_to_tf32(const Tensor& input) {
  Tensor rounded = torch::stable::clone(torch::stable::contiguous(input));
  float* values = rounded.mutable_data_ptr<float>();
  parallel_for(0, rounded.numel(), 4096, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (values[i] != values[i]) continue;  // NaN stays: a carry could make a number of it
      uint32_t bits;
      std::memcpy(&bits, values + i, sizeof(bits));
      bits = (bits + 0x1000) & ~uint32_t{0x1fff};
      std::memcpy(values + i, &bits, sizeof(bits));
    }
  });
  return rounded;
}

void add_conv2d_sums_(Tensor sums, Tensor input, std::vector<int64_t> kernel_size, std::vector<int64_t> stride,
                      std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups, bool tf32) {
  const GramPlan plan(geometry_of_input(input, kernel_size, stride, padding, dilation, groups));
  check_sums(plan, sums);
  check_input_dtype(sums, input, tf32);
  if (input.numel() == 0) return;
  if (input.scalar_type() == ScalarType::BFloat16) {
    input = torch::stable::to(input, ScalarType::Float);
  } else if (tf32) {
    input = rounded_to_tf32(input);
  }
  dispatch_float_or_double(input, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto add = plan.flat ? add_flat<T> : plan.depthwise() ? add_depthwise<T> : add_shifted<T>;
    add(plan, input, sums.mutable_data_ptr<T>());
  });
}

Tensor conv2d_gram(Tensor sums, std::vector<int64_t> size, std::vector<int64_t> kernel_size,
                   std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                   int64_t groups) {
  const GramPlan plan(geometry_of(size, kernel_size, stride, padding, dilation, groups));
  check_sums(plan, sums);
  const int64_t d = plan.geometry.columns();
  if (plan.flat) {
    Tensor gram = torch::stable::clone(sums);
    dispatch_float_or_double(sums, [&](auto* type) {
      mirror_upper(gram.mutable_data_ptr<std::remove_pointer_t<decltype(type)>>(), groups, d);
    });
    return gram;
  }
  Tensor gram = torch::stable::new_zeros(sums, {groups, d, d});
  dispatch_float_or_double(sums, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto finish = plan.depthwise() ? assemble_depthwise<T> : assemble<T>;
    finish(plan, sums.const_data_ptr<T>(), gram.mutable_data_ptr<T>());
  });
  return gram;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spade_fast, CPU, m) {
  m.impl("add_conv2d_sums_", TORCH_BOX(&add_conv2d_sums_));
  m.impl("conv2d_gram", TORCH_BOX(&conv2d_gram));
}

STABLE_TORCH_LIBRARY_IMPL(spade_fast, CompositeExplicitAutograd, m) {
  m.impl("conv2d_sums_shape", TORCH_BOX(&conv2d_sums_shape));
}

}  // namespace spade_fast
