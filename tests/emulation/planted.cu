// Kernels that prove the stand-in: right ones, and ones with a planted fault. `planted CASE SEED` runs one, and prints
// "right", "wrong", or the stand-in's error.

#include <cstdio>
#include <functional>
#include <map>
#include <numeric>
#include <string>
#include <vector>

#include "../../csrc/cuda/device.h"

namespace {

using mbf::cuda::convert;
using mbf::cuda::load;
using mbf::cuda::store;

constexpr unsigned int kAll = 0xffffffffu;

// What a fault changes; a kernel's template argument, so that the right one and the wrong one are the same otherwise.
enum class Fault { kNone, kNoBarrier, kNoAtomic, kBeyond, kUnset };

template <typename T, Fault kFault>
__global__ void __launch_bounds__(256) sum(const T* values, int size, unsigned int* total) {
  __shared__ unsigned int of_warps[8];
  unsigned int own = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < size; i += gridDim.x * blockDim.x) {
    own += static_cast<unsigned int>(convert<float>(load(values + i)));
  }
  for (int lanes = 16; lanes > 0; lanes /= 2) own += __shfl_down_sync(kAll, own, lanes);
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = own;
  if (kFault != Fault::kNoBarrier) __syncthreads();
  if (threadIdx.x >= 8) return;
  own = of_warps[threadIdx.x];
  for (int lanes = 4; lanes > 0; lanes /= 2) own += __shfl_xor_sync(0xff, own, lanes);
  if (threadIdx.x != 0) return;
  if (kFault == Fault::kNoAtomic) {
    store(total, load(total) + own);
  } else {
    atomicAdd(total, own);
  }
}

template <typename T, Fault kFault>
bool sums() {
  std::vector<T> values(70001);
  unsigned int wanted = 0, total = 0;
  for (size_t n = 0; n < values.size(); ++n) {
    wanted += n % 7;
    values[n] = static_cast<T>(static_cast<float>(n % 7));
  }
  const int size = static_cast<int>(values.size());
  MBF_LAUNCH((sum<T, kFault>), 5, 256, 0, nullptr, values.data(), size, &total);
  return total == wanted;
}

template <Fault kFault>
__global__ void count(unsigned int* total) {
  if (kFault == Fault::kNoAtomic) {
    store(total, load(total) + 1);
  } else {
    atomicAdd(total, 1);
  }
}

template <Fault kFault>
bool counts() {
  unsigned int total = 0;
  MBF_LAUNCH(count<kFault>, 3, dim3(8, 4, 2), 0, nullptr, &total);
  return total == 3 * 64;
}

// Inclusive sums of 256 numbers.
template <Fault kFault>
__global__ void scan(const int* in, int* out) {
  __shared__ int of_warps[8];
  const int lane = threadIdx.x % warpSize, warp = threadIdx.x / warpSize;
  int value = load(in + threadIdx.x);
  for (unsigned int lanes = 1; lanes < 32; lanes *= 2) {
    const int before = __shfl_up_sync(kAll, value, lanes);
    if (lane >= static_cast<int>(lanes)) value += before;
  }
  if (lane == 31) of_warps[warp] = value;
  if (kFault != Fault::kNoBarrier) __syncthreads();
  for (int before = 0; before < warp; ++before) value += of_warps[before];
  store(out + threadIdx.x, value);
}

template <Fault kFault>
bool scans() {
  std::vector<int> in(256), out(256), wanted(256);
  for (int n = 0; n < 256; ++n) in[n] = n * n % 13 - 5;
  std::partial_sum(in.begin(), in.end(), wanted.begin());
  MBF_LAUNCH(scan<kFault>, 1, 256, 0, nullptr, in.data(), out.data());
  return out == wanted;
}

// out [columns, rows] of in [rows, columns], through a tile of shared memory.
template <Fault kFault>
__global__ void transpose(const float* in, float* out, int rows, int columns) {
  __shared__ float tile[32][33];
  const int row0 = blockIdx.y * 32, column0 = blockIdx.x * 32, x = threadIdx.x;
  for (int y = threadIdx.y; y < 32; y += blockDim.y) {
    if (row0 + y >= rows || column0 + x >= columns) continue;
    if (kFault != Fault::kUnset || y != 5) tile[y][x] = load(in + (row0 + y) * columns + column0 + x);
  }
  if (kFault != Fault::kNoBarrier) __syncthreads();
  for (int y = threadIdx.y; y < 32; y += blockDim.y) {
    if (column0 + y >= columns || row0 + x >= rows) continue;
    const int beyond = kFault == Fault::kBeyond && column0 + y + 1 == columns ? 1 : 0;
    store(out + (column0 + y) * rows + row0 + x + beyond, tile[x][y]);
  }
}

template <Fault kFault>
bool transposes() {
  constexpr int kRows = 50, kColumns = 70;
  std::vector<float> in(kRows * kColumns), out(in.size(), 0.0f), wanted(in.size());
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kColumns; ++c) {
      in[r * kColumns + c] = wanted[c * kRows + r] = static_cast<float>(r * 100 + c);
    }
  }
  MBF_LAUNCH(transpose<kFault>, dim3(3, 2), dim3(32, 8), 0, nullptr, in.data(), out.data(), kRows, kColumns);
  return out == wanted;
}

// How often each of 16 numbers occurs, counted in shared memory first.
template <Fault kFault>
__global__ void histogram(const unsigned char* values, int size, unsigned int* bins) {
  __shared__ unsigned int own[16];
  if (threadIdx.x < 16) own[threadIdx.x] = 0;
  __syncthreads();
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < size; i += gridDim.x * blockDim.x) {
    if (kFault == Fault::kNoAtomic) {
      own[load(values + i)] += 1;
    } else {
      atomicAdd(&own[load(values + i)], 1u);
    }
  }
  __syncthreads();
  if (threadIdx.x < 16) atomicAdd(bins + threadIdx.x, own[threadIdx.x]);
}

template <Fault kFault>
bool histograms() {
  std::vector<unsigned char> values(5000);
  std::vector<unsigned int> bins(16), wanted(16);
  for (size_t n = 0; n < values.size(); ++n) ++wanted[values[n] = n * n % 16];
  MBF_LAUNCH(histogram<kFault>, 3, 64, 0, nullptr, values.data(), static_cast<int>(values.size()), bins.data());
  return bins == wanted;
}

// Reverses `blockDim.x` numbers in dynamic shared memory.
template <Fault kFault>
__global__ void reverse(int* values) {
  MBF_SHARED(int, held);
  const int i = threadIdx.x, last = blockDim.x - 1, to = kFault == Fault::kBeyond ? last + 1 - i : last - i;
  if (kFault != Fault::kUnset || i != 3) held[to] = load(values + i);
  if (kFault != Fault::kNoBarrier) __syncthreads();
  store(values + i, held[i]);
}

template <Fault kFault>
bool reverses() {
  std::vector<int> values(100), wanted(100);
  std::iota(values.begin(), values.end(), 1);
  std::iota(wanted.rbegin(), wanted.rend(), 1);
  MBF_LAUNCH(reverse<kFault>, 1, 100, 100 * sizeof(int), nullptr, values.data());
  return values == wanted;
}

// The last block to come adds up what every block has written.
template <Fault kFault>
__global__ void sum_last(int* parts, unsigned int* tickets, int* total) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    store(parts + blockIdx.x, static_cast<int>(blockIdx.x) + 1);
    __threadfence();
    last = kFault == Fault::kNoAtomic ? blockIdx.x + 1 == gridDim.x : atomicAdd(tickets, 1) + 1 == gridDim.x;
  }
  __syncthreads();
  if (!last || threadIdx.x != 0) return;
  int sum = 0;
  for (unsigned int block = 0; block < gridDim.x; ++block) sum += load(parts + block);
  store(total, sum);
}

template <Fault kFault>
bool sums_last() {
  std::vector<int> parts(9);
  unsigned int tickets = 0;
  int total = 0;
  MBF_LAUNCH(sum_last<kFault>, 9, 32, 0, nullptr, parts.data(), &tickets, &total);
  return total == 45;
}

// Relies on what another block, or nobody, has left in shared memory: zeros.
__global__ void rely_on_static(float* out) {
  __shared__ float left[32];
  if (blockIdx.x == 0) left[threadIdx.x] = 0.0f;
  store(out + blockIdx.x * 32 + threadIdx.x, left[threadIdx.x] + 1.0f);
}

__global__ void rely_on_dynamic(float* out) {
  MBF_SHARED(float, left);
  if (blockIdx.x == 0) left[threadIdx.x] = 0.0f;
  store(out + blockIdx.x * 32 + threadIdx.x, left[threadIdx.x] + 1.0f);
}

bool relies(void (*kernel)(float*), size_t bytes) {
  std::vector<float> out(64);
  MBF_LAUNCH(kernel, 2, 32, bytes, nullptr, out.data());
  return out == std::vector<float>(64, 1.0f);
}

// A write beyond static shared memory, which only AddressSanitizer sees.
__global__ void write_beyond_static(int* out, int at) {
  __shared__ int held[40];
  held[threadIdx.x] = threadIdx.x;
  __syncthreads();
  int* beyond = held + 39;
  asm volatile("" : "+r"(beyond));  // so that the compiler does not know, which UBSan would tell
  if (threadIdx.x == 0) beyond[at] = 1;
  __syncthreads();
  store(out + threadIdx.x, held[threadIdx.x]);
}

bool writes_beyond_static() {
  std::vector<int> out(40);
  MBF_LAUNCH(write_beyond_static, 1, 40, 0, nullptr, out.data(), 2);
  return true;
}

// Lanes hand a number on through shared memory.
template <Fault kFault>
__global__ void rotate(int* out) {
  __shared__ int held[32];
  held[threadIdx.x] = 10 * threadIdx.x;
  if (kFault != Fault::kNoBarrier) __syncwarp();
  store(out + threadIdx.x, held[(threadIdx.x + 1) % 32]);
}

template <Fault kFault>
bool rotates() {
  std::vector<int> out(32), wanted(32);
  for (int n = 0; n < 32; ++n) wanted[n] = 10 * ((n + 1) % 32);
  MBF_LAUNCH(rotate<kFault>, 1, 32, 0, nullptr, out.data());
  return out == wanted;
}

// The operations of a warp on parts of it, with votes, in a last warp that is not full.
__global__ void vote(unsigned int* out) {
  const unsigned int odd = __ballot_sync(kAll, threadIdx.x % 2);
  const unsigned int mask = threadIdx.x % 2 ? 0x2aaau : 0x1555u;  // of 14 lanes
  if (threadIdx.x < 32) return;
  unsigned int value = threadIdx.x;
  if (threadIdx.x % 2) {
    value = __shfl_sync(mask, value, 13, 16) + 100 * __any_sync(mask, threadIdx.x == 35);
  } else {
    value = __shfl_sync(mask, value, 0, 4) + 100 * __all_sync(mask, threadIdx.x != 34);
  }
  store(out + threadIdx.x - 32, 1000 * (odd == 0x2aaa) + value);
}

bool votes() {
  std::vector<unsigned int> out(14), wanted(14);
  for (unsigned int n = 0; n < 14; ++n) wanted[n] = 1000 + (n % 2 ? 100 + 45 : 32 + n / 4 * 4);
  MBF_LAUNCH(vote, 1, 46, 0, nullptr, out.data());
  return out == wanted;
}

__global__ void diverge(int* out, int how) {
  const int i = threadIdx.x;
  if (how == 0 && i >= 40) return;
  if (how == 1 && i < 7) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  if (how == 2 && i % 32 < 3) return;
  const unsigned int mask = how == 3 && i == 1 ? 0xfffffffd : kAll;
  if (how == 4 && i % 32 >= 16) return;
  store(out + i, how == 4 ? __shfl_sync(0xffff, i, 20) : __shfl_xor_sync(mask, i, 1));
}

template <int kHow>
bool diverges() {
  std::vector<int> out(64);
  MBF_LAUNCH(diverge, 1, 64, 0, nullptr, out.data(), kHow);
  return true;
}

__global__ void misalign(float* values) { store(values, load(reinterpret_cast<const float4*>(values + 1)).x); }

bool misaligned() {
  alignas(16) float values[8] = {};
  MBF_LAUNCH(misalign, 1, 1, 0, nullptr, values);
  return true;
}

// A kernel that failed leaves nothing behind for the next.
bool recovers() {
  for (int n = 0; n < 3; ++n) {
    try {
      diverges<0>();
      return false;
    } catch (const std::runtime_error&) {
    }
    if (!transposes<Fault::kNone>() || !scans<Fault::kNone>()) return false;
  }
  return true;
}

template <unsigned int kThreads, size_t kBytes>
bool launches() {
  std::vector<int> values(2048);
  MBF_LAUNCH(reverse<Fault::kNone>, 1, kThreads, kBytes, nullptr, values.data());
  return true;
}

// What was launched, and the bytes of a sum of fp16 and of a scan.
bool counted() {
  mbf::emulation::reset_traffic();
  sums<__half, Fault::kNone>();
  scans<Fault::kNone>();
  scans<Fault::kNone>();
  const auto& all = mbf::emulation::traffic();
  const auto is = [&](size_t n, const char* name, int64_t launches, int64_t loaded, int64_t stored) {
    return all[n].kernel == name && all[n].launches == launches && all[n].loaded == loaded && all[n].stored == stored;
  };
  return all.size() == 2 && is(0, "sum", 1, 2 * 70001 + 5 * 4, 5 * 4) && is(1, "scan", 2, 2 * 1024, 2 * 1024);
}

// 16-bit floats against what IEEE says, at ties, ends of the range and NaN.
bool halves() {
  const auto half = [](float x) { return static_cast<int>(__half_as_ushort(__float2half_rn(x))); };
  const auto bfloat = [](float x) { return static_cast<int>(__bfloat16_as_ushort(__float2bfloat16_rn(x))); };
  bool right = half(1.0f) == 0x3c00 && half(65519.99f) == 0x7bff && half(65520.0f) == 0x7c00 &&
               half(2049.0f) == 0x6800 && half(2051.0f) == 0x6802 && half(-0x1p-24f) == 0x8001 && half(0x1p-25f) == 0 &&
               half(0x1.8p-24f) == 2 && half(0x1.ffep-15f) == 0x400 && half(NAN) == 0x7fff &&
               bfloat(1.00390625f) == 0x3f80 && bfloat(1.01171875f) == 0x3f82 && bfloat(3.4e38f) == 0x7f80 &&
               bfloat(-1e-40f) == 0x8001 && bfloat(NAN) == 0x7fff;
  for (int bits = 0; bits < 0x7c00; ++bits) right = right && half(__half2float(__ushort_as_half(bits))) == bits;
  for (int bits = 0; bits < 0x7f80; ++bits) {
    right = right && bfloat(__bfloat162float(__ushort_as_bfloat16(bits))) == bits;
  }
  return right;
}

const std::map<std::string, std::function<bool()>> kCases = {
    {"sum", sums<float, Fault::kNone>},
    {"sum-of-halves", sums<__half, Fault::kNone>},
    {"sum-of-bfloats", sums<__nv_bfloat16, Fault::kNone>},
    {"count", counts<Fault::kNone>},
    {"scan", scans<Fault::kNone>},
    {"transpose", transposes<Fault::kNone>},
    {"histogram", histograms<Fault::kNone>},
    {"histogram-without-atomic", histograms<Fault::kNoAtomic>},
    {"reverse", reverses<Fault::kNone>},
    {"rotate", rotates<Fault::kNone>},
    {"vote", votes},
    {"sum-last", sums_last<Fault::kNone>},
    {"sum-last-without-atomic", sums_last<Fault::kNoAtomic>},
    {"recover", recovers},
    {"counted", counted},
    {"halves", halves},
    {"sum-without-barrier", sums<float, Fault::kNoBarrier>},
    {"scan-without-barrier", scans<Fault::kNoBarrier>},
    {"transpose-without-barrier", transposes<Fault::kNoBarrier>},
    {"reverse-without-barrier", reverses<Fault::kNoBarrier>},
    {"rotate-without-barrier", rotates<Fault::kNoBarrier>},
    {"count-without-atomic", counts<Fault::kNoAtomic>},
    {"transpose-unset", transposes<Fault::kUnset>},
    {"reverse-unset", reverses<Fault::kUnset>},
    {"static-unset", [] { return relies(rely_on_static, 0); }},
    {"dynamic-unset", [] { return relies(rely_on_dynamic, 128); }},
    {"transpose-beyond", transposes<Fault::kBeyond>},
    {"reverse-beyond", reverses<Fault::kBeyond>},
    {"static-beyond", writes_beyond_static},
    {"leave-before-barrier", diverges<0>},
    {"two-barriers", diverges<1>},
    {"leave-before-shuffle", diverges<2>},
    {"two-masks", diverges<3>},
    {"absent-lane", diverges<4>},
    {"misaligned", misaligned},
    {"too-many-threads", launches<1025, 8192>},
    {"too-much-shared", launches<32, 300000>},
};

}  // namespace

int main(int, char** arguments) {
  mbf::emulation::set_seed(std::stoull(arguments[2]));
  try {
    std::puts(kCases.at(arguments[1])() ? "right" : "wrong");
  } catch (const std::runtime_error& error) {
    std::puts(error.what());
  }
}
