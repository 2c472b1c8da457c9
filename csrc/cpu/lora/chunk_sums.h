// Adds up the partial sums that the chunks of rows left, one chunk after the other.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "grid.h"

namespace mbf::cpu {

// out[j, i] = Σ_chunk sums[chunk, j, i]
template <typename C>
void add_chunks(const C* sums, int64_t chunks, int64_t rows, int64_t columns, int64_t ld, C* out) {
  using torch::stable::parallel_for;
  if (rows == 0 || columns == 0) return;
  parallel_for(0, rows, parts_of(1 << 14, columns), [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      std::copy_n(sums + j * ld, columns, out + j * columns);
      for (int64_t chunk = 1; chunk < chunks; ++chunk) {
        const C* more = sums + (chunk * rows + j) * ld;
        for (int64_t i = 0; i < columns; ++i) out[j * columns + i] += more[i];
      }
    }
  });
}

// out[i, j] = Σ_chunk sums[chunk, j, i]; A chunk has `apart` rows, if not `rows`.
template <typename C>
void add_chunks_transposed(const C* sums, int64_t chunks, int64_t rows, int64_t columns, int64_t ld, C* out,
                           int64_t apart = -1) {
  using torch::stable::parallel_for;
  if (rows == 0 || columns == 0) return;
  constexpr int64_t kWidth = 4;
  parallel_for(0, parts_of(columns, kWidth), parts_of(1 << 14, kWidth * rows), [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t first = part * kWidth, last = std::min(kWidth, columns - first);
      const auto add = [&](auto width) {
        for (int64_t j = 0; j < rows; ++j) {
          C total[kWidth];
          for (int64_t i = 0; i < width; ++i) total[i] = sums[j * ld + first + i];
          for (int64_t chunk = 1; chunk < chunks; ++chunk) {
            const C* more = sums + (chunk * (apart < 0 ? rows : apart) + j) * ld + first;
            for (int64_t i = 0; i < width; ++i) total[i] += more[i];
          }
          for (int64_t i = 0; i < width; ++i) out[(first + i) * rows + j] = total[i];
        }
      };
      if (last == kWidth) {
        add(std::integral_constant<int64_t, kWidth>{});
      } else {
        add(last);
      }
    }
  });
}

}  // namespace mbf::cpu
