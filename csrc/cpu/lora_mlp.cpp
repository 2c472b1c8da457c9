// lora_mlp and its backward: y = down(act(gate(x)) ⊙ up(x)), three layers with branches of their own.
//
// A thread takes a chunk of rows through all three layers, so that g, u and a = act(g) ⊙ u are still in its cache when
// the next layer reads them, and of a, da, dg and du there is never more than a chunk. Where products are shared by all
// threads (together.h), they take a strip of rows through the layers together, likewise. Forward keeps g and u, or
// neither where they are to be made again; a is made again in backward in any case. With fewer chunks than threads, and
// where the base product is one call for all rows, the layers run one after the other over all rows instead; the bits
// are the same.

#include <algorithm>
#include <array>
#include <atomic>

#include "kernels.h"
#include "lora/members.h"
#include "lora/passes.h"
#include "lora/together.h"

namespace mbf::cpu {
namespace {

using torch::stable::parallel_for;

constexpr int64_t kGrain = 8192;      // elements below which a second thread costs more than it saves
constexpr int64_t kStripRows = 1024;  // that the threads take through the layers together

// By its place in mbf/ops/lora_mlp.py.
bool is_gelu(const char* op, int64_t activation) {
  STD_TORCH_CHECK(activation == 0 || activation == 1, op, ": activation is ", activation,
                  "; it must be 0 for silu or 1 for gelu_tanh");
  return activation == 1;
}

// gate and up [d_ff, d_in], down [d_out, d_ff].
void check_mlp(const char* op, const Tensor& x, const std::vector<Layer>& layers) {
  check_length({op, "weights"}, layers.size(), 3);
  check_rows({op, "x"}, x, -1);
  check_layer(op, layers[0], x, x.scalar_type(), x.size(-1), 0);
  check_layer(op, layers[1], x, x.scalar_type(), x.size(-1), 1);
  const int64_t d_ff = layers[0].weight.size(0);
  check_matrix({op, "weights", 1}, layers[1].weight, d_ff, -1);
  check_layer(op, layers[2], x, x.scalar_type(), d_ff, 2);
}

// Calls use(first element, their number, C* ...) for pieces of the tensors as C: in place where that is their type,
// through a first-level cacheful of scratch elsewhere. The first `inputs` are read, the others written.
template <typename C, size_t tensors, typename Use>
void over(const std::array<Tensor, tensors>& all, size_t inputs, const Use& use) {
  constexpr int64_t kSome = 1024;
  const Micro<C>& inner = micro<C>();
  const ScalarType type = all[0].scalar_type();
  const bool direct = element_size(type) == sizeof(C);
  std::array<Rows, tensors> rows;
  for (size_t k = 0; k < tensors; ++k) rows[k] = {all[k].mutable_data_ptr(), type, 1};
  parallel_for(0, all[0].numel(), kGrain, [&](int64_t begin, int64_t end) {
    Scratch<C> scratch(direct ? 0 : tensors * kSome);
    for (int64_t i = begin; i < end; i += kSome) {
      const int64_t n = std::min(kSome, end - i);
      std::array<C*, tensors> at;
      for (size_t k = 0; k < tensors; ++k) {
        at[k] = direct ? static_cast<C*>(rows[k].at(i).data) : scratch.get() + k * kSome;
        if (!direct && k < inputs) inner.widen(rows[k].at(i).data, type, n, at[k]);
      }
      use(n, at);
      for (size_t k = inputs; k < tensors && !direct; ++k) inner.narrow(at[k], n, rows[k].at(i).data, type);
    }
  });
}

template <typename C>
void gated(const Tensor& g, const Tensor& u, bool gelu, const Tensor& a) {
  over<C, 3>({g, u, a}, 2,
             [&](int64_t n, const std::array<C*, 3>& at) { micro<C>().gated(at[0], at[1], n, gelu, at[2]); });
}

// dg and du may be da, g or u themselves.
template <typename C>
void gated_backward(const Tensor& g, const Tensor& u, const Tensor& da, bool gelu, const Tensor& dg, const Tensor& du) {
  over<C, 5>({g, u, da, dg, du}, 3, [&](int64_t n, const std::array<C*, 5>& at) {
    micro<C>().gated_backward(at[2], at[0], at[1], n, gelu, at[3], at[4]);
  });
}

Tensor activated(const Tensor& g, const Tensor& u, bool gelu) {
  const Tensor a = empty(shape_of(g), g.scalar_type());
  g.scalar_type() == ScalarType::Double ? gated<double>(g, u, gelu, a) : gated<float>(g, u, gelu, a);
  return a;
}

// Scratch matrices for every thread, made by the thread that calls: one that a worker made would come from an arena of
// its own, whose pages go back to the system after every call.
class Workspaces {
 public:
  Workspaces(int64_t count, int64_t rows, int64_t columns, ScalarType type)
      : count_(count), rows_(rows), columns_(columns), type_(type) {
    for (uint32_t n = 0; n < torch::stable::get_num_threads(); ++n) ready_.push_back(make());
  }

  // For a thread to keep; safe to call from several.
  Tensors take() {
    const size_t n = next_.fetch_add(1);
    return n < ready_.size() ? ready_[n] : make();
  }

 private:
  Tensors make() const {
    Tensors out;
    for (int64_t n = 0; n < count_; ++n) out.push_back(empty({rows_, columns_}, type_));
    return out;
  }

  int64_t count_, rows_, columns_;
  ScalarType type_;
  std::vector<Tensors> ready_;
  std::atomic<size_t> next_{0};
};

Tensor like_with(const Tensor& x, int64_t columns, ScalarType type) {
  std::vector<int64_t> shape = shape_of(x);
  shape.back() = columns;
  return empty(shape, type);
}

struct Mlp {
  std::vector<Layer> inner, outer;
  bool gelu;
  int64_t rows, d_in, d_ff, d_out;
  ScalarType type;

  Mlp(const Tensor& x, const std::vector<Layer>& layers, bool gelu)
      : inner{layers[0], layers[1]},
        outer{layers[2]},
        gelu(gelu),
        rows(rows_of(x).size(0)),
        d_in(layers[0].weight.size(1)),
        d_ff(layers[0].weight.size(0)),
        d_out(layers[2].weight.size(0)),
        type(x.scalar_type()) {
    inner = readable(inner, type);
    outer = readable(outer, type);
  }

  bool together() const { return made_together(type, rows, inner) && made_together(type, rows, outer); }

  // Whether a thread is to take a chunk through all layers.
  bool by_chunks() const {
    const bool wide = type == ScalarType::Double;
    for (const auto* layers : {&inner, &outer}) {
      for (const Layer& layer : *layers) {
        if ((layer.branch.A.scalar_type() == ScalarType::Double) != wide) return false;
      }
    }
    if (in_one_call(type) && !must_widen(type)) return false;
    // Layers alone would make some of the products by other loops, and the number of threads must not choose those.
    if (made_together(type, rows, inner) || made_together(type, rows, outer)) return false;
    return grid(d_ff, d_in).row_chunks >= static_cast<int64_t>(torch::stable::get_num_threads());
  }
  Grid grid(int64_t columns, int64_t depth) const { return Grid(rows, columns, depth); }
  Workspaces workspaces(int64_t count) const {
    const Grid chunks = grid(d_ff, d_in);
    return Workspaces(count, (rows + chunks.row_chunks - 1) / chunks.row_chunks, d_ff, type);
  }

  // y, g and u (empty if they are to be made again), and h of gate, up and down.
  Tensors results(const Tensor& x, bool recompute) const {
    const auto h = [&](const Layer& layer) {
      return like_with(x, layer.branch.A.size(0), layer.branch.A.scalar_type());
    };
    const auto kept = [&] { return recompute ? empty({0}, type) : like_with(x, d_ff, type); };
    return {like_with(x, d_out, type), kept(), kept(), h(inner[0]), h(inner[1]), h(outer[0])};
  }
  Tensors scratch(int64_t count, int64_t most_rows) const {
    Tensors out;
    for (int64_t n = 0; n < count; ++n) out.push_back(empty({most_rows, d_ff}, type));
    return out;
  }
};

// -- forward --------------------------------------------------------------------------------------------------

template <typename C>
Tensors forward_chunks(const Tensor& x, const Mlp& mlp, bool recompute) {
  const std::vector<Branch<C>> inner = branches_of<C>(mlp.inner, x), outer = branches_of<C>(mlp.outer, x);
  const Tensors out = mlp.results(x, recompute);
  const Tensor x_rows = rows_of(x), y_rows = rows_of(out[0]);
  const Tensors hs{rows_of(out[3]), rows_of(out[4])}, outer_hs{rows_of(out[5])};
  const std::vector<Grid> grids(2, mlp.grid(mlp.d_ff, mlp.d_in)), outer_grids{mlp.grid(mlp.d_out, mlp.d_ff)};
  const Grid& grid = grids[0];
  Workspaces workspaces = mlp.workspaces(recompute ? 2 : 1);
  parallel_for(0, grid.row_chunks, 1, [&](int64_t begin, int64_t end) {
    const NoGrad no_grad;
    const Tensors own = workspaces.take();
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t row = grid.row(chunk), n = grid.row(chunk + 1) - row;
      const auto place = [&](const Tensor& whole, const Tensor& scratch) {
        return recompute ? block(scratch, 0, n, 0, mlp.d_ff) : block(rows_of(whole), row, n, 0, mlp.d_ff);
      };
      const Tensor g = place(out[1], own[0]), u = place(out[2], own.back());
      forward_chunk(mlp.inner, inner, row, block(x_rows, row, n, 0, mlp.d_in), {g, u}, grids, hs);
      const Tensor a = block(own[0], 0, n, 0, mlp.d_ff);
      gated<C>(g, u, mlp.gelu, a);
      forward_chunk(mlp.outer, outer, row, a, {block(y_rows, row, n, 0, mlp.d_out)}, outer_grids, outer_hs);
    }
  });
  return out;
}

Tensors forward_strips(const Tensor& x, const Mlp& mlp, bool recompute) {
  const std::vector<Branch<float>> inner = branches_of<float>(mlp.inner, x), outer = branches_of<float>(mlp.outer, x);
  const Tensors out = mlp.results(x, recompute);
  const Tensor x_rows = rows_of(x), y_rows = rows_of(out[0]);
  const Tensors hs{rows_of(out[3]), rows_of(out[4])}, outer_hs{rows_of(out[5])};
  const int64_t strips = parts_of(mlp.rows, kStripRows), size = (mlp.rows + strips - 1) / strips;
  const Tensors own = mlp.scratch(recompute ? 2 : 1, size);
  for (int64_t row = 0; row < mlp.rows; row += size) {
    const int64_t n = std::min(size, mlp.rows - row);
    const auto place = [&](const Tensor& whole, const Tensor& scratch) {
      return recompute ? block(scratch, 0, n, 0, mlp.d_ff) : block(rows_of(whole), row, n, 0, mlp.d_ff);
    };
    const Tensor g = place(out[1], own[0]), u = place(out[2], own.back()), a = block(own[0], 0, n, 0, mlp.d_ff);
    forward_together(mlp.inner, inner, row, block(x_rows, row, n, 0, mlp.d_in), {g, u}, hs);
    gated<float>(g, u, mlp.gelu, a);
    forward_together(mlp.outer, outer, row, a, {block(y_rows, row, n, 0, mlp.d_out)}, outer_hs);
  }
  return out;
}

Tensors forward_layers(const Tensor& x, const Mlp& mlp, bool recompute) {
  const LayerOutputs inner = forward(x, mlp.inner);
  const LayerOutputs outer = forward(activated(inner.ys[0], inner.ys[1], mlp.gelu), mlp.outer);
  const auto kept = [&](const Tensor& tensor) { return recompute ? empty({0}, x.scalar_type()) : tensor; };
  return {outer.ys[0], kept(inner.ys[0]), kept(inner.ys[1]), inner.hs[0], inner.hs[1], outer.hs[0]};
}

// -- backward -------------------------------------------------------------------------------------------------

struct MlpGradients {
  LayerGradients inner, outer;
};

template <typename C>
MlpGradients backward_chunks(const Tensor& dy, const Tensor& x, const MaybeTensor& g, const MaybeTensor& u,
                             const Tensors& hs, const Mlp& mlp, bool need_dx, const std::vector<Asked>& asked) {
  const std::vector<Branch<C>> inner = branches_of<C>(mlp.inner, x), outer = branches_of<C>(mlp.outer, x);
  const std::vector<Asked> inner_asked{asked[0], asked[1]}, outer_asked{asked[2]};
  const bool need_inner = need_dx || asked[0].any() || asked[1].any(), again = !g || !u;
  BranchBackward<C> inner_back(inner, inner_asked, {true, true}, mlp.grid(mlp.d_in, mlp.d_ff), need_dx);
  BranchBackward<C> outer_back(outer, outer_asked, {true}, mlp.grid(mlp.d_ff, mlp.d_out), need_inner);
  MlpGradients out;
  MaybeTensor dx;
  if (need_dx) {
    out.inner.dx = like_with(x, mlp.d_in, mlp.type);
    dx = rows_of(*out.inner.dx);
  }
  const Tensor dy_rows = rows_of(dy), x_rows = rows_of(x);
  const std::vector<Grid> grids(2, mlp.grid(mlp.d_ff, mlp.d_in));
  const Grid &grid = inner_back.grid(), &outer_grid = outer_back.grid();
  Workspaces workspaces = mlp.workspaces(again ? 4 : 2);
  parallel_for(0, grid.row_chunks, 1, [&](int64_t begin, int64_t end) {
    const NoGrad no_grad;
    const Tensors own = workspaces.take();
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t row = grid.row(chunk), n = grid.row(chunk + 1) - row;
      const auto scratch = [&](size_t k) { return block(own[k], 0, n, 0, mlp.d_ff); };
      const Tensor x_block = block(x_rows, row, n, 0, mlp.d_in), dy_block = block(dy_rows, row, n, 0, mlp.d_out);
      const Tensor g_block = again ? scratch(2) : block(rows_of(*g), row, n, 0, mlp.d_ff);
      const Tensor u_block = again ? scratch(3) : block(rows_of(*u), row, n, 0, mlp.d_ff);
      if (again) forward_chunk(mlp.inner, inner, row, x_block, {g_block, u_block}, grids, {});
      const Tensor a = scratch(0);
      if (asked[2].A) gated<C>(g_block, u_block, mlp.gelu, a);
      const MaybeTensor da = need_inner ? MaybeTensor(scratch(1)) : std::nullopt;
      outer_back.read_dy(chunk, {rows_in(dy_block)}, {hs[2]});
      for (int64_t column = 0; column < outer_grid.column_chunks; ++column) {
        backward_tile(mlp.outer, outer_back, chunk, column, {dy_block}, a, da, true);
      }
      if (!need_inner) continue;
      const Tensor &dg = *da, &du = a;
      gated_backward<C>(g_block, u_block, *da, mlp.gelu, dg, du);
      inner_back.read_dy(chunk, {rows_in(dg), rows_in(du)}, {hs[0], hs[1]});
      const MaybeTensor dx_block = dx ? MaybeTensor(block(*dx, row, n, 0, mlp.d_in)) : std::nullopt;
      for (int64_t column = 0; column < grid.column_chunks; ++column) {
        backward_tile(mlp.inner, inner_back, chunk, column, {dg, du}, x_block, dx_block, true);
      }
    }
  });
  for (size_t n = 0; n < 2; ++n) out.inner.branches.push_back(inner_back.finish(n));
  out.outer.branches.push_back(outer_back.finish(0));
  return out;
}

MlpGradients backward_strips(const Tensor& dy, const Tensor& x, const MaybeTensor& g, const MaybeTensor& u,
                             const Tensors& hs, const Mlp& mlp, bool need_dx, const std::vector<Asked>& asked) {
  const std::vector<Branch<float>> inner = branches_of<float>(mlp.inner, x), outer = branches_of<float>(mlp.outer, x);
  const std::vector<Asked> inner_asked{asked[0], asked[1]}, outer_asked{asked[2]};
  const bool need_inner = need_dx || asked[0].any() || asked[1].any(), again = !g || !u;
  const Grid grid = Grid::of_sums(mlp.rows, mlp.d_in);
  BranchBackward<float> inner_back(inner, inner_asked, {true, true}, grid, need_dx);
  BranchBackward<float> outer_back(outer, outer_asked, {true}, Grid::of_sums(mlp.rows, mlp.d_ff), need_inner);
  MlpGradients out;
  MaybeTensor dx;
  if (need_dx) {
    out.inner.dx = like_with(x, mlp.d_in, mlp.type);
    dx = rows_of(*out.inner.dx);
  }
  const Tensor dy_rows = rows_of(dy), x_rows = rows_of(x);
  // Enough chunks a strip that all threads have some.
  const int64_t chunks = grid.row_chunks, threads = static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t step =
      std::clamp<int64_t>(chunks / parts_of(mlp.rows, kStripRows), std::min(4 * threads, chunks), chunks);
  const Tensors own = mlp.scratch(again ? 4 : 2, step * parts_of(mlp.rows, chunks));
  for (int64_t chunk = 0; chunk < chunks; chunk += step) {
    const int64_t last = std::min(chunk + step, chunks), row = grid.row(chunk), n = grid.row(last) - row;
    const auto scratch = [&](size_t k) { return block(own[k], 0, n, 0, mlp.d_ff); };
    const Tensor x_block = block(x_rows, row, n, 0, mlp.d_in), dy_block = block(dy_rows, row, n, 0, mlp.d_out);
    const Tensor g_block = again ? scratch(2) : block(rows_of(*g), row, n, 0, mlp.d_ff);
    const Tensor u_block = again ? scratch(3) : block(rows_of(*u), row, n, 0, mlp.d_ff);
    if (again) forward_together(mlp.inner, inner, row, x_block, {g_block, u_block}, {});
    const Tensor a = scratch(0);
    if (asked[2].A) gated<float>(g_block, u_block, mlp.gelu, a);
    const MaybeTensor da = need_inner ? MaybeTensor(scratch(1)) : std::nullopt;
    backward_together(mlp.outer, outer_back, chunk, last, {dy_block}, {hs[2]}, a, da);
    if (!need_inner) continue;
    const Tensor &dg = *da, &du = a;
    gated_backward<float>(g_block, u_block, *da, mlp.gelu, dg, du);
    const MaybeTensor dx_block = dx ? MaybeTensor(block(*dx, row, n, 0, mlp.d_in)) : std::nullopt;
    backward_together(mlp.inner, inner_back, chunk, last, {dg, du}, {hs[0], hs[1]}, x_block, dx_block);
  }
  for (size_t n = 0; n < 2; ++n) out.inner.branches.push_back(inner_back.finish(n));
  out.outer.branches.push_back(outer_back.finish(0));
  return out;
}

MlpGradients backward_layers(const Tensor& dy, const Tensor& x, MaybeTensor g, MaybeTensor u, const Tensors& hs,
                             const Mlp& mlp, bool need_dx, const std::vector<Asked>& asked) {
  if (!g || !u) {
    const LayerOutputs again = forward(x, mlp.inner);
    g = again.ys[0];
    u = again.ys[1];
  }
  const bool need_inner = need_dx || asked[0].any() || asked[1].any();
  const MaybeTensor a = asked[2].A ? MaybeTensor(activated(*g, *u, mlp.gelu)) : std::nullopt;
  MlpGradients out;
  out.outer = backward({dy}, {hs[2]}, a, mlp.outer, need_inner, {asked[2]});
  out.inner.branches.resize(2);
  if (!need_inner) return out;
  const Tensor dg = empty(shape_of(*g), g->scalar_type());
  const Tensor du = empty(shape_of(*u), u->scalar_type());
  if (g->scalar_type() == ScalarType::Double) {
    gated_backward<double>(*g, *u, *out.outer.dx, mlp.gelu, dg, du);
  } else {
    gated_backward<float>(*g, *u, *out.outer.dx, mlp.gelu, dg, du);
  }
  out.inner = backward({dg, du}, {hs[0], hs[1]}, x, mlp.inner, need_dx, {asked[0], asked[1]});
  return out;
}

}  // namespace

Tensors lora_mlp(Tensor x, Tensors weights, MaybeTensors biases, Tensors A, Tensors B, std::vector<double> scales,
                 MaybeTensors gates, MaybeTensors mixes, std::vector<double> dropout_ps, MaybeTensors seeds,
                 MaybeTensors merged_Bs, MaybeTensors merge_weights, int64_t activation, bool recompute) {
  const char* op = "lora_mlp";
  const std::vector<Layer> layers =
      members(op, weights, &biases, A, B, scales, gates, mixes, dropout_ps, seeds, merged_Bs, merge_weights);
  check_mlp(op, x, layers);
  const Mlp mlp(x, layers, is_gelu(op, activation));
  if (mlp.together()) return forward_strips(x, mlp, recompute);
  if (!mlp.by_chunks()) return forward_layers(x, mlp, recompute);
  return mlp.type == ScalarType::Double ? forward_chunks<double>(x, mlp, recompute)
                                        : forward_chunks<float>(x, mlp, recompute);
}

Tensors lora_mlp_backward(Tensor dy, Tensor x, MaybeTensor g, MaybeTensor u, Tensors hs, Tensors weights,
                          MaybeTensors biases, Tensors A, Tensors B, std::vector<double> scales, MaybeTensors gates,
                          MaybeTensors mixes, std::vector<double> dropout_ps, MaybeTensors seeds,
                          MaybeTensors merged_Bs, MaybeTensors merge_weights, int64_t activation,
                          std::vector<bool> needs) {
  for (Tensor& h : hs) h = packed(h);
  if (g) g = packed(*g);
  if (u) u = packed(*u);
  const char* op = "lora_mlp_backward";
  const std::vector<Layer> layers =
      members(op, weights, &biases, A, B, scales, gates, mixes, dropout_ps, seeds, merged_Bs, merge_weights);
  check_mlp(op, x, layers);
  const std::vector<Asked> asked = asked_of_members(op, needs, layers, true);
  check_rows_like({op, "dy"}, dy, x, weights[2].size(0));
  check_type({op, "dy"}, dy, x.scalar_type());
  check_length({op, "hs"}, hs.size(), 3);
  for (size_t n = 0; n < 3; ++n) check_h(op, layers[n].branch, hs[n], x, static_cast<int64_t>(n));
  for (const auto& [name, kept] : {std::pair("g", &g), std::pair("u", &u)}) {
    if (!*kept) continue;
    check_rows_like({op, name}, **kept, x, weights[0].size(0));
    check_type({op, name}, **kept, x.scalar_type());
  }
  const Mlp mlp(x, layers, is_gelu(op, activation));
  const auto differentiate = [&] {
    if (mlp.together()) return backward_strips(dy, x, g, u, hs, mlp, needs[0], asked);
    if (!mlp.by_chunks()) return backward_layers(dy, x, g, u, hs, mlp, needs[0], asked);
    return mlp.type == ScalarType::Double ? backward_chunks<double>(dy, x, g, u, hs, mlp, needs[0], asked)
                                          : backward_chunks<float>(dy, x, g, u, hs, mlp, needs[0], asked);
  };
  const MlpGradients gradients = differentiate();
  Results results(dy);
  results.add(gradients.inner.dx);
  for (const BranchGradients& branch : gradients.inner.branches) results.add(branch);
  results.add(gradients.outer.branches[0]);
  return results.tensors;
}

}  // namespace mbf::cpu
