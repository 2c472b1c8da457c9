// merge_: M += λ (F − M) for a list of tensor pairs, in place.
//
// The pairs are laid end to end and that one range of elements is split among torch's threads, so neither many small
// tensors nor one large one leaves a thread idle. Every element is computed by the same operations wherever the range
// is cut: one subtraction, one fused multiply-add and one rounding to M's dtype. The last elements of a vector loop go
// through a padded buffer, and the scalar path uses std::fma, so bits depend neither on the number of threads nor on
// the instruction set.

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "kernels.h"
#include "simd.h"

namespace mbf::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrain = 32768;  // elements below which a second thread costs more than it saves

// λ as the formula that is exact at its end: M + λ (F − M) near M, F + (λ − 1) (F − M) near F. As torch.lerp does.
template <typename Compute>
struct Lerp {
  explicit Lerp(double weight)
      : from_finetuned(!(weight < 0.5)), factor(static_cast<Compute>(from_finetuned ? weight - 1.0 : weight)) {}

  Compute operator()(Compute m, Compute f) const { return std::fma(factor, f - m, from_finetuned ? f : m); }

  bool from_finetuned;
  Compute factor;
};

template <typename M, typename F>
using ComputeType = std::conditional_t<std::is_same_v<M, double> || std::is_same_v<F, double>, double, float>;

template <typename M, typename F>
void merge_span_scalar(M* m, const F* f, int64_t n, double weight) {
  using Compute = ComputeType<M, F>;
  const Lerp<Compute> lerp(weight);
  for (int64_t i = 0; i < n; ++i) {
    m[i] = static_cast<M>(lerp(static_cast<Compute>(m[i]), static_cast<Compute>(f[i])));
  }
}

#if MBF_HAS_AVX2

template <typename M, typename F>
MBF_AVX2 void merge_8(M* m, const F* f, const Lerp<float>& lerp) {
  const __m256 old = load8(m);
  const __m256 target = load8(f);
  const __m256 start = lerp.from_finetuned ? target : old;
  store8(m, _mm256_fmadd_ps(_mm256_set1_ps(lerp.factor), _mm256_sub_ps(target, old), start));
}

template <typename M, typename F>
MBF_AVX2 void merge_span_avx2(M* m, const F* f, int64_t n, double weight) {
  const Lerp<float> lerp(weight);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) merge_8(m + i, f + i, lerp);
  if (i == n) return;
  M m_tail[8] = {};
  F f_tail[8] = {};
  std::copy(m + i, m + n, m_tail);
  std::copy(f + i, f + n, f_tail);
  merge_8(m_tail, f_tail, lerp);
  std::copy(m_tail, m_tail + (n - i), m + i);
}

// The scalar loop again: the compiler vectorises it for AVX2 and FMA.
template <typename M, typename F>
MBF_AVX2 void merge_span_avx2_wide(M* m, const F* f, int64_t n, double weight) {
  const Lerp<double> lerp(weight);
  for (int64_t i = 0; i < n; ++i) {
    m[i] = static_cast<M>(lerp(static_cast<double>(m[i]), static_cast<double>(f[i])));
  }
}

#endif  // MBF_HAS_AVX2

template <typename M, typename F>
void merge_span(void* merged, const void* finetuned, int64_t begin, int64_t end, double weight) {
  M* m = static_cast<M*>(merged) + begin;
  const F* f = static_cast<const F*>(finetuned) + begin;
#if MBF_HAS_AVX2
  if (has_avx2()) {
    if constexpr (std::is_same_v<ComputeType<M, F>, float>) {
      return merge_span_avx2(m, f, end - begin, weight);
    } else {
      return merge_span_avx2_wide(m, f, end - begin, weight);
    }
  }
#endif
  merge_span_scalar(m, f, end - begin, weight);
}

using Span = void (*)(void* merged, const void* finetuned, int64_t begin, int64_t end, double weight);

template <typename M>
Span span_for(ScalarType finetuned) {
  switch (finetuned) {
    case ScalarType::Double:
      return merge_span<M, double>;
    case ScalarType::Float:
      return merge_span<M, float>;
    case ScalarType::BFloat16:
      return merge_span<M, BFloat16>;
    case ScalarType::Half:
      return merge_span<M, Half>;
    default:
      STD_TORCH_CHECK(false, "merge_: finetuned must be fp64, fp32, bf16 or fp16");
  }
}

Span span_for(ScalarType merged, ScalarType finetuned) {
  switch (merged) {
    case ScalarType::Double:
      return span_for<double>(finetuned);
    case ScalarType::Float:
      return span_for<float>(finetuned);
    case ScalarType::BFloat16:
      return span_for<BFloat16>(finetuned);
    case ScalarType::Half:
      return span_for<Half>(finetuned);
    default:
      STD_TORCH_CHECK(false, "merge_: merged must be fp64, fp32, bf16 or fp16");
  }
}

// One pair of contiguous tensors and where it lies in the concatenation of all.
struct Pair {
  Tensor merged;
  Tensor finetuned;
  void* m;
  const void* f;
  int64_t begin;
  int64_t end;
  Span span;
};

std::vector<Pair> lay_end_to_end(const std::vector<Tensor>& merged, const std::vector<Tensor>& finetuned) {
  STD_TORCH_CHECK(merged.size() == finetuned.size(), "merge_: ", merged.size(), " tensors and ", finetuned.size());
  std::vector<Pair> pairs;
  pairs.reserve(merged.size());
  int64_t begin = 0;
  for (size_t n = 0; n < merged.size(); ++n) {
    const auto shape = merged[n].sizes();
    STD_TORCH_CHECK(shape.equals(finetuned[n].sizes()), "merge_: the shapes of pair ", n, " differ");
    STD_TORCH_CHECK(merged[n].is_cpu() && finetuned[n].is_cpu(), "merge_: pair ", n, " is not on the CPU");
    const Span span = span_for(merged[n].scalar_type(), finetuned[n].scalar_type());
    const Tensor m = torch::stable::contiguous(merged[n]);
    const Tensor f = torch::stable::contiguous(finetuned[n]);
    const int64_t end = begin + m.numel();
    pairs.push_back({m, f, m.mutable_data_ptr(), f.const_data_ptr(), begin, end, span});
    begin = end;
  }
  return pairs;
}

}  // namespace

void merge_(std::vector<Tensor> merged, std::vector<Tensor> finetuned, Tensor weight) {
  STD_TORCH_CHECK(weight.is_cpu() && weight.dim() == 0 && weight.scalar_type() == ScalarType::Double,
                  "merge_: weight must be a 0-d fp64 tensor on the CPU");
  const double lambda = *weight.const_data_ptr<double>();
  const std::vector<Pair> pairs = lay_end_to_end(merged, finetuned);
  const int64_t total = pairs.empty() ? 0 : pairs.back().end;

  torch::stable::parallel_for(0, total, kGrain, [&](int64_t begin, int64_t end) {
    auto pair = std::upper_bound(pairs.begin(), pairs.end(), begin,
                                 [](int64_t element, const Pair& candidate) { return element < candidate.end; });
    for (; pair != pairs.end() && pair->begin < end; ++pair) {
      pair->span(pair->m, pair->f, std::max(begin, pair->begin) - pair->begin, std::min(end, pair->end) - pair->begin,
                 lambda);
    }
  });

  for (size_t n = 0; n < merged.size(); ++n) {
    if (!merged[n].is_contiguous()) torch::stable::copy_(merged[n], pairs[n].merged);
  }
}

}  // namespace mbf::cpu
