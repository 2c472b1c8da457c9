// lora_group and its backward: layers that read the same x, whose input gradients are one sum.

#include "kernels.h"
#include "lora/members.h"

namespace mbf::cpu {

Tensors lora_group(Tensor x, Tensors weights, MaybeTensors biases, Tensors A, Tensors B, std::vector<double> scales,
                   MaybeTensors gates, MaybeTensors mixes, std::vector<double> dropout_ps, MaybeTensors seeds,
                   MaybeTensors merged_Bs, MaybeTensors merge_weights) {
  LayerOutputs out =
      forward(x, members(weights, biases, A, B, scales, gates, mixes, dropout_ps, seeds, merged_Bs, merge_weights));
  Tensors results = std::move(out.ys);
  results.insert(results.end(), out.hs.begin(), out.hs.end());
  return results;
}

Tensors lora_group_backward(MaybeTensors dys, Tensors hs, MaybeTensor x, Tensors weights, Tensors A, Tensors B,
                            std::vector<double> scales, MaybeTensors gates, MaybeTensors mixes,
                            std::vector<double> dropout_ps, MaybeTensors seeds, MaybeTensors merged_Bs,
                            MaybeTensors merge_weights, std::vector<bool> needs) {
  const LayerGradients gradients = backward(
      dys, hs, x, members(weights, {}, A, B, scales, gates, mixes, dropout_ps, seeds, merged_Bs, merge_weights),
      needs[0], asked_of_members(needs));
  Results results(hs[0]);
  results.add(gradients.dx);
  for (const BranchGradients& branch : gradients.branches) results.add(branch);
  return results.tensors;
}

}  // namespace mbf::cpu
