// task_boundary_: the merge of every B, the replacement of every A and Q of every A, as csrc/cpu/task_boundary.cpp.
//
// The kernels of basis.cu read every A, and one here every B, and tell what isn't finite. If anything isn't, the
// kernels that write find a veto on the device and end at once, so nothing waits for the host.

#include <algorithm>

#include "basis.h"
#include "merge.h"
#include "ops.h"
#include "pieces.h"
#include "vectors.h"

namespace mbf::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kEntries = 120;

struct Entry {
  const void* numbers;
  int64_t size;
  int64_t first_piece;  // of the launch
  int32_t* finite;      // of every piece of its own
};

struct Table {
  int64_t count;
  Entry entry[kEntries];
};

template <typename T>
__device__ __forceinline__ bool is_finite(T number) {
  const auto wide = convert<double>(number);
  return wide - wide == 0.0;
}

// Whether a piece holds neither NaN nor infinity; single numbers where it doesn't begin on 16 bytes.
template <typename T>
__global__ void __launch_bounds__(kThreads) finite_kernel(const __grid_constant__ Table table) {
  constexpr int kPack = static_cast<int>(16 / sizeof(T));
  const Entry& entry = table.entry[entry_of(table.entry, table.count, blockIdx.x)];
  const int64_t piece = blockIdx.x - entry.first_piece, begin = piece * kPiece;
  const T* numbers = static_cast<const T*>(entry.numbers) + begin;
  const int size = size_of_piece(entry.size, begin);
  const int packed = reinterpret_cast<uintptr_t>(numbers) % 16 == 0 ? size / kPack * kPack : 0;
  bool finite = true;
  for (int i = static_cast<int>(threadIdx.x) * kPack; i < packed; i += kThreads * kPack) {
    const Pack<T, kPack> pack = load_pack<kPack>(numbers + i);
#pragma unroll
    for (int n = 0; n < kPack; ++n) finite = finite && is_finite(pack.values[n]);
  }
  for (int i = packed + static_cast<int>(threadIdx.x); i < size; i += kThreads) {
    finite = finite && is_finite(load(numbers + i));
  }
  const int bad = __syncthreads_or(!finite);
  if (threadIdx.x == 0) store(entry.finite + piece, bad == 0);
}

// Where the pieces of every B are among all; a launch for so many.
constexpr int kRanges = 500;

struct Ranges {
  const int32_t* finite;
  int32_t* status;  // of the first of these B
  int64_t count;
  struct {
    int32_t begin, end;
  } range[kRanges];
};

__global__ void __launch_bounds__(kThreads) status_kernel(const __grid_constant__ Ranges ranges) {
  for (int64_t n = threadIdx.x; n < ranges.count; n += kThreads) {
    bool finite = true;
    for (int piece = ranges.range[n].begin; piece < ranges.range[n].end; ++piece) {
      finite = finite && load(ranges.finite + piece) != 0;
    }
    store(ranges.status + n, finite ? kDone : kNotFinite);
  }
}

// Whether any matrix isn't finite. One block.
__global__ void __launch_bounds__(kThreads) veto_kernel(const int32_t* status, int64_t count, int32_t* veto) {
  bool found = false;
  for (int64_t n = threadIdx.x; n < count; n += kThreads) found = found || load(status + n) == kNotFinite;
  const int any = __syncthreads_or(found);
  if (threadIdx.x == 0) store(veto, any != 0);
}

void look(const std::vector<Tensor>& B, int32_t* finite, int32_t* status, cudaStream_t stream) {
  std::vector<std::pair<int64_t, int64_t>> ranges;
  int64_t found = 0;
  for (const Tensor& b : B) {
    ranges.emplace_back(found, found + pieces_of(b.numel()));
    found = ranges.back().second;
  }
  for (const ScalarType dtype : {ScalarType::Double, ScalarType::Float, ScalarType::BFloat16, ScalarType::Half}) {
    Table table{0, {}};
    int64_t pieces = 0;
    const auto launch = [&] {
      if (pieces > 0) {
        with_type(dtype, "task_boundary_: B", [&](auto type) {
          MBF_LAUNCH((finite_kernel<typename decltype(type)::type>), static_cast<unsigned int>(pieces), kThreads, 0,
                     stream, table);
        });
      }
      table.count = pieces = 0;
    };
    for (size_t n = 0; n < B.size(); ++n) {
      if (B[n].scalar_type() != dtype || B[n].numel() == 0) continue;
      table.entry[table.count++] = {B[n].const_data_ptr(), B[n].numel(), pieces, finite + ranges[n].first};
      pieces += pieces_of(B[n].numel());
      if (table.count == kEntries) launch();
    }
    launch();
  }
  const auto count = static_cast<int64_t>(B.size());
  for (int64_t first = 0; first < count; first += kRanges) {
    Ranges some{finite, status + first, std::min<int64_t>(kRanges, count - first), {}};
    for (int64_t n = 0; n < some.count; ++n) {
      some.range[n] = {static_cast<int32_t>(ranges[first + n].first), static_cast<int32_t>(ranges[first + n].second)};
    }
    MBF_LAUNCH(status_kernel, 1, kThreads, 0, stream, some);
  }
}

}  // namespace

Tensor task_boundary_(Tensors merged_A, Tensors merged_B, Tensors Q, Tensors A, Tensors B, Tensor weight) {
  const auto layers = static_cast<int64_t>(A.size());
  STD_TORCH_CHECK(merged_A.size() == A.size() && merged_B.size() == A.size() && B.size() == A.size() &&
                      Q.size() == A.size() && layers > 0,
                  "task_boundary_: all lists must have one length, which isn't 0");
  const double* lambda = weight_on_device(weight);
  const MergeLists of_A = contiguous_pairs("task_boundary_", merged_A, A);
  const MergeLists of_B = contiguous_pairs("task_boundary_", merged_B, B);
  const Launcher launcher(A[0]);
  const cudaStream_t stream = launcher.stream();
  Basis basis(of_A.finetuned);
  STD_TORCH_CHECK(basis.count() == layers, "task_boundary_: every A must be one matrix [r, d]");
  const MergeLists like_A = contiguous_pairs("task_boundary_", Q, A);
  for (int64_t n = 0; n < layers; ++n) {
    STD_TORCH_CHECK(Q[n].is_contiguous() && Q[n].scalar_type() == A[n].scalar_type(), "task_boundary_: Q ", n,
                    " must be contiguous and of the dtype of its A");
  }

  int64_t pieces = 0;
  for (const Tensor& b : of_B.finetuned) pieces += pieces_of(b.numel());
  const Tensor status = empty_on(A[0], {2 * layers}, ScalarType::Int);
  const Tensor flags = empty_on(A[0], {pieces + 1}, ScalarType::Int);
  int32_t *codes = static_cast<int32_t*>(status.mutable_data_ptr()),
          *veto = static_cast<int32_t*>(flags.mutable_data_ptr());
  basis.measure(codes, stream);
  look(of_B.finetuned, veto + 1, codes + layers, stream);
  MBF_LAUNCH(veto_kernel, 1, kThreads, 0, stream, codes, 2 * layers, veto);

  basis.write(Q, codes, veto, stream);
  launch_merge(of_B, lambda, veto, stream);
  launch_replace(of_A, veto, stream);
  write_back(merged_A, of_A);
  write_back(merged_B, of_B);
  return status;
}

}  // namespace mbf::cuda
