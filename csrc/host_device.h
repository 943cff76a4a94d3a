// For what both hosts and GPUs call.
#pragma once

#ifdef __CUDACC__
#define SPADE_FAST_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define SPADE_FAST_HOST_DEVICE inline
#endif
