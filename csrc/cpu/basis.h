// Lists of stacked matrices as the operators on bases take them.
#pragma once

#include <vector>

#include "linalg/orthonormal.h"

namespace mbf::cpu {

// Every matrix of contiguous tensors [..., r, d], 1 ≤ r ≤ d, in order.
std::vector<linalg::Matrix> matrices_of(const std::vector<Tensor>& stacks, const char* op);

std::vector<Tensor> packed(const std::vector<Tensor>& tensors);
std::vector<Tensor> empty_like(const std::vector<Tensor>& tensors);

}  // namespace mbf::cpu
