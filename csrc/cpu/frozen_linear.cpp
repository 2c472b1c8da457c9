// frozen_linear and its backward: y = x Wᵀ + b and dx = dy W, the fused layer with a branch of rank 0.

#include "kernels.h"
#include "lora/check.h"
#include "lora/layers.h"

namespace mbf::cpu {
namespace {

Layer without_branch(const Tensor& weight, const MaybeTensor& bias) {
  const ScalarType type = weight.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Operands none{};
  none.A = empty({0, weight.size(1)}, type);
  none.B = empty({weight.size(0), 0}, type);
  return {weight, bias, none};
}

}  // namespace

Tensor frozen_linear(Tensor x, Tensor weight, MaybeTensor bias) {
  check_rows({"frozen_linear", "x"}, x, -1);
  check_matrix({"frozen_linear", "weight"}, weight, -1, x.size(-1));
  check_type({"frozen_linear", "weight"}, weight, x.scalar_type());
  if (bias) check_bias("frozen_linear", *bias, weight);
  return forward(x, {without_branch(weight, bias)}).ys[0];
}

Tensor frozen_linear_backward(Tensor dy, Tensor weight) {
  check_rows({"frozen_linear_backward", "dy"}, dy, -1);
  check_matrix({"frozen_linear_backward", "weight"}, weight, dy.size(-1), -1);
  check_type({"frozen_linear_backward", "weight"}, weight, dy.scalar_type());
  const Layer layer = without_branch(weight, std::nullopt);
  std::vector<int64_t> shape = shape_of(dy);
  shape.back() = 0;
  return *backward({dy}, {empty(shape, layer.branch.A.scalar_type())}, std::nullopt, {layer}, true, {Asked{}}).dx;
}

}  // namespace mbf::cpu
