// Lists of stacked matrices as the operators on bases take them.
#pragma once

#include <vector>

#include "linalg/orthonormal.h"
#include "lora/check.h"

namespace mbf::cpu {

// Adds every matrix of a contiguous tensor [..., r, d] in order.
void add_matrices(const Argument& argument, const Tensor& stack, std::vector<linalg::Matrix>& to);

// The same of the list `argument`, whose matrices must have 1 ≤ r ≤ d.
std::vector<linalg::Matrix> matrices_of(Argument argument, const std::vector<Tensor>& stacks);

std::vector<Tensor> packed(const std::vector<Tensor>& tensors);

// The matrices of Q, which are to be written: contiguous, as the matrices of A are.
std::vector<linalg::Matrix> results_for(const std::vector<linalg::Matrix>& matrices, const std::vector<Tensor>& Q,
                                        const char* op);

// Whether results are so many bytes that they would only push out of the caches what is still to be read.
bool worth_streaming(const std::vector<linalg::Matrix>& results);

}  // namespace mbf::cpu
