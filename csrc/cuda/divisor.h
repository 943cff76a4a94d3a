#pragma once

#include <cstdint>

#include "../host_device.h"

namespace spade_fast::cuda {

// n / divisor without a division, for 0 <= n < 2^31 (Granlund and Montgomery 1994, section 4).
struct Divisor {
  uint32_t divisor, multiplier, shift;

  Divisor() = default;
  explicit Divisor(int64_t value) : divisor(static_cast<uint32_t>(value)), multiplier(0), shift(0) {
    while ((uint64_t{1} << shift) < divisor) ++shift;
    const uint64_t excess = (uint64_t{1} << shift) - divisor;
    multiplier = static_cast<uint32_t>((excess << 32) / divisor + 1);
  }

  SPADE_FAST_HOST_DEVICE uint32_t quotient(uint32_t n) const {
    return (static_cast<uint32_t>(uint64_t{n} * multiplier >> 32) + n) >> shift;
  }
};

}  // namespace spade_fast::cuda
