// The two passes over frozen layers with branches in which all threads share every product (gemm.h).
//
// Forward: z from x, rows shared out; then y, whose tiles begin with their share of the branch. Backward: one phase
// over dy and x, chunks of rows shared out, for dz, the mask's bits and the sums of all gradients; then dx, whose tiles
// begin with the masked branch. So the branch is never a pass over y or dx.
#pragma once

#include <vector>

#include "branch.h"
#include "grid.h"
#include "layers.h"

namespace mbf::cpu {

// Whether these layers are computed so, forward and backward, on `rows` rows of activations of `type`.
bool made_together(ScalarType type, int64_t rows, const std::vector<Layer>& layers);

// Rows `first` .. of x [n, d_in], the first of x, ys [n, d_out] and hs [all rows, r] (not saved where hs is empty).
void forward_together(const std::vector<Layer>& layers, const std::vector<Branch<float>>& branches, int64_t first,
                      const Tensor& x, const std::vector<Tensor>& ys, const std::vector<Tensor>& hs);

// Chunks `begin` .. `end` of the grid of `branches`, with whose first row dys, x and dx begin; any of them may be
// absent.
void backward_together(const std::vector<Layer>& layers, BranchBackward<float>& branches, int64_t begin, int64_t end,
                       const std::vector<MaybeTensor>& dys, const std::vector<Tensor>& hs, const MaybeTensor& x,
                       const MaybeTensor& dx);

}  // namespace mbf::cpu
