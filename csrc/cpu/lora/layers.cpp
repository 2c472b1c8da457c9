#include "layers.h"

#include <algorithm>

namespace mbf::cpu {
namespace {

using torch::stable::parallel_for;

constexpr int64_t kTile = 1 << 21;       // elements of an fp32 tile of W, 8 MiB
constexpr int64_t kStripe = 1 << 22;     // elements of the fp32 stripe of x, y or dx that goes with it
constexpr int64_t kCastGrain = 1 << 15;  // elements below which a second thread costs more than it saves

bool is_half(ScalarType type) { return type == ScalarType::BFloat16 || type == ScalarType::Half; }

bool must_widen(ScalarType type) { return is_half(type) && !multiplies_natively(type); }

Rows rows_in(const Tensor& matrix) { return {matrix.mutable_data_ptr(), matrix.scalar_type(), matrix.size(1)}; }

void widen(const Rows& from, int64_t rows, float* to) {
  const int64_t columns = from.ld;
  parallel_for(0, rows, std::max<int64_t>(1, kCastGrain / std::max<int64_t>(columns, 1)),
               [&](int64_t begin, int64_t end) {
                 micro<float>().widen(from.at(begin).data, from.type, (end - begin) * columns, to + begin * columns);
               });
}

void narrow(const float* from, int64_t rows, const Rows& to) {
  const int64_t columns = to.ld;
  parallel_for(0, rows, std::max<int64_t>(1, kCastGrain / std::max<int64_t>(columns, 1)),
               [&](int64_t begin, int64_t end) {
                 micro<float>().narrow(from + begin * columns, (end - begin) * columns, to.at(begin).data, to.type);
               });
}

int64_t stripe_rows(int64_t rows, int64_t widest) {
  return std::clamp<int64_t>(kStripe / std::max<int64_t>(widest, 1), 64, std::max<int64_t>(rows, 64));
}

Tensor first_rows(const Tensor& matrix, int64_t rows) {
  Tensor whole = matrix;
  return matrix.size(0) == rows ? matrix : torch::stable::narrow(whole, 0, 0, rows);
}

// Calls use(tile as fp32 [n, d_in], first row, n) for W's rows, a tile at a time.
template <typename Use>
void each_tile(const Tensor& weight, const Use& use) {
  const int64_t rows = weight.size(0), columns = weight.size(1);
  const int64_t most = std::clamp<int64_t>(kTile / std::max<int64_t>(columns, 1), 16, std::max<int64_t>(rows, 16));
  const int64_t parts = std::max<int64_t>(1, (rows + most - 1) / most), size = (rows + parts - 1) / parts;
  const Tensor tile = empty(weight, {size, columns}, ScalarType::Float);
  for (int64_t first = 0; first < rows; first += size) {
    const int64_t n = std::min(size, rows - first);
    widen(rows_in(weight).at(first), n, static_cast<float*>(tile.mutable_data_ptr()));
    use(first_rows(tile, n), first, n);
  }
}

Tensor columns_of(const Tensor& matrix, int64_t first, int64_t n) {
  Tensor whole = matrix;
  return n == matrix.size(1) ? matrix : torch::stable::narrow(whole, 1, first, n);
}

// With rows that each_tile can widen.
std::vector<Layer> contiguous(const std::vector<Layer>& layers) {
  std::vector<Layer> out = layers;
  for (Layer& layer : out) {
    if (!layer.weight.is_contiguous()) layer.weight = torch::stable::contiguous(layer.weight);
  }
  return out;
}

template <typename C>
std::vector<Branch<C>> branches_of(const std::vector<Layer>& layers, const Tensor& input) {
  std::vector<Branch<C>> branches;
  branches.reserve(layers.size());
  for (const Layer& layer : layers) branches.emplace_back(layer.branch, input);
  return branches;
}

template <typename C>
std::vector<const Branch<C>*> pointers(const std::vector<Branch<C>>& branches) {
  std::vector<const Branch<C>*> out;
  for (const Branch<C>& branch : branches) out.push_back(&branch);
  return out;
}

// -- base products in the type of x ---------------------------------------------------------------------------------------

template <typename C>
void forward_blas(const Tensor& x, const std::vector<Layer>& layers, const std::vector<Branch<C>>& branches,
                  const LayerOutputs& out) {
  std::vector<Rows> ys;
  for (size_t n = 0; n < layers.size(); ++n) {
    const Tensor right = transposed(layers[n].weight);
    if (layers[n].bias) {
      addmm_out(out.ys[n], *layers[n].bias, x, right);
    } else {
      mm_out(out.ys[n], x, right);
    }
    ys.push_back(rows_in(out.ys[n]));
  }
  add_branches<C>(pointers(branches), rows_in(x), 0, x.size(0), ys, out.hs);
}

void input_gradient_blas(const std::vector<MaybeTensor>& dys, const std::vector<Layer>& layers, const Tensor& dx) {
  bool add = false;
  for (size_t n = 0; n < layers.size(); ++n) {
    if (!dys[n]) continue;
    if (add) {
      addmm_out(dx, dx, *dys[n], layers[n].weight);
    } else {
      mm_out(dx, *dys[n], layers[n].weight);
    }
    add = true;
  }
  if (!add) {
    Tensor out = dx;
    torch::stable::zero_(out);
  }
}

// -- base products widened to fp32 ------------------------------------------------------------------------------------------

int64_t widest_of(const std::vector<Layer>& layers) {
  int64_t widest = layers[0].weight.size(1);
  for (const Layer& layer : layers) widest = std::max(widest, layer.weight.size(0));
  return widest;
}

// The first n · columns elements of flat scratch as a matrix.
Tensor matrix_in(const Tensor& flat, int64_t n, int64_t columns) {
  Tensor whole = flat;
  return torch::stable::view(torch::stable::narrow(whole, 0, 0, n * columns), {n, columns});
}

float* floats(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

void forward_widened(const Tensor& x, const std::vector<Layer>& layers, const std::vector<Branch<float>>& branches,
                     const LayerOutputs& out) {
  const int64_t rows = x.size(0), d_in = x.size(1), widest = widest_of(layers);
  const int64_t stripe = stripe_rows(rows, widest);
  const Tensor wide_x = empty(x, {stripe * d_in}, ScalarType::Float);
  const Tensor wide_y = empty(x, {stripe * widest}, ScalarType::Float);
  for (int64_t first = 0; first < rows; first += stripe) {
    const int64_t n = std::min(stripe, rows - first);
    const Tensor left = matrix_in(wide_x, n, d_in);
    widen(rows_in(x).at(first), n, floats(left));
    for (size_t member = 0; member < layers.size(); ++member) {
      const Layer& layer = layers[member];
      const Tensor y = matrix_in(wide_y, n, layer.weight.size(0));
      const MaybeTensor bias =
          layer.bias ? MaybeTensor(torch::stable::to(*layer.bias, ScalarType::Float)) : std::nullopt;
      each_tile(layer.weight, [&](const Tensor& tile, int64_t begin, int64_t size) {
        const Tensor part = columns_of(y, begin, size);
        if (bias) {
          Tensor whole = *bias;
          addmm_out(part, torch::stable::narrow(whole, 0, begin, size), left, transposed(tile));
        } else {
          mm_out(part, left, transposed(tile));
        }
      });
      add_branches<float>({&branches[member]}, rows_in(x).at(first), first, n, {rows_in(y)}, {out.hs[member]});
      narrow(floats(y), n, rows_in(out.ys[member]).at(first));
    }
  }
}

void backward_widened(const std::vector<MaybeTensor>& dys, const std::vector<Tensor>& hs, const Rows& x,
                      const std::vector<Layer>& layers, BranchBackward<float>& branches, const Tensor& dx) {
  const int64_t d_in = dx.size(1), widest = widest_of(layers);
  const int64_t stripe = stripe_rows(dx.size(0), widest);
  for (int64_t from = 0; from < branches.chunks();) {
    const int64_t first = branches.begin(from);
    int64_t to = from + 1;
    while (to < branches.chunks() && branches.begin(to + 1) - first <= stripe) ++to;
    const int64_t n = branches.begin(to) - first;
    const Tensor wide_dx = empty(dx, {n, d_in}, ScalarType::Float);
    const Tensor wide_dy = empty(dx, {n * widest}, ScalarType::Float);
    std::vector<Rows> dy_rows;
    bool add = false;
    for (size_t member = 0; member < layers.size(); ++member) {
      if (!dys[member]) {
        dy_rows.push_back({nullptr, ScalarType::Float, 0});
        continue;
      }
      dy_rows.push_back(rows_in(*dys[member]).at(first));
      const Tensor left = matrix_in(wide_dy, n, layers[member].weight.size(0));
      widen(dy_rows.back(), n, floats(left));
      each_tile(layers[member].weight, [&](const Tensor& tile, int64_t begin, int64_t size) {
        const Tensor part = columns_of(left, begin, size);
        if (add) {
          addmm_out(wide_dx, wide_dx, part, tile);
        } else {
          mm_out(wide_dx, part, tile);
        }
        add = true;
      });
    }
    if (!add) std::fill_n(floats(wide_dx), n * d_in, 0.0f);
    const Rows here = x.data == nullptr ? x : x.at(first);
    branches.run(from, to, dy_rows, hs, here, rows_in(wide_dx), true);
    narrow(floats(wide_dx), n, rows_in(dx).at(first));
    from = to;
  }
}

// -- by the type of the arithmetic -------------------------------------------------------------------------------------------

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

Rows rows_or_none(const MaybeTensor& tensor) {
  return tensor ? rows_in(*tensor) : Rows{nullptr, ScalarType::Float, 0};
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
    forward_blas(rows, layers, branches_of<double>(layers, x), flat);
    for (size_t n = 0; n < layers.size(); ++n) out.hs[n] = as(out.hs[n], layers[n].branch.A.scalar_type());
  } else if (must_widen(type)) {
    forward_widened(rows, contiguous(layers), branches_of<float>(layers, x), flat);
  } else {
    forward_blas(rows, layers, branches_of<float>(layers, x), flat);
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
  std::vector<Rows> dy_data;
  for (const MaybeTensor& dy : dys) {
    dy_rows.push_back(dy ? MaybeTensor(rows_of(*dy)) : std::nullopt);
    dy_data.push_back(rows_or_none(dy_rows.back()));
  }
  const MaybeTensor x_rows = x ? MaybeTensor(rows_of(*x)) : std::nullopt;
  const int64_t d_in = layers[0].branch.A.size(1);
  int64_t rows = 1;
  for (int64_t axis = 0; axis + 1 < like.dim(); ++axis) rows *= like.size(axis);

  BranchBackward<C> backward(branches, asked, rows, need_dx);
  LayerGradients out;
  if (need_dx) out.dx = matrix_like(like, d_in, like.scalar_type());
  bool done = false;
  if constexpr (sizeof(C) == 4) {
    if (need_dx && must_widen(like.scalar_type())) {
      backward_widened(dy_rows, hs, rows_or_none(x_rows), contiguous(layers), backward, rows_of(*out.dx));
      done = true;
    }
  }
  if (!done) {
    Rows dx{nullptr, ScalarType::Float, 0};
    MaybeTensor flat;
    if (need_dx) {
      flat = rows_of(*out.dx);
      input_gradient_blas(dy_rows, layers, *flat);
      dx = rows_in(*flat);
    }
    backward.run(0, backward.chunks(), dy_data, hs, rows_or_none(x_rows), dx, true);
  }
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
  LayerGradients out = differentiate<double>(wide_dys, wide_hs, as(x, ScalarType::Double),
                                             as(layers, ScalarType::Double), need_dx, asked,
                                             as(**used, ScalarType::Double));
  out.dx = as(out.dx, type);
  return out;
}

LayerOutputs accumulate(const Tensor& y, const Tensor& x, const Operands& operands) {
  const bool wide = is_wide(y) || is_wide(x) || is_wide(operands.A);
  const ScalarType type = operands.A.scalar_type();
  const Tensor input = wide ? as(x, ScalarType::Double) : x;
  Tensor out = wide && !is_wide(y) ? as(y, ScalarType::Double) : torch::stable::clone(y);
  if (!out.is_contiguous()) out = torch::stable::contiguous(out);
  const Tensor h = matrix_like(x, operands.A.size(0), wide ? ScalarType::Double : type);
  const Tensor in_rows = rows_of(input), out_rows = rows_of(out), h_rows = rows_of(h);
  if (wide) {
    const Branch<double> branch(operands, x);
    add_branches<double>({&branch}, rows_in(in_rows), 0, in_rows.size(0), {rows_in(out_rows)}, {h_rows});
  } else {
    const Branch<float> branch(operands, x);
    add_branches<float>({&branch}, rows_in(in_rows), 0, in_rows.size(0), {rows_in(out_rows)}, {h_rows});
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
  backward.run(0, backward.chunks(), {rows_in(dy_rows)}, {h}, rows_or_none(x_rows), rows_or_none(flat), false);
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
