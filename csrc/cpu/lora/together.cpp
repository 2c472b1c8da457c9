#include "together.h"

#include <algorithm>

#include "gemm.h"
#include "passes.h"

namespace mbf::cpu {
namespace {

using torch::stable::parallel_for;

gemm::Strided strided(const Tensor& weight, bool transpose) {
  const int64_t row = weight.stride(0), column = weight.stride(1);
  return {weight.const_data_ptr(), weight.scalar_type(), transpose ? column : row, transpose ? row : column};
}

Tensor as_floats(const Tensor& bias) {
  const Tensor packed = bias.is_contiguous() ? bias : torch::stable::contiguous(bias);
  return packed.scalar_type() == ScalarType::Float ? packed : torch::stable::to(packed, ScalarType::Float);
}

}  // namespace

bool made_together(ScalarType type, int64_t rows, const std::vector<Layer>& layers) {
  if (type != ScalarType::Float && !must_widen(type)) return false;
  return std::all_of(layers.begin(), layers.end(), [&](const Layer& layer) {
    const int64_t d_out = layer.weight.size(0), d_in = layer.weight.size(1);
    return layer.branch.A.scalar_type() != ScalarType::Double && layer.branch.A.size(0) <= gemm::kMostRank &&
           gemm::worthwhile(rows, d_out, d_in) && gemm::worthwhile(rows, d_in, d_out);
  });
}

void forward_together(const std::vector<Layer>& layers, const std::vector<Branch<float>>& branches, int64_t first,
                      const Tensor& x, const std::vector<Tensor>& ys, const std::vector<Tensor>& hs) {
  const int64_t rows = x.size(0);
  std::vector<Scratch<float>> zs, packed;
  for (const auto& branch : branches) {
    zs.emplace_back(rows * branch.rank());
    packed.push_back(branch.packed_A());
  }
  parallel_for(0, rows, kProjectGrain, [&](int64_t begin, int64_t end) {
    std::vector<float*> here;
    for (size_t n = 0; n < layers.size(); ++n) here.push_back(zs[n].get() + begin * branches[n].rank());
    project_all<float>(branches, packed, rows_in(x).at(begin), first + begin, end - begin, hs, here);
  });
  for (size_t n = 0; n < layers.size(); ++n) {
    const Tensor& weight = layers[n].weight;
    TileStart<float> start = branches[n].start(zs[n].get());
    const MaybeTensor bias = layers[n].bias ? MaybeTensor(as_floats(*layers[n].bias)) : std::nullopt;
    if (bias) start.bias = floats(*bias);
    gemm::multiply({rows_in(ys[n]), rows, weight.size(0), weight.size(1), rows_in(x), strided(weight, true), start});
  }
}

void backward_together(const std::vector<Layer>& layers, BranchBackward<float>& branches, int64_t begin, int64_t end,
                       const std::vector<MaybeTensor>& dys, const std::vector<Tensor>& hs, const MaybeTensor& x,
                       const MaybeTensor& dx) {
  const Grid& grid = branches.grid();
  const int64_t first = grid.row(begin), rows = grid.row(end) - first;
  branches.begin(first, rows);
  parallel_for(begin, end, 1, [&](int64_t from, int64_t to) {
    for (int64_t chunk = from; chunk < to; ++chunk) {
      const int64_t row = grid.row(chunk) - first;
      std::vector<Rows> here;
      for (const MaybeTensor& dy : dys) here.push_back(part(rows_or_none(dy), row, 0));
      branches.read_dy(chunk, here, hs);
      branches.read_x(chunk, part(rows_or_none(x), row, 0));
    }
  });
  if (!dx) return;
  bool add = false;
  for (size_t n = 0; n < layers.size(); ++n) {
    if (!dys[n]) continue;
    const Tensor& weight = layers[n].weight;
    TileStart<float> start = branches.start(n, first);
    start.add = add;
    gemm::multiply(
        {rows_in(*dx), rows, weight.size(1), weight.size(0), rows_in(*dys[n]), strided(weight, false), start});
    add = true;
  }
  if (!add) clear(*dx);
}

}  // namespace mbf::cpu
