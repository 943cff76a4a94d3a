// Inner loops for any machine: vectors of 16 bytes, which every x86-64 and ARM64 processor has.
#define SPADE_FAST_TARGET
#define SPADE_FAST_VECTOR_BYTES 16
#define SPADE_FAST_TILE_ROWS 2
#define SPADE_FAST_TILE_PANELS 3
#include "kernels_impl.h"

namespace spade_fast {

template <class T>
const Kernels<T>* default_kernels() {
  return &kTable<T>;
}
template const Kernels<float>* default_kernels();
template const Kernels<double>* default_kernels();

}  // namespace spade_fast
