// Eight floats at a time, read from and written to fp32, bf16 and fp16.
//
// The library is compiled for the baseline instruction set. Functions marked MBF_AVX2 may use AVX2, FMA and F16C and
// must be reached only when has_avx2() is true. Narrowing rounds to nearest even, bit for bit as the scalar conversions
// of torch/headeronly do, except that an fp16 NaN may keep another payload.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define MBF_HAS_AVX2 1
#define MBF_AVX2 __attribute__((target("avx2,fma,f16c")))
#include <immintrin.h>
#else
#define MBF_HAS_AVX2 0
#endif

namespace mbf::cpu {

using BFloat16 = torch::headeronly::BFloat16;
using Half = torch::headeronly::Half;

// Whether the machine has AVX2, FMA and F16C. ATEN_CPU_CAPABILITY=default says no, as it does to torch's own kernels.
inline bool has_avx2() {
#if MBF_HAS_AVX2
  static const bool available = [] {
    const char* capability = std::getenv("ATEN_CPU_CAPABILITY");
    const bool allowed = capability == nullptr || std::strcmp(capability, "default") != 0;
    return allowed && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  }();
  return available;
#else
  return false;
#endif
}

#if MBF_HAS_AVX2

MBF_AVX2 inline __m256 load8(const float* p) { return _mm256_loadu_ps(p); }

MBF_AVX2 inline __m256 load8(const BFloat16* p) {
  const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
}

MBF_AVX2 inline __m256 load8(const Half* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

MBF_AVX2 inline void store8(float* p, __m256 v) { _mm256_storeu_ps(p, v); }

MBF_AVX2 inline void store8(BFloat16* p, __m256 v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i high = _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_set1_epi32(0x7fc0), nan);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0xd8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}

MBF_AVX2 inline void store8(Half* p, __m256 v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

#endif  // MBF_HAS_AVX2

}  // namespace mbf::cpu
