// The two passes over frozen layers with branches, in pieces that a thread does alone: chunks of rows and tiles.
//
// layers.cpp shares the tiles of one matrix out among the threads; lora_mlp.cpp takes a chunk of rows through three
// layers while it is in the core's cache. Both come to the same bits, as tiles and sums are cut alike (Grid).
#pragma once

#include <vector>

#include "arithmetic.h"
#include "branch.h"
#include "grid.h"
#include "layers.h"

namespace mbf::cpu {

// Whether the processor lacks products of this type, so that they are made in fp32.
bool must_widen(ScalarType type);
// Whether the base product of this type is left to one call of torch for all rows.
bool in_one_call(ScalarType type);

// The layers with rows of W that can be widened one by one, if activations of `type` make that necessary.
std::vector<Layer> readable(const std::vector<Layer>& layers, ScalarType type);

constexpr int64_t kProjectGrain = 24;  // rows of x below which a second thread costs more than it saves

Rows rows_or_none(const MaybeTensor& tensor);
Rows part(const Rows& rows, int64_t row, int64_t column);
Tensor block(const Tensor& matrix, int64_t row, int64_t rows, int64_t column, int64_t columns);

template <typename C>
std::vector<Branch<C>> branches_of(const std::vector<Layer>& layers, const Tensor& input) {
  std::vector<Branch<C>> branches;
  branches.reserve(layers.size());
  for (const Layer& layer : layers) branches.emplace_back(layer.branch, input);
  return branches;
}

// y[:, column ..] of one layer for a chunk of rows: x [n, d_in], y [n, d_out] and z [n, r] begin at its first row. With
// `base` false y holds the base product already.
template <typename C>
void forward_tile(const Layer& layer, const Branch<C>& branch, const Tensor& x, const Tensor& y, const Grid& grid,
                  int64_t column_chunk, const C* z, bool base);

// A whole chunk of rows, all layers: hs as in project_all.
template <typename C>
void forward_chunk(const std::vector<Layer>& layers, const std::vector<Branch<C>>& branches, int64_t first,
                   const Tensor& x, const std::vector<Tensor>& ys, const std::vector<Grid>& grids,
                   const std::vector<Tensor>& hs);

// dx and dA's share of one tile, after read_dy of its chunk; dys [n, d_out], x and dx [n, d_in] begin at the chunk's
// first row. dx may be absent, and x where no dA is asked. With `base` false dx holds the base product already.
template <typename C>
void backward_tile(const std::vector<Layer>& layers, BranchBackward<C>& branches, int64_t row_chunk,
                   int64_t column_chunk, const std::vector<MaybeTensor>& dys, const MaybeTensor& x,
                   const MaybeTensor& dx, bool base);

void clear(const Tensor& tensor);

}  // namespace mbf::cpu
