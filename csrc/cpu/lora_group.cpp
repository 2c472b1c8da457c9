// lora_group and its backward: layers that read the same x, whose input gradients are one sum.

#include <algorithm>

#include "kernels.h"
#include "lora/members.h"

namespace mbf::cpu {

Tensors lora_group(Tensor x, Tensors weights, MaybeTensors biases, Tensors A, Tensors B, std::vector<double> scales,
                   MaybeTensors gates, MaybeTensors mixes, std::vector<double> dropout_ps, MaybeTensors seeds,
                   MaybeTensors merged_Bs, MaybeTensors merge_weights) {
  const char* op = "lora_group";
  const std::vector<Layer> layers =
      members(op, weights, &biases, A, B, scales, gates, mixes, dropout_ps, seeds, merged_Bs, merge_weights);
  check_rows({op, "x"}, x, -1);
  for (size_t n = 0; n < layers.size(); ++n) {
    check_layer(op, layers[n], x, x.scalar_type(), x.size(-1), static_cast<int64_t>(n));
  }
  LayerOutputs out = forward(x, layers);
  Tensors results = std::move(out.ys);
  results.insert(results.end(), out.hs.begin(), out.hs.end());
  return results;
}

Tensors lora_group_backward(MaybeTensors dys, Tensors hs, MaybeTensor x, Tensors weights, Tensors A, Tensors B,
                            std::vector<double> scales, MaybeTensors gates, MaybeTensors mixes,
                            std::vector<double> dropout_ps, MaybeTensors seeds, MaybeTensors merged_Bs,
                            MaybeTensors merge_weights, std::vector<bool> needs) {
  const char* op = "lora_group_backward";
  const std::vector<Layer> layers =
      members(op, weights, nullptr, A, B, scales, gates, mixes, dropout_ps, seeds, merged_Bs, merge_weights);
  const std::vector<Asked> asked = asked_of_members(op, needs, layers, x.has_value());
  check_length({op, "dys"}, dys.size(), layers.size());
  check_length({op, "hs"}, hs.size(), layers.size());
  const auto used = std::find_if(dys.begin(), dys.end(), [](const MaybeTensor& dy) { return dy.has_value(); });
  if (used == dys.end()) refuse({op, "dys"}, "has no gradient; there must be one");
  const Tensor& like = **used;
  check_rows({op, "dys", used - dys.begin()}, like, -1);
  const ScalarType type = like.scalar_type();
  if (x) check_input(op, *x, like, -1, type);
  const int64_t d_in = x ? x->size(-1) : weights[0].dim() == 2 ? weights[0].size(1) : -1;
  for (size_t n = 0; n < layers.size(); ++n) {
    const int64_t at = static_cast<int64_t>(n);
    check_layer(op, layers[n], like, type, d_in, at);
    check_h(op, layers[n].branch, hs[n], like, at);
    if (!dys[n]) continue;
    check_rows_like({op, "dys", at}, *dys[n], like, weights[n].size(0));
    check_type({op, "dys", at}, *dys[n], type);
  }
  const LayerGradients gradients = backward(dys, hs, x, layers, needs[0], asked);
  Results results(hs[0]);
  results.add(gradients.dx);
  for (const BranchGradients& branch : gradients.branches) results.add(branch);
  return results.tensors;
}

}  // namespace mbf::cpu
