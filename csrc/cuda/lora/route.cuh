// Gate and mix: z = gate ⊙ (h mixᵀ) and the way back. [rows, r] is small beside x and y, so a thread makes one element,
// whose row of h the first cache serves to its neighbours.
#pragma once

#include "../device.h"

namespace mbf::cuda::lora {

constexpr int kRouteThreads = 256;

// What routes [rows, r]; gate and mix are null where there are none. mix(j, k) multiplies rank k of h for rank j of u.
struct Routing {
  int64_t rows, ranks;
  const float* gate;
  int64_t gate_row, gate_rank;  // strides
  const float* mix;
  int64_t mix_row, mix_column;  // strides

  __device__ __forceinline__ float gate_at(int64_t row, int64_t rank) const {
    return gate == nullptr ? 1.0f : load(gate + row * gate_row + rank * gate_rank);
  }
  __device__ __forceinline__ float mix_at(int64_t row, int64_t column) const {
    return load(mix + row * mix_row + column * mix_column);
  }
};

// u = h mixᵀ, one element.
template <typename P>
__device__ __forceinline__ float mixed(const Routing& routing, const P* h, int64_t row, int64_t rank) {
  const P* of_row = h + row * routing.ranks;
  if (routing.mix == nullptr) return convert<float>(load(of_row + rank));
  float total = 0.0f;
#pragma unroll 4
  for (int64_t k = 0; k < routing.ranks; ++k) {
    total = fmaf(convert<float>(load(of_row + k)), routing.mix_at(rank, k), total);
  }
  return total;
}

template <typename P>
__global__ void __launch_bounds__(kRouteThreads) route_kernel(Routing routing, const P* h, P* z) {
  const int64_t number = static_cast<int64_t>(blockIdx.x) * kRouteThreads + threadIdx.x;
  if (number >= routing.rows * routing.ranks) return;
  const int64_t row = number / routing.ranks, rank = number % routing.ranks;
  store(z + number, convert<P>(mixed(routing, h, row, rank) * routing.gate_at(row, rank)));
}

// From dz: dh = (gate ⊙ dz) mix, and where they are asked gate ⊙ dz itself and dz ⊙ u, of which dmix and dgate are
// sums.
template <typename P>
__global__ void __launch_bounds__(kRouteThreads)
    unroute_kernel(Routing routing, const float* dz, const P* h, P* dh, P* du, float* dgate) {
  const int64_t number = static_cast<int64_t>(blockIdx.x) * kRouteThreads + threadIdx.x;
  if (number >= routing.rows * routing.ranks) return;
  const int64_t row = number / routing.ranks, rank = number % routing.ranks;
  const float own = load(dz + number), gated = own * routing.gate_at(row, rank);
  if (dgate != nullptr) store(dgate + number, own * mixed(routing, h, row, rank));
  if (du != nullptr) store(du + number, convert<P>(gated));
  float total = gated;
  if (routing.mix != nullptr) {
    total = 0.0f;
#pragma unroll 4
    for (int64_t j = 0; j < routing.ranks; ++j) {
      const float of_rank = load(dz + row * routing.ranks + j) * routing.gate_at(row, j);
      total = fmaf(of_rank, routing.mix_at(j, rank), total);
    }
  }
  store(dh + number, convert<P>(total));
}

}  // namespace mbf::cuda::lora
