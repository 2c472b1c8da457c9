#include "grid.h"

namespace mbf::cpu {
namespace {

constexpr int64_t kChunkRows = 256;      // of a tile: BLAS is as fast on it as on all rows, and half of it fits a cache
constexpr int64_t kTileColumns = 2048;   // of a tile, at most
constexpr int64_t kLeastColumns = 256;   // of a tile, where it is cut so that threads have work
constexpr int64_t kLeastTiles = 2;       // that a matrix is cut into, if its size allows
constexpr int64_t kLeastWork = 1 << 18;  // products that are worth a second thread
constexpr int64_t kMostChunks = 16;      // of rows: each has partial sums of its own
constexpr int64_t kSumRows = 128;        // of a chunk that makes sums only
constexpr int64_t kMostSums = 32;

}  // namespace

Grid::Grid(int64_t rows, int64_t columns, int64_t depth) : rows(rows), columns(columns) {
  row_chunks = rows == 0 ? 0 : std::clamp<int64_t>((rows + kChunkRows / 2) / kChunkRows, 1, kMostChunks);
  column_chunks = parts_of(columns, kTileColumns);
  if (row_chunks > 0 && tiles() < kLeastTiles && rows * columns * depth >= kLeastWork) {
    const int64_t most = std::max<int64_t>(1, columns / kLeastColumns);
    column_chunks = std::max(column_chunks, std::min(most, parts_of(kLeastTiles, row_chunks)));
  }
}

Grid Grid::of_sums(int64_t rows, int64_t columns) {
  Grid grid(rows, columns, 0);
  grid.row_chunks = rows == 0 ? 0 : std::clamp<int64_t>(rows / kSumRows, rows < kSumRows / 2 ? 1 : 2, kMostSums);
  grid.column_chunks = 1;
  return grid;
}

int64_t Grid::column(int64_t chunk) const {
  if (chunk == column_chunks) return columns;
  return columns * chunk / column_chunks / 32 * 32;  // panels of the packed operands stay aligned
}

}  // namespace mbf::cpu
