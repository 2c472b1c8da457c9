// dropout_mask: which elements of a tensor dropout keeps, as bytes of 0 and 1: the stream that the fused layers make in
// registers (lora/micro.h), bit by bit. It depends on neither the number of threads nor the instruction set.

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels.h"
#include "lora/micro.h"

namespace mbf::cpu {
namespace {

using torch::headeronly::ScalarType;

constexpr int64_t kGrain = 8192;  // blocks of eight elements below which a second thread costs more than it saves
constexpr int64_t kAtOnce = 512;  // blocks

// The bits of a byte as eight bytes of 0 and 1, the lowest first.
uint64_t bytes_of(uint8_t bits) {
  const uint64_t own = (bits * 0x0101010101010101u) & 0x8040201008040201u;  // byte k holds bit k, in its place
  return ((own + 0x7f7f7f7f7f7f7f7fu) >> 7) & 0x0101010101010101u;
}

}  // namespace

Tensor dropout_mask(Tensor seed, std::vector<int64_t> shape, double p) {
  STD_TORCH_CHECK(seed.is_cpu() && seed.dim() == 0 && seed.scalar_type() == ScalarType::Long,
                  "dropout_mask: seed must be a 0-d int64 tensor on the CPU");
  const double least = std::nearbyint(p * 65536.0);  // to even, as Python's round
  STD_TORCH_CHECK(p >= 0 && least <= UINT16_MAX, "dropout_mask: p is ", p, ", it must lie in [0, 1 - 2**-17)");
  Tensor mask = torch::stable::new_empty(seed, shape, ScalarType::Bool);
  uint8_t* keep = static_cast<uint8_t*>(mask.mutable_data_ptr());
  const int64_t size = mask.numel();
  const uint64_t key = static_cast<uint64_t>(*seed.const_data_ptr<int64_t>());

  torch::stable::parallel_for(0, (size + 7) / 8, kGrain, [&](int64_t begin, int64_t end) {
    uint8_t bits[kAtOnce];
    for (int64_t j = begin; j < end; j += kAtOnce) {
      const int64_t blocks = std::min(kAtOnce, end - j);
      micro<float>().mask_bits(key, static_cast<uint32_t>(least), static_cast<uint64_t>(j), blocks, bits);
      for (int64_t n = 0; n < blocks; ++n) {
        const uint64_t bytes = bytes_of(bits[n]);
        std::memcpy(keep + 8 * (j + n), &bytes, std::min<int64_t>(8, size - 8 * (j + n)));
      }
    }
  });
  return mask;
}

}  // namespace mbf::cpu
