#include "finite.h"

#include <algorithm>

#include "../simd.h"

namespace mbf::cpu {
namespace {

// A number is NaN or infinite where all bits of its exponent are set. Signed, as the vectors of the baseline
// instruction set have no other maximum.
template <typename Bits>
inline __attribute__((always_inline)) bool below(const void* numbers, int64_t n, Bits exponent) {
  const Bits* bits = static_cast<const Bits*>(numbers);
  Bits most = 0;
  for (int64_t i = 0; i < n; ++i) most = std::max<Bits>(most, bits[i] & exponent);
  return most != exponent;
}

template <typename Bits>
bool below_scalar(const void* numbers, int64_t n, Bits exponent) {
  return below(numbers, n, exponent);
}

template <typename Bits>
#if MBF_HAS_AVX2
MBF_AVX2
#endif
    bool below_avx2(const void* numbers, int64_t n, Bits exponent) {
  return below(numbers, n, exponent);
}

template <typename Bits>
bool finite(const void* numbers, int64_t n, Bits exponent) {
  return has_avx2() ? below_avx2(numbers, n, exponent) : below_scalar(numbers, n, exponent);
}

template <typename Bits>
void fill(void* numbers, int64_t n, Bits exponent) {
  std::fill_n(static_cast<Bits*>(numbers), n, static_cast<Bits>(exponent | (exponent >> 1)));
}

}  // namespace

bool all_finite(const void* numbers, torch::headeronly::ScalarType type, int64_t n) {
  using torch::headeronly::ScalarType;
  switch (type) {
    case ScalarType::Double:
      return finite<int64_t>(numbers, n, 0x7ff0000000000000);
    case ScalarType::Float:
      return finite<int32_t>(numbers, n, 0x7f800000);
    case ScalarType::BFloat16:
      return finite<int16_t>(numbers, n, 0x7f80);
    default:
      return finite<int16_t>(numbers, n, 0x7c00);
  }
}

void fill_nan(void* numbers, torch::headeronly::ScalarType type, int64_t n) {
  using torch::headeronly::ScalarType;
  switch (type) {
    case ScalarType::Double:
      return fill<int64_t>(numbers, n, 0x7ff0000000000000);
    case ScalarType::Float:
      return fill<int32_t>(numbers, n, 0x7f800000);
    case ScalarType::BFloat16:
      return fill<int16_t>(numbers, n, 0x7f80);
    default:
      return fill<int16_t>(numbers, n, 0x7c00);
  }
}

}  // namespace mbf::cpu
