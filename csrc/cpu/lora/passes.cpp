#include "passes.h"

#include <algorithm>

#include "amx.h"
#include "serial_blas.h"

namespace mbf::cpu {
namespace {

constexpr int64_t kRowsAtOnce = 32;    // of W, on as many pages, for one row of dy
constexpr int64_t kWidened = 1 << 19;  // elements of W that are widened at once: 2 MiB of fp32

float* floats(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

// fp32 copy of a block of a half matrix.
Tensor widened(const Rows& from, int64_t rows, int64_t columns) {
  const Tensor out = empty({rows, columns}, ScalarType::Float);
  for (int64_t t = 0; t < rows; ++t) {
    micro<float>().widen(from.at(t).data, from.type, columns, floats(out) + t * columns);
  }
  return out;
}

void narrow(const Tensor& from, const Rows& to) {
  const int64_t columns = from.size(1);
  for (int64_t t = 0; t < from.size(0); ++t) {
    micro<float>().narrow(floats(from) + t * columns, columns, to.at(t).data, to.type);
  }
}

// Calls use(first, n) for pieces of `size` rows of W, `columns` of each of which are widened at once.
template <typename Use>
void in_pieces(int64_t size, int64_t columns, const Use& use) {
  const int64_t most = std::max<int64_t>(16, kWidened / std::max<int64_t>(columns, 1));
  const int64_t parts = (size + most - 1) / most;
  for (int64_t n = 0; n < parts; ++n) use(size * n / parts, size * (n + 1) / parts - size * n / parts);
}

MaybeTensor slice(const MaybeTensor& bias, int64_t first, int64_t size) {
  if (!bias || bias->size(0) == size) return bias;
  Tensor whole = *bias;
  return torch::stable::narrow(whole, 0, first, size);
}

// Pieces of a product that the threads share: enough of them that none waits long for the last.
struct Pieces {
  Pieces(int64_t rows, int64_t columns) : down((rows + 255) / 256) {
    const int64_t wanted = 3 * static_cast<int64_t>(torch::stable::get_num_threads());
    across = std::clamp<int64_t>((wanted + down - 1) / down, 1, std::max<int64_t>(1, columns / 128));
  }
  int64_t down, across;
};

// out (+)= left right on the processor's tiles of bf16; false where they are of no use.
bool on_amx(const Tensor& out, const Tensor& left, const Tensor& right, const MaybeTensor& bias, bool add, By threads) {
  const int64_t m = out.size(0), n = out.size(1), k = left.size(1), ld = out.stride(0);
  if (out.scalar_type() != ScalarType::Float || !amx::worthwhile(m, n, k)) return false;
  if (left.stride(1) != 1 || (right.stride(0) != 1 && right.stride(1) != 1)) return false;
  const amx::Strided rows{floats(left), left.stride(0), 1}, columns{floats(right), right.stride(0), right.stride(1)};
  const auto piece = [&](int64_t t, int64_t t_end, int64_t i, int64_t i_end) {
    float* to = floats(out) + t * ld + i;
    if (bias) {
      const float* from = floats(*bias);
      const int64_t step = bias->stride(0);
      for (int64_t row = 0; row < t_end - t; ++row) {
        for (int64_t column = i; column < i_end; ++column) to[row * ld + column - i] = from[column * step];
      }
    }
    amx::multiply(to, ld, t_end - t, i_end - i, k, {rows.data + t * rows.row, rows.row, 1},
                  {columns.data + i * columns.column, columns.row, columns.column}, add || bias);
  };
  if (threads == By::kThis) {
    piece(0, m, 0, n);
    return true;
  }
  const Pieces pieces(m, n);
  torch::stable::parallel_for(0, pieces.down * pieces.across, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t down = p / pieces.across, across = p % pieces.across;
      piece(m * down / pieces.down, m * (down + 1) / pieces.down, n * across / pieces.across / 32 * 32,
            across + 1 == pieces.across ? n : n * (across + 1) / pieces.across / 32 * 32);
    }
  });
  return true;
}

// Whether the kernels of the branch can read W's rows, as they do those of its packed factors: whole vectors.
bool like_packed(const Tensor& weight) {
  return weight.scalar_type() == ScalarType::Float && weight.stride(1) == 1 &&
         weight.size(1) % micro<float>().lanes == 0;
}

}  // namespace

bool must_widen(ScalarType type) {
  return (type == ScalarType::BFloat16 || type == ScalarType::Half) && !multiplies_natively(type);
}

bool in_one_call(ScalarType type) { return type == ScalarType::BFloat16 || type == ScalarType::Half; }

bool cuts_freely(ScalarType type, int64_t m, int64_t n, int64_t k) {
  return type == ScalarType::Float && amx::worthwhile(m, n, k) && amx::worthwhile(m, k, n);
}

Rows rows_in(const Tensor& matrix) { return {matrix.mutable_data_ptr(), matrix.scalar_type(), matrix.stride(0)}; }

Rows rows_or_none(const MaybeTensor& tensor) { return tensor ? rows_in(*tensor) : Rows{nullptr, ScalarType::Float, 0}; }

Rows part(const Rows& rows, int64_t row, int64_t column) {
  Rows out = rows.at(row);
  if (out.data != nullptr) out.data = static_cast<char*>(out.data) + column * element_size(out.type);
  return out;
}

Tensor block(const Tensor& matrix, int64_t row, int64_t rows, int64_t column, int64_t columns) {
  if (rows == matrix.size(0) && columns == matrix.size(1)) return matrix;
  const int64_t row_stride = matrix.stride(0), column_stride = matrix.stride(1);
  return viewed(matrix, row * row_stride + column * column_stride, rows, columns, row_stride, column_stride);
}

std::vector<Layer> readable(const std::vector<Layer>& layers, ScalarType type) {
  std::vector<Layer> out = layers;
  for (Layer& layer : out) {
    if (must_widen(type) && !layer.weight.is_contiguous()) layer.weight = torch::stable::contiguous(layer.weight);
  }
  return out;
}

void base_product(const Tensor& y, const Tensor& x, const Tensor& weight, const MaybeTensor& bias, By threads) {
  if (on_amx(y, x, transposed(weight), bias, false, threads)) return;
  if (threads == By::kThis && y.size(0) == 1 && !bias && like_packed(weight)) {
    micro<float>().project(rows_in(x), 1, x.size(1), floats(weight), weight.stride(0), y.size(1), {}, floats(y));
    return;
  }
  if (bias) {
    addmm_out(y, *bias, x, transposed(weight));
  } else {
    mm_out(y, x, transposed(weight));
  }
}

void base_gradient(const Tensor& dx, const Tensor& dy, const Tensor& weight, bool add, By threads) {
  if (on_amx(dx, dy, weight, std::nullopt, add, threads)) return;
  if (threads == By::kThis && dx.size(0) == 1 && like_packed(weight)) {
    for (int64_t n = 0; n < dy.size(1); n += kRowsAtOnce) {
      micro<float>().expand(rows_in(dx), 1, dx.size(1), floats(dy) + n, std::min(kRowsAtOnce, dy.size(1) - n),
                            floats(weight) + n * weight.stride(0), weight.stride(0), {}, add || n > 0);
    }
    return;
  }
  if (add) {
    addmm_out(dx, dx, dy, weight);
  } else {
    mm_out(dx, dy, weight);
  }
}

void clear(const Tensor& tensor) {
  Tensor out = tensor;
  torch::stable::zero_(out);
}

template <typename C>
void forward_tile(const Layer& layer, const Branch<C>& branch, const Tensor& x, const Tensor& y, const Grid& grid,
                  int64_t column_chunk, const C* z, bool base) {
  const SerialBlas alone;
  const int64_t n = x.size(0), d_in = x.size(1);
  const int64_t column = grid.column(column_chunk), columns = grid.column(column_chunk + 1) - column;
  const Rows to = part(rows_in(y), 0, column);
  if (!base || !must_widen(x.scalar_type())) {
    if (base) {
      base_product(block(y, 0, n, column, columns), x, block(layer.weight, column, columns, 0, d_in),
                   slice(layer.bias, column, columns), By::kThis);
    }
    branch.expand(to, n, column, columns, z);
    return;
  }
  const Tensor left = widened(rows_in(x), n, d_in);
  const Tensor wide = empty({n, columns}, ScalarType::Float);
  in_pieces(columns, d_in, [&](int64_t first, int64_t size) {
    const Tensor weight = widened(rows_in(layer.weight).at(column + first), size, d_in);
    const MaybeTensor bias = slice(layer.bias, column + first, size);
    base_product(block(wide, 0, n, first, size), left, weight,
                 bias ? MaybeTensor(torch::stable::to(*bias, ScalarType::Float)) : std::nullopt, By::kThis);
  });
  branch.expand(rows_in(wide), n, column, columns, z);
  narrow(wide, to);
}

template <typename C>
void forward_chunk(const std::vector<Layer>& layers, const std::vector<Branch<C>>& branches, int64_t first,
                   const Tensor& x, const std::vector<Tensor>& ys, const std::vector<Grid>& grids,
                   const std::vector<Tensor>& hs) {
  const int64_t rows = x.size(0);
  std::vector<Scratch<C>> zs;
  std::vector<C*> z_data;
  for (const Branch<C>& branch : branches) {
    zs.emplace_back(rows * branch.rank());
    z_data.push_back(zs.back().get());
  }
  project_all<C>(branches, rows_in(x), first, rows, hs, z_data);
  for (size_t n = 0; n < layers.size(); ++n) {
    for (int64_t chunk = 0; chunk < grids[n].column_chunks; ++chunk) {
      forward_tile(layers[n], branches[n], x, ys[n], grids[n], chunk, z_data[n], true);
    }
  }
}

template <typename C>
void backward_tile(const std::vector<Layer>& layers, BranchBackward<C>& branches, int64_t row_chunk,
                   int64_t column_chunk, const std::vector<MaybeTensor>& dys, const MaybeTensor& x,
                   const MaybeTensor& dx, bool base) {
  const SerialBlas alone;
  const Grid& grid = branches.grid();
  const int64_t n = grid.row(row_chunk + 1) - grid.row(row_chunk);
  const int64_t column = grid.column(column_chunk), columns = grid.column(column_chunk + 1) - column;
  const Rows x_part = part(rows_or_none(x), 0, column);
  if (!dx || !base) {
    branches.visit(row_chunk, column_chunk, x_part, part(rows_or_none(dx), 0, column), true);
    return;
  }
  const bool widen = must_widen(dx->scalar_type());
  const Tensor to = widen ? empty({n, columns}, ScalarType::Float) : block(*dx, 0, n, column, columns);
  bool add = false;
  for (size_t member = 0; member < layers.size(); ++member) {
    if (!dys[member]) continue;
    const Tensor& weight = layers[member].weight;
    const int64_t d_out = weight.size(0);
    if (widen) {
      in_pieces(d_out, columns, [&](int64_t first, int64_t size) {
        base_gradient(to, widened(part(rows_in(*dys[member]), 0, first), n, size),
                      widened(part(rows_in(weight), first, column), size, columns), add, By::kThis);
        add = true;
      });
    } else {
      base_gradient(to, *dys[member], block(weight, 0, d_out, column, columns), add, By::kThis);
      add = true;
    }
  }
  if (!add) clear(to);
  branches.visit(row_chunk, column_chunk, x_part, rows_in(to), true);
  if (widen) narrow(to, part(rows_in(*dx), 0, column));
}

template void forward_tile<float>(const Layer&, const Branch<float>&, const Tensor&, const Tensor&, const Grid&,
                                  int64_t, const float*, bool);
template void forward_chunk<float>(const std::vector<Layer>&, const std::vector<Branch<float>>&, int64_t, const Tensor&,
                                   const std::vector<Tensor>&, const std::vector<Grid>&, const std::vector<Tensor>&);
template void backward_tile<float>(const std::vector<Layer>&, BranchBackward<float>&, int64_t, int64_t,
                                   const std::vector<MaybeTensor>&, const MaybeTensor&, const MaybeTensor&, bool);
template void forward_tile<double>(const Layer&, const Branch<double>&, const Tensor&, const Tensor&, const Grid&,
                                   int64_t, const double*, bool);
template void forward_chunk<double>(const std::vector<Layer>&, const std::vector<Branch<double>>&, int64_t,
                                    const Tensor&, const std::vector<Tensor>&, const std::vector<Grid>&,
                                    const std::vector<Tensor>&);
template void backward_tile<double>(const std::vector<Layer>&, BranchBackward<double>&, int64_t, int64_t,
                                    const std::vector<MaybeTensor>&, const MaybeTensor&, const MaybeTensor&, bool);

}  // namespace mbf::cpu
