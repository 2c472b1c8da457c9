// orthonormal_rows: orthonormal bases of the rows of many matrices, of any mixture of shapes and dtypes.

#include "basis.h"

#include <algorithm>

#include "kernels.h"
#include "lora/check.h"
#include "lora/micro.h"
#include "share.h"

namespace mbf::cpu {

void add_matrices(const Argument& argument, const Tensor& stack, std::vector<linalg::Matrix>& to) {
  check_float(argument, stack);
  if (stack.dim() < 2 || !stack.is_contiguous()) {
    refuse(argument, "is " + described(stack) + "; it must be contiguous and [..., r, d]");
  }
  const int64_t r = stack.size(-2), d = stack.size(-1);
  const int64_t bytes = r * d * element_size(stack.scalar_type());
  const char* data = static_cast<const char*>(stack.const_data_ptr());
  for (int64_t n = 0; n < stack.numel() / std::max<int64_t>(r * d, 1); ++n) {
    to.push_back({data + n * bytes, stack.scalar_type(), r, d});
  }
}

std::vector<linalg::Matrix> matrices_of(Argument argument, const std::vector<Tensor>& stacks) {
  std::vector<linalg::Matrix> found;
  for (const Tensor& stack : stacks) {
    ++argument.at;
    add_matrices(argument, stack, found);
    const int64_t r = stack.size(-2), d = stack.size(-1);
    if (r < 1 || r > d) refuse(argument, "has matrices " + described(stack) + "; r must lie in [1, d]");
  }
  return found;
}

std::vector<Tensor> packed(const std::vector<Tensor>& tensors) {
  std::vector<Tensor> out;
  out.reserve(tensors.size());
  for (const Tensor& tensor : tensors) out.push_back(packed(tensor));
  return out;
}

std::vector<linalg::Matrix> results_for(const std::vector<linalg::Matrix>& matrices, const std::vector<Tensor>& Q,
                                        const char* op) {
  const auto found = matrices_of({op, "Q"}, Q);
  if (found.size() != matrices.size()) refuse({op, "Q"}, "must be as A is, matrix for matrix");
  for (size_t n = 0; n < found.size(); ++n) {
    const linalg::Matrix &A = matrices[n], &here = found[n];
    if (here.type != A.type || here.r != A.r || here.d != A.d) {
      refuse({op, "Q"}, std::to_string(n) + " must have the shape and dtype of its A");
    }
  }
  return found;
}

bool worth_streaming(const std::vector<linalg::Matrix>& results) {
  constexpr int64_t kWorth = int64_t{1} << 23;  // bytes
  int64_t bytes = 0;
  for (const auto& matrix : results) bytes += matrix.r * matrix.d * element_size(matrix.type);
  return bytes >= kWorth;
}

Tensors orthonormal_rows(Tensors A) {
  const char* op = "orthonormal_rows";
  const Tensors from = packed(A);
  const auto matrices = matrices_of({op, "A"}, from);
  Tensors out = empty_like_all(from);
  const auto bases = results_for(matrices, out, op);
  const int64_t count = static_cast<int64_t>(matrices.size());
  const bool past_caches = worth_streaming(bases);
  const Tensor status = empty({count}, ScalarType::Int);
  int32_t* found = static_cast<int32_t*>(status.mutable_data_ptr());
  for_each(count, [&](int64_t n) {
    const linalg::Orthonormal rows(matrices[n], n + 1 < count ? &matrices[n + 1] : nullptr);
    found[n] = rows.status();
    rows.write(const_cast<void*>(bases[n].data), past_caches);
  });
  out.push_back(status);
  return out;
}

}  // namespace mbf::cpu
