// Adds up what blocks left, in the order of the parts: the same bits in every run.
#pragma once

#include "../reduce.cuh"

namespace mbf::cuda::lora {

constexpr int kSumThreads = 256;

// parts [count, ·, ld], of each of which `size` elements of rows of `columns` count.
struct Parts {
  const float* data;
  int64_t count, part_size, ld;
  int64_t size, columns;
  float factor;
};

// factor · Σ of element `number`.
__device__ __forceinline__ float sum_of(const Parts& parts, int64_t number) {
  const float* at = parts.data + number / parts.columns * parts.ld + number % parts.columns;
  float total = 0.0f;
#pragma unroll 4
  for (int64_t part = 0; part < parts.count; ++part) total += load(at + part * parts.part_size);
  return total * parts.factor;
}

template <typename Out>
__global__ void __launch_bounds__(kSumThreads) sum_kernel(Parts parts, Out* out) {
  const int64_t number = static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x;
  if (number < parts.size) store(out + number, convert<Out>(sum_of(parts, number)));
}

// dB = λ dB̂, dB₀ = (1 − λ) dB̂ and, of dλ = ⟨dB̂, B − B₀⟩, each block's share; null where not asked.
template <typename P>
__global__ void __launch_bounds__(kSumThreads)
    sum_merged_kernel(Parts parts, const P* B, const P* merged, const float* weight, float value, P* dB, P* dmerged,
                      double* dweight) {
  const int64_t number = static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x;
  const float lambda = weight == nullptr ? value : load(weight);
  double share = 0.0;
  if (number < parts.size) {
    const float total = sum_of(parts, number);
    if (dB != nullptr) store(dB + number, convert<P>(lambda * total));
    if (dmerged != nullptr) store(dmerged + number, convert<P>((1.0f - lambda) * total));
    if (dweight != nullptr) {
      share = static_cast<double>(total) * (convert<float>(load(B + number)) - convert<float>(load(merged + number)));
    }
  }
  if (dweight == nullptr) return;
  __shared__ double of_warps[kSumThreads / kWarp];
  share = sum_of_block(share, of_warps);
  if (threadIdx.x == 0) store(dweight + blockIdx.x, share);
}

}  // namespace mbf::cuda::lora
