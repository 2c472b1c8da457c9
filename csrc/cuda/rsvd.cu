// What a randomised SVD needs beside torch's products and basis.cu: the sketch, and the SVD of small square matrices.
//
// svd: M = U diag(S) V by one-sided Jacobi rotations in fp64 (Hestenes), a block for a matrix. Rotations from the right
// make the columns of M orthogonal. They are kept as rows of a transposed copy, so that a rotation runs along memory. A
// sweep visits every pair of columns in k − 1 rounds of disjoint pairs (a round-robin tournament), a warp for a pair,
// so results don't depend on the order of threads. A matrix with a singular value of zero is given up, as its U has no
// column there.

#include <algorithm>

#include "basis.h"
#include "ops.h"
#include "philox.cuh"
#include "pieces.h"
#include "reduce.cuh"

namespace mbf::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kSweeps = 40;  // about ten are needed
constexpr double kEpsilon = 2.220446049250313e-16;

struct Entry {
  const double* M;
  double *columns, *rotations;  // [k, k] each: of a stack, one matrix after another
  double *U, *S, *V;
  int32_t* status;
  int32_t k;
  int64_t first_piece;  // of the launch; a piece is a matrix
};

constexpr int kEntries = 50;

struct Table {
  int64_t count;
  Entry entry[kEntries];
};

__device__ __forceinline__ void rotate(double* x, double* y, int k, double c, double s) {
  for (int i = static_cast<int>(threadIdx.x) % kWarp; i < k; i += kWarp) {
    const double a = load(x + i), b = load(y + i);
    store(x + i, c * a - s * b);
    store(y + i, s * a + c * b);
  }
}

// Makes two columns orthogonal; returns whether they were not.
__device__ bool orthogonalise(double* x, double* y, double* v, double* w, int k) {
  double xx = 0.0, yy = 0.0, xy = 0.0;
  for (int i = static_cast<int>(threadIdx.x) % kWarp; i < k; i += kWarp) {
    const double a = load(x + i), b = load(y + i);
    xx = __fma_rn(a, a, xx);
    yy = __fma_rn(b, b, yy);
    xy = __fma_rn(a, b, xy);
  }
  xx = sum_of_warp(xx);
  yy = sum_of_warp(yy);
  xy = sum_of_warp(xy);
  if (!(fabs(xy) > kEpsilon * sqrt(xx) * sqrt(yy))) return false;
  const double zeta = (yy - xx) / (2.0 * xy);
  const double t = (zeta < 0.0 ? -1.0 : 1.0) / (fabs(zeta) + sqrt(1.0 + zeta * zeta));
  const double c = 1.0 / sqrt(1.0 + t * t), s = c * t;
  rotate(x, y, k, c, s);
  rotate(v, w, k, c, s);
  return true;
}

// The largest magnitude of a matrix, for all threads.
__device__ double largest_of(const double* M, int size, double* of_warps) {
  double most = 0.0;
  for (int n = threadIdx.x; n < size; n += kThreads) most = fmax(most, fabs(load(M + n)));
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) most = fmax(most, __shfl_xor_sync(0xffffffffu, most, lanes));
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = most;
  __syncthreads();
  for (int warp = 0; warp < kWarps; ++warp) most = fmax(most, of_warps[warp]);
  __syncthreads();
  return most;
}

// Column `place` of round `round` of a tournament of an even number of columns: the last stays, the others go round.
__device__ __forceinline__ int in_round(int place, int round, int columns) {
  return place == columns - 1 ? place : (place + round) % (columns - 1);
}

__global__ void __launch_bounds__(kThreads, 1) svd_kernel(const __grid_constant__ Table table) {
  __shared__ double of_warps[kWarps];
  MBF_SHARED(double, lengths);
  const Entry& entry = table.entry[entry_of(table.entry, table.count, blockIdx.x)];
  const int64_t number = blockIdx.x - entry.first_piece;
  const int k = entry.k, warp = static_cast<int>(threadIdx.x) / kWarp, size = k * k;
  const double* M = entry.M + number * size;
  double *columns = entry.columns + number * size, *rotations = entry.rotations + number * size;
  const double largest = largest_of(M, size, of_warps), scale = largest > 0.0 ? largest : 1.0;
  for (int n = threadIdx.x; n < size; n += kThreads) {
    store(columns + n, load(M + n % k * k + n / k) / scale);
    store(rotations + n, n / k == n % k ? 1.0 : 0.0);
  }
  __syncthreads();

  const int even = k + k % 2;
  for (int sweep = 0; sweep < kSweeps; ++sweep) {
    bool rotated = false;
    for (int round = 0; round < even - 1; ++round) {
      for (int pair = warp; pair < even / 2; pair += kWarps) {
        const int one = in_round(pair, round, even), other = in_round(even - 1 - pair, round, even);
        const int i = one < other ? one : other, j = one < other ? other : one;
        if (j >= k) continue;
        rotated |= orthogonalise(columns + i * k, columns + j * k, rotations + i * k, rotations + j * k, k);
      }
      __syncthreads();
    }
    if (!__syncthreads_or(rotated)) break;
  }

  for (int i = warp; i < k; i += kWarps) {
    double square = 0.0;
    for (int n = static_cast<int>(threadIdx.x) % kWarp; n < k; n += kWarp) {
      const double x = load(columns + i * k + n);
      square = __fma_rn(x, x, square);
    }
    square = sum_of_warp(square);
    if (threadIdx.x % kWarp == 0) lengths[i] = square - square == 0.0 ? sqrt(square) : 0.0;
  }
  __syncthreads();
  bool zero = false;
  for (int i = warp; i < k; i += kWarps) {
    int place = 0;
    for (int j = 0; j < k; ++j) place += lengths[j] > lengths[i] || (lengths[j] == lengths[i] && j < i);
    zero = zero || !(lengths[i] > 1e-140);
    if (threadIdx.x % kWarp == 0) store(entry.S + number * k + place, lengths[i] * scale);
    for (int n = static_cast<int>(threadIdx.x) % kWarp; n < k; n += kWarp) {
      store(entry.U + number * size + n * k + place, load(columns + i * k + n) / lengths[i]);
      store(entry.V + number * size + place * k + n, load(rotations + i * k + n));
    }
  }
  const int given_up = __syncthreads_or(zero);
  if (threadIdx.x == 0) store(entry.status + number, given_up ? kGivenUp : kDone);
}

// Two elements a thread: elements 2 j and 2 j + 1 of matrix blockIdx.y are made of block j; see mbf/ops/rsvd.py.
__global__ void __launch_bounds__(kThreads) sketch_kernel(const int64_t* seeds, int64_t size, float* out) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (2 * j >= size) return;
  const uint4 words = philox_block(static_cast<uint64_t>(load(seeds + blockIdx.y)), static_cast<uint64_t>(j), 1);
  const auto number = [](uint32_t a, uint32_t b) {
    const int sum = static_cast<int>((a & 0xffff) + (a >> 16) + (b & 0xffff) + (b >> 16));
    return __fmul_rn(static_cast<float>(2 * sum - 262139), 1.0f / 75674.0f);
  };
  float* to = out + blockIdx.y * size + 2 * j;
  store(to, number(words.x, words.y));
  if (2 * j + 1 < size) store(to + 1, number(words.z, words.w));
}

}  // namespace

Tensor sketch(Tensor seeds, int64_t n, int64_t columns) {
  STD_TORCH_CHECK(on_device(seeds) && seeds.dim() == 1 && seeds.scalar_type() == ScalarType::Long &&
                      seeds.is_contiguous() && n >= 0 && columns >= 0,
                  "sketch: seeds must be a contiguous int64 vector on the device, and sizes not negative");
  const int64_t count = seeds.size(0), size = n * columns;
  const Tensor out = empty_on(seeds, {count, n, columns}, ScalarType::Float);
  const Launcher launcher(seeds);
  const auto blocks = static_cast<unsigned int>((size + 2 * kThreads - 1) / (2 * kThreads));
  constexpr int64_t kMostMatrices = 65535;  // of the grid's second axis
  for (int64_t first = 0; first < count && size > 0; first += kMostMatrices) {
    const dim3 grid(blocks, static_cast<unsigned int>(std::min(kMostMatrices, count - first)));
    MBF_LAUNCH(sketch_kernel, grid, kThreads, 0, launcher.stream(), seeds.const_data_ptr<int64_t>() + first, size,
               static_cast<float*>(out.mutable_data_ptr()) + first * size);
  }
  return out;
}

Tensors svd(Tensors matrices) {
  STD_TORCH_CHECK(!matrices.empty(), "svd: no matrix; pass one or more");
  Tensors parts[3], from;
  int64_t count = 0, numbers = 0;
  for (const Tensor& stack : matrices) {
    STD_TORCH_CHECK(on_device(stack) && stack.dim() == 3 && stack.size(1) == stack.size(2) && stack.size(1) > 0 &&
                        stack.size(1) <= 1024 && stack.scalar_type() == ScalarType::Double,
                    "svd: every stack must be fp64 [count, k, k] on the device, with k from 1 to 1024");
    from.push_back(torch::stable::contiguous(stack));
    const int64_t size = stack.size(0), k = stack.size(1);
    parts[0].push_back(empty_on(stack, {size, k, k}, ScalarType::Double));
    parts[1].push_back(empty_on(stack, {size, k}, ScalarType::Double));
    parts[2].push_back(empty_on(stack, {size, k, k}, ScalarType::Double));
    count += size;
    numbers += stack.numel();
  }
  const Tensor status = empty_on(matrices[0], {count}, ScalarType::Int);
  const Tensor workspace = empty_on(matrices[0], {2 * numbers + 1}, ScalarType::Double);
  auto* space = static_cast<double*>(workspace.mutable_data_ptr());
  auto* codes = static_cast<int32_t*>(status.mutable_data_ptr());
  const Launcher launcher(matrices[0]);
  Table table{0, {}};
  int64_t pieces = 0, most = 1;
  const auto launch = [&] {
    if (pieces > 0) {
      MBF_LAUNCH(svd_kernel, static_cast<unsigned int>(pieces), kThreads, sizeof(double) * most, launcher.stream(),
                 table);
    }
    table.count = pieces = 0;
  };
  const auto data = [](const Tensor& t) { return static_cast<double*>(t.mutable_data_ptr()); };
  for (size_t n = 0; n < from.size(); ++n) {
    const int64_t size = from[n].size(0), k = from[n].size(1);
    if (size == 0) continue;
    table.entry[table.count++] = {static_cast<const double*>(from[n].const_data_ptr()),
                                  space,
                                  space + from[n].numel(),
                                  data(parts[0][n]),
                                  data(parts[1][n]),
                                  data(parts[2][n]),
                                  codes,
                                  static_cast<int32_t>(k),
                                  pieces};
    space += 2 * from[n].numel();
    codes += size;
    pieces += size;
    most = std::max(most, k);
    if (table.count == kEntries) launch();
  }
  launch();
  Tensors out;
  for (const auto& part : parts) out.insert(out.end(), part.begin(), part.end());
  out.push_back(status);
  return out;
}

}  // namespace mbf::cuda
