// task_boundary_: the merge of every B, the replacement of every A and the basis that the next task starts from, in two
// rounds over all of them. The first makes the bases, which nobody has yet, and finds what isn't finite in A and B;
// only if all is well does the second change what is merged.

#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstring>

#include "basis.h"
#include "kernels.h"
#include "lora/micro.h"
#include "merge.h"
#include "share.h"

namespace mbf::cpu {
namespace {

// The memory that A is copied to, or null where it's no plain copy.
void* place_of(const Tensor& merged, const Tensor& A) {
  const bool plain = merged.is_contiguous() && merged.scalar_type() == A.scalar_type();
  return plain && merged.const_data_ptr() != A.const_data_ptr() ? merged.mutable_data_ptr() : nullptr;
}

}  // namespace

Tensor task_boundary_(Tensors merged_A, Tensors merged_B, Tensors Q, Tensors A, Tensors B, Tensor weight) {
  STD_TORCH_CHECK(
      merged_A.size() == A.size() && merged_B.size() == B.size() && A.size() == B.size() && Q.size() == A.size(),
      "task_boundary_: all lists must have one length");
  const Merge merge(merged_B, B, weight);
  const Tensors from = packed(A);
  const auto matrices = matrices_of(from, "task_boundary_");
  const auto bases = results_for(matrices, Q, "task_boundary_");
  const int64_t layers = static_cast<int64_t>(matrices.size()), pieces = merge.pieces();
  STD_TORCH_CHECK(layers == static_cast<int64_t>(A.size()), "task_boundary_: every A must be one matrix [r, d]");
  const Tensor status = empty({2 * layers}, ScalarType::Int);
  int32_t* found = static_cast<int32_t*>(status.mutable_data_ptr());

  std::vector<char> finite(pieces);
  for_each(layers + pieces, [&](int64_t n) {
    if (n < layers) {
      const linalg::Orthonormal rows(matrices[n]);
      found[n] = rows.status();
      rows.write(const_cast<void*>(bases[n].data));
    } else {
      finite[n - layers] = merge.finite(n - layers);
    }
  });
  std::fill(found + layers, found + 2 * layers, linalg::kDone);
  for (int64_t n = 0; n < pieces; ++n) {
    if (!finite[n]) found[layers + merge.pair_of(n)] = linalg::kNotFinite;
  }
  if (std::find(found, found + 2 * layers, linalg::kNotFinite) == found + 2 * layers) {
    for_each(layers + pieces, [&](int64_t n) {
      if (n >= layers) return merge.run(n - layers);
      if (void* place = place_of(merged_A[n], from[n])) {
        std::memcpy(place, matrices[n].data, from[n].numel() * element_size(matrices[n].type));
      }
    });
    merge.finish();
    for (int64_t n = 0; n < layers; ++n) {
      if (place_of(merged_A[n], from[n]) == nullptr) torch::stable::copy_(merged_A[n], A[n]);
    }
  }
  return status;
}

}  // namespace mbf::cpu
