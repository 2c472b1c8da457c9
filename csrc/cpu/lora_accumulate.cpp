// lora_accumulate and its backward: the branch alone, on a base output that any layer made.

#include "kernels.h"
#include "lora/layers.h"
#include "lora/results.h"

namespace mbf::cpu {

std::tuple<Tensor, Tensor> lora_accumulate(Tensor y, Tensor x, Tensor A, Tensor B, double scale, MaybeTensor gate,
                                           MaybeTensor mix, double dropout_p, MaybeTensor seed, MaybeTensor merged_B,
                                           MaybeTensor merge_weight) {
  const LayerOutputs out = accumulate(y, x, {A, B, scale, gate, mix, dropout_p, seed, merged_B, merge_weight});
  return {out.ys[0], out.hs[0]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lora_accumulate_backward(
    Tensor dy, Tensor h, MaybeTensor x, Tensor A, Tensor B, double scale, MaybeTensor gate, MaybeTensor mix,
    double dropout_p, MaybeTensor seed, MaybeTensor merged_B, MaybeTensor merge_weight, std::vector<bool> needs) {
  const Operands operands{A, B, scale, gate, mix, dropout_p, seed, merged_B, merge_weight};
  const LayerGradients gradients =
      accumulate_backward(dy, h, x, operands, x ? x->scalar_type() : dy.scalar_type(), needs[0], asked_of(needs, 1));
  const BranchGradients& branch = gradients.branches[0];
  return {or_undefined(gradients.dx),       or_undefined(branch.A),   or_undefined(branch.B),
          or_undefined(branch.gate),        or_undefined(branch.mix), or_undefined(branch.merged_B),
          or_undefined(branch.merge_weight)};
}

}  // namespace mbf::cpu
