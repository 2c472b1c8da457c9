// orthonormal_rows: A = L Q for many matrices [r, d] at once, by Cholesky QR in fp64, as csrc/cpu/linalg/orthonormal.h.
//
//   gram     a block for a slice of columns: its share of A Aᵀ, and whether all of it is finite
//   factor   a block for a matrix: adds the shares in order, scales rows to unit length, G = L Lᵀ, L⁻¹
//   gram2, factor2   the same of L⁻¹ A, where the condition or fp64 asks for a second round; other blocks end at once
//   apply    a block for a slice: Q = L₂⁻¹ L₁⁻¹ A, rounded once
//
// Whether there is a second round is decided on the device, so nothing waits for it and a CUDA graph can hold the
// launches. Sums are taken in a fixed order: no atomics. Tables of matrices travel by value in a kernel's 4 KB of
// parameters. A is staged in shared memory as fp64, 32 columns at a time, by accesses of 16 bytes where it begins
// on 16.

#include <algorithm>

#include "basis.h"
#include "cholesky.cuh"
#include "ops.h"
#include "pieces.h"
#include "reduce.cuh"
#include "vectors.h"

namespace mbf::cuda {
namespace {

constexpr int kColumns = 32;           // staged at a time
constexpr int kStride = kColumns + 1;  // of a staged row, so that a column's numbers lie in different banks
constexpr int kSlice = 1024;           // columns of a block
constexpr int kMostRows = 184;         // of which two stages fit the 99 KiB that every GPU has; others are given up
constexpr double kOneRound = 3e3;      // as csrc/cpu/linalg/orthonormal.cpp
constexpr double kLeast = 1e-280, kMost = 1e280;

struct Entry {
  const void* A;
  void* Q;
  double* partial;  // [slices, r, r]
  double* inverse;  // [2, r, r]: of both rounds; the first one's rows divided by the lengths
  int32_t* finite;  // [slices]
  int32_t* again;   // whether a second round is made
  int32_t* status;
  int32_t r, slices;
  int64_t d;
  int64_t first_piece;  // of the launch
};

constexpr int kEntries = 44;

struct Table {
  int64_t count;
  const int32_t* veto;
  Entry entry[kEntries];
};

template <typename T>
constexpr int kPack = static_cast<int>(16 / sizeof(T));

// Columns `first` .. of A as fp64, zeros beyond its width; returns whether this thread's numbers are finite.
template <typename T>
__device__ bool stage(const Entry& entry, int64_t first, double* to) {
  const T* A = static_cast<const T*>(entry.A);
  bool finite = true;
  const bool whole = entry.d % kPack<T> == 0 && reinterpret_cast<uintptr_t>(A) % 16 == 0;
  constexpr int kPacks = kColumns / kPack<T>;
  for (int n = threadIdx.x; n < entry.r * kPacks; n += kCholeskyThreads) {
    const int row = n / kPacks, column = n % kPacks * kPack<T>;
    const T* from = A + row * entry.d + first + column;
    double* into = to + row * kStride + column;
    if (whole && first + column < entry.d) {
      const Pack<T, kPack<T>> pack = load_pack<kPack<T>>(from);
#pragma unroll
      for (int k = 0; k < kPack<T>; ++k) into[k] = convert<double>(pack.values[k]);
    } else {
      for (int k = 0; k < kPack<T>; ++k) into[k] = first + column + k < entry.d ? convert<double>(load(from + k)) : 0.0;
    }
#pragma unroll
    for (int k = 0; k < kPack<T>; ++k) finite = finite && into[k] - into[k] == 0.0;
  }
  return finite;
}

// to = T X for a lower triangle T [r, r] in global memory and staged rows X.
__device__ void multiply(const double* T, const double* X, int r, double* to) {
  const int column = static_cast<int>(threadIdx.x) % kColumns;
  for (int row = static_cast<int>(threadIdx.x) / kColumns; row < r; row += kCholeskyThreads / kColumns) {
    double sum = 0.0;
    for (int j = 0; j <= row; ++j) sum = __fma_rn(load(T + row * r + j), X[j * kStride + column], sum);
    to[row * kStride + column] = sum;
  }
}

// Adds X Xᵀ of the staged columns to this slice's share, whose entry (i, j), j ≤ i, is always the same thread's.
__device__ void add_products(const double* X, int r, double* partial, bool begin) {
  const int entries = r * (r + 1) / 2;
  for (int n = threadIdx.x; n < entries; n += kCholeskyThreads) {
    int i = static_cast<int>((sqrtf(8.0f * n + 1.0f) - 1.0f) / 2.0f);
    while ((i + 1) * (i + 2) / 2 <= n) ++i;
    while (i * (i + 1) / 2 > n) --i;
    const int j = n - i * (i + 1) / 2;
    double sum = begin ? 0.0 : load(partial + i * r + j);
#pragma unroll 8
    for (int k = 0; k < kColumns; ++k) sum = __fma_rn(X[i * kStride + k], X[j * kStride + k], sum);
    store(partial + i * r + j, sum);
  }
}

template <typename T, bool kAgain>
__global__ void __launch_bounds__(kCholeskyThreads) gram_kernel(const __grid_constant__ Table table) {
  MBF_SHARED(double, rows);
  const Entry& entry = table.entry[entry_of(table.entry, table.count, blockIdx.x)];
  if (entry.r > kMostRows) return;
  if (kAgain && (load(entry.status) != kDone || load(entry.again) == 0)) return;
  const int slice = static_cast<int>(blockIdx.x - entry.first_piece);
  const int64_t begin = static_cast<int64_t>(slice) * kSlice;
  const int64_t end = entry.d - begin < kSlice ? entry.d : begin + kSlice;
  double* partial = entry.partial + static_cast<int64_t>(slice) * entry.r * entry.r;
  double* products = rows + entry.r * kStride;
  bool finite = true;
  for (int64_t first = begin; first < end; first += kColumns) {
    __syncthreads();
    finite = stage<T>(entry, first, rows) && finite;
    __syncthreads();
    if constexpr (kAgain) {
      multiply(entry.inverse, rows, entry.r, products);
      __syncthreads();
    }
    add_products(kAgain ? products : rows, entry.r, partial, first == begin);
  }
  if constexpr (!kAgain) {
    const int bad = __syncthreads_or(!finite);
    if (threadIdx.x == 0) store(entry.finite + slice, bad == 0);
  }
}

// G, into the first slice's place: whole, and in the first round scaled; returns the status that this settles.
template <bool kAgain>
__device__ int32_t sum_shares(const Entry& entry, double* G, double* lengths) {
  const int r = entry.r;
  int bad = 0;
  for (int n = threadIdx.x; n < r * r; n += kCholeskyThreads) {
    const int i = n / r, j = n % r;
    if (j > i) continue;
    double sum = 0.0;
    for (int slice = 0; slice < entry.slices; ++slice) sum += load(entry.partial + (int64_t{slice} * r + i) * r + j);
    if (i == j && !(sum >= kLeast && sum <= kMost)) bad = 1;
    if (i == j) lengths[i] = kAgain ? 1.0 : sqrt(sum);
    store(G + n, sum);
  }
  if (!kAgain) {
    for (int slice = threadIdx.x; slice < entry.slices; slice += kCholeskyThreads) {
      if (load(entry.finite + slice) == 0) bad |= 2;
    }
  }
  const int not_finite = __syncthreads_or(bad & 2), extreme = __syncthreads_or(bad & 1);
  if (not_finite) return kNotFinite;
  if (extreme) return kGivenUp;
  for (int n = threadIdx.x; n < r * r; n += kCholeskyThreads) {
    const int i = n / r, j = n % r;
    if (j > i) continue;
    const double scaled = i == j && !kAgain ? 1.0 : load(G + n) / (lengths[i] * lengths[j]);
    store(G + n, scaled);
  }
  __syncthreads();
  return kDone;
}

template <typename T, bool kAgain>
__global__ void __launch_bounds__(kCholeskyThreads) factor_kernel(const __grid_constant__ Table table) {
  MBF_SHARED(double, lengths);
  __shared__ double of_warps[kCholeskyThreads / kWarp];
  const Entry& entry = table.entry[blockIdx.x];
  if (kAgain && (load(entry.status) != kDone || load(entry.again) == 0)) return;
  int32_t status = kGivenUp;
  bool again = false;
  if (entry.r <= kMostRows) {
    double* G = entry.partial;
    status = sum_shares<kAgain>(entry, G, lengths);
    if (status == kDone && !cholesky(G, entry.r)) status = kGivenUp;
    if (status == kDone) {
      double squares = 0.0, of_inverse = 0.0;
      invert(G, entry.r, lengths, entry.inverse + (kAgain ? entry.r * entry.r : 0), squares, of_inverse);
      const double condition = sqrt(sum_of_block(squares, of_warps) * sum_of_block(of_inverse, of_warps));
      again = std::is_same_v<T, double> || condition > kOneRound;
    }
  }
  if (threadIdx.x != 0) return;
  store(entry.status, status);
  if (!kAgain) store(entry.again, again ? 1 : 0);
}

template <typename T>
__global__ void __launch_bounds__(kCholeskyThreads) apply_kernel(const __grid_constant__ Table table) {
  MBF_SHARED(double, rows);
  if (table.veto != nullptr && load(table.veto) != 0) return;
  const Entry& entry = table.entry[entry_of(table.entry, table.count, blockIdx.x)];
  const int r = entry.r;
  const int64_t begin = static_cast<int64_t>(blockIdx.x - entry.first_piece) * kSlice;
  const int64_t end = entry.d - begin < kSlice ? entry.d : begin + kSlice;
  const bool done = load(entry.status) == kDone, again = done && load(entry.again) != 0;
  double* products = rows + r * kStride;
  T* Q = static_cast<T*>(entry.Q);
  const bool whole = entry.d % kPack<T> == 0 && reinterpret_cast<uintptr_t>(Q) % 16 == 0;
  if (!done) {
    const T nan = convert<T>(sqrtf(-1.0f));
    for (int64_t n = threadIdx.x; n < r * (end - begin); n += kCholeskyThreads) {
      store(Q + n / (end - begin) * entry.d + begin + n % (end - begin), nan);
    }
    return;
  }
  for (int64_t first = begin; first < end; first += kColumns) {
    __syncthreads();
    stage<T>(entry, first, rows);
    __syncthreads();
    multiply(entry.inverse, rows, r, products);
    __syncthreads();
    if (again) {
      multiply(entry.inverse + r * r, products, r, rows);
      __syncthreads();
    }
    const double* found = again ? rows : products;
    constexpr int kPacks = kColumns / kPack<T>;
    for (int n = threadIdx.x; n < r * kPacks; n += kCholeskyThreads) {
      const int row = n / kPacks, column = n % kPacks * kPack<T>;
      const double* from = found + row * kStride + column;
      T* to = Q + row * entry.d + first + column;
      Pack<T, kPack<T>> pack;
#pragma unroll
      for (int k = 0; k < kPack<T>; ++k) pack.values[k] = convert<T>(from[k]);
      if (whole && first + column < entry.d) {
        store_pack(to, pack);
      } else {
        for (int k = 0; k < kPack<T> && first + column + k < entry.d; ++k) store(to + k, pack.values[k]);
      }
    }
  }
}

int64_t slices_of(int64_t d) { return (d + kSlice - 1) / kSlice; }

// Bytes of shared memory for `stages` stages of the tallest matrix of a table.
size_t shared_bytes(const Table& table, int stages) {
  int32_t rows = 1;
  for (int64_t n = 0; n < table.count; ++n) rows = std::max(rows, std::min(table.entry[n].r, kMostRows));
  return sizeof(double) * rows * kStride * stages;
}

void check_rows(const Tensor& stack) {
  STD_TORCH_CHECK(on_device(stack) && stack.dim() >= 2 && stack.is_contiguous(),
                  "orthonormal_rows: matrices must be contiguous tensors [..., r, d] on the device of the first");
  const int64_t r = stack.size(-2), d = stack.size(-1);
  STD_TORCH_CHECK(1 <= r && r <= d, "orthonormal_rows: r must lie in [1, d], it is ", r, " and d is ", d);
}

int64_t element_size(ScalarType type) { return type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2; }

// Calls use(pointer) for every matrix of the stacks, in order.
template <typename Use>
void each_matrix(const std::vector<Tensor>& stacks, const Use& use) {
  for (const Tensor& stack : stacks) {
    const int64_t size = stack.size(-2) * stack.size(-1), bytes = size * element_size(stack.scalar_type());
    char* data = static_cast<char*>(stack.mutable_data_ptr());
    for (int64_t n = 0; n < stack.numel() / std::max<int64_t>(size, 1); ++n) use(stack, data + n * bytes);
  }
}

}  // namespace

Basis::Basis(const std::vector<Tensor>& A) {
  int64_t doubles = 0;
  for (const Tensor& stack : A) check_rows(stack);
  each_matrix(A, [&](const Tensor& stack, void* data) {
    const int64_t r = stack.size(-2), d = stack.size(-1), square = r <= kMostRows ? r * r : 0;
    matrices_.push_back({data, stack.scalar_type(), r, d, doubles, doubles + slices_of(d) * square, pieces_});
    doubles += (slices_of(d) + 2) * square;
    pieces_ += slices_of(d);
  });
  if (A.empty()) return;
  workspace_ = empty_on(A[0], {std::max<int64_t>(doubles, 1)}, ScalarType::Double);
  flags_ = empty_on(A[0], {pieces_ + count() + 1}, ScalarType::Int);
}

// Calls use(dtype, table, blocks) for tables of matrices of one dtype.
template <typename Use>
void Basis::in_tables(const std::vector<void*>& Q, int32_t* status, const int32_t* veto, const Use& use) const {
  double* numbers = static_cast<double*>(workspace_->mutable_data_ptr());
  int32_t* flags = static_cast<int32_t*>(flags_->mutable_data_ptr());
  for (const ScalarType type : {ScalarType::Double, ScalarType::Float, ScalarType::BFloat16, ScalarType::Half}) {
    Table table{0, veto, {}};
    int64_t pieces = 0;
    const auto flush = [&] {
      if (table.count > 0) use(type, table, static_cast<unsigned int>(pieces));
      table.count = pieces = 0;
    };
    for (int64_t n = 0; n < count(); ++n) {
      const Matrix& m = matrices_[n];
      if (m.type != type) continue;
      const int64_t slices = slices_of(m.d);
      table.entry[table.count++] = {m.A,
                                    Q.empty() ? nullptr : Q[n],
                                    numbers + m.partial,
                                    numbers + m.inverse,
                                    flags + m.first_piece,
                                    flags + pieces_ + n,
                                    status + n,
                                    static_cast<int32_t>(m.r),
                                    static_cast<int32_t>(slices),
                                    m.d,
                                    pieces};
      pieces += slices;
      if (table.count == kEntries || pieces > (int64_t{1} << 30)) flush();
    }
    flush();
  }
}

void Basis::measure(int32_t* status, cudaStream_t stream) {
  in_tables({}, status, nullptr, [&](ScalarType dtype, const Table& table, unsigned int pieces) {
    with_type(dtype, "orthonormal_rows: A", [&](auto type) {
      using T = typename decltype(type)::type;
      const auto matrices = static_cast<unsigned int>(table.count);
      const size_t lengths = sizeof(double) * kMostRows;
      MBF_LAUNCH((gram_kernel<T, false>), pieces, kCholeskyThreads, shared_bytes(table, 1), stream, table);
      MBF_LAUNCH((factor_kernel<T, false>), matrices, kCholeskyThreads, lengths, stream, table);
      MBF_LAUNCH((gram_kernel<T, true>), pieces, kCholeskyThreads, shared_bytes(table, 2), stream, table);
      MBF_LAUNCH((factor_kernel<T, true>), matrices, kCholeskyThreads, lengths, stream, table);
    });
  });
}

void Basis::write(const std::vector<Tensor>& Q, int32_t* status, const int32_t* veto, cudaStream_t stream) const {
  std::vector<void*> places;
  each_matrix(Q, [&](const Tensor&, void* data) { places.push_back(data); });
  in_tables(places, status, veto, [&](ScalarType dtype, const Table& table, unsigned int pieces) {
    with_type(dtype, "orthonormal_rows: A", [&](auto type) {
      MBF_LAUNCH((apply_kernel<typename decltype(type)::type>), pieces, kCholeskyThreads, shared_bytes(table, 2),
                 stream, table);
    });
  });
}

Tensor orthonormal_rows(Tensors A, Tensors Q) {
  STD_TORCH_CHECK(!A.empty() && A.size() == Q.size(),
                  "orthonormal_rows: no matrix, or not a Q for every A; pass one or more, and as many Q");
  Tensors from;
  for (const Tensor& stack : A) from.push_back(torch::stable::contiguous(stack));
  const Launcher launcher(A[0]);
  Basis basis(from);
  for (size_t n = 0; n < A.size(); ++n) {
    STD_TORCH_CHECK(Q[n].dim() == A[n].dim(), "orthonormal_rows: Q ", n, " must have the shape of its A");
    const bool alike = Q[n].numel() == A[n].numel() && Q[n].size(-1) == A[n].size(-1) && Q[n].size(-2) == A[n].size(-2);
    STD_TORCH_CHECK(alike && Q[n].scalar_type() == A[n].scalar_type() && Q[n].is_contiguous(), "orthonormal_rows: Q ",
                    n, " must be contiguous and have the shape and dtype of its A");
  }
  const Tensor status = empty_on(A[0], {basis.count()}, ScalarType::Int);
  int32_t* codes = static_cast<int32_t*>(status.mutable_data_ptr());
  basis.measure(codes, launcher.stream());
  basis.write(Q, codes, nullptr, launcher.stream());
  return status;
}

}  // namespace mbf::cuda
