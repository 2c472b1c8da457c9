// Keywords of CUDA C++.
#pragma once

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __noinline__  // nothing, as the standard library writes __attribute__((__noinline__))
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)
#define __grid_constant__

// One variable for all threads of a block, since blocks run one after another; see shared.cpp.
#if defined(__SANITIZE_ADDRESS__)
#define __shared__ static
#else
#define __shared__ static thread_local
#endif

using cudaStream_t = void*;
