// dropout_mask: which elements of a tensor dropout keeps, as bytes of 0 and 1. The blocks are split among torch's
// threads; the mask depends on neither their number nor the instruction set.

#include "philox.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels.h"

namespace mbf::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrain = 8192;  // blocks below which a second thread costs more than it saves

void mask_block(const Philox& philox, uint64_t j, uint32_t threshold, uint8_t* keep) {
  const auto words = philox.block(j);
  for (int lane = 0; lane < 4; ++lane) keep[lane] = words[lane] >= threshold;
}

#if MBF_HAS_AVX2
// 32 elements: the four words of a block become the four bytes of its 32-bit lane.
MBF_AVX2 void mask_8_blocks(const Philox& philox, uint64_t j, uint32_t threshold, uint8_t* keep) {
  __m256i words[4];
  philox.blocks8(j, words);
  const __m256i least = _mm256_set1_epi32(static_cast<int>(threshold));
  __m256i bytes = _mm256_setzero_si256();
  for (int lane = 0; lane < 4; ++lane) {
    const __m256i kept = _mm256_cmpeq_epi32(_mm256_max_epu32(words[lane], least), words[lane]);
    bytes = _mm256_or_si256(bytes, _mm256_and_si256(kept, _mm256_set1_epi32(1 << (8 * lane))));
  }
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(keep), bytes);
}

MBF_AVX2 int64_t mask_blocks_avx2(const Philox& philox, int64_t begin, int64_t end, uint32_t threshold, uint8_t* keep) {
  int64_t j = begin;
  for (; j + 8 <= end && Philox::can_take_8(j); j += 8) mask_8_blocks(philox, j, threshold, keep + 4 * j);
  return j;
}
#endif

}  // namespace

Tensor dropout_mask(Tensor seed, std::vector<int64_t> shape, double p) {
  STD_TORCH_CHECK(seed.is_cpu() && seed.dim() == 0 && seed.scalar_type() == ScalarType::Long,
                  "dropout_mask: seed must be a 0-d int64 tensor on the CPU");
  STD_TORCH_CHECK(p >= 0 && p < 1, "dropout_mask: p is ", p, ", it must lie in [0, 1)");
  Tensor mask = torch::stable::new_empty(seed, shape, ScalarType::Bool);
  uint8_t* keep = static_cast<uint8_t*>(mask.mutable_data_ptr());
  const int64_t size = mask.numel();
  const double least = std::nearbyint(p * 4294967296.0);  // to even, as Python's round
  if (least > UINT32_MAX) {                               // p within 2^-33 of 1: no word is that large
    std::memset(keep, 0, static_cast<size_t>(size));
    return mask;
  }
  const uint32_t threshold = static_cast<uint32_t>(least);
  const Philox philox(static_cast<uint64_t>(*seed.const_data_ptr<int64_t>()));

  torch::stable::parallel_for(0, size / 4, kGrain, [&](int64_t begin, int64_t end) {
    int64_t j = begin;
#if MBF_HAS_AVX2
    if (has_avx2()) j = mask_blocks_avx2(philox, begin, end, threshold, keep);
#endif
    for (; j < end; ++j) mask_block(philox, static_cast<uint64_t>(j), threshold, keep + 4 * j);
  });
  if (size % 4 != 0) {
    uint8_t last[4];
    mask_block(philox, static_cast<uint64_t>(size / 4), threshold, last);
    std::copy(last, last + size % 4, keep + size - size % 4);
  }
  return mask;
}

}  // namespace mbf::cpu
