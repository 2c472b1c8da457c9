// lora_accumulate and its backward: the branch alone, on a base output that any layer made.

#include "kernels.h"
#include "lora/check.h"
#include "lora/layers.h"
#include "lora/results.h"

namespace mbf::cpu {

std::tuple<Tensor, Tensor> lora_accumulate(Tensor y, Tensor x, Tensor A, Tensor B, double scale, MaybeTensor gate,
                                           MaybeTensor mix, double dropout_p, MaybeTensor seed, MaybeTensor merged_B,
                                           MaybeTensor merge_weight) {
  const Operands operands{A, B, scale, gate, mix, dropout_p, seed, merged_B, merge_weight};
  const char* op = "lora_accumulate";
  check_rows({op, "x"}, x, -1);
  check_rows_like({op, "y"}, y, x, -1);
  check_branch(op, operands, x, x.size(-1), y.size(-1));
  const LayerOutputs out = accumulate(y, x, operands);
  return {out.ys[0], out.hs[0]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lora_accumulate_backward(
    Tensor dy, Tensor h, MaybeTensor x, Tensor A, Tensor B, double scale, MaybeTensor gate, MaybeTensor mix,
    double dropout_p, MaybeTensor seed, MaybeTensor merged_B, MaybeTensor merge_weight, std::vector<bool> needs) {
  const Operands operands{A, B, scale, gate, mix, dropout_p, seed, merged_B, merge_weight};
  const char* op = "lora_accumulate_backward";
  check_length({op, "needs"}, needs.size(), 7);
  check_rows({op, "dy"}, dy, -1);
  check_branch(op, operands, dy, -1, dy.size(-1));
  check_h(op, operands, h, dy);
  const ScalarType type = x ? x->scalar_type() : dy.scalar_type();
  if (x) check_input(op, *x, dy, A.size(1), type);
  const Asked asked = possible(asked_of(needs, 1), operands, x.has_value());
  const LayerGradients gradients = accumulate_backward(dy, h, x, operands, type, needs[0], asked);
  const BranchGradients& branch = gradients.branches[0];
  return {or_undefined(gradients.dx),       or_undefined(branch.A),   or_undefined(branch.B),
          or_undefined(branch.gate),        or_undefined(branch.mix), or_undefined(branch.merged_B),
          or_undefined(branch.merge_weight)};
}

}  // namespace mbf::cpu
