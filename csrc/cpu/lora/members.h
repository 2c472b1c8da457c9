// The lists of the schemas of lora_group and lora_mlp as layers.
#pragma once

#include <vector>

#include "../kernels.h"
#include "layers.h"
#include "results.h"

namespace mbf::cpu {

inline std::vector<Layer> members(const Tensors& weights, const MaybeTensors& biases, const Tensors& A,
                                  const Tensors& B, const std::vector<double>& scales, const MaybeTensors& gates,
                                  const MaybeTensors& mixes, const std::vector<double>& dropout_ps,
                                  const MaybeTensors& seeds, const MaybeTensors& merged_Bs,
                                  const MaybeTensors& merge_weights) {
  std::vector<Layer> layers;
  for (size_t n = 0; n < weights.size(); ++n) {
    layers.push_back(
        {weights[n],
         biases.empty() ? std::nullopt : biases[n],
         {A[n], B[n], scales[n], gates[n], mixes[n], dropout_ps[n], seeds[n], merged_Bs[n], merge_weights[n]}});
  }
  return layers;
}

// needs = [x, then for each member A, B, gate, mix, merged_B, merge_weight]
inline std::vector<Asked> asked_of_members(const std::vector<bool>& needs) {
  std::vector<Asked> asked;
  for (size_t at = 1; at < needs.size(); at += 6) asked.push_back(asked_of(needs, at));
  return asked;
}

}  // namespace mbf::cpu
