// c = a b for a wide a and a thin b: a's rows as they lie, and as much of b at a time as stays in the first-level
// cache.
#pragma once

#include "product.h"

namespace mbf::cpu::MBF_ISA {
namespace {

constexpr int64_t kThinBytes = 96 << 10;

template <typename C>
void thin(const C* a, int64_t lda, int64_t rows, int64_t depth, const C* b, int64_t columns, C* c) {
  int64_t some = kThinBytes / (columns * static_cast<int64_t>(sizeof(C)));
  if (some < 16) some = 16;
  for (int64_t k = 0; k < depth; k += some) {
    const int64_t here = depth - k < some ? depth - k : some;
    product<C, C, C, Masked::kNothing>(rows, columns, here, a + k, lda, 1, b + k * columns, columns, c, columns, {},
                                       k > 0);
  }
}

}  // namespace
}  // namespace mbf::cpu::MBF_ISA
