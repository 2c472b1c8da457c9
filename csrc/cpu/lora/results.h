// How gradients leave the operators, in the order of their schemas. What was not asked is undefined (None in Python) in
// a tuple; a list cannot hold that and has an empty tensor instead.
#pragma once

#include <vector>

#include "branch.h"

namespace mbf::cpu {

// `needs` from position `at` on: A, B, gate, mix, merged_B, merge_weight.
inline Asked asked_of(const std::vector<bool>& needs, size_t at) {
  return {needs[at], needs[at + 1], needs[at + 2], needs[at + 3], needs[at + 4], needs[at + 5]};
}

inline Tensor or_undefined(const MaybeTensor& gradient) { return gradient ? *gradient : Tensor(); }

// Gradients in order, an empty tensor for each that was not asked.
class Results {
 public:
  explicit Results(const Tensor& like) : like_(like) {}

  void add(const MaybeTensor& gradient) { tensors.push_back(gradient ? *gradient : empty({0}, like_.scalar_type())); }
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
