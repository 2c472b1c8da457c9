// g (+)= zᵀ drop(x): the product over rows, the mask on the rows of x.
#pragma once

#include "product.h"

namespace mbf::cpu::MBF_ISA {
namespace {

template <typename C, typename T>
void outer_rows(const T* x, int64_t ldx, int64_t rows, int64_t columns, const C* z, int64_t r, Mask mask, Ahead ahead,
                C* g, int64_t ldg, bool add) {
  const int64_t visits = (r + MBF_TILE_ROWS - 1) / MBF_TILE_ROWS;
  // Rows a multiple of 2 KiB apart share two sets of the first-level cache, and are read from the second in every
  // visit.
  const bool crowded = ldx * static_cast<int64_t>(sizeof(T)) % 2048 == 0;
  // With vectors of 64 bytes a mask costs little, and a visit serves twice as many ranks.
  constexpr bool wide = MBF_BYTES == 64;
  if (mask.bits == nullptr && (visits == 1 || (!crowded && (wide || visits == 2)))) {
    const auto all = [&](auto fetched) {
      product<C, T, C, Masked::kNothing>(r, columns, rows, z, 1, r, x, ldx, g, ldg, {}, add, fetched);
    };
    ahead.rows > 0 ? all(Lines{ahead.next, ahead.stride, columns * ahead.size / Lines::kBytes}) : all(NoLines{});
    return;
  }
  if (mask.bits != nullptr && (visits == 1 || (wide && !copies(visits)))) {
    product<C, T, C, Masked::kFactor>(r, columns, rows, z, 1, r, x, ldx, g, ldg, mask, add);
    return;
  }
  // A copy in the first-level cache, and while it is used, the rows that come next are fetched, or the next columns.
  constexpr int64_t kRows = 48, kColumns = 384 / sizeof(C), kLd = kColumns + kLanes<C>, kSize = sizeof(T);
  static_assert(kColumns % (MBF_TILE_VECTORS * kLanes<C>) == 0);
  alignas(64) C kept[kRows * kLd];
  for (int64_t t = 0; t < rows; t += kRows) {
    const int64_t some = rows - t < kRows ? rows - t : kRows;
    for (int64_t i = 0; i < columns; i += kColumns) {
      const int64_t width = columns - i < kColumns ? columns - i : kColumns;
      const T* from = x + t * ldx + i;
      copy_kept<C, T>(from, ldx, some, width, {mask.bits, mask.first + t * mask.ld + i, mask.ld}, kept, kLd);
      Lines lines{reinterpret_cast<const char*>(from) + kColumns * kSize, ldx * kSize,
                  kColumns * kSize / Lines::kBytes};
      if (ahead.rows > 0) lines = {ahead.next + i * ahead.size, ahead.stride, kColumns * ahead.size / Lines::kBytes};
      product<C, C, C, Masked::kNothing>(r, width, some, z + t * r, 1, r, kept, kLd, g + i, ldg, {}, add || t > 0,
                                         lines);
    }
  }
}

}  // namespace
}  // namespace mbf::cpu::MBF_ISA
