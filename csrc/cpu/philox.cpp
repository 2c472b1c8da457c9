// dropout_mask: which elements of a tensor dropout keeps, as bytes of 0 and 1. The blocks are split among torch's
// threads; the mask depends on neither their number nor the instruction set.

#include "philox.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>

#include "kernels.h"

namespace mbf::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrain = 8192;  // blocks below which a second thread costs more than it saves

void mask_block(const Philox& philox, uint64_t j, uint16_t threshold, uint8_t* keep) {
  const auto words = philox.block(j);
  for (int lane = 0; lane < 8; ++lane) {
    keep[lane] = static_cast<uint16_t>(words[lane / 2] >> (lane % 2 * 16)) >= threshold;
  }
}

#if MBF_HAS_AVX2
MBF_AVX2 __m256i at_least(__m256i half_words, __m256i least) {
  return _mm256_cmpeq_epi16(_mm256_max_epu16(half_words, least), half_words);
}

// 32 elements, a block's eight to a 64-bit lane.
MBF_AVX2 void mask_4_blocks(const Philox& philox, uint64_t j, uint16_t threshold, uint8_t* keep) {
  __m256i words01, words23;
  philox.blocks4(j, words01, words23);
  const __m256i least = _mm256_set1_epi16(static_cast<int16_t>(threshold));
  // Packing interleaves the four-byte halves of two blocks; the shuffle puts each block's together.
  const __m256i kept = _mm256_packs_epi16(at_least(words01, least), at_least(words23, least));
  const __m256i bytes = _mm256_and_si256(_mm256_shuffle_epi32(kept, 0xD8), _mm256_set1_epi8(1));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(keep), bytes);
}

MBF_AVX2 int64_t mask_blocks_avx2(const Philox& philox, int64_t begin, int64_t end, uint16_t threshold, uint8_t* keep) {
  int64_t j = begin;
  for (; j + 4 <= end; j += 4) mask_4_blocks(philox, static_cast<uint64_t>(j), threshold, keep + 8 * j);
  return j;
}
#endif

}  // namespace

Tensor dropout_mask(Tensor seed, std::vector<int64_t> shape, double p) {
  STD_TORCH_CHECK(seed.is_cpu() && seed.dim() == 0 && seed.scalar_type() == ScalarType::Long,
                  "dropout_mask: seed must be a 0-d int64 tensor on the CPU");
  const double least = std::nearbyint(p * 65536.0);  // to even, as Python's round
  STD_TORCH_CHECK(p >= 0 && least <= UINT16_MAX, "dropout_mask: p is ", p, ", it must lie in [0, 1 - 2**-17)");
  Tensor mask = torch::stable::new_empty(seed, shape, ScalarType::Bool);
  uint8_t* keep = static_cast<uint8_t*>(mask.mutable_data_ptr());
  const int64_t size = mask.numel();
  const uint16_t threshold = static_cast<uint16_t>(least);
  const Philox philox(static_cast<uint64_t>(*seed.const_data_ptr<int64_t>()));

  torch::stable::parallel_for(0, size / 8, kGrain, [&](int64_t begin, int64_t end) {
    int64_t j = begin;
#if MBF_HAS_AVX2
    if (has_avx2()) j = mask_blocks_avx2(philox, begin, end, threshold, keep);
#endif
    for (; j < end; ++j) mask_block(philox, static_cast<uint64_t>(j), threshold, keep + 8 * j);
  });
  if (size % 8 != 0) {
    uint8_t last[8];
    mask_block(philox, static_cast<uint64_t>(size / 8), threshold, last);
    std::copy(last, last + size % 8, keep + size - size % 8);
  }
  return mask;
}

}  // namespace mbf::cpu
