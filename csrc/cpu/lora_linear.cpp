// lora_linear and its backward: one layer of lora/layers.h, whose base may be trained, too.

#include "kernels.h"
#include "lora/check.h"
#include "lora/layers.h"
#include "lora/results.h"

namespace mbf::cpu {
namespace {

// leftᵀ right, in fp32 where the processor does not multiply the type.
Tensor product_of_rows(const Tensor& left, const Tensor& right) {
  const ScalarType type = left.scalar_type();
  if (type != ScalarType::Float && type != ScalarType::Double && !multiplies_natively(type)) {
    const Tensor wide =
        product_of_rows(torch::stable::to(left, ScalarType::Float), torch::stable::to(right, ScalarType::Float));
    return torch::stable::to(wide, type);
  }
  const Tensor out = empty({left.size(1), right.size(1)}, type);
  mm_out(out, transposed(left), right);
  return out;
}

}  // namespace

std::tuple<Tensor, Tensor> lora_linear(Tensor x, Tensor weight, MaybeTensor bias, Tensor A, Tensor B, double scale,
                                       MaybeTensor gate, MaybeTensor mix, double dropout_p, MaybeTensor seed,
                                       MaybeTensor merged_B, MaybeTensor merge_weight) {
  const Layer layer{weight, bias, {A, B, scale, gate, mix, dropout_p, seed, merged_B, merge_weight}};
  check_rows({"lora_linear", "x"}, x, -1);
  check_layer("lora_linear", layer, x, x.scalar_type(), x.size(-1));
  const LayerOutputs out = forward(x, {layer});
  return {out.ys[0], out.hs[0]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lora_linear_backward(
    Tensor dy, Tensor h, MaybeTensor x, Tensor weight, Tensor A, Tensor B, double scale, MaybeTensor gate,
    MaybeTensor mix, double dropout_p, MaybeTensor seed, MaybeTensor merged_B, MaybeTensor merge_weight,
    std::vector<bool> needs) {
  const Layer layer{weight, std::nullopt, {A, B, scale, gate, mix, dropout_p, seed, merged_B, merge_weight}};
  const char* op = "lora_linear_backward";
  check_length({op, "needs"}, needs.size(), 9);
  check_rows({op, "dy"}, dy, -1);
  check_layer(op, layer, dy, dy.scalar_type(), -1);
  check_gradient(op, layer, dy, h);
  if (x) check_input(op, *x, dy, weight.size(1), dy.scalar_type());
  const Asked asked = possible(asked_of(needs, 3), layer.branch, x.has_value());
  const LayerGradients gradients = backward({dy}, {h}, x, {layer}, needs[0], {asked});
  const BranchGradients& branch = gradients.branches[0];
  return {or_undefined(gradients.dx),
          needs[1] && x ? product_of_rows(rows_of(dy), rows_of(*x)) : Tensor(),
          needs[2] ? torch::stable::sum(rows_of(dy), std::vector<int64_t>{0}) : Tensor(),
          or_undefined(branch.A),
          or_undefined(branch.B),
          or_undefined(branch.gate),
          or_undefined(branch.mix),
          or_undefined(branch.merged_B),
          or_undefined(branch.merge_weight)};
}

}  // namespace mbf::cpu
