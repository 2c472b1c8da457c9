// lora_linear and its backward: the base product by torch's BLAS, and the branch of lora/ on top of it.

#include "lora/branch.h"

namespace mbf::cuda {

std::tuple<Tensor, Tensor> lora_linear(Tensor x, Tensor weight, MaybeTensor bias, Tensor A, Tensor B, double scale,
                                       MaybeTensor gate, MaybeTensor mix, double dropout_p, MaybeTensor seed,
                                       MaybeTensor merged_B, MaybeTensor merge_weight) {
  const lora::Branch branch{A, B, scale, gate, mix, dropout_p, seed, merged_B, merge_weight};
  STD_TORCH_CHECK(x.dim() > 0 && weight.dim() == 2, "lora_linear: x must be [..., d_in], and weight [d_out, d_in]");
  lora::check("lora_linear", branch, {{"x", x}, {"weight", weight}}, x, x.size(x.dim() - 1), weight.size(0));
  const Tensor y = lora::packed(lora::call("aten::linear", "", x, weight, bias));
  const Tensor h = lora::project(x, branch);
  lora::accumulate(y, y, h, branch);
  return {y, h};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lora_linear_backward(
    Tensor dy, Tensor h, MaybeTensor x, Tensor weight, Tensor A, Tensor B, double scale, MaybeTensor gate,
    MaybeTensor mix, double dropout_p, MaybeTensor seed, MaybeTensor merged_B, MaybeTensor merge_weight,
    std::vector<bool> needs) {
  const lora::Branch branch{A, B, scale, gate, mix, dropout_p, seed, merged_B, merge_weight};
  const char* op = "lora_linear_backward";
  STD_TORCH_CHECK(needs.size() == 9 && dy.dim() > 0 && weight.dim() == 2, op,
                  ": needs must have 9 entries, dy be [..., d_out], and weight [d_out, d_in]");
  lora::check(op, branch, {{"dy", dy}, {"x", x}, {"weight", weight}}, dy, weight.size(1), weight.size(0));
  lora::check_rows(op, "dy", dy, dy, weight.size(0));
  lora::check_backward(op, branch, dy, h, x);
  const lora::Needs asked =
      lora::possible(branch, x, {needs[0], needs[3], needs[4], needs[5], needs[6], needs[7], needs[8]});
  const Tensor rows = lora::matrix(dy);
  lora::BranchGradients found = lora::output_gradients(rows, h, branch, asked);
  MaybeTensor dx;
  if (asked.x) dx = lora::call("aten::mm", "", rows, weight);
  const MaybeTensor of_A = asked.A ? x : std::nullopt;
  if (dx || of_A) found.A = lora::input_gradients(of_A, dx, dx, *found.dh, branch);
  Tensor dweight, dbias;
  if (needs[1] && x) {
    dweight = lora::call("aten::mm", "", torch::stable::transpose(rows, 0, 1), lora::matrix(*x));
  }
  if (needs[2]) dbias = torch::stable::sum(rows, std::vector<int64_t>{0});
  return {dx ? torch::stable::view(*dx, lora::shape_with(dy, weight.size(1))) : Tensor(),
          dweight,
          dbias,
          found.A,
          found.B,
          found.gate,
          found.mix,
          found.merged_B,
          found.merge_weight};
}

}  // namespace mbf::cuda
