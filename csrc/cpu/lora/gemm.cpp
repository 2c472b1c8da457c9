#include "gemm.h"

#include <algorithm>
#include <vector>

namespace mbf::cpu::gemm {
namespace {

using torch::stable::parallel_for;

// What is packed at once. Right's panel, a block of left's rows beside it, stays in the second-level cache, as the
// third may be at others' service; but where left has to be copied for every panel, panels are wide and lie in the
// third.
constexpr int64_t kMostRows = 48, kMostColumns = 1024, kMostDepth = 768, kPanel = 1 << 16;
constexpr int64_t kLine = 16;         // numbers
constexpr int64_t kRowsOfHalf = 512;  // whose output is kept in fp32 until the depth is through
constexpr int64_t kLeastWork = 1 << 18;

int64_t rounded_up(int64_t size, int64_t unit) { return (size + unit - 1) / unit * unit; }

// Equal parts, multiples of `unit`, of at most `most`.
struct Cut {
  Cut(int64_t whole, int64_t most, int64_t unit) : whole(whole) {
    const int64_t parts = std::max<int64_t>(1, (whole + most - 1) / most);
    size = std::max(unit, rounded_up((whole + parts - 1) / parts, unit));
  }
  int64_t at(int64_t from) const { return std::min(size, whole - from); }

  int64_t whole, size;
};

// Whether rows of fp32 at this distance share one set of the first-level cache.
bool crowded(int64_t ld) { return ld * 4 % 4096 == 0; }

bool read_as_it_lies(const Rows& left) { return left.type == ScalarType::Float && !crowded(left.ld); }

const char* moved(const void* data, ScalarType type, int64_t elements) {
  return static_cast<const char*>(data) + elements * element_size(type);
}

Strided part(const Strided& right, int64_t row, int64_t column) {
  return {moved(right.data, right.type, row * right.row + column * right.column), right.type, right.row, right.column};
}

// The start of a part of the output.
TileStart<float> part(const TileStart<float>& start, int64_t row, int64_t column) {
  TileStart<float> out = start;
  if (out.r > 0) {
    out.z += row * out.r;
    out.e += column;
    out.mask.first += row * out.mask.ld + column;
  }
  if (out.bias != nullptr) out.bias += column;
  return out;
}

Product part(const Product& whole, int64_t row, int64_t rows, int64_t column, int64_t columns) {
  Product out = whole;
  out.out = whole.out.at(row);
  out.out.data = const_cast<char*>(moved(out.out.data, out.out.type, column));
  out.rows = rows;
  out.columns = columns;
  out.left = whole.left.at(row);
  out.right = part(whole.right, 0, column);
  out.start = part(whole.start, row, column);
  return out;
}

// A sliver that the output ends inside of, through one of whole width.
void multiply_edge(const GemmLoops& loops, const float* left, int64_t ldl, int64_t rows, int64_t columns,
                   const float* sliver, int64_t depth, float* out, int64_t ldo, const TileStart<float>& start) {
  const int64_t width = loops.columns;
  static thread_local const Scratch<float> block(kMostRows * width), padded((kMostRank + 1) * width);
  TileStart<float> own = start;
  own.add = false;
  const auto copy = [&](const float* from, float* to) {
    std::fill(std::copy_n(from, columns, to), to + width, 0.0f);
    return to;
  };
  for (int64_t j = 0; j < start.r; ++j) copy(start.e + j * start.lde, padded.get() + j * width);
  own.e = padded.get();
  own.lde = width;
  if (start.bias != nullptr) own.bias = copy(start.bias, padded.get() + kMostRank * width);
  loops.multiply(left, ldl, rows, sliver, depth, block.get(), width, own);
  for (int64_t t = 0; t < rows; ++t) {
    for (int64_t i = 0; i < columns; ++i) {
      float& to = out[t * ldo + i];
      to = start.add ? to + block[t * width + i] : block[t * width + i];
    }
  }
}

// Columns that are packed at once, into fp32. Serial.
void multiply_columns(const Product& product, float* out, int64_t ldo, bool add) {
  const GemmLoops& loops = *gemm_loops();
  static thread_local const Scratch<float> packed_left(kMostRows * (kMostDepth + kLine)),
      packed_right(kMostColumns * kMostDepth);
  const bool direct = read_as_it_lies(product.left);
  const Cut depths(product.depth, kMostDepth, 8), heights(product.rows, kMostRows, loops.rows);
  for (int64_t from = 0; from < std::max<int64_t>(product.depth, 1); from += depths.size) {
    const int64_t depth = depths.at(from);
    const Strided right = part(product.right, from, 0);
    loops.pack(right.data, right.type, right.row, right.column, product.columns, depth, packed_right.get());
    const int64_t ldl = direct ? product.left.ld : crowded(depth) ? depth + kLine : depth;
    Rows left = product.left;
    left.data = const_cast<char*>(moved(left.data, left.type, from));
    for (int64_t row = 0; row < product.rows; row += heights.size) {
      const int64_t rows = heights.at(row);
      const float* block = direct ? static_cast<const float*>(left.at(row).data) : packed_left.get();
      if (!direct) loops.copy(left.at(row), rows, depth, {}, packed_left.get(), ldl);
      for (int64_t column = 0; column < product.columns; column += loops.columns) {
        TileStart<float> start = from > 0 ? TileStart<float>{} : part(product.start, row, column);
        start.add = from > 0 || add;
        const float* sliver = packed_right.get() + column * depth;
        float* to = out + row * ldo + column;
        const int64_t width = std::min(loops.columns, product.columns - column);
        if (width == loops.columns) {
          loops.multiply(block, ldl, rows, sliver, depth, to, ldo, start);
        } else {
          multiply_edge(loops, block, ldl, rows, width, sliver, depth, to, ldo, start);
        }
      }
    }
  }
}

// What one thread does.
void multiply_alone(const Product& product) {
  const int64_t depth = Cut(product.depth, kMostDepth, 8).size;
  const int64_t unit = gemm_loops()->columns;
  const int64_t panel =
      read_as_it_lies(product.left) ? std::min(kPanel / depth / unit * unit, kMostColumns) : kMostColumns;
  const Cut widths(product.columns, panel, unit);
  if (product.out.type == ScalarType::Float) {
    for (int64_t column = 0; column < product.columns; column += widths.size) {
      const Product here = part(product, 0, product.rows, column, widths.at(column));
      multiply_columns(here, static_cast<float*>(here.out.data), here.out.ld, product.start.add);
    }
    return;
  }
  const Micro<float>& inner = micro<float>();
  const Cut heights(product.rows, kRowsOfHalf, 1);
  static thread_local const Scratch<float> wide(kRowsOfHalf * kMostColumns);
  for (int64_t row = 0; row < product.rows; row += heights.size) {
    for (int64_t column = 0; column < product.columns; column += widths.size) {
      const int64_t rows = heights.at(row), columns = widths.at(column);
      const Product here = part(product, row, rows, column, columns);
      for (int64_t t = 0; t < rows && product.start.add; ++t) {
        inner.widen(here.out.at(t).data, here.out.type, columns, wide.get() + t * columns);
      }
      multiply_columns(here, wide.get(), columns, product.start.add);
      for (int64_t t = 0; t < rows; ++t) {
        inner.narrow(wide.get() + t * columns, columns, here.out.at(t).data, here.out.type);
      }
    }
  }
}

// Into how many pieces across the columns the threads cut a product; the rest of them cut its rows. Counted is what the
// largest piece takes: its products, and the packing of a number of right and the copy of one of left (or its way into
// the cache, where it is read as it lies) as so many of them.
int64_t pieces_across(const Product& product, int64_t threads) {
  const GemmLoops& loops = *gemm_loops();
  int64_t best = 1;
  double least = 0;
  for (int64_t across = 1; across <= threads; ++across) {
    if (threads % across != 0) continue;
    const int64_t down = threads / across;
    const double columns = rounded_up((product.columns + across - 1) / across, loops.columns);
    const double rows = rounded_up((product.rows + down - 1) / down, loops.rows);
    const double cost = rows * columns + 16 * columns + (read_as_it_lies(product.left) ? 2 : 20) * rows;
    if (across == 1 || cost < least) {
      best = across;
      least = cost;
    }
  }
  return best;
}

}  // namespace

bool usable() { return gemm_loops() != nullptr; }

bool worthwhile(int64_t rows, int64_t columns, int64_t depth) {
  return usable() && rows >= 48 && columns >= 32 && depth >= 32;
}

void multiply(const Product& product) {
  if (product.rows == 0 || product.columns == 0) return;
  const int64_t threads = product.rows * product.columns * product.depth < kLeastWork
                              ? 1
                              : static_cast<int64_t>(torch::stable::get_num_threads());
  const GemmLoops& loops = *gemm_loops();
  const int64_t across = pieces_across(product, threads), down = threads / across;
  const auto edge = [](int64_t whole, int64_t parts, int64_t n, int64_t unit) {
    return n == parts ? whole : std::min(whole, (whole + unit - 1) / unit * n / parts * unit);
  };
  parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t row = edge(product.rows, down, piece / across, loops.rows);
      const int64_t column = edge(product.columns, across, piece % across, loops.columns);
      const int64_t rows = edge(product.rows, down, piece / across + 1, loops.rows) - row;
      const int64_t columns = edge(product.columns, across, piece % across + 1, loops.columns) - column;
      if (rows > 0 && columns > 0) multiply_alone(part(product, row, rows, column, columns));
    }
  });
}

bool projects(int64_t rank) { return usable() && rank > 0 && 2 * rounded_up(rank, gemm_loops()->columns) <= 3 * rank; }

Scratch<float> packed(const Strided& right, int64_t depth, int64_t r) {
  const GemmLoops& loops = *gemm_loops();
  const int64_t width = rounded_up(r, loops.columns);
  const Cut depths(depth, kMostDepth, 8);
  Scratch<float> out(depth * width);
  for (int64_t from = 0; from < depth; from += depths.size) {
    const Strided here = part(right, from, 0);
    loops.pack(here.data, here.type, here.row, here.column, r, depths.at(from), out.get() + from * width);
  }
  return out;
}

void project(const Rows& x, int64_t rows, int64_t depth, const float* packed, int64_t r, const Mask& mask, float* h) {
  const GemmLoops& loops = *gemm_loops();
  const int64_t width = rounded_up(r, loops.columns);
  const Cut depths(depth, kMostDepth, 8);
  static thread_local const Scratch<float> kept(kMostRows * (kMostDepth + kLine)), sums(kMostRows * kMostRank);
  for (int64_t row = 0; row < rows; row += kMostRows) {
    const int64_t some = std::min(kMostRows, rows - row);
    for (int64_t from = 0; from < depth; from += depths.size) {
      const int64_t size = depths.at(from);
      Rows here = x.at(row);
      here.data = const_cast<char*>(moved(here.data, here.type, from));
      const float* block = static_cast<const float*>(here.data);
      int64_t ld = here.ld;
      if (here.type != ScalarType::Float || mask.bits != nullptr) {
        ld = size + kLine;
        loops.copy(here, some, size, {mask.bits, mask.first + row * mask.ld + from, mask.ld}, kept.get(), ld);
        block = kept.get();
      }
      TileStart<float> start;
      start.add = from > 0;
      for (int64_t column = 0; column < width; column += loops.columns) {
        loops.multiply(block, ld, some, packed + from * width + column * size, size, sums.get() + column, width, start);
      }
    }
    for (int64_t t = 0; t < some; ++t) std::copy_n(sums.get() + t * width, r, h + (row + t) * r);
  }
}

}  // namespace mbf::cpu::gemm
