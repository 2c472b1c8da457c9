// __half and __nv_bfloat16, their pairs, conversions (to nearest even) and arithmetic, which is fp32's rounded.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "types.h"

namespace mbf::emulation {

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

inline uint16_t bfloat16_bits(float x) {
  const uint32_t bits = bits_of(x);
  if (x != x) return 0x7fff;  // CUDA's NaN
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline uint16_t half_bits(float x) {
  const uint32_t bits = bits_of(x), magnitude = bits & 0x7fffffff;
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  if (magnitude > 0x7f800000) return 0x7fff;  // CUDA's NaN
  if (magnitude >= 0x47800000) return sign | 0x7c00;
  if (magnitude < 0x38800000) {
    // Subnormal: fp32's own adder rounds at 2^-24 when the number is added to one whose last place that is.
    return sign | static_cast<uint16_t>(bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f));
  }
  const uint32_t rebased = magnitude - (112u << 23);
  return sign | static_cast<uint16_t>((rebased + 0xfff + (rebased >> 13 & 1)) >> 13);
}

inline float half_value(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, rest = half & 0x7fff;
  if (rest >= 0x7c00) return float_of(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  if (rest >= 0x400) return float_of(sign | ((rest << 13) + (112u << 23)));
  const float magnitude = static_cast<float>(rest) * 0x1p-24f;
  return sign != 0 ? -magnitude : magnitude;
}

}  // namespace mbf::emulation

// A 16-bit float `name` and its pair; `bits_from` and `value` convert from and to fp32.
#define MBF_SIXTEEN(name, pair, raw, bits_from, value)                                                   \
  struct name {                                                                                          \
    uint16_t bits;                                                                                       \
    name() = default;                                                                                    \
    name(float x) : bits(bits_from(x)) {}                                                                \
    name(double x) : name(static_cast<float>(x)) {}                                                      \
    name(int x) : name(static_cast<float>(x)) {}                                                         \
    operator float() const { return value(bits); }                                                       \
    name& operator+=(name other) { return *this = name(float(*this) + float(other)); }                   \
    name& operator-=(name other) { return *this = name(float(*this) - float(other)); }                   \
    name& operator*=(name other) { return *this = name(float(*this) * float(other)); }                   \
  };                                                                                                     \
  inline name operator+(name a, name b) { return name(float(a) + float(b)); }                            \
  inline name operator-(name a, name b) { return name(float(a) - float(b)); }                            \
  inline name operator*(name a, name b) { return name(float(a) * float(b)); }                            \
  inline name operator/(name a, name b) { return name(float(a) / float(b)); }                            \
  inline name operator-(name a) { return name(-float(a)); }                                              \
  inline bool operator==(name a, name b) { return float(a) == float(b); }                                \
  inline bool operator!=(name a, name b) { return float(a) != float(b); }                                \
  inline bool operator<(name a, name b) { return float(a) < float(b); }                                  \
  inline bool operator>(name a, name b) { return float(a) > float(b); }                                  \
  struct alignas(4) pair {                                                                               \
    name x, y;                                                                                           \
    pair() = default;                                                                                    \
    pair(name x, name y) : x(x), y(y) {}                                                                 \
  };                                                                                                     \
  inline name __hadd(name a, name b) { return a + b; }                                                   \
  inline name __hsub(name a, name b) { return a - b; }                                                   \
  inline name __hmul(name a, name b) { return a * b; }                                                   \
  inline name __hfma(name a, name b, name c) { return name(std::fma(float(a), float(b), float(c))); }    \
  inline bool __hisnan(name a) { return float(a) != float(a); }                                          \
  inline pair __hadd2(pair a, pair b) { return {a.x + b.x, a.y + b.y}; }                                 \
  inline pair __hmul2(pair a, pair b) { return {a.x * b.x, a.y * b.y}; }                                 \
  inline pair __hfma2(pair a, pair b, pair c) { return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)}; } \
  inline name __low2##raw(pair a) { return a.x; }                                                        \
  inline name __high2##raw(pair a) { return a.y; }                                                       \
  inline float __low2float(pair a) { return a.x; }                                                       \
  inline float __high2float(pair a) { return a.y; }                                                      \
  inline unsigned short __##raw##_as_ushort(name a) { return a.bits; }                                   \
  inline name __ushort_as_##raw(unsigned short bits) {                                                   \
    name a;                                                                                              \
    a.bits = bits;                                                                                       \
    return a;                                                                                            \
  }                                                                                                      \
  inline name __float2##raw(float x) { return name(x); }                                                 \
  inline name __float2##raw##_rn(float x) { return name(x); }                                            \
  inline float __##raw##2float(name a) { return a; }

MBF_SIXTEEN(__half, __half2, half, mbf::emulation::half_bits, mbf::emulation::half_value)
MBF_SIXTEEN(__nv_bfloat16, __nv_bfloat162, bfloat16, mbf::emulation::bfloat16_bits,
            [](uint16_t b) { return mbf::emulation::float_of(static_cast<uint32_t>(b) << 16); })

#undef MBF_SIXTEEN

using half = __half;
using half2 = __half2;
using nv_bfloat16 = __nv_bfloat16;
using nv_bfloat162 = __nv_bfloat162;

inline __half2 __halves2half2(__half low, __half high) { return {low, high}; }
inline __half2 __float2half2_rn(float x) { return {x, x}; }
inline __half2 __floats2half2_rn(float low, float high) { return {low, high}; }
inline __half2 __float22half2_rn(float2 x) { return {x.x, x.y}; }
inline float2 __half22float2(__half2 x) { return {x.x, x.y}; }

inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 low, __nv_bfloat16 high) { return {low, high}; }
inline __nv_bfloat162 __float2bfloat162_rn(float x) { return {x, x}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float low, float high) { return {low, high}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 x) { return {x.x, x.y}; }
inline float2 __bfloat1622float2(__nv_bfloat162 x) { return {x.x, x.y}; }
