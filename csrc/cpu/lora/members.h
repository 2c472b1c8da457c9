// The lists of the schemas of lora_group and lora_mlp as layers.
#pragma once

#include <vector>

#include "../kernels.h"
#include "check.h"
#include "layers.h"
#include "results.h"

namespace mbf::cpu {

// `biases` may be null.
inline std::vector<Layer> members(const char* op, const Tensors& weights, const MaybeTensors* biases, const Tensors& A,
                                  const Tensors& B, const std::vector<double>& scales, const MaybeTensors& gates,
                                  const MaybeTensors& mixes, const std::vector<double>& dropout_ps,
                                  const MaybeTensors& seeds, const MaybeTensors& merged_Bs,
                                  const MaybeTensors& merge_weights) {
  check_members(op, weights, biases, A, B, scales, gates, mixes, dropout_ps, seeds, merged_Bs, merge_weights);
  std::vector<Layer> layers;
  for (size_t n = 0; n < weights.size(); ++n) {
    layers.push_back(
        {weights[n],
         biases == nullptr ? std::nullopt : (*biases)[n],
         {A[n], B[n], scales[n], gates[n], mixes[n], dropout_ps[n], seeds[n], merged_Bs[n], merge_weights[n]}});
  }
  return layers;
}

// needs = [x, then for each member A, B, gate, mix, merged_B, merge_weight]
inline std::vector<Asked> asked_of_members(const char* op, const std::vector<bool>& needs,
                                           const std::vector<Layer>& layers, bool x_is_there) {
  check_length({op, "needs"}, needs.size(), 1 + 6 * layers.size());
  std::vector<Asked> asked;
  for (size_t n = 0; n < layers.size(); ++n) {
    asked.push_back(possible(asked_of(needs, 1 + 6 * n), layers[n].branch, x_is_there));
  }
  return asked;
}

}  // namespace mbf::cpu
