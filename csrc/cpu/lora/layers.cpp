#include "layers.h"

#include <algorithm>

#include "base_product.h"
#include "passes.h"
#include "together.h"

namespace mbf::cpu {
namespace {

using torch::stable::parallel_for;

constexpr int64_t kThreadsPerTile = 4;  // beyond it tiles would leave threads idle that BLAS itself can use
constexpr int64_t kNarrow = 32;         // columns of a layer that is too small for that to count

// Whether the base product of all rows is made in one call, by all threads. Of BLAS the bits then depend on how many
// there are, as those of torch's own linear layer do; what cuts freely is never left to fewer threads than there are,
// and fp64, which is for exactness, is never left to BLAS's choice.
bool whole_base(ScalarType type, int64_t rows, const std::vector<Layer>& layers, int64_t tiles) {
  if (must_widen(type)) return false;
  if (in_one_call(type)) return true;
  const auto narrow = [](const Layer& layer) { return std::min(layer.weight.size(0), layer.weight.size(1)) < kNarrow; };
  if (type == ScalarType::Double || std::any_of(layers.begin(), layers.end(), narrow)) return false;
  const bool free = std::all_of(layers.begin(), layers.end(), [&](const Layer& layer) {
    return cuts_freely(type, rows, layer.weight.size(0), layer.weight.size(1));
  });
  return torch::stable::get_num_threads() > (free ? 1 : kThreadsPerTile) * tiles;
}

// x [rows, d_in] and the outputs as matrices.
template <typename C>
void forward_rows(const Tensor& x, const std::vector<Layer>& layers, const std::vector<Branch<C>>& branches,
                  const LayerOutputs& out) {
  const int64_t rows = x.size(0), d_in = x.size(1);
  std::vector<Scratch<C>> zs;
  std::vector<Grid> grids;
  struct Tile {
    size_t member;
    int64_t column_chunk;
  };
  std::vector<Tile> across;  // all tiles of a chunk of rows
  for (size_t n = 0; n < layers.size(); ++n) {
    zs.emplace_back(rows * branches[n].rank());
    grids.emplace_back(rows, layers[n].weight.size(0), d_in);
    for (int64_t chunk = 0; chunk < grids[n].column_chunks; ++chunk) across.push_back({n, chunk});
  }
  const int64_t width = static_cast<int64_t>(across.size()), tiles = grids[0].row_chunks * width;
  const bool whole = whole_base(x.scalar_type(), rows, layers, tiles);
  for (size_t n = 0; n < layers.size() && whole; ++n) {
    base_product(out.ys[n], x, layers[n].weight, layers[n].bias, By::kAll);
  }
  parallel_for(0, rows, kProjectGrain, [&](int64_t begin, int64_t end) {
    std::vector<C*> z_data;
    for (size_t n = 0; n < layers.size(); ++n) z_data.push_back(zs[n].get() + begin * branches[n].rank());
    project_all<C>(branches, {}, rows_in(x).at(begin), begin, end - begin, out.hs, z_data);
  });
  parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
    const NoGrad no_grad;
    for (int64_t tile = begin; tile < end; ++tile) {
      const auto [n, column_chunk] = across[tile % width];
      const Grid& grid = grids[n];
      const int64_t row = grid.row(tile / width), size = grid.row(tile / width + 1) - row;
      forward_tile(layers[n], branches[n], block(x, row, size, 0, d_in), block(out.ys[n], row, size, 0, grid.columns),
                   grid, column_chunk, zs[n].get() + row * branches[n].rank(), !whole);
    }
  });
}

// dys, x and dx as matrices.
template <typename C>
void backward_rows(const std::vector<MaybeTensor>& dys, const std::vector<Tensor>& hs, const MaybeTensor& x,
                   const std::vector<Layer>& layers, const MaybeTensor& dx, BranchBackward<C>& branches) {
  const Grid& grid = branches.grid();
  const bool one_row = dx && std::all_of(layers.begin(), layers.end(), [&](const Layer& layer) {
                         return dx->scalar_type() == ScalarType::Float && is_one_row(grid.rows, layer.weight);
                       });
  const bool whole = one_row || (dx && whole_base(dx->scalar_type(), grid.rows, layers, grid.tiles()));
  parallel_for(0, grid.row_chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      std::vector<Rows> here;
      for (const MaybeTensor& dy : dys) here.push_back(part(rows_or_none(dy), grid.row(chunk), 0));
      branches.read_dy(chunk, here, hs);
    }
  });
  if (whole) {
    bool add = false;
    for (size_t n = 0; n < layers.size(); ++n) {
      if (!dys[n]) continue;
      base_gradient(*dx, *dys[n], layers[n].weight, add, By::kAll);
      add = true;
    }
    if (!add) clear(*dx);
  }
  parallel_for(0, grid.tiles(), one_row ? grid.tiles() : 1, [&](int64_t begin, int64_t end) {
    const NoGrad no_grad;
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t chunk = tile / grid.column_chunks;
      const int64_t row = grid.row(chunk), size = grid.row(chunk + 1) - row;
      const auto here = [&](const MaybeTensor& tensor) {
        return tensor ? MaybeTensor(block(*tensor, row, size, 0, tensor->size(1))) : std::nullopt;
      };
      std::vector<MaybeTensor> dy_blocks;
      for (const MaybeTensor& dy : dys) dy_blocks.push_back(here(dy));
      backward_tile(layers, branches, chunk, tile % grid.column_chunks, dy_blocks, here(x), here(dx), !whole);
    }
  });
}

// -- by the type of the arithmetic --------------------------------------------------------------------------

bool is_wide(const MaybeTensor& tensor) { return tensor && tensor->scalar_type() == ScalarType::Double; }

bool any_wide(const std::vector<Layer>& layers) {
  return std::any_of(layers.begin(), layers.end(), [](const Layer& layer) { return is_wide(layer.branch.A); });
}

Tensor as(const Tensor& tensor, ScalarType type) {
  return tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type);
}

MaybeTensor as(const MaybeTensor& tensor, ScalarType type) {
  return tensor ? MaybeTensor(as(*tensor, type)) : std::nullopt;
}

std::vector<Layer> as(const std::vector<Layer>& layers, ScalarType type) {
  std::vector<Layer> out = layers;
  for (Layer& layer : out) {
    layer.weight = as(layer.weight, type);
    layer.bias = as(layer.bias, type);
  }
  return out;
}

Tensor matrix_like(const Tensor& x, int64_t columns, ScalarType type) {
  std::vector<int64_t> shape = shape_of(x);
  shape.back() = columns;
  return empty(shape, type);
}

}  // namespace

LayerOutputs forward(const Tensor& x, const std::vector<Layer>& layers) {
  const ScalarType type = x.scalar_type();
  if (type != ScalarType::Double && any_wide(layers)) {
    LayerOutputs out = forward(as(x, ScalarType::Double), as(layers, ScalarType::Double));
    for (Tensor& y : out.ys) y = as(y, type);
    return out;
  }
  const Tensor rows = rows_of(x);
  const bool wide = type == ScalarType::Double;
  LayerOutputs out, flat;
  for (const Layer& layer : layers) {
    out.ys.push_back(matrix_like(x, layer.weight.size(0), type));
    out.hs.push_back(matrix_like(x, layer.branch.A.size(0), wide ? type : layer.branch.A.scalar_type()));
    flat.ys.push_back(rows_of(out.ys.back()));
    flat.hs.push_back(rows_of(out.hs.back()));
  }
  if (wide) {
    forward_rows(rows, layers, branches_of<double>(layers, x), flat);
    for (size_t n = 0; n < layers.size(); ++n) out.hs[n] = as(out.hs[n], layers[n].branch.A.scalar_type());
  } else {
    const std::vector<Layer> all = readable(layers, type);
    const std::vector<Branch<float>> branches = branches_of<float>(layers, x);
    if (made_together(type, rows.size(0), all)) {
      forward_together(all, branches, 0, rows, flat.ys, flat.hs);
    } else {
      forward_rows(rows, all, branches, flat);
    }
  }
  return out;
}

namespace {

// In arithmetic of C; all activations are of a type that its inner loops read.
template <typename C>
LayerGradients differentiate(const std::vector<MaybeTensor>& dys, const std::vector<Tensor>& hs, const MaybeTensor& x,
                             const std::vector<Layer>& layers, bool need_dx, const std::vector<Asked>& asked,
                             const Tensor& like) {
  const std::vector<Branch<C>> branches = branches_of<C>(layers, like);
  std::vector<MaybeTensor> dy_rows;
  for (const MaybeTensor& dy : dys) dy_rows.push_back(dy ? MaybeTensor(rows_of(*dy)) : std::nullopt);
  const MaybeTensor x_rows = x ? MaybeTensor(rows_of(*x)) : std::nullopt;
  int64_t rows = 1;
  for (int64_t axis = 0; axis + 1 < like.dim(); ++axis) rows *= like.size(axis);

  std::vector<bool> used;
  for (const MaybeTensor& dy : dys) used.push_back(dy.has_value());
  const int64_t d_in = layers[0].branch.A.size(1), d_out = layers[0].branch.B.size(0);
  const bool together = sizeof(C) == 4 && made_together(like.scalar_type(), rows, layers);
  BranchBackward<C> backward(branches, asked, used, together ? Grid::of_sums(rows, d_in) : Grid(rows, d_in, d_out),
                             need_dx);
  LayerGradients out;
  MaybeTensor flat;
  if (need_dx) {
    out.dx = matrix_like(like, layers[0].branch.A.size(1), like.scalar_type());
    flat = rows_of(*out.dx);
  }
  const std::vector<Layer> all = readable(layers, like.scalar_type());
  if constexpr (sizeof(C) == 4) {
    if (together) backward_together(all, backward, 0, backward.grid().row_chunks, dy_rows, hs, x_rows, flat);
  }
  if (!together) backward_rows(dy_rows, hs, x_rows, all, flat, backward);
  for (size_t n = 0; n < layers.size(); ++n) out.branches.push_back(backward.finish(n));
  return out;
}

}  // namespace

LayerGradients backward(const std::vector<MaybeTensor>& dys, const std::vector<Tensor>& saved, const MaybeTensor& x,
                        const std::vector<Layer>& layers, bool need_dx, const std::vector<Asked>& asked) {
  std::vector<Tensor> hs;
  for (const Tensor& h : saved) hs.push_back(packed(h));
  const auto used = std::find_if(dys.begin(), dys.end(), [](const MaybeTensor& dy) { return dy.has_value(); });
  STD_TORCH_CHECK(used != dys.end(),
                  "the backward of a low-rank layer was given no gradient; pass dy of one member or more");
  const ScalarType type = (*used)->scalar_type();
  if (type != ScalarType::Double && !any_wide(layers)) {
    return differentiate<float>(dys, hs, x, layers, need_dx, asked, **used);
  }
  std::vector<MaybeTensor> wide_dys;
  std::vector<Tensor> wide_hs;
  for (const MaybeTensor& dy : dys) wide_dys.push_back(as(dy, ScalarType::Double));
  for (const Tensor& h : hs) wide_hs.push_back(as(h, ScalarType::Double));
  LayerGradients out =
      differentiate<double>(wide_dys, wide_hs, as(x, ScalarType::Double), as(layers, ScalarType::Double), need_dx,
                            asked, as(**used, ScalarType::Double));
  out.dx = as(out.dx, type);
  return out;
}

namespace {

template <typename C>
void add_branch(const Operands& operands, const Tensor& x, const Tensor& y, const Tensor& h) {
  std::vector<Branch<C>> branches;
  branches.emplace_back(operands, x);
  const Tensor x_rows = rows_of(x), y_rows = rows_of(y);
  const int64_t rows = x_rows.size(0), d_out = y_rows.size(1);
  std::vector<Scratch<C>> zs;
  zs.emplace_back(rows * branches[0].rank());
  parallel_for(0, rows, kProjectGrain, [&](int64_t begin, int64_t end) {
    project_all<C>(branches, {}, rows_in(x_rows).at(begin), begin, end - begin, {h},
                   {zs[0].get() + begin * branches[0].rank()});
    branches[0].expand(rows_in(y_rows).at(begin), end - begin, 0, d_out, zs[0].get() + begin * branches[0].rank());
  });
}

}  // namespace

LayerOutputs accumulate(const Tensor& y, const Tensor& x, const Operands& operands) {
  const bool wide = is_wide(y) || is_wide(x) || is_wide(operands.A);
  const ScalarType type = operands.A.scalar_type();
  const Tensor input = wide ? as(x, ScalarType::Double) : x;
  Tensor out = wide && !is_wide(y) ? as(y, ScalarType::Double) : torch::stable::clone(y);
  if (!out.is_contiguous()) out = torch::stable::contiguous(out);
  const Tensor h = matrix_like(x, operands.A.size(0), wide ? ScalarType::Double : type);
  if (wide) {
    add_branch<double>(operands, input, out, h);
  } else {
    add_branch<float>(operands, input, out, h);
  }
  return {{as(out, y.scalar_type())}, {as(h, type)}};
}

namespace {

template <typename C>
LayerGradients differentiate_branch(const Tensor& dy, const Tensor& h, const MaybeTensor& x, const Operands& operands,
                                    ScalarType dx_type, bool need_dx, const Asked& asked) {
  std::vector<Branch<C>> branches;
  branches.emplace_back(operands, dy);
  const Tensor dy_rows = rows_of(dy), h_packed = packed(h);
  const MaybeTensor x_rows = x ? MaybeTensor(rows_of(*x)) : std::nullopt;
  const std::vector<Asked> all{asked};
  BranchBackward<C> backward(branches, all, {true}, Grid(dy_rows.size(0), operands.A.size(1), operands.B.size(0)),
                             need_dx);
  LayerGradients out;
  MaybeTensor flat;
  if (need_dx) {
    out.dx = matrix_like(dy, operands.A.size(1), dx_type);
    flat = rows_of(*out.dx);
  }
  const Grid& grid = backward.grid();
  parallel_for(0, grid.row_chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      backward.read_dy(chunk, {rows_in(dy_rows).at(grid.row(chunk))}, {h_packed});
    }
  });
  parallel_for(0, need_dx || asked.A ? grid.tiles() : 0, 1, [&](int64_t begin, int64_t end) {
    const NoGrad no_grad;
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t row = tile / grid.column_chunks, column = tile % grid.column_chunks;
      backward.visit(row, column, part(rows_or_none(x_rows), grid.row(row), grid.column(column)),
                     part(rows_or_none(flat), grid.row(row), grid.column(column)), false);
    }
  });
  out.branches.push_back(backward.finish(0));
  return out;
}

}  // namespace

LayerGradients accumulate_backward(const Tensor& dy, const Tensor& h, const MaybeTensor& x, const Operands& operands,
                                   ScalarType x_type, bool need_dx, const Asked& asked) {
  if (!is_wide(dy) && !is_wide(x) && x_type != ScalarType::Double && !is_wide(operands.A)) {
    return differentiate_branch<float>(dy, h, x, operands, x_type, need_dx, asked);
  }
  LayerGradients out =
      differentiate_branch<double>(as(dy, ScalarType::Double), as(h, ScalarType::Double), as(x, ScalarType::Double),
                                   operands, ScalarType::Double, need_dx, asked);
  out.dx = as(out.dx, x_type);
  return out;
}

}  // namespace mbf::cpu
