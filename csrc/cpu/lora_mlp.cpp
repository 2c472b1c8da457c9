// lora_mlp and its backward: y = down(act(gate(x)) ⊙ up(x)), three layers with branches of their own.
//
// Forward keeps g = gate(x) and u = up(x), or nothing of that width where they are to be made again. The product
// a = act(g) ⊙ u lives only until down has read it; backward makes it again in the pass that turns da into dg and du.

#include <algorithm>

#include "kernels.h"
#include "lora/members.h"

namespace mbf::cpu {
namespace {

using torch::stable::parallel_for;

constexpr int64_t kGrain = 8192;  // elements below which a second thread costs more than it saves

bool is_gelu(const std::string& activation) {
  STD_TORCH_CHECK(activation == "silu" || activation == "gelu_tanh", "lora_mlp: activation is '", activation.c_str(),
                  "'; it must be 'silu' or 'gelu_tanh'");
  return activation == "gelu_tanh";
}

// Elements through fp32 (or fp64) scratch, a first-level cacheful at a time.
template <typename C, typename Use>
void over(int64_t size, const Use& use) {
  constexpr int64_t kSome = 1024;
  parallel_for(0, size, kGrain, [&](int64_t begin, int64_t end) {
    Scratch<C> scratch(4 * kSome);
    for (int64_t i = begin; i < end; i += kSome) use(i, std::min(kSome, end - i), scratch.get(), kSome);
  });
}

const char* at(const Tensor& tensor, int64_t n) {
  return static_cast<const char*>(tensor.const_data_ptr()) + n * element_size(tensor.scalar_type());
}

char* mutable_at(const Tensor& tensor, int64_t n) {
  return static_cast<char*>(tensor.mutable_data_ptr()) + n * element_size(tensor.scalar_type());
}

template <typename C>
void gated(const Tensor& g, const Tensor& u, bool gelu, const Tensor& a) {
  const Micro<C>& inner = micro<C>();
  const ScalarType type = g.scalar_type();
  over<C>(g.numel(), [&](int64_t i, int64_t n, C* scratch, int64_t some) {
    C *wide_g = scratch, *wide_u = scratch + some;
    inner.widen(at(g, i), type, n, wide_g);
    inner.widen(at(u, i), type, n, wide_u);
    inner.gated(wide_g, wide_u, n, gelu, wide_g);
    inner.narrow(wide_g, n, mutable_at(a, i), type);
  });
}

// a again, and dg, du from da.
template <typename C>
void gated_backward(const Tensor& g, const Tensor& u, const Tensor& da, bool gelu, const Tensor& dg, const Tensor& du) {
  const Micro<C>& inner = micro<C>();
  const ScalarType type = g.scalar_type();
  over<C>(g.numel(), [&](int64_t i, int64_t n, C* scratch, int64_t some) {
    C *wide_g = scratch, *wide_u = scratch + some, *wide_d = scratch + 2 * some, *unused = scratch + 3 * some;
    inner.widen(at(g, i), type, n, wide_g);
    inner.widen(at(u, i), type, n, wide_u);
    inner.widen(at(da, i), type, n, wide_d);
    inner.gated_backward(wide_d, wide_g, wide_u, n, gelu, unused);
    inner.narrow(wide_g, n, mutable_at(dg, i), type);
    inner.narrow(wide_u, n, mutable_at(du, i), type);
  });
}

Tensor activated(const Tensor& g, const Tensor& u, bool gelu) {
  const Tensor a = torch::stable::new_empty(g, shape_of(g), g.scalar_type());
  g.scalar_type() == ScalarType::Double ? gated<double>(g, u, gelu, a) : gated<float>(g, u, gelu, a);
  return a;
}

}  // namespace

Tensors lora_mlp(Tensor x, Tensors weights, MaybeTensors biases, Tensors A, Tensors B, std::vector<double> scales,
                 MaybeTensors gates, MaybeTensors mixes, std::vector<double> dropout_ps, MaybeTensors seeds,
                 MaybeTensors merged_Bs, MaybeTensors merge_weights, std::string activation, bool recompute) {
  const bool gelu = is_gelu(activation);
  const std::vector<Layer> layers =
      members(weights, biases, A, B, scales, gates, mixes, dropout_ps, seeds, merged_Bs, merge_weights);
  const LayerOutputs inner = forward(x, {layers[0], layers[1]});
  const LayerOutputs outer = forward(activated(inner.ys[0], inner.ys[1], gelu), {layers[2]});
  const auto kept = [&](const Tensor& tensor) { return recompute ? torch::stable::new_empty(x, {0}) : tensor; };
  return {outer.ys[0], kept(inner.ys[0]), kept(inner.ys[1]), inner.hs[0], inner.hs[1], outer.hs[0]};
}

Tensors lora_mlp_backward(Tensor dy, Tensor x, MaybeTensor g, MaybeTensor u, Tensors hs, Tensors weights,
                          MaybeTensors biases, Tensors A, Tensors B, std::vector<double> scales, MaybeTensors gates,
                          MaybeTensors mixes, std::vector<double> dropout_ps, MaybeTensors seeds,
                          MaybeTensors merged_Bs, MaybeTensors merge_weights, std::string activation,
                          std::vector<bool> needs) {
  const bool gelu = is_gelu(activation);
  const std::vector<Layer> layers =
      members(weights, biases, A, B, scales, gates, mixes, dropout_ps, seeds, merged_Bs, merge_weights);
  const std::vector<Layer> inner{layers[0], layers[1]};
  const std::vector<Asked> asked = asked_of_members(needs);
  if (!g || !u) {
    const LayerOutputs again = forward(x, inner);
    g = again.ys[0];
    u = again.ys[1];
  }
  const bool need_inner = needs[0] || asked[0].any() || asked[1].any();
  const MaybeTensor a = asked[2].A ? MaybeTensor(activated(*g, *u, gelu)) : std::nullopt;
  const LayerGradients outer = backward({dy}, {hs[2]}, a, {layers[2]}, need_inner, {asked[2]});
  LayerGradients rest{std::nullopt, std::vector<BranchGradients>(2)};
  if (need_inner) {
    const Tensor dg = torch::stable::new_empty(*g, shape_of(*g), g->scalar_type());
    const Tensor du = torch::stable::new_empty(*u, shape_of(*u), u->scalar_type());
    if (g->scalar_type() == ScalarType::Double) {
      gated_backward<double>(*g, *u, *outer.dx, gelu, dg, du);
    } else {
      gated_backward<float>(*g, *u, *outer.dx, gelu, dg, du);
    }
    rest = backward({dg, du}, {hs[0], hs[1]}, x, inner, needs[0], {asked[0], asked[1]});
  }
  Results results(dy);
  results.add(rest.dx);
  for (const BranchGradients& branch : rest.branches) results.add(branch);
  results.add(outer.branches[0]);
  return results.tensors;
}

}  // namespace mbf::cpu
