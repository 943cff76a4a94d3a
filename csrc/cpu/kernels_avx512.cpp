// Inner loops for x86-64 with AVX-512: vectors of 64 bytes, 32 registers.
#include "kernels.h"

#if defined(__x86_64__)

#define SPADE_FAST_TARGET __attribute__((target("avx512f")))
#define SPADE_FAST_VECTOR_BYTES 64
#define SPADE_FAST_TILE_ROWS 8
#define SPADE_FAST_TILE_PANELS 3
#include "kernels_impl.h"

namespace spade_fast {

template <class T>
const Kernels<T>* avx512_kernels() {
  return &kTable<T>;
}

}  // namespace spade_fast

#else

namespace spade_fast {

template <class T>
const Kernels<T>* avx512_kernels() {
  return nullptr;
}

}  // namespace spade_fast

#endif

namespace spade_fast {

template const Kernels<float>* avx512_kernels();
template const Kernels<double>* avx512_kernels();

}  // namespace spade_fast
