// Sums of products of shifted maps on a GPU, by the plan of ../gram_plan.h: what is launched, worked out on the host.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "../gram_plan.h"
#include "divisor.h"

namespace spade_fast::cuda {

// Of the inputs; sums are float64 for the first and float32 for the others. BFloat16 needs vectors (GramArguments).
enum class Precision { kFloat64, kFloat32, kTf32, kBFloat16 };

// How a batch of maps lies in memory: channels side by side, positions by these steps, in elements; 0 along an axis of
// one place.
struct MapLayout {
  int64_t images, image_step, row_step, column_step;
};

// One sum: the channels at the positions of one piece of a map, times those at the shifted positions.
struct GramProduct {
  int64_t first, other_first;  // elements from the batch's first to the channels of the first position
  Divisor width, area;         // of the piece, in positions of one image
  int32_t positions;           // of all images
  int32_t sum;                 // where it goes
  int32_t first_tile;          // within its section
  int32_t symmetric;           // only tiles on and above the diagonal are computed
};

// Products whose positions are cut into equally many chunks, by blocks of threads in the order (chunk, product, tile).
struct GramSection {
  int32_t first_block, tiles, chunks, first_product, end_product;
  int32_t first_partial;  // in tiles, of those kept apart until all chunks are there; unused with one chunk
};

constexpr int kMostProducts = 48;
constexpr int kSections = 2;  // whole maps, and the strips along their borders

// One launch; small enough to be passed by value.
struct GramLaunch {
  GramProduct products[kMostProducts];
  GramSection sections[kSections];
  int32_t size;                        // of each sum, [size, size]
  int32_t tiles_per_side;              // ceil(size / tile)
  int32_t sums;                        // of each group
  int64_t image_step, y_step, x_step;  // between neighbouring positions of a product, in elements
  // Where columns are those of patches: column j reads channel j / taps at tap j % taps, zero outside the input.
  Divisor taps, kernel_width;
  int64_t row_step, column_step;
  int32_t channels;  // of one group
  int32_t stride[2], dilation[2], padding[2], input_size[2];
  int32_t blocks, partial_tiles;
};
static_assert(sizeof(GramLaunch) + 3 * sizeof(void*) <= 4096, "what a kernel may take by value");

// Positions of a batch are counted in 31 bits, a little beyond the last one.
constexpr int64_t kMostPositions = (int64_t{1} << 31) - 64;

// Whether the channels of every position and group begin at 16 bytes and fill whole vectors, none of them padding.
bool has_vectors(const GramPlan& plan, const MapLayout& layout, const void* input, int64_t element_bytes);

// Launches that add a batch to the sums of a plan that is not depthwise, on tiles of `tile` x `tile`.
std::vector<GramLaunch> gram_launches(const GramPlan& plan, const MapLayout& layout, int tile, Precision precision,
                                      int multiprocessors);

// The tile for sums of this size: 128, 64 or 32; not 128 without vectors (GramArguments), always 64 in float64.
int gram_tile(int64_t size, Precision precision, bool vectors);

// Depthwise: a sum is a number for every channel.
struct DepthwiseProduct {
  int64_t first, other_first;        // as above, for channel 0
  int32_t first_row, height, width;  // rows of the first map that it covers, positions in each
};

// One launch, over as many sums as a warp has shared memory for.
struct DepthwiseLaunch {
  int32_t first_sum, sums;
  int32_t channels;
  int32_t rows, units;  // of the tallest map; of all images
  int32_t warps, chunks;
  int64_t image_step, y_step, x_step;
};

// One for each sum, in their order.
std::vector<DepthwiseProduct> depthwise_products(const GramPlan& plan, const MapLayout& layout);
std::vector<DepthwiseLaunch> depthwise_launches(const GramPlan& plan, const MapLayout& layout, int64_t element_bytes,
                                                int multiprocessors);

// A block of the Gram matrix, by a pair of taps: the sum of `count` sums, listed from `first` on.
struct AssembledPair {
  int32_t tap, other_tap, first, count, symmetric;
};

struct AssemblyTables {
  std::vector<AssembledPair> pairs;
  std::vector<int32_t> sums;

  explicit AssemblyTables(const GramPlan& plan);
};

// Implemented in gram.cu. All pointers are to device memory; work is queued on the CUDA stream.

struct GramArguments {
  Precision precision;
  const void* input;
  bool vectors;    // as has_vectors found
  void* sums;      // [groups, sums, size, size]
  void* partials;  // [partial_tiles, tile, tile] of the sums' type
  int tile;
};
void add_gram(const GramArguments& arguments, const GramLaunch& launch, void* stream);

struct DepthwiseArguments {
  Precision precision;
  const void* input;
  const DepthwiseProduct* products;  // of all launches
  void* sums;                        // [sums of all launches, channels]
  void* partials;                    // [chunks, sums, channels]
};
void add_depthwise(const DepthwiseArguments& arguments, const DepthwiseLaunch& launch, void* stream);

// gram [groups, d, d] from the sums of a plan that is not flat.
template <class T>
struct AssemblyArguments {
  int64_t groups, size, taps, sums, pairs;  // size: channels of a group
  const T* values;                          // the sums
  const AssembledPair* pair_table;
  const int32_t* sum_table;
  T* gram;
};
template <class T>
void assemble_gram(const AssemblyArguments<T>& arguments, bool depthwise, void* stream);

// Of matrices [count, size, size], in place.
template <class T>
void mirror_upper(T* matrices, int64_t count, int64_t size, void* stream);

}  // namespace spade_fast::cuda
