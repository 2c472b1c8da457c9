// lora_accumulate and its backward: the branch alone, on a base output that any layer made. The kernels are in lora/.

#include "lora/branch.h"
#include "lora/launch.cuh"

namespace mbf::cuda::lora {
namespace {

// The gradients of B, B₀ and λ from the parts of dB̂.
void merged_gradients(const Tensor& parts, const Interpolated& B, const Branch& branch, const Needs& needs,
                      BranchGradients& found, const Launcher& launcher) {
  const ScalarType type = branch.B.scalar_type();
  const int64_t size = B.B.numel(), blocks = divided(size, kSumThreads);
  const std::vector<int64_t> shape = shape_of(B.B);
  if (needs.B) found.B = empty_on(B.B, shape, type);
  if (needs.merged_B) found.merged_B = empty_on(B.B, shape, type);
  const Tensor shares = empty_on(B.B, {blocks}, ScalarType::Double);
  if (size > 0) {
    with_factor(type, [&](auto factor_type) {
      using P = typename decltype(factor_type)::type;
      MBF_LAUNCH(sum_merged_kernel<P>, grid_of(blocks), kSumThreads, 0, launcher.stream(),
                 parts_of(parts, size, shape[1], branch.scale), const_data_of<P>(B.B), B.merged_data<P>(),
                 B.weight_data(), B.value, needs.B ? data_of<P>(found.B) : nullptr,
                 needs.merged_B ? data_of<P>(found.merged_B) : nullptr,
                 needs.merge_weight ? data_of<double>(shares) : nullptr);
    });
  }
  if (needs.merge_weight) {
    const Tensor& like = *branch.merge_weight;
    const Tensor sum = torch::stable::sum(shares, std::vector<int64_t>{0});
    found.merge_weight = torch::stable::to(sum, like.scalar_type(), std::nullopt, like.device());
  }
}

// From dz back through gate and mix to h, with their gradients.
void unroute(const Tensor& dz, const Tensor& h, const Branch& branch, const Routed& route, const Needs& needs,
             BranchGradients& found, const Launcher& launcher) {
  const ScalarType type = branch.A.scalar_type();
  found.dh = empty_on(h, shape_of(dz), type);
  MaybeTensor du, products;
  if (needs.mix) du = empty_on(h, shape_of(dz), type);
  if (needs.gate) products = empty_on(h, shape_of(h), ScalarType::Float);
  if (dz.numel() > 0) {
    with_factor(type, [&](auto factor_type) {
      using P = typename decltype(factor_type)::type;
      MBF_LAUNCH(unroute_kernel<P>, grid_of(divided(dz.numel(), kRouteThreads)), kRouteThreads, 0, launcher.stream(),
                 route.routing, const_data_of<float>(dz), const_data_of<P>(h), data_of<P>(*found.dh),
                 du ? data_of<P>(*du) : nullptr, products ? data_of<float>(*products) : nullptr);
    });
  }
  if (products) {
    const Tensor& gate = *branch.gate;
    found.gate = cast(call("aten::sum_to_size", "", *products, gate.sizes()), gate.scalar_type());
  }
  if (du) {
    const Tensor dmix = call("aten::mm", "", torch::stable::transpose(*du, 0, 1), matrix(h));
    found.mix = cast(dmix, branch.mix->scalar_type());
  }
}

}  // namespace

void check_rows(const char* op, const char* name, const Tensor& tensor, const Tensor& like, int64_t columns) {
  bool fits = tensor.dim() == like.dim() && like.dim() > 0 && tensor.size(tensor.dim() - 1) == columns;
  for (int64_t axis = 0; fits && axis + 1 < like.dim(); ++axis) fits = tensor.size(axis) == like.size(axis);
  STD_TORCH_CHECK(fits, op, ": ", name, " must have the other activations' shape but for the last axis, of ", columns);
}

void check(const char* op, const Branch& branch, std::initializer_list<std::pair<const char*, MaybeTensor>> activations,
           const Tensor& input, int64_t d_in, int64_t d_out) {
  const ScalarType type = branch.A.scalar_type();
  STD_TORCH_CHECK(branch.A.dim() == 2, op, ": A must be [r, d_in]");
  const auto known = [](ScalarType dtype) {
    return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
  };
  const char* elsewhere = "; mbf.use_backend(\"reference\") computes it in plain torch";
  STD_TORCH_CHECK(branch.A.size(0) <= kMostRanks, op, ": A has ", branch.A.size(0),
                  " rows; the kernels take ranks up to ", kMostRanks, elsewhere);
  STD_TORCH_CHECK(known(type) && branch.B.scalar_type() == type, op, ": A and B must both be fp32, bf16 or fp16",
                  elsewhere);
  for (const auto& [name, tensor] : activations) {
    if (!tensor) continue;
    STD_TORCH_CHECK(on_device(*tensor), op, ": ", name, " must be on the GPU");
    STD_TORCH_CHECK(known(tensor->scalar_type()) && (type == ScalarType::Float || tensor->scalar_type() == type), op,
                    ": ", name, " must have the dtype of A and B or, with these in fp32, be fp32, bf16 or fp16",
                    elsewhere);
  }
  STD_TORCH_CHECK(branch.dropout_p >= 0.0 && branch.dropout_p <= 1.0, op, ": dropout_p must lie in [0, 1]");
  STD_TORCH_CHECK(branch.dropout_p == 0.0 || (branch.seed && on_device(*branch.seed) && branch.seed->numel() == 1 &&
                                              branch.seed->scalar_type() == ScalarType::Long),
                  op, ": dropout needs a seed on the GPU, int64, such as mbf.ops.draw_seed(x.device) gives");
  const auto of_matrix = [&](const char* name, const Tensor& tensor, int64_t rows, int64_t columns) {
    STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns && on_device(tensor), op,
                    ": ", name, " must be [", rows, ", ", columns, "] on the GPU, as the other arguments say");
  };
  const int64_t r = branch.A.dim() == 2 ? branch.A.size(0) : -1;
  of_matrix("A", branch.A, r, d_in);
  of_matrix("B", branch.B, d_out, r);
  if (branch.mix) of_matrix("mix", *branch.mix, r, r);
  if (branch.gate) {
    const Tensor& gate = *branch.gate;
    const int64_t lead = input.dim() - gate.dim();
    bool fits = lead >= 0 && (on_device(gate) || gate.dim() == 0);
    for (int64_t axis = 0; fits && axis < gate.dim(); ++axis) {
      const int64_t size = gate.size(axis);
      fits = size == 1 || size == (axis + 1 == gate.dim() ? r : input.size(lead + axis));
    }
    STD_TORCH_CHECK(fits, op, ": gate must broadcast to the activations' shape with ", r,
                    " in the last axis, and be on the GPU");
  }
  STD_TORCH_CHECK(branch.merged_B.has_value() == branch.merge_weight.has_value(), op,
                  ": merged_B and merge_weight go together; pass both or neither");
  if (branch.merged_B) {
    of_matrix("merged_B", *branch.merged_B, d_out, r);
    STD_TORCH_CHECK(branch.merged_B->scalar_type() == type, op, ": merged_B must have the dtype of B");
    STD_TORCH_CHECK(branch.merge_weight->dim() == 0, op, ": merge_weight must be 0-d");
  }
}

void check_backward(const char* op, const Branch& branch, const Tensor& dy, const Tensor& h, const MaybeTensor& x) {
  check_rows(op, "h", h, dy, branch.A.size(0));
  STD_TORCH_CHECK(on_device(h) && h.scalar_type() == branch.A.scalar_type(), op, ": h must have the dtype of A");
  if (x) check_rows(op, "x", *x, dy, branch.A.size(1));
}

Needs possible(const Branch& branch, const MaybeTensor& x, const Needs& asked) {
  const bool merged = branch.merged_B.has_value();
  return {asked.x,
          asked.A && x.has_value(),
          asked.B,
          asked.gate && branch.gate.has_value(),
          asked.mix && branch.mix.has_value(),
          asked.merged_B && merged,
          asked.merge_weight && merged};
}

Tensor project(const Tensor& x, const Branch& branch) {
  const Launcher launcher(x);
  const Tensor rows = matrix(x), A = matrix(branch.A);
  const ScalarType type = A.scalar_type();
  const int64_t tiles = divided(A.size(0), kTile), chunks = divided(tiles, kMostRankTiles);
  MaybeTensor parts;
  with_types(x.scalar_type(), type, [&](auto activation, auto factor) {
    using X = typename decltype(activation)::type;
    using P = typename decltype(factor)::type;
    using Shape = ProjectShape<P>;
    const int64_t blocks = divided(rows.size(0), Shape::kRows);
    const int64_t wanted = multiprocessors() * kProjectBlocks;
    const Split columns(rows.size(1), Shape::kColumns, kLeastColumns, wanted, blocks * chunks);
    parts = empty_on(x, {columns.parts, blocks * Shape::kRows, tiles * kTile}, ScalarType::Float);
    if (parts->numel() == 0) return;
    MBF_LAUNCH((project_kernel<X, P>), grid_of(blocks, columns.parts, chunks), Shape::kThreads,
               Shape::shared_bytes(static_cast<int>(std::min<int64_t>(tiles, kMostRankTiles))), launcher.stream(),
               rows_in<X>(rows), rows_in<P>(A), dropout_of(branch), data_of<float>(*parts), parts->size(1),
               parts->size(2), columns.span);
  });
  return summed(*parts, shape_with(x, A.size(0)), keep_scale(branch), type, launcher);
}

void accumulate(const Tensor& base, const Tensor& out, const Tensor& h, const Branch& branch) {
  const Launcher launcher(out);
  const Interpolated B(branch);
  const Tensor z = matrix(routed(packed(h), Routed(branch, h), launcher));
  const Tensor base_rows = matrix(base), out_rows = matrix(out);
  with_types(out.scalar_type(), B.B.scalar_type(), [&](auto activation, auto factor) {
    using X = typename decltype(activation)::type;
    using P = typename decltype(factor)::type;
    Expansion<X, P> e{};
    e.z = rows_in<P>(z);
    e.factor = B.factor<P>();
    e.base = rows_in<X>(base_rows);
    e.out = rows_out<X>(out_rows);
    e.scale = static_cast<float>(branch.scale);
    e.columns = out_rows.size(1);
    launch_expand<false>(e, out, launcher);
  });
}

BranchGradients output_gradients(const Tensor& dy, const Tensor& h, const Branch& branch, const Needs& needs) {
  BranchGradients found;
  if (!needs.of_z() && !needs.of_B()) return found;
  const Launcher launcher(dy);
  const Interpolated B(branch);
  const Tensor whole_h = packed(h);
  const Routed route(branch, whole_h);
  const Tensor rows = matrix(dy), z = matrix(needs.of_B() ? routed(whole_h, route, launcher) : whole_h);
  OutputParts parts;
  with_types(dy.scalar_type(), B.B.scalar_type(), [&](auto activation, auto factor) {
    using X = typename decltype(activation)::type;
    using P = typename decltype(factor)::type;
    parts = z.size(1) <= kTile ? launch_output_gradient<X, P, 1>(rows, z, B, needs, launcher)
                               : launch_output_gradient<X, P, 4>(rows, z, B, needs, launcher);
  });
  if (needs.of_B() && branch.merged_B) {
    merged_gradients(*parts.dB, B, branch, needs, found, launcher);
  } else if (needs.of_B()) {
    found.B = summed(*parts.dB, shape_of(B.B), branch.scale, B.B.scalar_type(), launcher);
  }
  if (needs.of_z()) {
    const ScalarType type = route.there() ? ScalarType::Float : branch.A.scalar_type();
    const Tensor dz = summed(*parts.dz, shape_of(z), branch.scale, type, launcher);
    found.dh = dz;
    if (route.there()) unroute(dz, whole_h, branch, route, needs, found, launcher);
  }
  return found;
}

Tensor input_gradients(const MaybeTensor& x, const MaybeTensor& base, const MaybeTensor& dx, const Tensor& dh,
                       const Branch& branch) {
  const Launcher launcher(dh);
  const Tensor A = matrix(branch.A);
  const double factor = keep_scale(branch);
  MaybeTensor x_rows, parts;
  if (x) x_rows = matrix(*x);
  with_types((dx ? *dx : *x).scalar_type(), A.scalar_type(), [&](auto activation, auto factor_type) {
    using X = typename decltype(activation)::type;
    using P = typename decltype(factor_type)::type;
    Expansion<X, P> e{};
    e.z = rows_in<P>(dh);
    e.A = rows_in<P>(A);
    e.dropout = dropout_of(branch);
    e.columns = A.size(1);
    if (base) e.base = rows_in<X>(*base);
    if (dx) {
      e.out = rows_out<X>(*dx);
      e.scale = static_cast<float>(factor);
    }
    if (x_rows) {
      e.x = rows_in<X>(*x_rows);
      parts = launch_expand<true>(e, dh, launcher);
    } else {
      launch_expand<false>(e, dh, launcher);
    }
  });
  return parts ? summed(*parts, shape_of(A), factor, A.scalar_type(), launcher) : Tensor();
}

}  // namespace mbf::cuda::lora

namespace mbf::cuda {

std::tuple<Tensor, Tensor> lora_accumulate(Tensor y, Tensor x, Tensor A, Tensor B, double scale, MaybeTensor gate,
                                           MaybeTensor mix, double dropout_p, MaybeTensor seed, MaybeTensor merged_B,
                                           MaybeTensor merge_weight) {
  const lora::Branch branch{A, B, scale, gate, mix, dropout_p, seed, merged_B, merge_weight};
  STD_TORCH_CHECK(x.dim() > 0 && y.dim() > 0, "lora_accumulate: x must be [..., d_in], and y [..., d_out]");
  lora::check("lora_accumulate", branch, {{"y", y}, {"x", x}}, x, x.size(x.dim() - 1), y.size(y.dim() - 1));
  lora::check_rows("lora_accumulate", "y", y, x, y.size(y.dim() - 1));
  const Tensor h = lora::project(x, branch);
  const Tensor out = empty_on(y, lora::shape_of(y), y.scalar_type());
  lora::accumulate(y, out, h, branch);
  return {out, h};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lora_accumulate_backward(
    Tensor dy, Tensor h, MaybeTensor x, Tensor A, Tensor B, double scale, MaybeTensor gate, MaybeTensor mix,
    double dropout_p, MaybeTensor seed, MaybeTensor merged_B, MaybeTensor merge_weight, std::vector<bool> needs) {
  const lora::Branch branch{A, B, scale, gate, mix, dropout_p, seed, merged_B, merge_weight};
  const char* op = "lora_accumulate_backward";
  STD_TORCH_CHECK(needs.size() == 7 && dy.dim() > 0, op, ": needs must have 7 entries, and dy be [..., d_out]");
  lora::check(op, branch, {{"dy", dy}, {"x", x}}, dy, A.dim() == 2 ? A.size(1) : -1, dy.size(dy.dim() - 1));
  lora::check_backward(op, branch, dy, h, x);
  const lora::Needs asked =
      lora::possible(branch, x, {needs[0], needs[1], needs[2], needs[3], needs[4], needs[5], needs[6]});
  lora::BranchGradients found = lora::output_gradients(dy, h, branch, asked);
  MaybeTensor dx;
  if (asked.x) dx = empty_on(dy, {found.dh->size(0), A.size(1)}, (x ? *x : dy).scalar_type());
  const MaybeTensor of_A = asked.A ? x : std::nullopt;
  if (dx || of_A) found.A = lora::input_gradients(of_A, std::nullopt, dx, *found.dh, branch);
  return {dx ? torch::stable::view(*dx, lora::shape_with(dy, A.size(1))) : Tensor(),
          found.A,
          found.B,
          found.gate,
          found.mix,
          found.merged_B,
          found.merge_weight};
}

}  // namespace mbf::cuda
