// merge_: M += λ (F − M) for a list of tensor pairs, in place.
//
// The pairs are cut into pieces, which torch's threads share out, so neither many small tensors nor one large one
// leaves a thread idle. Every element is computed by the same operations wherever the range is cut: one subtraction,
// one fused multiply-add and one rounding to M's dtype. The last elements of a vector loop go through a padded buffer,
// and the scalar path uses std::fma, so bits depend neither on the number of threads nor on the instruction set. Norms
// are summed in fp64 over pieces of a fixed size, whose sums are added in order.

#include "merge.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "kernels.h"
#include "linalg/finite.h"
#include "lora/micro.h"
#include "lora/torch.h"
#include "memory/overlap.h"
#include "simd.h"

namespace mbf::cpu {
namespace {

constexpr int64_t kPiece = 32768;  // elements, for which a second thread is worth its wake-up

// λ as the formula that is exact at its end: M + λ (F − M) near M, F + (λ − 1) (F − M) near F, as torch.lerp does; and
// M or F alone at the end itself, where F − M may be infinite or NaN.
template <typename Compute>
struct Lerp {
  explicit Lerp(double weight)
      : from_finetuned(!(weight < 0.5)), factor(static_cast<Compute>(from_finetuned ? weight - 1.0 : weight)) {}

  Compute operator()(Compute m, Compute f) const {
    const Compute base = from_finetuned ? f : m;
    return factor == 0 ? base : std::fma(factor, f - m, base);
  }

  bool from_finetuned;
  Compute factor;
};

template <typename M, typename F>
using ComputeType = std::conditional_t<std::is_same_v<M, double> || std::is_same_v<F, double>, double, float>;

// Sums of squares of F, of F − M as M was, and of M as it is written; without them, nothing is summed.
struct NoSums {
  template <typename Compute>
  void add(Compute, Compute, Compute) {}
};
struct Sums {
  double squares[3] = {};

  template <typename Compute>
  void add(Compute f, Compute step, Compute m) {
    squares[0] += static_cast<double>(f) * static_cast<double>(f);
    squares[1] += static_cast<double>(step) * static_cast<double>(step);
    squares[2] += static_cast<double>(m) * static_cast<double>(m);
  }
};

template <typename M, typename F, typename Into>
inline __attribute__((always_inline)) void merge_elements(M* m, const F* f, int64_t n, double weight, Into& sums) {
  using Compute = ComputeType<M, F>;
  const Lerp<Compute> lerp(weight);
  for (int64_t i = 0; i < n; ++i) {
    const Compute old = static_cast<Compute>(m[i]), target = static_cast<Compute>(f[i]);
    m[i] = static_cast<M>(lerp(old, target));
    sums.add(target, target - old, static_cast<Compute>(m[i]));
  }
}

template <typename M, typename F, typename Into>
void merge_span_scalar(M* m, const F* f, int64_t n, double weight, Into& sums) {
  merge_elements(m, f, n, weight, sums);
}

#if MBF_HAS_AVX2

struct NoSums8 {
  MBF_AVX2 void add(__m256, __m256, __m256) {}
  MBF_AVX2 void into(NoSums&) const {}
};
struct Sums8 {
  __m256d squares[3][2] = {};

  MBF_AVX2 void add(__m256 f, __m256 step, __m256 m) {
    add_to(squares[0], f);
    add_to(squares[1], step);
    add_to(squares[2], m);
  }

  MBF_AVX2 static void add_to(__m256d (&sum)[2], __m256 v) {
    const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(v)), high = _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1));
    sum[0] = _mm256_fmadd_pd(low, low, sum[0]);
    sum[1] = _mm256_fmadd_pd(high, high, sum[1]);
  }

  MBF_AVX2 void into(Sums& sums) const {
    for (int n = 0; n < 3; ++n) {
      alignas(32) double lanes[4];
      _mm256_store_pd(lanes, _mm256_add_pd(squares[n][0], squares[n][1]));
      sums.squares[n] += (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
    }
  }
};

template <typename M, typename F, typename Into8>
MBF_AVX2 void merge_8(M* m, const F* f, const Lerp<float>& lerp, Into8& sums) {
  const __m256 old = load8(m);
  const __m256 target = load8(f);
  const __m256 step = _mm256_sub_ps(target, old);
  const __m256 base = lerp.from_finetuned ? target : old;
  store8(m, lerp.factor == 0 ? base : _mm256_fmadd_ps(_mm256_set1_ps(lerp.factor), step, base));
  sums.add(target, step, load8(m));
}

template <typename M, typename F, typename Into>
MBF_AVX2 void merge_span_avx2(M* m, const F* f, int64_t n, double weight, Into& sums) {
  const Lerp<float> lerp(weight);
  std::conditional_t<std::is_same_v<Into, Sums>, Sums8, NoSums8> here;
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) merge_8(m + i, f + i, lerp, here);
  if (i < n) {
    M m_tail[8] = {};
    F f_tail[8] = {};
    std::copy(m + i, m + n, m_tail);
    std::copy(f + i, f + n, f_tail);
    merge_8(m_tail, f_tail, lerp, here);
    std::copy(m_tail, m_tail + (n - i), m + i);
  }
  here.into(sums);
}

// The scalar loop again: the compiler vectorises it for AVX2 and FMA.
template <typename M, typename F, typename Into>
MBF_AVX2 void merge_span_avx2_wide(M* m, const F* f, int64_t n, double weight, Into& sums) {
  merge_elements(m, f, n, weight, sums);
}

#endif  // MBF_HAS_AVX2

template <typename M, typename F, typename Into>
void merge_elements_of(M* m, const F* f, int64_t n, double weight, Into& sums) {
#if MBF_HAS_AVX2
  if (has_avx2()) {
    if constexpr (std::is_same_v<ComputeType<M, F>, float>) {
      return merge_span_avx2(m, f, n, weight, sums);
    } else {
      return merge_span_avx2_wide(m, f, n, weight, sums);
    }
  }
#endif
  merge_span_scalar(m, f, n, weight, sums);
}

template <typename M, typename F>
void merge_span(void* merged, const void* finetuned, int64_t begin, int64_t end, double weight, double* squares) {
  M* m = static_cast<M*>(merged) + begin;
  const F* f = static_cast<const F*>(finetuned) + begin;
  if (squares == nullptr) {
    NoSums none;
    return merge_elements_of(m, f, end - begin, weight, none);
  }
  Sums sums;
  merge_elements_of(m, f, end - begin, weight, sums);
  std::copy_n(sums.squares, 3, squares);
}

template <typename M>
MergeSpan span_for(ScalarType finetuned) {
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

MergeSpan span_for(ScalarType merged, ScalarType finetuned) {
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

}  // namespace

Merge::Merge(const Argument& merged_name, const std::vector<Tensor>& merged, const Argument& finetuned_name,
             const std::vector<Tensor>& finetuned, const Tensor& weight)
    : merged_(merged) {
  if (!weight.is_cpu() || weight.dim() != 0 || weight.scalar_type() != ScalarType::Double) {
    refuse({merged_name.op, "weight"}, "is " + described(weight) + "; it must be a 0-d fp64 tensor on the CPU");
  }
  check_length(finetuned_name, finetuned.size(), merged.size());
  lambda_ = *weight.const_data_ptr<double>();
  pairs_.reserve(merged.size());
  for (size_t n = 0; n < merged.size(); ++n) {
    const Argument into{merged_name.op, merged_name.name, static_cast<int64_t>(n)};
    const Argument source{finetuned_name.op, finetuned_name.name, static_cast<int64_t>(n)};
    check_float(into, merged[n]);
    check_float(source, finetuned[n]);
    if (!merged[n].sizes().equals(finetuned[n].sizes())) {
      refuse(source, "is " + described(finetuned[n]) + "; its partner is " + described(merged[n]));
    }
    check_writable(into, merged[n]);
    const MergeSpan span = span_for(merged[n].scalar_type(), finetuned[n].scalar_type());
    const Tensor m = packed(merged[n]);
    const Tensor f = packed(finetuned[n]);
    const int64_t size = m.numel();
    pairs_.push_back({m, f, m.mutable_data_ptr(), f.const_data_ptr(), span});
    for (int64_t begin = 0; begin < size; begin += kPiece)
      pieces_.push_back({n, begin, std::min(begin + kPiece, size)});
  }
}

void Merge::run(int64_t piece, double* squares) const {
  const Piece& here = pieces_[piece];
  const Pair& pair = pairs_[here.pair];
  pair.span(pair.m, pair.f, here.begin, here.end, lambda_, squares);
}

bool Merge::finite(int64_t piece) const {
  const Piece& here = pieces_[piece];
  const Pair& pair = pairs_[here.pair];
  const ScalarType type = pair.finetuned.scalar_type();
  const char* from = static_cast<const char*>(pair.f) + here.begin * element_size(type);
  return all_finite(from, type, here.end - here.begin);
}

void Merge::finish() const {
  for (size_t n = 0; n < merged_.size(); ++n) {
    Tensor target = merged_[n];
    if (!target.is_contiguous()) torch::stable::copy_(target, pairs_[n].merged);
  }
}

void merge_(Tensors merged, Tensors finetuned, Tensor weight) {
  const Merge merge({"merge_", "merged"}, merged, {"merge_", "finetuned"}, finetuned, weight);
  check_apart("merge_", {{merged}}, {{finetuned}});
  torch::stable::parallel_for(0, merge.pieces(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) merge.run(n);
  });
  merge.finish();
}

Tensor merge_with_norms_(Tensors merged, Tensors finetuned, Tensor weight) {
  const char* op = "merge_with_norms_";
  const Merge merge({op, "merged"}, merged, {op, "finetuned"}, finetuned, weight);
  check_apart(op, {{merged}}, {{finetuned}});
  std::vector<double> squares(3 * merge.pieces());
  torch::stable::parallel_for(0, merge.pieces(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) merge.run(n, &squares[3 * n]);
  });
  merge.finish();
  const Tensor out = empty({static_cast<int64_t>(merged.size()), 3}, ScalarType::Double);
  double* sums = static_cast<double*>(out.mutable_data_ptr());
  std::fill(sums, sums + out.numel(), 0.0);
  for (int64_t n = 0; n < merge.pieces(); ++n) {
    for (int k = 0; k < 3; ++k) sums[3 * merge.pair_of(n) + k] += squares[3 * n + k];
  }
  return out;
}

}  // namespace mbf::cpu
