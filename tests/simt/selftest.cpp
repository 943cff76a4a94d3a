// csrc/simt/simt.h against kernels that are right, and against kernels with one planted fault each.
//
//   selftest CASE   0 where the case went as it should. Races and accesses out of bounds are for the sanitizers to
//   find. selftest        the names of the cases
#include "../../csrc/simt/simt.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace simt = spade_fast::simt;

#define CHECK(condition) \
  if (!(condition)) throw std::logic_error(std::to_string(__LINE__) + ": " #condition)

namespace {

constexpr unsigned kAll = ~0u;

void for_each_order(const std::function<void()>& test) {
  for (unsigned seed : {0u, 1u, 7u, 12345u}) {
    simt::set_thread_order(seed);
    test();
  }
  simt::set_thread_order(0);
}

void expect_error(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel) {
  std::string what;
  try {
    simt::launch(grid, block, shared_bytes, kernel);
  } catch (const simt::Error& error) {
    what = error.what();
  }
  CHECK(!what.empty());
  int runs = 0;
  simt::launch(2, 64, 16, [&] {
    __syncthreads();
    atomicAdd(&runs, 1);
  });
  CHECK(runs == 128);
  std::printf("%s\n", what.c_str());
}

__device__ unsigned existing_lanes() {
  const unsigned threads = blockDim.x - threadIdx.x / 32 * 32;
  return threads >= 32 ? kAll : (1u << threads) - 1;
}

// ---- Right kernels

// sums[block] = the sum of the block's values: by shuffles in a warp, by shared memory among the warps.
__global__ void block_sum_kernel(const int* __restrict__ values, int n, int* __restrict__ sums) {
  int* partial = static_cast<int*>(simt::shared_memory());
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x), lane = static_cast<int>(threadIdx.x % 32);
  const unsigned mask = existing_lanes();
  int sum = i < n ? __ldg(values + i) : 0;
  for (int delta = 16; delta > 0; delta /= 2) {
    const int other = __shfl_sync(mask, sum, mask >> min(lane + delta, 31) & 1 ? lane + delta : lane);
    if (lane + delta < 32 && (mask >> (lane + delta) & 1)) sum += other;
  }
  if (lane == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    int total = 0;
    for (unsigned warp = 0; warp < (blockDim.x + 31) / 32; ++warp) total += partial[warp];
    sums[blockIdx.x] = total;
  }
}

void block_sum() {
  for_each_order([] {
    for (int threads : {1, 31, 33, 100, 256}) {
      const int n = 3 * threads - threads / 2;
      std::vector<int> values(static_cast<size_t>(n)), sums(3), expected(3);
      for (int i = 0; i < n; ++i)
        expected[static_cast<size_t>(i / threads)] += values[static_cast<size_t>(i)] = i * i % 101;
      simt::launch(3, static_cast<unsigned>(threads), 32 * sizeof(int),
                   [&] { block_sum_kernel(values.data(), n, sums.data()); });
      CHECK(sums == expected);
    }
  });
}

template <class T>
void shuffle_values() {
  simt::launch(1, 64, 0, [] {
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32) * 1000;
    const auto value = [warp](int of) { return static_cast<T>(warp + of * 3 + 1); };
    CHECK(__shfl_sync(kAll, value(lane), 5) == value(5));
    CHECK(__shfl_sync(kAll, value(lane), 31 - lane) == value(31 - lane));
    CHECK(__shfl_up_sync(kAll, value(lane), 3) == value(lane < 3 ? lane : lane - 3));
    CHECK(__shfl_down_sync(kAll, value(lane), 3) == value(lane > 28 ? lane : lane + 3));
    CHECK(__shfl_xor_sync(kAll, value(lane), 9) == value(lane ^ 9));
  });
}

void shuffles() {
  for_each_order([] {
    shuffle_values<int>();
    shuffle_values<unsigned long long>();
    shuffle_values<float>();
    shuffle_values<double>();
  });
}

void votes() {
  for_each_order([] {
    simt::launch(1, 40, 0, [] {
      const unsigned mask = existing_lanes();
      const int lane = static_cast<int>(threadIdx.x % 32);
      CHECK(__ballot_sync(mask, lane % 3 == 0) == (0x49249249u & mask));
      CHECK(__any_sync(mask, lane == 7) != 0);
      CHECK(__any_sync(mask, lane == 40) == 0);
      CHECK(__all_sync(mask, lane < 32) != 0);
      CHECK(__all_sync(mask, lane != 7) == 0);
    });
  });
}

// Some lanes may wait for others that have an operation of their own to do first.
void partial_masks() {
  for_each_order([] {
    simt::launch(1, 32, 0, [] {
      const unsigned lane = threadIdx.x, half = lane < 16 ? 0xFFFFu : 0xFFFF0000u;
      if (lane < 16) CHECK(__shfl_sync(0xFFFFu, lane, 15) == 15);
      CHECK(__ballot_sync(kAll, lane % 16 == 0) == 0x10001u);
      for (int i = 0; i < (lane < 16 ? 2 : 5); ++i) CHECK(__ballot_sync(half, 1) == half);
      __syncwarp(1u << lane);
      __syncwarp();
    });
  });
}

void atomics() {
  for_each_order([] {
    int sum = 0, most = -5, bits = 0;
    unsigned count = 0, largest = 0, flags = 0;
    unsigned long long wide = 1ull << 40;
    std::vector<int> seen(3 * 50);
    simt::launch(3, 50, 0, [&] {
      const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
      atomicAdd(&seen[atomicAdd(&count, 1u)], 1);
      atomicAdd(&sum, -i);
      atomicAdd(&wide, 2ull);
      atomicMax(&most, i - 100);
      atomicMax(&largest, static_cast<unsigned>(i));
      atomicOr(&bits, 1 << i % 8);
      atomicOr(&flags, 1u << i % 32);
    });
    CHECK(count == 150 && sum == -150 * 149 / 2 && wide == (1ull << 40) + 300);
    CHECK(most == 49 && largest == 149 && bits == 255 && flags == kAll);
    CHECK(std::count(seen.begin(), seen.end(), 1) == 150);
  });
}

void copies() {
  std::vector<uint32_t> source(64 * 4);
  std::iota(source.begin(), source.end(), 100u);
  for_each_order([&] {
    simt::launch(2, 64, 3 * 64 * 16, [&] {
      auto* shared = static_cast<uint32_t*>(simt::shared_memory());
      const unsigned thread = threadIdx.x;
      const auto stage = [&](unsigned i) { return shared + (i * 64 + thread) * 4; };
      const uint32_t* from = source.data() + thread * 4;
      simt::cp_async(stage(0), from, 16, true);
      simt::cp_async_commit();
      simt::cp_async(stage(1), from, 8, true);
      simt::cp_async(stage(1) + 2, from + 2, 4, true);
      simt::cp_async_commit();
      simt::cp_async(stage(2), nullptr, 16, false);
      CHECK(stage(0)[0] == simt::kPoison && stage(1)[0] == simt::kPoison && stage(2)[0] == simt::kPoison);
      simt::cp_async_wait<1>();
      CHECK(stage(0)[0] == from[0] && stage(0)[3] == from[3] && stage(1)[0] == simt::kPoison);
      simt::cp_async_commit();
      simt::cp_async_wait<0>();
      CHECK(stage(1)[1] == from[1] && stage(1)[2] == from[2] && stage(1)[3] == simt::kPoison && stage(2)[3] == 0);
      __syncthreads();
      const unsigned other = 63 - thread;
      CHECK(shared[other * 4] == source[other * 4]);
      __syncthreads();
      simt::cp_async(stage(0), from, 4, true);  // what was there is gone at once
      CHECK(stage(0)[0] == simt::kPoison);
      simt::cp_async_commit();
      simt::cp_async_wait<0>();
    });
  });
}

float truncated(float value) {
  return __uint_as_float(__float_as_uint(value) & ~0x1FFFu);
}

void mma() {
  std::mt19937 random(3);
  std::uniform_real_distribution<float> uniform(-1, 1);
  for_each_order([&] {
    float a[16][8], b[8][8], c[16][8], d[16][8];
    for (auto& row : a) {
      for (float& value : row) value = uniform(random);
    }
    for (auto& row : b) {
      for (float& value : row) value = uniform(random);
    }
    for (auto& row : c) {
      for (float& value : row) value = uniform(random);
    }
    simt::launch(1, 32, 0, [&] {
      const unsigned g = threadIdx.x / 4, t = threadIdx.x % 4;
      float sums[4] = {c[g][2 * t], c[g][2 * t + 1], c[g + 8][2 * t], c[g + 8][2 * t + 1]};
      const uint32_t left[4] = {__float_as_uint(a[g][t]), __float_as_uint(a[g + 8][t]), __float_as_uint(a[g][t + 4]),
                                __float_as_uint(a[g + 8][t + 4])};
      const uint32_t right[2] = {__float_as_uint(b[t][g]), __float_as_uint(b[t + 4][g])};
      simt::mma_m16n8k8_tf32(sums, left, right);
      d[g][2 * t] = sums[0];
      d[g][2 * t + 1] = sums[1];
      d[g + 8][2 * t] = sums[2];
      d[g + 8][2 * t + 1] = sums[3];
    });
    for (int m = 0; m < 16; ++m) {
      for (int n = 0; n < 8; ++n) {
        double sum = 0;
        for (int k = 0; k < 8; ++k) sum += static_cast<double>(truncated(a[m][k])) * truncated(b[k][n]);
        CHECK(std::abs(d[m][n] - (c[m][n] + sum)) < 2e-7 * (1 + std::abs(d[m][n])));
      }
    }
  });
}

void poison() {
  simt::launch(3, 32, 32 * sizeof(double) + 3, [] {
    const void* shared = simt::shared_memory();
    CHECK(reinterpret_cast<uintptr_t>(shared) % 16 == 0);
    CHECK(std::isnan(static_cast<const float*>(shared)[threadIdx.x]));
    CHECK(std::isnan(static_cast<const double*>(shared)[threadIdx.x]));
    __syncthreads();
    static_cast<double*>(simt::shared_memory())[threadIdx.x] = 0;  // and yet poison in the next block
  });
}

void arithmetic() {
  CHECK(__umulhi(0x80000000u, 6u) == 3 && __umulhi(kAll, kAll) == 0xFFFFFFFEu);
  CHECK(__popc(0xF0F0u) == 8 && __ffs(0) == 0 && __ffs(8) == 4 && __clz(0) == 32 && __clz(1) == 31);
  CHECK(__float_as_uint(1.0f) == 0x3F800000u && __uint_as_float(0xC0000000u) == -2.0f);
  CHECK(__double_as_longlong(-0.0) == INT64_MIN);
  CHECK(min(-1, 2) == -1 && max(1u, 2u) == 2 && min(NAN, 2.0f) == 2 && max(2.0, double(NAN)) == 2);
}

void indices() {
  for_each_order([] {
    std::vector<int> seen(2 * 3 * 4 * 5 * 3 * 2);
    simt::launch(dim3(2, 3, 4), dim3(5, 3, 2), 0, [&] {
      CHECK(gridDim.x == 2 && gridDim.y == 3 && gridDim.z == 4 && blockDim.x == 5 && blockDim.y == 3);
      const unsigned block = (blockIdx.z * 3 + blockIdx.y) * 2 + blockIdx.x;
      __syncthreads();
      ++seen[block * 30 + (threadIdx.z * 3 + threadIdx.y) * 5 + threadIdx.x];
    });
    CHECK(std::count(seen.begin(), seen.end(), 1) == static_cast<std::ptrdiff_t>(seen.size()));
  });
}

void orders() {
  const auto trace = [](unsigned seed) {
    simt::set_thread_order(seed);
    std::vector<unsigned> order(160);
    unsigned count = 0;
    simt::launch(2, 40, 0, [&] {
      for (unsigned round = 0; round < 2; ++round) {
        order[atomicAdd(&count, 1u)] = (blockIdx.x * 2 + round) * 40 + threadIdx.x;
        __syncthreads();
      }
    });
    simt::set_thread_order(0);
    return order;
  };
  std::vector<unsigned> ascending(160), descending;
  std::iota(ascending.begin(), ascending.end(), 0u);
  for (unsigned round : {2u, 3u, 0u, 1u}) {
    for (unsigned i = 40; i-- > 0;) descending.push_back(round * 40 + i);
  }
  CHECK(trace(0) == ascending && trace(1) == descending);
  const std::vector<unsigned> seven = trace(7);
  CHECK(seven == trace(7) && seven != trace(8));
  for (unsigned i = 0; i < 40; ++i) {
    if (seven[i] % 40 != seven[40 + i] % 40) return;
  }
  CHECK(!"the same order in two rounds");
}

void launches() {
  const auto refused = [](dim3 grid, dim3 block, size_t shared_bytes) {
    try {
      simt::launch(grid, block, shared_bytes, [] {});
    } catch (const simt::Error&) {
      return true;
    }
    return false;
  };
  CHECK(refused(1, 0, 0) && refused(1, 1025, 0) && refused(1, dim3(32, 32, 2), 0) && refused(1, dim3(1, 1, 65), 0));
  CHECK(refused(dim3(1, 65536), 1, 0) && refused(1, 1, 227 * 1024 + 1) && !refused(1, 1, 227 * 1024));
  simt::launch(dim3(3, 0), 32, 0, [] { CHECK(!"an empty grid runs nothing"); });
  int runs = 0;
  simt::launch(1, 1024, 0, [&] {
    __syncthreads();
    atomicAdd(&runs, 1);
  });
  CHECK(runs == 1024);
  expect_error(1, 1, 0, [] { simt::launch(1, 1, 0, [] {}); });
}

// What a kernel throws gets out, and the threads that wait for the one that threw are unwound.
void exceptions() {
  for_each_order([] {
    int unwound = 0, value = 0;
    struct Guard {
      int& count;
      ~Guard() { atomicAdd(&count, 1); }
    };
    try {
      simt::launch(4, 96, 0, [&] {
        const Guard guard = {unwound};
        __syncthreads();
        if (threadIdx.x == 50) throw 42;
        if (threadIdx.x % 2) __syncthreads();
        __syncwarp(0x55555555u);
      });
    } catch (int thrown) {
      value = thrown;
    }
    CHECK(value == 42 && unwound == 96);
  });
}

// ---- Faults that Error names

void divergent_barrier() {
  expect_error(1, 64, 0, [] {
    if (threadIdx.x < 32) __syncthreads();
    if (threadIdx.x >= 32) __syncthreads();
  });
}

void barrier_against_warp() {
  expect_error(1, 32, 0, [] {
    if (threadIdx.x < 16) {
      __syncthreads();
    } else {
      __syncwarp();
    }
  });
}

void barrier_then_warp() {
  expect_error(1, 32, 0, [] {
    if (threadIdx.x < 16) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  });
}

void exit_before_barrier() {
  expect_error(2, 64, 0, [] {
    if (threadIdx.x == 63 && blockIdx.x == 1) return;
    __syncthreads();
  });
}

void barrier_after_exit() {
  expect_error(1, 64, 0, [] {
    if (threadIdx.x > 0) __syncthreads();
  });
}

void mask_mismatch() {
  expect_error(1, 32, 0, [] { __shfl_sync(threadIdx.x == 3 ? 0x7FFFFFFFu : kAll, threadIdx.x, 0); });
}

void kind_mismatch() {
  expect_error(1, 32, 0, [] {
    if (threadIdx.x % 2) {
      __ballot_sync(kAll, 1);
    } else {
      __any_sync(kAll, 1);
    }
  });
}

void exited_lane() {
  expect_error(1, 64, 0, [] {
    if (threadIdx.x == 40) return;
    __syncwarp();
  });
}

void lane_exited_before() {
  expect_error(1, 64, 0, [] {
    if (threadIdx.x == 40) return;
    if (threadIdx.x > 40) __syncwarp();
  });
}

void missing_lane() {
  expect_error(1, 40, 0, [] { __syncwarp(); });
}

void own_lane() {
  expect_error(1, 32, 0, [] { __ballot_sync(0xFFFEu, 1); });
}

void shuffle_outside() {
  expect_error(1, 32, 0, [] {
    if (threadIdx.x < 8) __shfl_down_sync(0xFFu, threadIdx.x, 1);
  });
}

// Three lanes, each of which waits for the next one.
void deadlock() {
  expect_error(1, 32, 0, [] {
    constexpr unsigned masks[] = {0b011, 0b110, 0b101};
    if (threadIdx.x < 3) __syncwarp(masks[threadIdx.x]);
  });
}

void unwaited_copy() {
  const int value = 1;
  expect_error(1, 1, 4, [&] {
    simt::cp_async(simt::shared_memory(), &value, 4, true);
    simt::cp_async_commit();
    simt::cp_async_wait<1>();
  });
}

void misaligned_copy() {
  alignas(16) const int values[8] = {};
  expect_error(1, 1, 32, [&] { simt::cp_async(simt::shared_memory(), values + 1, 8, true); });
}

void copy_outside() {
  const int value = 1;
  expect_error(1, 1, 4, [&] { simt::cp_async(static_cast<char*>(simt::shared_memory()) + 4, &value, 4, true); });
}

// ---- Accesses out of bounds, for AddressSanitizer

void shared_out_of_bounds() {
  simt::launch(1, 32, 31, [] { static_cast<char*>(simt::shared_memory())[threadIdx.x] = 1; });
}

void global_out_of_bounds() {
  const std::unique_ptr<float[]> values(new float[31]);
  simt::launch(1, 32, 0, [&] { values[threadIdx.x] = 1; });
}

void copy_out_of_bounds() {
  const std::unique_ptr<float[]> values(new float[31]);
  simt::launch(1, 32, 32 * sizeof(float), [&] {
    simt::cp_async(static_cast<float*>(simt::shared_memory()) + threadIdx.x, &values[threadIdx.x], 4, true);
    simt::cp_async_commit();
    simt::cp_async_wait<0>();
  });
}

// ---- Races, for ThreadSanitizer. Each is what becomes of a right kernel when one line is forgotten.

template <bool repaired>
void race_in_block() {
  for_each_order([] {
    int sums[2] = {};
    simt::launch(2, 96, 96 * sizeof(int), [&] {
      int* shared = static_cast<int*>(simt::shared_memory());
      for (int round = 0; round < 3; ++round) {
        shared[threadIdx.x] = 1;
        __syncthreads();
        const int other = shared[95 - threadIdx.x];
        if (repaired) __syncthreads();  // else a quick thread writes the next round's value
        atomicAdd(&sums[blockIdx.x], other);
      }
    });
    CHECK(!repaired || (sums[0] == 288 && sums[1] == 288));
  });
}

template <bool repaired>
void race_in_warp() {
  for_each_order([] {
    int sum = 0;
    simt::launch(2, 32, 32 * sizeof(int), [&] {
      int* shared = static_cast<int*>(simt::shared_memory());
      const unsigned half = threadIdx.x < 16 ? 0xFFFFu : 0xFFFF0000u;
      __syncwarp(half);
      shared[threadIdx.x] = 1;
      __ballot_sync(kAll, 1);  // all are here, but no memory is ordered
      if (repaired) __syncwarp();
      atomicAdd(&sum, shared[31 - threadIdx.x]);
    });
    CHECK(!repaired || sum == 64);
  });
}

// A copy may land at any time before it is waited for: here while another thread still reads what was there.
template <bool repaired>
void race_of_copy() {
  const std::vector<int> source(64, 5);
  for_each_order([&] {
    int sum = 0;
    simt::launch(1, 64, 64 * sizeof(int), [&] {
      int* shared = static_cast<int*>(simt::shared_memory());
      shared[threadIdx.x] = 1;
      __syncthreads();
      atomicAdd(&sum, shared[threadIdx.x ^ 32]);
      if (repaired) __syncthreads();
      simt::cp_async(shared + threadIdx.x, &source[threadIdx.x], 4, true);
      simt::cp_async_commit();
      simt::cp_async_wait<0>();
      __syncthreads();
      atomicAdd(&sum, shared[threadIdx.x ^ 32]);
    });
    CHECK(!repaired || sum == 64 + 5 * 64);
  });
}

template <bool repaired>
void race_of_blocks() {
  for_each_order([] {
    int count = 0;
    simt::launch(3, 32, 0, [&] {
      if (threadIdx.x != 0) return;
      if (repaired) {
        atomicAdd(&count, 1);
      } else {
        count += 1;
      }
    });
    CHECK(count == 3);
  });
}

}  // namespace

int main(int argc, char** argv) {
  const std::map<std::string, void (*)()> cases = {
      {"block_sum", block_sum},
      {"shuffles", shuffles},
      {"votes", votes},
      {"partial_masks", partial_masks},
      {"atomics", atomics},
      {"copies", copies},
      {"mma", mma},
      {"poison", poison},
      {"arithmetic", arithmetic},
      {"indices", indices},
      {"orders", orders},
      {"launches", launches},
      {"exceptions", exceptions},
      {"divergent_barrier", divergent_barrier},
      {"barrier_against_warp", barrier_against_warp},
      {"barrier_then_warp", barrier_then_warp},
      {"exit_before_barrier", exit_before_barrier},
      {"barrier_after_exit", barrier_after_exit},
      {"mask_mismatch", mask_mismatch},
      {"kind_mismatch", kind_mismatch},
      {"exited_lane", exited_lane},
      {"lane_exited_before", lane_exited_before},
      {"missing_lane", missing_lane},
      {"own_lane", own_lane},
      {"shuffle_outside", shuffle_outside},
      {"deadlock", deadlock},
      {"unwaited_copy", unwaited_copy},
      {"misaligned_copy", misaligned_copy},
      {"copy_outside", copy_outside},
      {"shared_out_of_bounds", shared_out_of_bounds},
      {"global_out_of_bounds", global_out_of_bounds},
      {"copy_out_of_bounds", copy_out_of_bounds},
      {"race_in_block", race_in_block<false>},
      {"race_in_block_repaired", race_in_block<true>},
      {"race_in_warp", race_in_warp<false>},
      {"race_in_warp_repaired", race_in_warp<true>},
      {"race_of_copy", race_of_copy<false>},
      {"race_of_copy_repaired", race_of_copy<true>},
      {"race_of_blocks", race_of_blocks<false>},
      {"race_of_blocks_repaired", race_of_blocks<true>},
  };
  const auto found = argc == 2 ? cases.find(argv[1]) : cases.end();
  if (found == cases.end()) {
    for (const auto& one : cases) std::printf("%s\n", one.first.c_str());
    return 2;
  }
  try {
    found->second();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s: %s\n", argv[1], error.what());
    return 1;
  }
  return 0;
}
