// rsvd and svd_factors: leading singular triples of many matrices, dense or products of thin factors.

#include <algorithm>
#include <memory>

#include "basis.h"
#include "kernels.h"
#include "linalg/range.h"
#include "share.h"

namespace mbf::cpu {
namespace {

using linalg::Matrix;
using linalg::Triples;

// [U.., S.., Vh.., status] for stacks [..., m, n], and where each matrix's triples go.
struct Outputs {
  Tensors tensors;
  std::vector<Triples> triples;
  int32_t* status;
};

void add_stack(const Tensor& like, int64_t m, int64_t n, int64_t rank, Tensors (&parts)[3],
               std::vector<Triples>& triples) {
  std::vector<int64_t> batch = shape_of(like);
  batch.resize(batch.size() - 2);
  const auto make = [&](std::initializer_list<int64_t> sizes) {
    std::vector<int64_t> shape = batch;
    shape.insert(shape.end(), sizes);
    return empty(shape, like.scalar_type());
  };
  const Tensor U = make({m, rank}), S = make({rank}), Vh = make({rank, n});
  const int64_t bytes = element_size(like.scalar_type());
  const auto at = [](const Tensor& t, int64_t offset) { return static_cast<char*>(t.mutable_data_ptr()) + offset; };
  for (int64_t i = 0; i < S.numel() / rank; ++i) {
    triples.push_back({like.scalar_type(), m, n, rank, at(U, i * m * rank * bytes), at(S, i * rank * bytes),
                       at(Vh, i * rank * n * bytes)});
  }
  parts[0].push_back(U);
  parts[1].push_back(S);
  parts[2].push_back(Vh);
}

Outputs outputs_for(const Tensors& lefts, const Tensors& rights, int64_t rank) {
  Outputs out;
  Tensors parts[3];
  for (size_t n = 0; n < lefts.size(); ++n) {
    add_stack(lefts[n], lefts[n].size(-2), rights[n].size(-1), rank, parts, out.triples);
  }
  for (auto& part : parts) out.tensors.insert(out.tensors.end(), part.begin(), part.end());
  const Tensor status = empty({static_cast<int64_t>(out.triples.size())}, ScalarType::Int);
  out.status = static_cast<int32_t*>(status.mutable_data_ptr());
  out.tensors.push_back(status);
  return out;
}

// All phases of some matrices together, so that few large ones and many small ones keep every thread busy.
template <typename C>
void decompose(const std::vector<Matrix>& matrices, const std::vector<size_t>& chosen, const int64_t* seeds,
               int64_t columns, int64_t n_iter, const Outputs& out) {
  std::vector<std::unique_ptr<linalg::RangeFinder<C>>> finders;
  std::vector<std::pair<size_t, int64_t>> strips;
  for (const size_t n : chosen) {
    const int64_t k = std::min({columns, matrices[n].r, matrices[n].d});
    finders.push_back(
        std::make_unique<linalg::RangeFinder<C>>(matrices[n], k, n_iter, static_cast<uint64_t>(seeds[n])));
    for (int64_t s = 0; s < finders.back()->strips(); ++s) strips.emplace_back(finders.size() - 1, s);
  }
  const int64_t count = static_cast<int64_t>(finders.size());
  for_each(count, [&](int64_t n) { finders[n]->begin(); });
  for (int64_t phase = 0; phase < n_iter + 2; ++phase) {
    for_each(static_cast<int64_t>(strips.size()),
             [&](int64_t n) { finders[strips[n].first]->strip(phase, strips[n].second); });
    for_each(count, [&](int64_t n) { finders[n]->end(phase); });
  }
  for_each(count, [&](int64_t n) {
    finders[n]->write(out.triples[chosen[n]]);
    out.status[chosen[n]] = finders[n]->status();
  });
}

constexpr int64_t kMostIterations = 1 << 20;
constexpr int64_t kAtOnce = 1 << 24;  // numbers of the matrices whose scratch memory is held at a time

std::vector<double> doubles_of(const Matrix& matrix, bool transpose) {
  std::vector<double> plain(matrix.r * matrix.d);
  if (matrix.type == ScalarType::Double) {
    std::copy_n(static_cast<const double*>(matrix.data), plain.size(), plain.begin());
  } else {
    std::vector<float> floats(plain.size());
    micro<float>().widen(matrix.data, matrix.type, static_cast<int64_t>(floats.size()), floats.data());
    std::copy(floats.begin(), floats.end(), plain.begin());
  }
  if (!transpose) return plain;
  std::vector<double> out(plain.size());
  for (int64_t t = 0; t < matrix.r; ++t) {
    for (int64_t i = 0; i < matrix.d; ++i) out[i * matrix.r + t] = plain[t * matrix.d + i];
  }
  return out;
}

// B = Leftᵀ L_Bᵀ and A = L_A Right, so B A = Leftᵀ (L_Bᵀ L_A) Right.
linalg::Status decompose_product(const Matrix& B, const Matrix& A, const Triples& triples) {
  const int64_t r = A.r;
  std::vector<double> left = doubles_of(B, true), right = doubles_of(A, false), L_B, L_A, core(r * r, 0.0);
  if (r > B.r || r > A.d) return linalg::kGivenUp;
  if (!linalg::make_orthonormal(left, r, B.r, &L_B) || !linalg::make_orthonormal(right, r, A.d, &L_A)) {
    return linalg::kNotFinite;
  }
  for (int64_t k = 0; k < r; ++k) {
    for (int64_t i = 0; i < r; ++i) {
      for (int64_t j = 0; j < r; ++j) core[i * r + j] += L_B[k * r + i] * L_A[k * r + j];
    }
  }
  triples.write(left, core, right, r);
  return linalg::kDone;
}

std::vector<Matrix> all_of(Argument argument, const Tensors& stacks) {
  std::vector<Matrix> found;
  for (const Tensor& stack : stacks) {
    ++argument.at;
    add_matrices(argument, stack, found);
  }
  return found;
}

void check_rank(const char* op, int64_t rank, int64_t triples) {
  if (1 <= rank && rank <= triples) return;
  refuse({op, "rank"}, "is " + std::to_string(rank) + "; it must lie in [1, " + std::to_string(triples) +
                           "], the number of singular triples");
}

// B [..., m, r] and A [..., r, n] of one dtype.
void check_factors(int64_t at, const Tensor& B, const Tensor& A, int64_t rank) {
  const Argument argument{"svd_factors", "B", at};
  std::vector<int64_t> of_B = shape_of(B), of_A = shape_of(A);
  const int64_t m = of_B[of_B.size() - 2], n = of_A.back(), r = of_B.back();
  of_B.erase(of_B.end() - 2);
  of_A.pop_back();
  if (of_B != of_A)
    refuse(argument, "is " + described(B) + " and A " + described(A) + "; they must be [..., m, r] and [..., r, n]");
  check_type(argument, B, A.scalar_type());
  check_rank("svd_factors", rank, std::min({m, r, n}));
}

}  // namespace

Tensors rsvd(Tensors matrices, Tensor seeds, int64_t rank, int64_t oversample, int64_t n_iter) {
  const Tensors from = packed(matrices);
  const std::vector<Matrix> all = all_of({"rsvd", "matrices"}, from);
  for (const Tensor& stack : from) check_rank("rsvd", rank, std::min(stack.size(-2), stack.size(-1)));
  if (oversample < 0) refuse({"rsvd", "oversample"}, "is " + std::to_string(oversample) + "; it can't be negative");
  if (n_iter < 0 || n_iter > kMostIterations) {
    refuse({"rsvd", "n_iter"},
           "is " + std::to_string(n_iter) + "; it must lie in [0, " + std::to_string(kMostIterations) + "]");
  }
  oversample = std::min(oversample, INT64_MAX - rank);
  const Tensor keys = torch::stable::contiguous(seeds);
  if (!keys.is_cpu() || keys.scalar_type() != ScalarType::Long || keys.numel() != static_cast<int64_t>(all.size())) {
    refuse({"rsvd", "seeds"}, "is " + described(seeds) + "; it must be int64 on the CPU, one for each of " +
                                  std::to_string(all.size()) + " matrices");
  }
  const Outputs out = outputs_for(from, from, rank);
  for (size_t n = 0; n < all.size();) {
    const ScalarType type = all[n].type;
    std::vector<size_t> chosen;
    for (int64_t size = 0; n < all.size() && all[n].type == type && (chosen.empty() || size < kAtOnce); ++n) {
      chosen.push_back(n);
      size += all[n].r * all[n].d;
    }
    const int64_t* key = keys.const_data_ptr<int64_t>();
    if (type == ScalarType::Double) {
      decompose<double>(all, chosen, key, rank + oversample, n_iter, out);
    } else {
      decompose<float>(all, chosen, key, rank + oversample, n_iter, out);
    }
  }
  return out.tensors;
}

Tensors svd_factors(Tensors B, Tensors A, int64_t rank) {
  check_length({"svd_factors", "B"}, B.size(), A.size());
  const Tensors lefts = packed(B), rights = packed(A);
  const std::vector<Matrix> all_B = all_of({"svd_factors", "B"}, lefts), all_A = all_of({"svd_factors", "A"}, rights);
  for (size_t n = 0; n < lefts.size(); ++n) check_factors(static_cast<int64_t>(n), lefts[n], rights[n], rank);
  const Outputs out = outputs_for(lefts, rights, rank);
  for_each(static_cast<int64_t>(all_A.size()), [&](int64_t n) {
    out.status[n] = decompose_product(all_B[n], all_A[n], out.triples[n]);
    if (out.status[n] != linalg::kDone) out.triples[n].clear();
  });
  return out.tensors;
}

}  // namespace mbf::cpu
