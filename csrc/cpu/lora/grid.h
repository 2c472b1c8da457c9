// How the work on an activation matrix is cut: by its shape only, so that sums over the pieces come to the same bits.
#pragma once

#include <algorithm>
#include <cstdint>

namespace mbf::cpu {

constexpr int64_t kBlockRows = 48;  // rows that go through the inner loops at once

// Into how many pieces of at most `most` a size is cut.
inline int64_t parts_of(int64_t size, int64_t most) { return std::max<int64_t>(1, (size + most - 1) / most); }

// The chunks of rows and columns that an activation matrix is worked through in.
struct Grid {
  Grid(int64_t rows, int64_t columns, int64_t depth);  // depth: products that an element takes

  // Chunks of rows only, finer ones: for sums beside products that are not cut by them.
  static Grid of_sums(int64_t rows, int64_t columns);

  int64_t tiles() const { return row_chunks * column_chunks; }
  int64_t row(int64_t chunk) const { return rows * chunk / row_chunks; }
  int64_t column(int64_t chunk) const;

  int64_t rows, columns, row_chunks, column_chunks;
};

}  // namespace mbf::cpu
