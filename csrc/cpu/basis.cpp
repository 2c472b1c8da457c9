// orthonormal_rows: orthonormal bases of the rows of many matrices, of any mixture of shapes and dtypes.

#include "basis.h"

#include <torch/headeronly/util/Exception.h>

#include <algorithm>

#include "kernels.h"
#include "lora/micro.h"
#include "share.h"

namespace mbf::cpu {

void add_matrices(const Tensor& stack, std::vector<linalg::Matrix>& to) {
  STD_TORCH_CHECK(stack.is_cpu() && stack.dim() >= 2 && stack.is_contiguous(),
                  "matrices must be contiguous tensors [..., r, d] on the CPU");
  const int64_t r = stack.size(-2), d = stack.size(-1);
  const int64_t bytes = r * d * element_size(stack.scalar_type());
  const char* data = static_cast<const char*>(stack.const_data_ptr());
  for (int64_t n = 0; n < stack.numel() / std::max<int64_t>(r * d, 1); ++n) {
    to.push_back({data + n * bytes, stack.scalar_type(), r, d});
  }
}

std::vector<linalg::Matrix> matrices_of(const std::vector<Tensor>& stacks, const char* op) {
  std::vector<linalg::Matrix> found;
  for (const Tensor& stack : stacks) {
    add_matrices(stack, found);
    const int64_t r = stack.size(-2), d = stack.size(-1);
    STD_TORCH_CHECK(1 <= r && r <= d, op, ": r must lie in [1, d], it is ", r, " and d is ", d);
  }
  return found;
}

std::vector<Tensor> packed(const std::vector<Tensor>& tensors) {
  std::vector<Tensor> out;
  for (const Tensor& tensor : tensors) out.push_back(torch::stable::contiguous(tensor));
  return out;
}

std::vector<Tensor> empty_like(const std::vector<Tensor>& tensors) {
  std::vector<Tensor> out;
  for (const Tensor& tensor : tensors) out.push_back(empty(shape_of(tensor), tensor.scalar_type()));
  return out;
}

Tensors orthonormal_rows(Tensors A) {
  const Tensors from = packed(A);
  Tensors out = empty_like(A);
  const auto matrices = matrices_of(from, "orthonormal_rows");
  const auto Q = matrices_of(out, "orthonormal_rows");
  const int64_t count = static_cast<int64_t>(matrices.size());
  const Tensor status = empty({count}, ScalarType::Int);
  int32_t* found = static_cast<int32_t*>(status.mutable_data_ptr());
  for_each(count, [&](int64_t n) {
    const linalg::Orthonormal rows(matrices[n]);
    found[n] = rows.status();
    rows.write(const_cast<void*>(Q[n].data));
  });
  out.push_back(status);
  return out;
}

}  // namespace mbf::cpu
