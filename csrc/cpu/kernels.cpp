#include "kernels.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace spade_fast {
namespace {

enum Capability { kDefault, kAvx2, kAvx512 };
constexpr const char* kNames[] = {"default", "avx2", "avx512"};

Capability best_capability() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2;
#endif
  return kDefault;
}

Capability choose_capability() {
  const Capability best = best_capability();
  const char* wanted = std::getenv("SPADE_FAST_CPU_CAPABILITY");
  if (wanted == nullptr || *wanted == '\0') return best;
  for (int capability = kDefault; capability <= best; ++capability) {
    if (std::strcmp(wanted, kNames[capability]) == 0) return static_cast<Capability>(capability);
  }
  throw std::runtime_error("SPADE_FAST_CPU_CAPABILITY is '" + std::string(wanted) +
                           "': unset it, or choose what this machine can run: " + cpu_capabilities());
}

Capability capability() {
  static const Capability chosen = choose_capability();
  return chosen;
}

}  // namespace

const char* cpu_capability() {
  return kNames[capability()];
}

std::string cpu_capabilities() {
  std::string names;
  for (int capability = kDefault; capability <= best_capability(); ++capability) {
    names += std::string(names.empty() ? "" : " ") + kNames[capability];
  }
  return names;
}

template <class T>
const Kernels<T>& kernels() {
  switch (capability()) {
    case kAvx512:
      return *avx512_kernels<T>();
    case kAvx2:
      return *avx2_kernels<T>();
    default:
      return *default_kernels<T>();
  }
}
template const Kernels<float>& kernels();
template const Kernels<double>& kernels();

}  // namespace spade_fast
