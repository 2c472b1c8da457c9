// Frozen linear layers with their branches: y = x Wᵀ + b + branch, for one layer or for several that read the same x.
//
// The base product (base_product.h) is made by every thread for tiles of its own (Grid in grid.h): on tiles of 256 rows
// BLAS is as fast as on all rows at once (on 64 it is a fifth slower), the tile is still in the core's cache when the
// branch is added to it, and as no tile depends on the number of threads, neither do the bits. Half types that the
// processor multiplies natively go through torch's oneDNN in one call. Half types that it cannot multiply are widened
// into fp32 scratch tile by tile, in both directions; the branch is added there and the result rounded once. From 48
// rows on, a processor with AVX2 and no more has both types multiplied by loops of our own, all threads sharing each
// product (together.h).
#pragma once

#include <vector>

#include "branch.h"

namespace mbf::cpu {

struct Layer {
  Tensor weight;
  MaybeTensor bias;
  Operands branch;
};

struct LayerOutputs {
  std::vector<Tensor> ys, hs;
};

struct LayerGradients {
  MaybeTensor dx;
  std::vector<BranchGradients> branches;
};

LayerOutputs forward(const Tensor& x, const std::vector<Layer>& layers);

// dys[n] may be absent. x may be, too, where no gradient of an A is asked.
LayerGradients backward(const std::vector<MaybeTensor>& dys, const std::vector<Tensor>& hs, const MaybeTensor& x,
                        const std::vector<Layer>& layers, bool need_dx, const std::vector<Asked>& asked);

// The same on a base output that exists already: y + branch, and its derivatives but for that of y.
LayerOutputs accumulate(const Tensor& y, const Tensor& x, const Operands& branch);
LayerGradients accumulate_backward(const Tensor& dy, const Tensor& h, const MaybeTensor& x, const Operands& branch,
                                   ScalarType x_type, bool need_dx, const Asked& asked);

}  // namespace mbf::cpu
