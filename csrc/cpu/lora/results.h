// How gradients leave the operators: in the order of their schemas, an empty tensor where none was asked.
#pragma once

#include <vector>

#include "branch.h"

namespace mbf::cpu {

inline Tensor given(const MaybeTensor& gradient, const Tensor& like) {
  return gradient ? *gradient : torch::stable::new_empty(like, {0});
}

// `needs` from position `at` on: A, B, gate, mix, merged_B, merge_weight.
inline Asked asked_of(const std::vector<bool>& needs, size_t at) {
  return {needs[at], needs[at + 1], needs[at + 2], needs[at + 3], needs[at + 4], needs[at + 5]};
}

inline void append(std::vector<Tensor>& out, const BranchGradients& branch, const Tensor& like) {
  for (const MaybeTensor* gradient :
       {&branch.A, &branch.B, &branch.gate, &branch.mix, &branch.merged_B, &branch.merge_weight}) {
    out.push_back(given(*gradient, like));
  }
}

}  // namespace mbf::cpu
