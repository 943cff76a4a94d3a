// What a pivot of a Cholesky factor is worth, on every device.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace spade_fast {

// The least M_ii^2 / H_ii that is no rounding noise. A backward stable factor may have pivots of nothing else, what the
// subtractions H_ii - ... left of their own rounding, and OBS divides by them: they must stand out ten times.
SPADE_FAST_HOST_DEVICE double least_pivot(int64_t size, double epsilon) {
  return 10 * sqrt(static_cast<double>(size)) * epsilon;
}

}  // namespace spade_fast
