// Inner loops for x86-64 with AVX2 and FMA: vectors of 32 bytes, 16 registers.
#include "kernels.h"

#if defined(__x86_64__)

#define SPADE_FAST_TARGET __attribute__((target("avx2,fma")))
#define SPADE_FAST_VECTOR_BYTES 32
#define SPADE_FAST_TILE_ROWS 4
#define SPADE_FAST_TILE_PANELS 3
#include "kernels_impl.h"

namespace spade_fast {

template <class T>
const Kernels<T>* avx2_kernels() {
  return &kTable<T>;
}

}  // namespace spade_fast

#else

namespace spade_fast {

template <class T>
const Kernels<T>* avx2_kernels() {
  return nullptr;
}

}  // namespace spade_fast

#endif

namespace spade_fast {

template const Kernels<float>* avx2_kernels();
template const Kernels<double>* avx2_kernels();

}  // namespace spade_fast
