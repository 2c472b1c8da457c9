// merge_: M += λ (F − M) for a list of tensor pairs, in place, in one launch for each pair of dtypes.
//
// Pairs are cut into pieces of 8192 elements, a block for each. The table of pairs travels by value in the kernel's 4
// KB of parameters, so that nothing is copied to the device and a CUDA graph can hold the launch; more pairs than fit
// take more launches. The wider of a pair's dtypes is accessed 16 bytes at a time, with several accesses in flight;
// tensors that do not begin on 16 bytes, one element at a time. λ is read on the device.
//
// Each element takes one subtraction, one fused multiply-add and one rounding to M's dtype, as in csrc/cpu/merge.cpp,
// so both give the same bits. Norms are summed in fp64: by a thread over its elements of a piece, by a tree over the
// block, and by a second kernel over a pair's pieces, always in the same order.

#include <algorithm>

#include "merge.h"
#include "ops.h"
#include "pieces.h"
#include "reduce.cuh"
#include "vectors.h"

namespace mbf::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kNorms = 3;  // Σ F², Σ (F − M)² with M as it was, Σ M² as it is written

struct Pair {
  void* merged;
  const void* finetuned;
  int64_t size;
  int64_t first_piece;  // of the launch
};

constexpr int kPairs = 127;

struct Pairs {
  const double* weight;
  const int32_t* veto;
  double* squares;  // kNorms of each piece of the launch
  int64_t count;
  Pair pair[kPairs];
};

enum class Action { kMerge, kMergeWithNorms, kReplace };

__device__ __forceinline__ float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ __forceinline__ double fused(double a, double b, double c) { return __fma_rn(a, b, c); }

// λ as the formula that is exact at its end: M + λ (F − M) near M, F + (λ − 1) (F − M) near F; and M or F alone at the
// end itself, where F − M may be infinite or NaN.
template <typename Compute>
struct Lerp {
  __device__ explicit Lerp(double weight)
      : from_finetuned(!(weight < 0.5)), factor(static_cast<Compute>(from_finetuned ? weight - 1.0 : weight)) {}

  __device__ Compute operator()(Compute m, Compute f) const {
    const Compute base = from_finetuned ? f : m;
    return factor == 0 ? base : fused(factor, f - m, base);
  }

  bool from_finetuned;
  Compute factor;
};

// What a piece of a pair of dtypes needs: how an element is computed, and what its thread has summed so far.
template <typename M, typename F, Action kAction>
struct Merger {
  static constexpr bool kWide = std::is_same_v<M, double> || std::is_same_v<F, double>;
  using Compute = std::conditional_t<kWide, double, float>;

  __device__ explicit Merger(double weight) : lerp(weight) {}

  __device__ __forceinline__ M operator()(M merged, F finetuned) {
    if constexpr (kAction == Action::kReplace) {
      return convert<M>(finetuned);
    } else {
      const Compute m = convert<Compute>(merged), f = convert<Compute>(finetuned);
      const M result = convert<M>(lerp(m, f));
      if constexpr (kAction == Action::kMergeWithNorms) {
        add(0, static_cast<double>(f));
        add(1, static_cast<double>(f - m));
        add(2, convert<double>(result));
      }
      return result;
    }
  }

  __device__ __forceinline__ void add(int norm, double value) { squares[norm] = fused(value, value, squares[norm]); }

  Lerp<Compute> lerp;
  double squares[kNorms] = {0.0, 0.0, 0.0};
};

// Steps of kBatch packs whose loads are in flight together, then single packs, then single elements.
template <bool kWhole, typename M, typename F, Action kAction>
__device__ __forceinline__ void merge_piece(M* m, const F* f, int size, Merger<M, F, kAction>& merger) {
  constexpr int kPack = 16 / static_cast<int>(sizeof(M) > sizeof(F) ? sizeof(M) : sizeof(F));
  constexpr int kBatch = !kWhole ? 1 : kPack == 8 ? 2 : 4;
  constexpr int kStep = kThreads * kPack;
  int i = static_cast<int>(threadIdx.x) * kPack;
  for (; i + (kBatch - 1) * kStep + kPack <= size; i += kBatch * kStep) {
    Pack<M, kPack> old[kBatch];
    Pack<F, kPack> target[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if constexpr (kAction != Action::kReplace) old[b] = load_pack<kPack, kWhole>(m + i + b * kStep);
      target[b] = load_pack<kPack, kWhole>(f + i + b * kStep);
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
#pragma unroll
      for (int n = 0; n < kPack; ++n) old[b].values[n] = merger(old[b].values[n], target[b].values[n]);
      store_pack<kWhole>(m + i + b * kStep, old[b]);
    }
  }
#pragma unroll 1
  for (; i + kPack <= size; i += kStep) {
    Pack<M, kPack> old;
    if constexpr (kAction != Action::kReplace) old = load_pack<kPack, kWhole>(m + i);
    const Pack<F, kPack> target = load_pack<kPack, kWhole>(f + i);
#pragma unroll
    for (int n = 0; n < kPack; ++n) old.values[n] = merger(old.values[n], target.values[n]);
    store_pack<kWhole>(m + i, old);
  }
#pragma unroll 1
  for (; i < size; ++i) store(m + i, merger(load(m + i), load(f + i)));
}

template <typename M, typename F, Action kAction>
__global__ void __launch_bounds__(kThreads) merge_kernel(const __grid_constant__ Pairs pairs) {
  if (pairs.veto != nullptr && load(pairs.veto) != 0) return;
  const Pair& pair = pairs.pair[entry_of(pairs.pair, pairs.count, blockIdx.x)];
  const int64_t begin = (blockIdx.x - pair.first_piece) * kPiece;
  const int size = size_of_piece(pair.size, begin);
  M* m = static_cast<M*>(pair.merged) + begin;
  const F* f = static_cast<const F*>(pair.finetuned) + begin;

  Merger<M, F, kAction> merger(kAction == Action::kReplace ? 1.0 : load(pairs.weight));
  if ((reinterpret_cast<uintptr_t>(m) | reinterpret_cast<uintptr_t>(f)) % 16 == 0) {
    merge_piece<true>(m, f, size, merger);
  } else {
    merge_piece<false>(m, f, size, merger);
  }
  if constexpr (kAction == Action::kMergeWithNorms) {
    __shared__ double of_warps[kThreads / kWarp];
    for (int norm = 0; norm < kNorms; ++norm) {
      const double sum = sum_of_block(merger.squares[norm], of_warps);
      if (threadIdx.x == 0) store(pairs.squares + kNorms * static_cast<int64_t>(blockIdx.x) + norm, sum);
    }
  }
}

// Where the pieces of each pair are among all.
struct Ranges {
  const double* squares;  // [pieces, kNorms]
  double* norms;          // [pairs, kNorms]
  static constexpr int kCapacity = 500;
  struct {
    int32_t begin, count;
  } range[kCapacity];
};

// A block for a pair, a warp for a norm.
__global__ void __launch_bounds__(kNorms* kWarp) add_pieces_kernel(const __grid_constant__ Ranges ranges) {
  const int norm = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const auto range = ranges.range[blockIdx.x];
  double sum = 0.0;
  for (int piece = lane; piece < range.count; piece += kWarp) {
    sum += load(ranges.squares + kNorms * (static_cast<int64_t>(range.begin) + piece) + norm);
  }
  sum = sum_of_warp(sum);
  if (lane == 0) store(ranges.norms + kNorms * blockIdx.x + norm, sum);
}

template <Action kAction>
void launch_pairs(ScalarType merged, ScalarType finetuned, const Pairs& pairs, int64_t pieces, cudaStream_t stream) {
  STD_TORCH_CHECK(pieces < int64_t{1} << 31, "merge_: ", pieces, " pieces of ", kPiece,
                  " elements are too many; merge fewer tensors a call");
  with_type(merged, "merge_: merged", [&](auto m) {
    with_type(finetuned, "merge_: finetuned", [&](auto f) {
      using M = typename decltype(m)::type;
      using F = typename decltype(f)::type;
      MBF_LAUNCH((merge_kernel<M, F, kAction>), static_cast<unsigned int>(pieces), kThreads, 0, stream, pairs);
    });
  });
}

// The first pair of each pair of dtypes takes along all others of the same. Returns where each pair's pieces begin in
// the order of the launches, which is that of `squares`.
template <Action kAction>
std::vector<int64_t> launch_all(const MergeLists& lists, const double* weight, const int32_t* veto, double* squares,
                                cudaStream_t stream) {
  const size_t count = lists.merged.size();
  std::vector<int64_t> begins(count, 0);
  std::vector<bool> done(count, false);
  int64_t launched = 0;
  for (size_t first = 0; first < count; ++first) {
    if (done[first]) continue;
    const ScalarType merged = lists.merged[first].scalar_type(), finetuned = lists.finetuned[first].scalar_type();
    Pairs pairs{weight, veto, squares, 0, {}};
    int64_t pieces = 0;
    const auto launch = [&] {
      if (squares != nullptr) pairs.squares = squares + kNorms * launched;
      if (pieces > 0) launch_pairs<kAction>(merged, finetuned, pairs, pieces, stream);
      launched += pieces;
      pieces = pairs.count = 0;
    };
    for (size_t n = first; n < count; ++n) {
      const Tensor &m = lists.merged[n], &f = lists.finetuned[n];
      if (done[n] || m.scalar_type() != merged || f.scalar_type() != finetuned) continue;
      done[n] = true;
      begins[n] = launched + pieces;
      if (m.numel() == 0) continue;
      pairs.pair[pairs.count++] = {m.mutable_data_ptr(), f.const_data_ptr(), m.numel(), pieces};
      pieces += pieces_of(m.numel());
      if (pairs.count == kPairs) launch();
    }
    launch();
  }
  return begins;
}

}  // namespace

const double* weight_on_device(const Tensor& weight) {
  STD_TORCH_CHECK(on_device(weight) && weight.dim() == 0 && weight.scalar_type() == ScalarType::Double,
                  "merge_: weight must be a 0-d fp64 tensor on the device of the tensors");
  return static_cast<const double*>(weight.const_data_ptr());
}

MergeLists contiguous_pairs(const char* name, const std::vector<Tensor>& merged, const std::vector<Tensor>& finetuned) {
  STD_TORCH_CHECK(merged.size() == finetuned.size(), name, ": ", merged.size(), " tensors and ", finetuned.size(),
                  "; pass one for each");
  MergeLists lists;
  for (size_t n = 0; n < merged.size(); ++n) {
    const Tensor &m = merged[n], &f = finetuned[n];
    STD_TORCH_CHECK(m.sizes().equals(f.sizes()), name, ": the shapes of pair ", n, " differ; pass two of one shape");
    STD_TORCH_CHECK(on_device(m) && on_device(f) && m.get_device_index() == merged[0].get_device_index() &&
                        f.get_device_index() == m.get_device_index(),
                    name, ": pair ", n, " is not on the device of the first; move it there");
    with_type(m.scalar_type(), "merge_: merged", [](auto) {});
    with_type(f.scalar_type(), "merge_: finetuned", [](auto) {});
    lists.merged.push_back(torch::stable::contiguous(m));
    lists.finetuned.push_back(torch::stable::contiguous(f));
  }
  return lists;
}

void write_back(const std::vector<Tensor>& merged, const MergeLists& lists) {
  for (size_t n = 0; n < merged.size(); ++n) {
    Tensor target = merged[n];
    if (!target.is_contiguous()) torch::stable::copy_(target, lists.merged[n]);
  }
}

void launch_merge(const MergeLists& lists, const double* weight, const int32_t* veto, cudaStream_t stream) {
  launch_all<Action::kMerge>(lists, weight, veto, nullptr, stream);
}

void launch_replace(const MergeLists& lists, const int32_t* veto, cudaStream_t stream) {
  launch_all<Action::kReplace>(lists, nullptr, veto, nullptr, stream);
}

void merge_(Tensors merged, Tensors finetuned, Tensor weight) {
  const double* lambda = weight_on_device(weight);
  const MergeLists lists = contiguous_pairs("merge_", merged, finetuned);
  if (merged.empty()) return;
  const Launcher launcher(merged[0]);
  launch_merge(lists, lambda, nullptr, launcher.stream());
  write_back(merged, lists);
}

Tensor merge_with_norms_(Tensors merged, Tensors finetuned, Tensor weight) {
  const double* lambda = weight_on_device(weight);
  const MergeLists lists = contiguous_pairs("merge_with_norms_", merged, finetuned);
  const auto count = static_cast<int64_t>(merged.size());
  const Tensor norms = empty_on(weight, {count, kNorms}, ScalarType::Double);
  if (count == 0) return norms;
  const Launcher launcher(merged[0]);

  int64_t pieces = 0;
  for (const Tensor& m : lists.merged) pieces += pieces_of(m.numel());
  const Tensor partial = empty_on(weight, {pieces, kNorms}, ScalarType::Double);
  auto squares = static_cast<double*>(partial.mutable_data_ptr());
  const auto begins = launch_all<Action::kMergeWithNorms>(lists, lambda, nullptr, squares, launcher.stream());

  for (int64_t first = 0; first < count; first += Ranges::kCapacity) {
    const int64_t here = std::min<int64_t>(Ranges::kCapacity, count - first);
    Ranges ranges{squares, static_cast<double*>(norms.mutable_data_ptr()) + kNorms * first, {}};
    for (int64_t n = 0; n < here; ++n) {
      const auto size = static_cast<int32_t>(pieces_of(lists.merged[first + n].numel()));
      ranges.range[n] = {static_cast<int32_t>(begins[first + n]), size};
    }
    MBF_LAUNCH(add_pieces_kernel, static_cast<unsigned int>(here), kNorms * kWarp, 0, launcher.stream(), ranges);
  }
  write_back(merged, lists);
  return norms;
}

}  // namespace mbf::cuda
