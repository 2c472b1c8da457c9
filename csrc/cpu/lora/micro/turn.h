// Rows of numbers on their way to and from MoRA's square matrix: masked, turned in pairs, added to an activation.
#pragma once

#include "activation.h"
#include "dropout.h"

namespace mbf::cpu::MBF_ISA {
namespace {

template <typename C>
void keep_scaled(C* v, int64_t n, Mask mask, C factor) {
  over<C>(n, [&](int64_t i, int64_t some) __attribute__((always_inline)) {
    Vec<C> here = load_some(v + i, some) * factor;
    if (mask.bits != nullptr) here = keep<C>(here, mask.bits, mask.first + i);
    store_some<C>(v + i, here, some);
  });
}

template <typename C>
void turn(C* a, C* b, int64_t n, const C* cosine, const C* sine) {
  over<C>(n, [&](int64_t i, int64_t some) __attribute__((always_inline)) {
    const Vec<C> c = load_some(cosine + i, some), s = load_some(sine + i, some);
    const Vec<C> first = load_some(a + i, some), second = load_some(b + i, some);
    store_some<C>(a + i, first * c - second * s, some);
    store_some<C>(b + i, second * c + first * s, some);
  });
}

template <typename C, typename T>
void add_scaled(const T* y, const C* v, C factor, int64_t n, T* out) {
  int64_t i = 0;
  for (; i + kLanes<C> <= n; i += kLanes<C>) store(out + i, load(y + i) + factor * load(v + i));
  if (i < n) {
    const int64_t last = n - i;
    store_first<C>(out + i, load_first<C>(y + i, last) + factor * load_first<C>(v + i, last), last);
  }
}

}  // namespace
}  // namespace mbf::cpu::MBF_ISA
