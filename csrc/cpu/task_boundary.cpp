// task_boundary_: the merge of every B, the replacement of every A and the basis that the next task starts from, in two
// rounds over all of them. The first looks for what isn't finite in A and B, and has A anyway: it makes Q in memory of
// its own, or takes what Q is written over A from. Only if all is well does the second write what is the caller's.
// Where Q was to be A itself but was given up, A is left as it was.

#include <algorithm>
#include <cstring>
#include <optional>

#include "basis.h"
#include "kernels.h"
#include "linalg/orthonormal.h"
#include "lora/micro.h"
#include "memory/overlap.h"
#include "memory/stream.h"
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
  const char* op = "task_boundary_";
  check_length({op, "merged_A"}, merged_A.size(), A.size());
  check_length({op, "B"}, B.size(), A.size());
  check_length({op, "Q"}, Q.size(), A.size());
  const Merge merge({op, "merged_B"}, merged_B, {op, "B"}, B, weight);
  for (size_t n = 0; n < A.size(); ++n) {
    const Argument into{op, "merged_A", static_cast<int64_t>(n)};
    check_matrix({op, "A", into.at}, A[n], -1, -1);
    check_matrix(into, merged_A[n], A[n].size(0), A[n].size(1));
    check_writable(into, merged_A[n]);
  }
  const Tensors from = packed(A);
  const auto matrices = matrices_of({op, "A"}, from);
  const auto bases = results_for(matrices, Q, op);
  check_apart(op, {{merged_A}, {merged_B, A.size()}, {Q}}, {{A}, {B, A.size()}});
  const int64_t layers = static_cast<int64_t>(matrices.size()), pieces = merge.pieces();
  const Tensor status = empty({2 * layers}, ScalarType::Int);
  int32_t* found = static_cast<int32_t*>(status.mutable_data_ptr());

  const bool past_caches = worth_streaming(bases);
  const auto in_place = [&](int64_t n) { return bases[n].data == matrices[n].data; };
  std::vector<std::optional<linalg::Orthonormal>> rows(layers);
  std::vector<char> finite_B(pieces);
  for_each(layers, [&](int64_t n) {
    auto& here = rows[n].emplace(matrices[n], n + 1 < layers ? &matrices[n + 1] : nullptr);
    found[n] = here.status();
    if (in_place(n)) {
      here.put_aside();
    } else {
      here.write(const_cast<void*>(bases[n].data), past_caches);
      rows[n].reset();
    }
  });
  for_each(pieces, [&](int64_t n) { finite_B[n] = merge.finite(n); });
  std::fill(found + layers, found + 2 * layers, linalg::kDone);
  for (int64_t n = 0; n < pieces; ++n) {
    if (!finite_B[n]) found[layers + merge.pair_of(n)] = linalg::kNotFinite;
  }
  if (std::find(found, found + 2 * layers, linalg::kNotFinite) != found + 2 * layers) {
    std::replace<int32_t*, int32_t>(found, found + layers, linalg::kGivenUp, linalg::kDone);  // nothing is to be mended
    return status;
  }

  for (int64_t n = 0; n < layers; ++n) {
    if (place_of(merged_A[n], from[n]) == nullptr) torch::stable::copy_(merged_A[n], A[n]);
  }
  for_each(layers, [&](int64_t n) {
    if (void* place = place_of(merged_A[n], from[n])) {
      const int64_t bytes = from[n].numel() * element_size(matrices[n].type);
      if (past_caches) {
        stream(matrices[n].data, bytes, place);
        streamed();
      } else {
        std::memcpy(place, matrices[n].data, bytes);
      }
    }
    if (in_place(n) && found[n] == linalg::kDone) rows[n]->write(const_cast<void*>(bases[n].data));
  });
  for_each(pieces, [&](int64_t n) { merge.run(n); });
  merge.finish();
  return status;
}

}  // namespace mbf::cpu
