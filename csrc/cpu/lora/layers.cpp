#include "layers.h"

#include <algorithm>

namespace mbf::cpu {
namespace {

using torch::stable::parallel_for;

constexpr int64_t kWidened = 1 << 19;  // elements of W that are widened at once: 2 MiB of fp32

bool must_widen(ScalarType type) {
  return (type == ScalarType::BFloat16 || type == ScalarType::Half) && !multiplies_natively(type);
}

// One call for all rows, where the BLAS of a type does not come out ahead on tiles.
bool in_one_call(ScalarType type) { return type == ScalarType::BFloat16 || type == ScalarType::Half; }

Rows rows_in(const Tensor& matrix) { return {matrix.mutable_data_ptr(), matrix.scalar_type(), matrix.stride(0)}; }

Rows rows_or_none(const MaybeTensor& tensor) { return tensor ? rows_in(*tensor) : Rows{nullptr, ScalarType::Float, 0}; }

Rows part(const Rows& rows, int64_t row, int64_t column) {
  Rows out = rows.at(row);
  if (out.data != nullptr) out.data = static_cast<char*>(out.data) + column * element_size(out.type);
  return out;
}

Tensor block(const Tensor& matrix, int64_t row, int64_t rows, int64_t column, int64_t columns) {
  Tensor out = matrix;
  if (rows != out.size(0)) out = torch::stable::narrow(out, 0, row, rows);
  if (columns != out.size(1)) out = torch::stable::narrow(out, 1, column, columns);
  return out;
}

float* floats(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

// fp32 copy of a block of a half matrix.
Tensor widened(const Tensor& like, const Rows& from, int64_t rows, int64_t columns) {
  const Tensor out = empty(like, {rows, columns}, ScalarType::Float);
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

template <typename C>
std::vector<Branch<C>> branches_of(const std::vector<Layer>& layers, const Tensor& input) {
  std::vector<Branch<C>> branches;
  branches.reserve(layers.size());
  for (const Layer& layer : layers) branches.emplace_back(layer.branch, input);
  return branches;
}

// -- forward
// -------------------------------------------------------------------------------------------------------------

void base_product(const Tensor& y, const Tensor& x, const Tensor& weight, const MaybeTensor& bias) {
  if (bias) {
    addmm_out(y, *bias, x, transposed(weight));
  } else {
    mm_out(y, x, transposed(weight));
  }
}

MaybeTensor slice(const MaybeTensor& bias, int64_t first, int64_t size) {
  if (!bias || bias->size(0) == size) return bias;
  Tensor whole = *bias;
  return torch::stable::narrow(whole, 0, first, size);
}

// x [rows, d_in] and the outputs as matrices.
template <typename C>
void forward_rows(const Tensor& x, const std::vector<Layer>& layers, const std::vector<Branch<C>>& branches,
                  const LayerOutputs& out) {
  const int64_t rows = x.size(0), d_in = x.size(1);
  const bool widen = must_widen(x.scalar_type()), whole = !widen && in_one_call(x.scalar_type());
  std::vector<Scratch<C>> zs;
  std::vector<Grid> grids;
  std::vector<int64_t> ends;  // of each member's tiles among all
  for (size_t n = 0; n < layers.size(); ++n) {
    zs.emplace_back(rows * branches[n].rank());
    grids.emplace_back(rows, layers[n].weight.size(0), d_in);
    ends.push_back((n == 0 ? 0 : ends.back()) + grids.back().tiles());
    if (whole) base_product(out.ys[n], x, layers[n].weight, layers[n].bias);
  }
  project_all<C>(branches, rows_in(x), rows, out.hs, zs);
  parallel_for(0, ends.back(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const size_t member = std::upper_bound(ends.begin(), ends.end(), tile) - ends.begin();
      const Layer& layer = layers[member];
      const Grid& grid = grids[member];
      const int64_t at = tile - (member == 0 ? 0 : ends[member - 1]);
      const int64_t row = grid.row(at / grid.column_chunks), n = grid.row(at / grid.column_chunks + 1) - row;
      const int64_t column = grid.column(at % grid.column_chunks);
      const int64_t columns = grid.column(at % grid.column_chunks + 1) - column;
      const C* z = zs[member].get() + row * branches[member].rank();
      const Rows y = part(rows_in(out.ys[member]), row, column);
      if (!widen) {
        if (!whole) {
          base_product(block(out.ys[member], row, n, column, columns), block(x, row, n, 0, d_in),
                       block(layer.weight, column, columns, 0, d_in), slice(layer.bias, column, columns));
        }
        branches[member].expand(y, n, column, columns, z);
        continue;
      }
      const Tensor left = widened(x, rows_in(x).at(row), n, d_in);
      const Tensor wide = empty(x, {n, columns}, ScalarType::Float);
      in_pieces(columns, d_in, [&](int64_t first, int64_t size) {
        const Tensor weight = widened(x, rows_in(layer.weight).at(column + first), size, d_in);
        const MaybeTensor bias = slice(layer.bias, column + first, size);
        base_product(block(wide, 0, n, first, size), left, weight,
                     bias ? MaybeTensor(torch::stable::to(*bias, ScalarType::Float)) : std::nullopt);
      });
      branches[member].expand(rows_in(wide), n, column, columns, z);
      narrow(wide, y);
    }
  });
}

// -- backward
// ------------------------------------------------------------------------------------------------------------

// dx (+)= dy W
void base_gradient(const Tensor& dx, const Tensor& dy, const Tensor& weight, bool add) {
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

// dys, x and dx as matrices.
template <typename C>
void backward_rows(const std::vector<MaybeTensor>& dys, const std::vector<Tensor>& hs, const MaybeTensor& x,
                   const std::vector<Layer>& layers, const MaybeTensor& dx, BranchBackward<C>& backward) {
  const bool widen = dx && must_widen(dx->scalar_type()), whole = dx && !widen && in_one_call(dx->scalar_type());
  std::vector<Rows> dy_rows;
  for (const MaybeTensor& dy : dys) dy_rows.push_back(rows_or_none(dy));
  backward.read_dy(dy_rows, hs);
  if (whole) {
    bool add = false;
    for (size_t n = 0; n < layers.size(); ++n) {
      if (!dys[n]) continue;
      base_gradient(*dx, *dys[n], layers[n].weight, add);
      add = true;
    }
    if (!add) clear(*dx);
  }
  const Grid& grid = backward.grid();
  parallel_for(0, grid.tiles(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t row_chunk = tile / grid.column_chunks, column_chunk = tile % grid.column_chunks;
      const int64_t row = grid.row(row_chunk), n = grid.row(row_chunk + 1) - row;
      const int64_t column = grid.column(column_chunk), columns = grid.column(column_chunk + 1) - column;
      const Rows x_part = part(rows_or_none(x), row, column);
      if (!dx || whole) {
        backward.visit(row_chunk, column_chunk, x_part, part(rows_or_none(dx), row, column), true);
        continue;
      }
      const Tensor to = widen ? empty(*dx, {n, columns}, ScalarType::Float) : block(*dx, row, n, column, columns);
      bool add = false;
      for (size_t member = 0; member < layers.size(); ++member) {
        if (!dys[member]) continue;
        const Tensor& weight = layers[member].weight;
        const int64_t d_out = weight.size(0);
        if (widen) {
          in_pieces(d_out, columns, [&](int64_t first, int64_t size) {
            base_gradient(to, widened(*dx, part(dy_rows[member], row, first), n, size),
                          widened(*dx, part(rows_in(weight), first, column), size, columns), add);
            add = true;
          });
        } else {
          base_gradient(to, block(*dys[member], row, n, 0, d_out), block(weight, 0, d_out, column, columns), add);
          add = true;
        }
      }
      if (!add) clear(to);
      backward.visit(row_chunk, column_chunk, x_part, rows_in(to), true);
      if (widen) narrow(to, part(rows_in(*dx), row, column));
    }
  });
}

// -- by the type of the arithmetic
// -------------------------------------------------------------------------------------------

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
  return torch::stable::new_empty(x, shape, type);
}

// With rows that can be widened one by one.
std::vector<Layer> readable(const std::vector<Layer>& layers, ScalarType type) {
  std::vector<Layer> out = layers;
  for (Layer& layer : out) {
    if (must_widen(type) && !layer.weight.is_contiguous()) layer.weight = torch::stable::contiguous(layer.weight);
  }
  return out;
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
    forward_rows(rows, readable(layers, type), branches_of<float>(layers, x), flat);
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

  BranchBackward<C> backward(branches, asked, rows, need_dx);
  LayerGradients out;
  MaybeTensor flat;
  if (need_dx) {
    out.dx = matrix_like(like, layers[0].branch.A.size(1), like.scalar_type());
    flat = rows_of(*out.dx);
  }
  backward_rows(dy_rows, hs, x_rows, readable(layers, like.scalar_type()), flat, backward);
  for (size_t n = 0; n < layers.size(); ++n) out.branches.push_back(backward.finish(n));
  return out;
}

}  // namespace

LayerGradients backward(const std::vector<MaybeTensor>& dys, const std::vector<Tensor>& hs, const MaybeTensor& x,
                        const std::vector<Layer>& layers, bool need_dx, const std::vector<Asked>& asked) {
  const auto used = std::find_if(dys.begin(), dys.end(), [](const MaybeTensor& dy) { return dy.has_value(); });
  STD_TORCH_CHECK(used != dys.end(), "the backward of a low-rank layer was given no gradient");
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
  project_all<C>(branches, rows_in(x_rows), rows, {h}, zs);
  parallel_for(0, rows, 64, [&](int64_t begin, int64_t end) {
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
  const Tensor dy_rows = rows_of(dy);
  const MaybeTensor x_rows = x ? MaybeTensor(rows_of(*x)) : std::nullopt;
  const std::vector<Asked> all{asked};
  BranchBackward<C> backward(branches, all, dy_rows.size(0), need_dx);
  LayerGradients out;
  MaybeTensor flat;
  if (need_dx) {
    out.dx = matrix_like(dy, operands.A.size(1), dx_type);
    flat = rows_of(*out.dx);
  }
  backward.read_dy({rows_in(dy_rows)}, {h});
  const Grid& grid = backward.grid();
  parallel_for(0, need_dx || asked.A ? grid.tiles() : 0, 1, [&](int64_t begin, int64_t end) {
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
