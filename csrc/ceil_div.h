#pragma once

#include <cstdint>

namespace spade_fast {

// a / b, rounded up, for a >= 0 and b > 0.
inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

}  // namespace spade_fast
