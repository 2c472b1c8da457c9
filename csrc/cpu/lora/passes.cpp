#include "passes.h"

#include <algorithm>

#include "base_product.h"
#include "serial_blas.h"

namespace mbf::cpu {
namespace {

constexpr int64_t kWidened = 1 << 19;  // elements of W that are widened at once: 2 MiB of fp32

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

}  // namespace

bool must_widen(ScalarType type) {
  return (type == ScalarType::BFloat16 || type == ScalarType::Half) && !multiplies_natively(type);
}

bool in_one_call(ScalarType type) { return type == ScalarType::BFloat16 || type == ScalarType::Half; }

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
  project_all<C>(branches, {}, rows_in(x), first, rows, hs, z_data);
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
