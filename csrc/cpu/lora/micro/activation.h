// The MLP's gated activations and their derivatives.
#pragma once

#include "vectors.h"

namespace mbf::cpu::MBF_ISA {
namespace {

// exp to about one unit in the last place: 2^n · P(remainder), n = round(x / ln 2). Arguments beyond ±87 are clamped.
MBF_INLINE Vec<float> exponential(Vec<float> x) {
  const Vec<float> most = broadcast(87.0f), least = broadcast(-87.0f);
  x = x > most ? most : x;
  x = x < least ? least : x;
  const Vec<float> shifted = x * 1.44269504088896341f + 12582912.0f;  // 1.5 · 2^23: rounds to the nearest integer
  const Vec<float> n = shifted - 12582912.0f;
  const Vec<float> f = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec<float> p = f * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * f * f + f + 1.0f;
  const Int32 exponent = (reinterpret_cast<Int32>(shifted) - 0x4b400000 + 127) << 23;
  return p * reinterpret_cast<Vec<float>>(exponent);
}

MBF_INLINE Vec<double> exponential(Vec<double> x) {
  for (int lane = 0; lane < kLanes<double>; ++lane) x[lane] = __builtin_exp(x[lane]);
  return x;
}

template <typename C>
struct Activation {
  Vec<C> value, slope;
};

// act(g) and its derivative. silu: g σ(g). gelu_tanh: g σ(2c (g + 0.044715 g³)), c = √(2/π), as 1 + tanh(v) = 2 σ(2v).
// Not inlined: copies of it could be rounded otherwise, one for whole vectors and one for what is left of a row.
template <typename C>
__attribute__((noinline)) Activation<C> activation(Vec<C> g, bool gelu) {
  constexpr C k2c = static_cast<C>(1.5957691216057307117597842397375), kCubic = static_cast<C>(0.044715);
  const Vec<C> one = broadcast(static_cast<C>(1));
  const Vec<C> inner = gelu ? k2c * (g + kCubic * g * g * g) : g;
  const auto gone = inner < broadcast(static_cast<C>(-88));  // σ there is less than what exponential gives at least
  const Vec<C> sigma = gone ? Vec<C>{} : one / (one + exponential(-inner));
  const Vec<C> inner_slope = gelu ? k2c * (one + 3 * kCubic * g * g) : one;
  const Vec<C> value = g * sigma;
  return {value, gone ? Vec<C>{} : sigma + value * (one - sigma) * inner_slope};
}

template <typename C, typename Step>
MBF_INLINE void over(int64_t n, const Step& step) {
  int64_t i = 0;
  for (; i + kLanes<C> <= n; i += kLanes<C>) step(i, kLanes<C>);
  if (i < n) step(i, n - i);
}

template <typename C>
MBF_INLINE Vec<C> load_some(const C* p, int64_t n) {
  return n == kLanes<C> ? load(p) : load_first<C>(p, n);
}

template <typename C>
MBF_INLINE void store_some(C* p, Vec<C> v, int64_t n) {
  if (n == kLanes<C>) {
    store(p, v);
  } else {
    store_first<C>(p, v, n);
  }
}

template <typename C>
void gated(const C* g, const C* u, int64_t n, bool gelu, C* out) {
  over<C>(n, [&](int64_t i, int64_t some) __attribute__((always_inline)) {
    const auto [value, slope] = activation<C>(load_some(g + i, some), gelu);
    store_some<C>(out + i, value * load_some(u + i, some), some);
  });
}

template <typename C>
void gated_backward(const C* da, const C* g, const C* u, int64_t n, bool gelu, C* dg, C* du) {
  over<C>(n, [&](int64_t i, int64_t some) __attribute__((always_inline)) {
    const auto [value, slope] = activation<C>(load_some(g + i, some), gelu);
    const Vec<C> d = load_some(da + i, some), up = load_some(u + i, some);
    store_some<C>(dg + i, d * up * slope, some);
    store_some<C>(du + i, d * value, some);
  });
}

}  // namespace
}  // namespace mbf::cpu::MBF_ISA
