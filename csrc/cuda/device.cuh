// What the kernels share. Kernel sources include this and nothing of CUDA or torch: nvcc compiles them for GPUs, and
// any C++ compiler, through ../simt/simt.h, for the CPU, where tests run them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

#ifdef __CUDACC__
#include <cuda_runtime.h>
#else
#include "../simt/simt.h"
#ifndef __grid_constant__
#define __grid_constant__
#endif
#endif

namespace spade_fast::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

#ifdef __CUDACC__

using Stream = cudaStream_t;

inline void check_cuda(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// Runs kernel(arguments...) on the stream; a grid without blocks does nothing.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes, Stream stream,
            const Arguments&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  constexpr size_t kWithoutAsking = 48 << 10;
  if (shared_bytes > kWithoutAsking) {
    // Always as much as there is: another thread may be about to launch the same kernel with more.
    int device = 0, most = 0;
    check_cuda(cudaGetDevice(&device), "spade_fast: asking for the device");
    check_cuda(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
               "spade_fast: asking for shared memory");
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most),
               "spade_fast: reserving shared memory");
  }
  kernel<<<grid, threads, shared_bytes, stream>>>(arguments...);
  check_cuda(cudaGetLastError(), "spade_fast: launching a kernel");
}

template <class T>
__device__ T* shared_memory() {
  extern __shared__ __align__(16) unsigned char dynamic_shared_memory[];
  return reinterpret_cast<T*>(dynamic_shared_memory);
}

// A pointer into global memory, for a compiler that cannot see where it comes from: shared memory then is no part of
// what stores may change.
template <class T>
__device__ __forceinline__ T* in_global_memory(T* pointer) {
  __builtin_assume(__isGlobal(pointer));
  return pointer;
}

// Starts copying kBytes (4, 8 or 16) into shared memory, zeros where not `valid`: `global` is then not read.
template <int kBytes>
__device__ __forceinline__ void cp_async(void* shared, const void* global, bool valid) {
  const auto target = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  const int bytes = valid ? kBytes : 0;
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(global), "r"(bytes) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(target), "l"(global), "n"(kBytes), "r"(bytes)
                 : "memory");
  }
}

// Closes the group of copies that this thread has started.
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits for this thread's groups but the kLatest latest.
template <int kLatest>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLatest) : "memory");
}

// d += a b on a warp's matrices [16, 8] and [8, 8], whose elements the lanes share out as in the PTX ISA, m16n8k8.
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#else

using Stream = void*;  // there is only one order of things

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes, Stream,
            const Arguments&... arguments) {
  simt::launch(grid, dim3(threads), shared_bytes, [&] { kernel(arguments...); });
}

template <class T>
T* shared_memory() {
  return static_cast<T*>(simt::shared_memory());
}

template <class T>
T* in_global_memory(T* pointer) {
  return pointer;
}

template <int kBytes>
void cp_async(void* shared, const void* global, bool valid) {
  simt::cp_async(shared, global, kBytes, valid);
}

inline void cp_async_commit() {
  simt::cp_async_commit();
}

template <int kLatest>
void cp_async_wait() {
  simt::cp_async_wait<kLatest>();
}

inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  simt::mma_m16n8k8_tf32(d, a, b);
}

#endif

// 16 bytes side by side, loaded and stored at once.
template <class T>
struct alignas(16) Vector {
  static constexpr int kLanes = 16 / sizeof(T);
  T lane[kLanes];
};

// The upper half of a float32.
struct BFloat16 {
  uint16_t bits;
};

__device__ __forceinline__ float to_float(BFloat16 value) {
  return __uint_as_float(static_cast<uint32_t>(value.bits) << 16);
}

// Where a chunk of `count` things begins: all have count / chunks of them, the first ones one more.
__device__ __forceinline__ int first_of_chunk(int count, int chunk, int chunks) {
  const int more = count % chunks;
  return count / chunks * chunk + (chunk < more ? chunk : more);
}

// Rounded to TF32, ten bits of mantissa, ties away from zero, as an operand of mma, which does not look at the bits
// below. NaN stays.
__device__ __forceinline__ uint32_t tf32_operand(float value) {
#ifdef __CUDACC__
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(value));
  return rounded;
#else
  return value == value ? __float_as_uint(value) + 0x1000 : __float_as_uint(value);
#endif
}

// The same as a number.
__device__ __forceinline__ float to_tf32(float value) {
  return __uint_as_float(tf32_operand(value) & ~uint32_t{0x1fff});
}

}  // namespace spade_fast::cuda
