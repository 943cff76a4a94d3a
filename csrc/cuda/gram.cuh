// Adds a batch of maps to the sums of ../gram_plan.h: for each of its classes of tap pairs and each piece,
//
//     S[c, e] += sum over positions z of the piece of x[z, c] x[z + shift, e]
//
// which is a product A^T B of two operands that lie in the input itself: no patches are ever written down. Where the
// plan is flat, columns are those of patches, gathered as they are loaded.
//
// gram_tiles: a block of threads owns one tile [kTile, kTile] of one sum and one chunk of its positions; a thread (or,
// on tensor cores, a warp) owns some of its elements, in registers. Grid: GramLaunch::blocks. Shared memory: kStages
// stages of kDepth positions of both operands, filled by asynchronous copies while the stage before is multiplied.
//   input   E [images, ..., channels], as GramLaunch says; float, double or BFloat16
//   sums    Sum [groups, sums, size, size], float or double
// With one chunk a block adds its tile to the sums; else it writes it to `partials`, and gram_reduce adds up the chunks
// in their order: results are deterministic. Accumulation is in Sum; on tensor cores in float32. The host guarantees
// that no position count exceeds 31 bits and, for kVectors, that channels begin at 16 bytes and fill whole vectors.
#pragma once

#include "device.cuh"
#include "gram.h"
#include "tile.cuh"

namespace spade_fast::cuda {

constexpr int kStages = 3;

// Where a tile's work lies: tile (row, column) of the sums of one group and product.
struct GramTile {
  int product, group, row, column;
};

__device__ __forceinline__ GramTile find_tile(const GramLaunch& work, const GramSection& section, int tile) {
  int low = section.first_product, high = section.end_product - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (work.products[middle].first_tile <= tile) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const int side = work.tiles_per_side;
  const bool symmetric = work.products[low].symmetric;
  const int pairs = symmetric ? side * (side + 1) / 2 : side * side, place = tile - work.products[low].first_tile;
  int pair = place % pairs, row = 0;
  if (!symmetric) return {low, place / pairs, pair / side, pair % side};
  for (; pair >= side - row; ++row) pair -= side - row;
  return {low, place / pairs, row, row + pair};
}

// Copies kDepth positions of one operand at a time into shared memory [kDepth, kStride], vectors of channels at once.
template <class Tile, bool kVectors>
class OperandLoader {
  using E = typename Tile::Element;
  static constexpr int kWidth = kVectors ? Vector<E>::kLanes : 1, kPerPosition = Tile::kTile / kWidth;
  static_assert(Tile::kThreads % kPerPosition == 0, "a thread always loads the same columns");

 public:
  static constexpr int kRounds = kDepth * kPerPosition / Tile::kThreads;

  __device__ OperandLoader(const GramLaunch& work, const E* input, int64_t first, int group, int tile)
      : work_(work), input_(input + first) {
    const int column = tile * Tile::kTile + threadIdx.x % kPerPosition * kWidth;
    is_column_ = column < work.size;
    if constexpr (kVectors) {
      input_ += int64_t{group} * work.channels + column;
    } else if (is_column_) {
      const int channel = work.taps.quotient(column), tap = column - channel * work.taps.divisor;
      const int ky = work.kernel_width.quotient(tap), kx = tap - ky * work.kernel_width.divisor;
      y_ = ky * work.dilation[0] - work.padding[0];
      x_ = kx * work.dilation[1] - work.padding[1];
      input_ += int64_t{group} * work.channels + channel + y_ * work.row_step + x_ * work.column_step;
    }
  }

  // This thread's share of one round: of position (image, y, x), at `base`.
  __device__ __forceinline__ void load(int round, bool is_position, int y, int x, int64_t base, E* shared) const {
    const int place = threadIdx.x + round * Tile::kThreads, row = place / kPerPosition;
    bool valid = is_position && is_column_;
    if constexpr (!kVectors) {
      const int from_y = y * work_.stride[0] + y_, from_x = x * work_.stride[1] + x_;
      valid = valid && from_y >= 0 && from_y < work_.input_size[0] && from_x >= 0 && from_x < work_.input_size[1];
    }
    cp_async<kWidth * sizeof(E)>(shared + row * Tile::kStride + place % kPerPosition * kWidth, input_ + base, valid);
  }

  static __device__ __forceinline__ int row(int round) { return (threadIdx.x + round * Tile::kThreads) / kPerPosition; }

 private:
  const GramLaunch& work_;
  const E* input_;
  bool is_column_;
  int y_ = 0, x_ = 0;
};

template <class Tile>
constexpr size_t kGramSharedBytes = size_t{kStages} * 2 * kDepth * Tile::kStride * sizeof(typename Tile::Element);

template <class Tile, bool kVectors>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    gram_tiles(const typename Tile::Element* input, typename Tile::Sum* sums, typename Tile::Sum* partials,
               const __grid_constant__ GramLaunch work) {
  using E = typename Tile::Element;
  using Sum = typename Tile::Sum;
  constexpr int kTile = Tile::kTile, kOperand = kDepth * Tile::kStride;
  using Loader = OperandLoader<Tile, kVectors>;

  const GramSection& section = work.sections[static_cast<int>(blockIdx.x) >= work.sections[1].first_block];
  const int block = blockIdx.x - section.first_block, chunk = block / section.tiles, tile = block % section.tiles;
  const GramTile place = find_tile(work, section, tile);
  const GramProduct& product = work.products[place.product];
  const int begin = first_of_chunk(product.positions, chunk, section.chunks);
  const int end = first_of_chunk(product.positions, chunk + 1, section.chunks);

  E* stages = shared_memory<E>();
  const Loader left(work, input, product.first, place.group, place.row);
  const Loader right(work, input, product.other_first, place.group, place.column);
  const auto load_stage = [&](int stage, int first) {
    E* a = stages + stage * 2 * kOperand;
#pragma unroll
    for (int round = 0; round < Loader::kRounds; ++round) {
      const int position = first + Loader::row(round);
      const int image = product.area.quotient(position), within = position - image * product.area.divisor;
      const int y = product.width.quotient(within), x = within - y * product.width.divisor;
      const int64_t base = image * work.image_step + y * work.y_step + x * work.x_step;
      left.load(round, position < end, y, x, base, a);
      right.load(round, position < end, y, x, base, a + kOperand);
    }
  };

  Tile result;
  const int steps = (end - begin + kDepth - 1) / kDepth;
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) {
    if (stage < steps) load_stage(stage, begin + stage * kDepth);
    cp_async_commit();
  }
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // this stage is there for all, and nobody reads the one that is filled next any more
    const int next = step + kStages - 1;
    if (next < steps) load_stage(next % kStages, begin + next * kDepth);
    cp_async_commit();
    const E* a = stages + step % kStages * 2 * kOperand;
    result.multiply(a, a + kOperand);
  }
  cp_async_wait<0>();

  if (section.chunks == 1) {
    Sum* sum = sums + (int64_t{place.group} * work.sums + product.sum) * work.size * work.size;
    result.for_each([&](int m, int n, Sum value) {
      const int row = place.row * kTile + m, column = place.column * kTile + n;
      if (row < work.size && column < work.size) sum[int64_t{row} * work.size + column] += value;
    });
  } else {
    Sum* partial = partials + (int64_t{section.first_partial} + tile * section.chunks + chunk) * kTile * kTile;
    result.for_each([&](int m, int n, Sum value) { partial[m * kTile + n] = value; });
  }
}

constexpr int kReduceThreads = 256;

// A block of threads owns kReduceThreads elements of one tile whose chunks are apart. Grid: (tiles of the section, tile
// area / kReduceThreads).
template <class Sum, int kTile>
__global__ void __launch_bounds__(kReduceThreads)
    gram_reduce(const Sum* partials, Sum* sums, int section_index, const __grid_constant__ GramLaunch work) {
  static_assert(kTile * kTile % kReduceThreads == 0, "blocks cover a tile");
  const GramSection& section = work.sections[section_index];
  const GramTile place = find_tile(work, section, blockIdx.x);
  const int element = blockIdx.y * kReduceThreads + threadIdx.x;
  const int row = place.row * kTile + element / kTile, column = place.column * kTile + element % kTile;
  if (row >= work.size || column >= work.size) return;
  const Sum* partial =
      partials + (int64_t{section.first_partial} + int64_t{blockIdx.x} * section.chunks) * kTile * kTile + element;
  Sum total = 0;
  for (int chunk = 0; chunk < section.chunks; ++chunk) total += partial[int64_t{chunk} * kTile * kTile];
  const int64_t sum = int64_t{place.group} * work.sums + work.products[place.product].sum;
  sums[(sum * work.size + row) * work.size + column] += total;
}

template <class Tile, bool kVectors>
void run_gram(const void* input, void* sums, void* partials, const GramLaunch& work, Stream stream) {
  using E = typename Tile::Element;
  using Sum = typename Tile::Sum;
  launch(gram_tiles<Tile, kVectors>, dim3(work.blocks), Tile::kThreads, kGramSharedBytes<Tile>, stream,
         static_cast<const E*>(input), static_cast<Sum*>(sums), static_cast<Sum*>(partials), work);
  for (int section = 0; section < kSections; ++section) {
    const bool is_apart = work.sections[section].tiles > 0 && work.sections[section].chunks > 1;
    const dim3 grid(is_apart ? work.sections[section].tiles : 0, Tile::kTile * Tile::kTile / kReduceThreads);
    launch(gram_reduce<Sum, Tile::kTile>, grid, kReduceThreads, 0, stream, static_cast<const Sum*>(partials),
           static_cast<Sum*>(sums), section, work);
  }
}

// Runs the kernel of a tile size, of those that Tile<size> is made for.
template <template <int> class Tile>
void run_gram_tile(const GramArguments& arguments, const GramLaunch& work, Stream stream) {
  const auto run = [&](auto* run_one) { run_one(arguments.input, arguments.sums, arguments.partials, work, stream); };
  if constexpr (sizeof(typename Tile<64>::Element) >= 4) {  // what can be copied by itself
    if (!arguments.vectors) return run(arguments.tile == 64 ? run_gram<Tile<64>, false> : run_gram<Tile<32>, false>);
  }
  if (arguments.tile == 128) return run(run_gram<Tile<128>, true>);
  run(arguments.tile == 64 ? run_gram<Tile<64>, true> : run_gram<Tile<32>, true>);
}

template <int kTile>
using FloatTile = ScalarTile<float, kTile, kTile == 32 ? 4 : 8>;
template <int kTile>
using Tf32Tile = TensorTile<float, kTile>;
template <int kTile>
using BFloat16Tile = TensorTile<BFloat16, kTile>;

inline void run_gram(const GramArguments& arguments, const GramLaunch& work, Stream stream) {
  using DoubleTile = ScalarTile<double, 64, 4>;
  switch (arguments.precision) {
    case Precision::kFloat64: {
      const auto run = arguments.vectors ? run_gram<DoubleTile, true> : run_gram<DoubleTile, false>;
      return run(arguments.input, arguments.sums, arguments.partials, work, stream);
    }
    case Precision::kFloat32:
      return run_gram_tile<FloatTile>(arguments, work, stream);
    case Precision::kTf32:
      return run_gram_tile<Tf32Tile>(arguments, work, stream);
    case Precision::kBFloat16:
      return run_gram_tile<BFloat16Tile>(arguments, work, stream);
  }
}

}  // namespace spade_fast::cuda
