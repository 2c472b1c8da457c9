// Frozen linear layers with their branches: y = x Wᵀ + b + branch, for one layer or for several that read the same x.
//
// The base product is torch's (its BLAS; for half types that the processor multiplies natively, its oneDNN). In one call
// over all rows it is 20 to 40 % faster than in blocks of 32 to 64 rows, and that is more than the second visit to y
// costs. Half types that the processor cannot multiply are widened tile by tile into fp32 BLAS, in both directions; the
// branch is then added to the fp32 tile and y rounded once.
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
