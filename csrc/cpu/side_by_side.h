// Independent tasks of unequal size on all threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <numeric>
#include <vector>

namespace spade_fast {

// Calls task(i) once for every item, whose costs are known roughly. A large item, for which the threads would wait in
// the end, has them all to itself, one such after the other. The others are shared out, the largest first, and run on
// one thread each. What a task computes may depend on the number of threads, not on timing.
template <class Task>
void run_side_by_side(const std::vector<double>& costs, const Task& task) {
  const auto items = static_cast<int64_t>(costs.size()), threads = int64_t{torch::stable::get_num_threads()};
  std::vector<int64_t> order(items);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return costs[a] > costs[b]; });
  double left = std::accumulate(costs.begin(), costs.end(), 0.0);
  int64_t alone = 0;
  for (; alone < items && costs[order[alone]] * static_cast<double>(threads) >= left; ++alone) {
    left -= costs[order[alone]];
    task(order[alone]);
  }
  std::atomic<int64_t> next{alone};
  torch::stable::parallel_for(0, std::min(threads, items - alone), 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < items; i = next++) task(order[i]);
  });
}

}  // namespace spade_fast
