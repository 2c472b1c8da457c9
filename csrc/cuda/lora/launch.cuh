// Launches of the branch's kernels on tensors, with the buffers of their partial sums.
#pragma once

#include "expand.cuh"
#include "operands.cuh"
#include "output_gradient.cuh"
#include "project.cuh"
#include "route.cuh"
#include "sum.cuh"

namespace mbf::cuda::lora {

// Of a part; and blocks for each multiprocessor, which are as many as have room on it.
constexpr int64_t kLeastColumns = 512, kLeastRows = 256;
constexpr int64_t kProjectBlocks = 4, kSummingBlocks = 2, kExpandBlocks = 8;
constexpr size_t kSharedOfAll = 99 * 1024;  // bytes that a block can have on every architecture from sm_80 on

// parts [count, ·, ld] as a kernel takes them.
inline Parts parts_of(const Tensor& parts, int64_t size, int64_t columns, double factor) {
  return {const_data_of<float>(parts), parts.size(0), parts.size(1) * parts.size(2), parts.size(2), size, columns,
          static_cast<float>(factor)};
}

// factor · Σ of parts [count, ·, ld] as a tensor of `shape`, the last axis of which is a row.
inline Tensor summed(const Tensor& parts, std::vector<int64_t> shape, double factor, ScalarType type,
                     const Launcher& launcher) {
  const Tensor out = empty_on(parts, shape, type);
  const int64_t size = out.numel();
  if (size == 0) return out;
  with_factor(type, [&](auto out_type) {
    using Out = typename decltype(out_type)::type;
    MBF_LAUNCH(sum_kernel<Out>, grid_of(divided(size, kSumThreads)), kSumThreads, 0, launcher.stream(),
               parts_of(parts, size, shape.back(), factor), data_of<Out>(out));
  });
  return out;
}

// z = gate ⊙ (h mixᵀ) of h [rows, r]: h itself where there is neither.
inline Tensor routed(const Tensor& h, const Routed& route, const Launcher& launcher) {
  if (!route.there()) return h;
  const Tensor z = empty_on(h, shape_of(h), h.scalar_type());
  if (h.numel() == 0) return z;
  with_factor(h.scalar_type(), [&](auto type) {
    using P = typename decltype(type)::type;
    MBF_LAUNCH(route_kernel<P>, grid_of(divided(h.numel(), kRouteThreads)), kRouteThreads, 0, launcher.stream(),
               route.routing, const_data_of<P>(h), data_of<P>(z));
  });
  return z;
}

// Launches the expansion, and returns the parts of dA.
template <typename X, typename P, int kRankTiles, bool kOuter>
MaybeTensor launch_expand(Expansion<X, P> e, const Tensor& like, const Launcher& launcher) {
  using Shape = ExpandShape<P, kRankTiles>;
  static_assert(Shape::shared_bytes(kRankTiles) <= kSharedOfAll);
  const int64_t stripes = divided(e.columns, Shape::kColumns), tiles = divided(e.z.columns, kTile);
  const int64_t blocks = multiprocessors() * (kOuter ? kSummingBlocks : kExpandBlocks);
  const Split rows(e.z.rows, Shape::kRows, kOuter ? kLeastRows : kLeastRows / 2, blocks, stripes);
  e.span = rows.span;
  MaybeTensor parts;
  if (kOuter) {
    e.padded_ranks = tiles * kTile;
    e.padded_columns = stripes * Shape::kColumns;
    parts = empty_on(like, {rows.parts, e.padded_ranks, e.padded_columns}, ScalarType::Float);
    e.dA = data_of<float>(*parts);
  }
  if (stripes > 0 && rows.parts > 0) {
    MBF_LAUNCH((expand_kernel<X, P, kRankTiles, kOuter>), grid_of(stripes, rows.parts), Shape::kThreads,
               Shape::shared_bytes(static_cast<int>(tiles)), launcher.stream(), e);
  }
  return parts;
}

template <bool kOuter, typename X, typename P>
MaybeTensor launch_expand(const Expansion<X, P>& e, const Tensor& like, const Launcher& launcher) {
  if (e.z.columns <= 4 * kTile) return launch_expand<X, P, 4, kOuter>(e, like, launcher);
  return launch_expand<X, P, 16, kOuter>(e, like, launcher);
}

struct OutputParts {
  MaybeTensor dz, dB;
};

template <typename X, typename P, int kRankTiles>
OutputParts launch_output_gradient(const Tensor& dy, const Tensor& z, const Interpolated& B, const Needs& needs,
                                   const Launcher& launcher) {
  using Shape = OutputShape<P, kRankTiles>;
  static_assert(Shape::kSharedBytes <= kSharedOfAll);
  const int64_t tiles = divided(z.size(1), kTile), chunks = divided(tiles, kRankTiles);
  const int64_t stripes = divided(dy.size(1), Shape::kColumns);
  const Split rows(dy.size(0), Shape::kRows, kLeastRows, multiprocessors() * kSummingBlocks, stripes * chunks);
  const int64_t high = padded(dy.size(0), Shape::kRows), wide = stripes * Shape::kColumns, deep = tiles * kTile;
  OutputParts found;
  if (needs.of_z()) found.dz = empty_on(dy, {stripes, high, deep}, ScalarType::Float);
  if (needs.of_B()) found.dB = empty_on(dy, {rows.parts, wide, deep}, ScalarType::Float);
  if (stripes > 0 && rows.parts > 0 && chunks > 0) {
    MBF_LAUNCH((output_gradient_kernel<X, P, kRankTiles>), grid_of(stripes, rows.parts, chunks), Shape::kThreads,
               Shape::kSharedBytes, launcher.stream(), rows_in<X>(dy), rows_in<P>(z), B.factor<P>(),
               found.dz ? data_of<float>(*found.dz) : nullptr, found.dB ? data_of<float>(*found.dB) : nullptr, high,
               wide, deep, rows.span);
  }
  return found;
}

}  // namespace mbf::cuda::lora
