#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace spade_fast {

// How many of `candidates` weights of one block are pruned. Both rules are evaluated in double, as Python would.
inline int64_t count_to_prune(int64_t candidates, double sparsity, bool published_count) {
  const double exact = static_cast<double>(candidates) * sparsity;
  // The published rule prunes all scores up to and including the int(n s)-th smallest: one more than asked for.
  const int64_t count =
      published_count ? static_cast<int64_t>(exact) + 1 : static_cast<int64_t>(std::floor(exact + 0.5));
  return std::clamp<int64_t>(count, 0, candidates);
}

}  // namespace spade_fast
