// What every kernel file includes: the CUDA runtime under nvcc, or its stand-in on the host under g++ with
// -DMBF_EMULATION; how both launch a kernel, declare dynamic shared memory and find torch's stream.
#pragma once

#ifdef MBF_EMULATION
#include "../emulation/cuda.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

// MBF_LAUNCH(kernel, grid, block, shared_bytes, stream, args...); a kernel's template arguments go in parentheses:
// MBF_LAUNCH((merge_kernel<float, 4>), ...). Throws with the kernel's name where the launch fails.
#define MBF_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::mbf::cuda::launch(#kernel, kernel, grid, block, shared_bytes, stream __VA_OPT__(, ) __VA_ARGS__)

// In a kernel: T* name, the launch's dynamic shared memory.
#ifdef MBF_EMULATION
#define MBF_SHARED(T, name) T* name = static_cast<T*>(::mbf::emulation::dynamic_shared())
#else
#define MBF_SHARED(T, name)                                           \
  extern __shared__ __align__(16) unsigned char mbf_dynamic_shared[]; \
  T* name = reinterpret_cast<T*>(mbf_dynamic_shared)
extern "C" int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace mbf::cuda {

constexpr int kWarp = 32;
constexpr size_t kParameterBytes = 4096;    // of a kernel, on every architecture and toolkit
constexpr size_t kSharedBytes = 48 * 1024;  // of a block without asking for more
constexpr size_t kMostShared = 163 * 1024;  // of a block that asks, on sm_80; sm_90 has 227 KiB, sm_86 99

// Global memory goes through load and store, which the stand-in counts; under nvcc they are plain accesses.
template <typename T>
__device__ __forceinline__ T load(const T* address) {
#ifdef MBF_EMULATION
  emulation::loaded(address, sizeof(T), alignof(T));
#endif
  return *address;
}

template <typename T>
__device__ __forceinline__ void store(T* address, std::type_identity_t<T> value) {
#ifdef MBF_EMULATION
  emulation::stored(address, sizeof(T), alignof(T));
#endif
  *address = value;
}

// One dtype as another, rounded to nearest even; fp64 reaches the 16-bit ones by way of fp32, as torch's do.
template <typename To, typename From>
__device__ __forceinline__ To convert(From value) {
  if constexpr (std::is_same_v<To, From>) {
    return value;
  } else if constexpr (std::is_same_v<From, __half>) {
    return static_cast<To>(__half2float(value));
  } else if constexpr (std::is_same_v<From, __nv_bfloat16>) {
    return static_cast<To>(__bfloat162float(value));
  } else if constexpr (std::is_same_v<To, __half>) {
    return __float2half_rn(static_cast<float>(value));
  } else if constexpr (std::is_same_v<To, __nv_bfloat16>) {
    return __float2bfloat16_rn(static_cast<float>(value));
  } else {
    return static_cast<To>(value);
  }
}

#ifdef MBF_EMULATION

inline cudaStream_t current_stream(int32_t) { return nullptr; }

template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
            Arguments&&... arguments) {
  static_assert((sizeof(Parameters) + ... + 0) <= kParameterBytes, "a kernel's parameters are at most 4 KB");
  emulation::launch(name, grid, block, shared_bytes, [&] { kernel(static_cast<Parameters>(arguments)...); });
}

#else

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("mbf: ") + what + ": " + cudaGetErrorString(error));
}

// torch's current stream of this device, which must be the current device.
inline cudaStream_t current_stream(int32_t device_index) {
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream(device_index, &stream) != 0) {
    throw std::runtime_error("mbf: torch has no current stream for GPU " + std::to_string(device_index));
  }
  return static_cast<cudaStream_t>(stream);
}

template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            cudaStream_t stream, Arguments&&... arguments) {
  static_assert((sizeof(Parameters) + ... + 0) <= kParameterBytes, "a kernel's parameters are at most 4 KB");
  if (shared_bytes > kSharedBytes) {
    const auto most = cudaFuncAttributeMaxDynamicSharedMemorySize;
    check(cudaFuncSetAttribute(kernel, most, static_cast<int>(shared_bytes)), name);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), name);
}

#endif

}  // namespace mbf::cuda
