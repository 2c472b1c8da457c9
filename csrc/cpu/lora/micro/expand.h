// y (+)= drop(z E): the product over ranks, the mask on what it adds.
#pragma once

#include "product.h"

namespace mbf::cpu::MBF_ISA {
namespace {

template <typename C, typename T>
void expand_rows(T* y, int64_t ldy, int64_t rows, int64_t columns, const C* z, int64_t r, const C* e, int64_t lde,
                 Mask mask, bool add) {
  if (mask.bits == nullptr) {
    product<C, C, T, Masked::kNothing>(rows, columns, r, z, r, 1, e, lde, y, ldy, mask, add);
  } else {
    product<C, C, T, Masked::kProduct>(rows, columns, r, z, r, 1, e, lde, y, ldy, mask, add);
  }
}

}  // namespace
}  // namespace mbf::cpu::MBF_ISA
