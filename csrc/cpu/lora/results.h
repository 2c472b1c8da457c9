// How gradients leave the operators: in the order of their schemas, an empty tensor where none was asked.
#pragma once

#include <vector>

#include "branch.h"

namespace mbf::cpu {

// `needs` from position `at` on: A, B, gate, mix, merged_B, merge_weight.
inline Asked asked_of(const std::vector<bool>& needs, size_t at) {
  return {needs[at], needs[at + 1], needs[at + 2], needs[at + 3], needs[at + 4], needs[at + 5]};
}

// Gradients in order, an empty tensor for each that was not asked.
class Results {
 public:
  explicit Results(const Tensor& like) : like_(like) {}

  void add(const MaybeTensor& gradient) {
    tensors.push_back(gradient ? *gradient : torch::stable::new_empty(like_, {0}));
  }
  void add(const BranchGradients& branch) {
    for (const MaybeTensor* gradient :
         {&branch.A, &branch.B, &branch.gate, &branch.mix, &branch.merged_B, &branch.merge_weight}) {
      add(*gradient);
    }
  }

  std::vector<Tensor> tensors;

 private:
  const Tensor& like_;
};

}  // namespace mbf::cpu
