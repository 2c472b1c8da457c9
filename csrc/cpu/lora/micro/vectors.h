// Vectors of fp32 and fp64 in GCC's vector extension, loaded from and stored to memory of any type, whole and in part.
#pragma once

#define MBF_INLINE inline __attribute__((always_inline))
#define MBF_UNROLL _Pragma("GCC unroll 16")
// Keeps a vector in a register that the compiler would rather read from memory again for each of its uses.
#if defined(__x86_64__)
#define MBF_PIN(v) asm("" : "+v"(v))
#else
#define MBF_PIN(v) (void)(v)
#endif

namespace mbf::cpu::MBF_ISA {
namespace {

template <typename C>
struct Vector {
  static constexpr int lanes = MBF_BYTES / sizeof(C);
  typedef C type __attribute__((vector_size(MBF_BYTES)));
  typedef C unaligned __attribute__((vector_size(MBF_BYTES), aligned(sizeof(C)), may_alias));
};

template <typename C>
using Vec = typename Vector<C>::type;
template <typename C>
constexpr int kLanes = Vector<C>::lanes;

using Bits32 = uint32_t __attribute__((vector_size(MBF_BYTES)));
using Int32 = int32_t __attribute__((vector_size(MBF_BYTES)));
using Int64 = int64_t __attribute__((vector_size(MBF_BYTES)));
using Bits16 = uint16_t __attribute__((vector_size(MBF_BYTES / 2)));
using Bits16Unaligned = uint16_t __attribute__((vector_size(MBF_BYTES / 2), aligned(2), may_alias));

template <typename C>
MBF_INLINE Vec<C> broadcast(C value) {
  return value - Vec<C>{};
}

MBF_INLINE Vec<float> load(const float* p) { return *reinterpret_cast<const Vector<float>::unaligned*>(p); }
MBF_INLINE Vec<double> load(const double* p) { return *reinterpret_cast<const Vector<double>::unaligned*>(p); }
MBF_INLINE void store(float* p, Vec<float> v) { *reinterpret_cast<Vector<float>::unaligned*>(p) = v; }
MBF_INLINE void store(double* p, Vec<double> v) { *reinterpret_cast<Vector<double>::unaligned*>(p) = v; }

MBF_INLINE Vec<float> load(const BFloat16* p) {
  const Bits16 bits = *reinterpret_cast<const Bits16Unaligned*>(p);
  return reinterpret_cast<Vec<float>>(__builtin_convertvector(bits, Bits32) << 16);
}

MBF_INLINE void store(BFloat16* p, Vec<float> v) {
  const Bits32 bits = reinterpret_cast<Bits32>(v);
  const Bits32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Bits32 nan = reinterpret_cast<Bits32>(v != v);
  *reinterpret_cast<Bits16Unaligned*>(p) = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), Bits16);
}

#if MBF_BYTES == 64
MBF_INLINE Vec<float> load(const Half* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
MBF_INLINE void store(Half* p, Vec<float> v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
#elif MBF_BYTES == 32
MBF_INLINE Vec<float> load(const Half* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
MBF_INLINE void store(Half* p, Vec<float> v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
#else
MBF_INLINE Vec<float> load(const Half* p) {
  Vec<float> v;
  for (int lane = 0; lane < kLanes<float>; ++lane) v[lane] = static_cast<float>(p[lane]);
  return v;
}
MBF_INLINE void store(Half* p, Vec<float> v) {
  for (int lane = 0; lane < kLanes<float>; ++lane) p[lane] = static_cast<Half>(v[lane]);
}
#endif

// The first n < lanes elements, zeros behind them.
template <typename C, typename T>
MBF_INLINE Vec<C> load_first(const T* p, int64_t n) {
  alignas(64) T padded[kLanes<C>] = {};
  __builtin_memcpy(padded, p, n * sizeof(T));
  return load(padded);
}

template <typename C, typename T>
MBF_INLINE void store_first(T* p, Vec<C> v, int64_t n) {
  alignas(64) T padded[kLanes<C>];
  store(padded, v);
  __builtin_memcpy(p, padded, n * sizeof(T));
}

}  // namespace
}  // namespace mbf::cpu::MBF_ISA
