#include "orthonormal.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "../lora/micro.h"
#include "../memory/stream.h"
#include "../simd.h"
#include "cholesky.h"
#include "finite.h"

namespace mbf::cpu::linalg {
namespace {

constexpr int64_t kBlock = 32768;  // numbers of a block of columns in fp64: 256 KiB, for the second-level cache
constexpr double kOneRound = 3e3;  // the condition up to which one round leaves Q Qᵀ − I below 1e-8
constexpr double kInFloats = 2;    // the length of L⁻¹'s rows up to which Q = L⁻¹ A loses nothing in fp32
constexpr double kFloatLengths[2] = {1e-30, 1e30};  // of rows whose inverses fp32 holds to its last place
constexpr double kSquares[2] = {1e-280, 1e280};     // within which the Gram's diagonal means what it says
constexpr int64_t kFloatDepth = 512;                // numbers of a row whose products are summed in fp32
constexpr int64_t kBlocksAhead = 2;    // of such blocks, from the one that is summed to the one that is fetched
constexpr double kGramInFloats = 1.5;  // the length of L⁻¹'s rows up to which that leaves Q Qᵀ − I below 1e-7
constexpr double kFloatSquares[2] = {1e-24, 1e24};  // within which sums of products in fp32 lose nothing

// Rows of so many numbers, and never a power of two apart, where they would share few sets of the caches.
int64_t padded(int64_t columns) { return (columns + 15) / 16 * 16 + 8; }

int64_t block_columns(int64_t r) { return std::max<int64_t>(64, kBlock / r / 8 * 8); }

// The same in fp32, in half the memory of two blocks.
int64_t float_columns(int64_t r) { return 2 * block_columns(r); }

// Memory of the calling thread, which lasts: two blocks, and a row of one in fp32.
struct Memory {
  Scratch<double> blocks[2];
  Scratch<float> row;
  int64_t size = 0, width = 0;

  static Memory& of(int64_t r) {
    static thread_local Memory memory;
    const int64_t columns = block_columns(r);
    if (memory.size < r * padded(columns)) {
      memory.size = std::max(2 * kBlock, r * padded(columns));
      for (auto& block : memory.blocks) block = Scratch<double>(memory.size);
    }
    if (memory.width < padded(columns)) {
      memory.width = padded(columns);
      memory.row = Scratch<float>(memory.width);
    }
    return memory;
  }
};

void to_doubles(const float* from, int64_t n, double* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = from[i];
}
void to_floats(const double* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<float>(from[i]);
}
#if MBF_HAS_AVX2
MBF_AVX2 void to_doubles_avx2(const float* from, int64_t n, double* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = from[i];
}
MBF_AVX2 void to_floats_avx2(const double* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<float>(from[i]);
}
#else
constexpr auto to_doubles_avx2 = to_doubles;
constexpr auto to_floats_avx2 = to_floats;
#endif

void widen(const float* from, int64_t n, double* to) {
  has_avx2() ? to_doubles_avx2(from, n, to) : to_doubles(from, n, to);
}
void narrow(const double* from, int64_t n, float* to) {
  has_avx2() ? to_floats_avx2(from, n, to) : to_floats(from, n, to);
}

const char* element(const Matrix& A, int64_t row, int64_t column) {
  return static_cast<const char*>(A.data) + (row * A.d + column) * element_size(A.type);
}

// Columns `first` .. of A as rows of `ld` numbers in fp64, the last ones zero.
void read(const Matrix& A, int64_t first, int64_t columns, Memory& memory, double* to, int64_t ld) {
  for (int64_t t = 0; t < A.r; ++t, to += ld) {
    const char* from = element(A, t, first);
    if (A.type == ScalarType::Double) {
      std::memcpy(to, from, columns * sizeof(double));
    } else if (A.type == ScalarType::Float) {
      widen(reinterpret_cast<const float*>(from), columns, to);
    } else {
      micro<float>().widen(from, A.type, columns, memory.row.get());
      widen(memory.row.get(), columns, to);
    }
    std::fill(to + columns, to + ld, 0.0);
  }
}

// The other way, into a matrix of A's dtype and sizes.
void store(const double* from, int64_t ld, const Matrix& A, int64_t first, int64_t columns, Memory& memory, void* to) {
  for (int64_t t = 0; t < A.r; ++t, from += ld) {
    char* row = static_cast<char*>(to) + (element(A, t, first) - static_cast<const char*>(A.data));
    if (A.type == ScalarType::Double) {
      std::memcpy(row, from, columns * sizeof(double));
    } else if (A.type == ScalarType::Float) {
      narrow(from, columns, reinterpret_cast<float*>(row));
    } else {
      narrow(from, columns, memory.row.get());
      micro<float>().narrow(memory.row.get(), columns, row, A.type);
    }
  }
}

// Columns `first` .. of A in fp32 as rows of padded(columns) numbers, the last ones zero; calls use(column, columns) of
// every kFloatDepth of them as soon as they are there, the last few with zeros to a multiple of 16.
template <typename Use>
const float* floats(const Matrix& A, int64_t first, int64_t columns, Memory& memory, const Use& use) {
  const int64_t ld = padded(columns);
  float* rows = reinterpret_cast<float*>(memory.blocks[0].get());
  for (int64_t from = 0; from < columns; from += kFloatDepth) {
    const int64_t some = std::min(kFloatDepth, columns - from), end = from + some;
    for (int64_t t = 0; t < A.r; ++t) {
      micro<float>().widen(element(A, t, first + from), A.type, some, rows + t * ld + from);
      if (end == columns) std::fill(rows + t * ld + end, rows + (t + 1) * ld, 0.0f);
    }
    use(from, (some + 15) / 16 * 16);  // whole vectors of any width, and no number of the next row
  }
  return rows;
}

// The columns of a matrix from one on, as what is read next.
Ahead ahead_of(const Matrix& A, int64_t column) {
  const int64_t size = element_size(A.type);
  return {element(A, 0, column), A.d * size, A.r, size};
}

// Block `n` of kFloatDepth columns, of A or beyond its end of the matrix after it, as what is read some time from now.
Ahead block_of(const Matrix& A, const Matrix* next, int64_t n) {
  const int64_t blocks = (A.d + kFloatDepth - 1) / kFloatDepth;
  if (n < blocks) return ahead_of(A, n * kFloatDepth);
  const bool there = next != nullptr && (n - blocks) * kFloatDepth < next->d;
  return there ? ahead_of(*next, (n - blocks) * kFloatDepth) : Ahead{};
}

// A lower triangle [r, r] as micro.h takes it, panel by panel: rows of as many numbers as the panel is deep.
template <typename C>
std::vector<C> in_panels(const std::vector<double>& T, int64_t r) {
  std::vector<C> out;
  for (int64_t first = 0; first < r; first += kTrianglePanel) {
    const int64_t depth = std::min(first + kTrianglePanel, r);
    for (int64_t t = first; t < depth; ++t) out.insert(out.end(), &T[t * r], &T[t * r] + depth);
  }
  return out;
}

// Calls use(first column, columns, rows of `ld` numbers) for blocks of the columns of A, of T A, or of U T A.
template <typename Use>
void in_blocks(const Matrix& A, const std::vector<double>& T, const std::vector<double>& U, const Use& use) {
  Memory& memory = Memory::of(A.r);
  const int64_t most = block_columns(A.r);
  std::vector<std::vector<double>> triangles;
  for (const auto* triangle : {&T, &U}) {
    if (!triangle->empty()) triangles.push_back(in_panels<double>(*triangle, A.r));
  }
  for (int64_t first = 0; first < A.d; first += most) {
    const int64_t columns = std::min(most, A.d - first), ld = padded(columns);
    double *here = memory.blocks[0].get(), *other = memory.blocks[1].get();
    read(A, first, columns, memory, here, ld);
    for (const auto& triangle : triangles) {
      micro<double>().triangle(triangle.data(), A.r, here, ld, ld, {other, ScalarType::Double, ld}, false);
      std::swap(here, other);
    }
    use(first, columns, here, ld, memory);
  }
}

}  // namespace

Orthonormal::Orthonormal(const Matrix& A, const Matrix* next) : A_(A), length_(A.r) {
  if (A.type != ScalarType::Double && try_in_floats(next)) return;
  const int64_t r = A.r;
  std::vector<double> gram(r * r);
  const auto measure = [&](int64_t, int64_t, const double* X, int64_t ld, Memory&) {
    micro<double>().gram(X, r, ld, ld, {}, gram.data());
  };
  in_blocks(A, {}, {}, measure);
  for (int64_t i = 0; i < r; ++i) {
    const double square = gram[i * r + i];
    if (!(square >= kSquares[0] && square <= kSquares[1])) {
      status_ = all_finite(A.data, A.type, r * A.d) ? kGivenUp : kNotFinite;
      return;
    }
    length_[i] = std::sqrt(square);
  }
  scale_to_unit(gram);
  const double condition = factor_round(gram, 0);
  if (status_ != kDone) return;
  const double longest = longest_row();
  fold_lengths();
  if (A.type != ScalarType::Double && condition <= kOneRound) {
    const auto [least, most] = std::minmax_element(length_.begin(), length_.end());
    if (longest <= kInFloats && *least >= kFloatLengths[0] && *most <= kFloatLengths[1]) {
      in_floats_ = in_panels<float>(inverse_[0], r);
    }
    return;
  }
  std::fill(gram.begin(), gram.end(), 0.0);
  in_blocks(A, inverse_[0], {}, measure);
  for (int64_t i = 0; i < r; ++i) {
    for (int64_t j = 0; j < i; ++j) gram[j * r + i] = gram[i * r + j];
  }
  factor_round(gram, 1);
}

// The Gram matrix of the rows at unit length, both triangles.
void Orthonormal::scale_to_unit(std::vector<double>& gram) const {
  const int64_t r = A_.r;
  for (int64_t i = 0; i < r; ++i) {
    for (int64_t j = 0; j < i; ++j) gram[j * r + i] = gram[i * r + j] /= length_[i] * length_[j];
    gram[i * r + i] = 1;
  }
}

// The greatest length of a row of the first round's L⁻¹.
double Orthonormal::longest_row() const {
  double longest = 0;
  for (int64_t i = 0; i < A_.r; ++i) {
    const double* row = &inverse_[0][i * A_.r];
    longest = std::max(longest, std::sqrt(std::inner_product(row, row + i + 1, row, 0.0)));
  }
  return longest;
}

void Orthonormal::fold_lengths() {
  for (int64_t i = 0; i < A_.r; ++i) {
    for (int64_t j = 0; j <= i; ++j) inverse_[0][i * A_.r + j] /= length_[j];
  }
}

// Products of kFloatDepth numbers are summed in fp32, and these sums in fp64. So the rounding errors of a sum of many
// products stay apart, and it is good to about 1e-8 of the lengths.
bool Orthonormal::try_in_floats(const Matrix* next) {
  const int64_t r = A_.r, most = float_columns(r);
  std::vector<double> gram(r * r);
  Memory& memory = Memory::of(r);
  const float* rows = nullptr;
  for (int64_t first = 0; first < A_.d; first += most) {
    const int64_t columns = std::min(most, A_.d - first), ld = padded(columns);
    const float* here = reinterpret_cast<const float*>(memory.blocks[0].get());
    rows = floats(A_, first, columns, memory, [&](int64_t from, int64_t some) {
      const Ahead ahead = block_of(A_, next, (first + from) / kFloatDepth + kBlocksAhead);
      micro<float>().gram(here + from, r, some, ld, ahead, gram.data());
    });
  }
  for (int64_t i = 0; i < r; ++i) {
    const double square = gram[i * r + i];
    if (!(square >= kFloatSquares[0] && square <= kFloatSquares[1])) return false;
    length_[i] = std::sqrt(square);
  }
  scale_to_unit(gram);
  if (!std::isfinite(factor_round(gram, 0)) || !(longest_row() <= kGramInFloats)) {
    status_ = kDone;
    return false;
  }
  fold_lengths();
  in_floats_ = in_panels<float>(inverse_[0], r);
  if (A_.d <= most) rows_ = rows;
  return true;
}

void Orthonormal::put_aside() {
  rows_ = nullptr;
  for (auto& triangle : upper_) std::vector<double>().swap(triangle);
  if (!in_floats_.empty()) std::vector<double>().swap(inverse_[0]);
}

double Orthonormal::factor_round(std::vector<double>& gram, int round) {
  inverse_[round].resize(A_.r * A_.r);
  const double condition = factor(gram.data(), A_.r, inverse_[round].data());
  if (!std::isfinite(condition)) status_ = kGivenUp;
  upper_[round] = gram;
  return condition;
}

void Orthonormal::write(void* Q, bool past_caches) const {
  if (status_ != kDone) return fill_nan(Q, A_.type, A_.r * A_.d);
  if (in_floats_.empty()) {
    in_blocks(A_, inverse_[0], inverse_[1],
              [&](int64_t first, int64_t columns, const double* X, int64_t ld, Memory& memory) {
                store(X, ld, A_, first, columns, memory, Q);
              });
    return;
  }
  Memory& memory = Memory::of(A_.r);
  const int64_t most = rows_ != nullptr ? A_.d : std::min(kFloatDepth, float_columns(A_.r));
  for (int64_t first = 0; first < A_.d; first += most) {
    const int64_t columns = std::min(most, A_.d - first);
    const float* rows = rows_ != nullptr ? rows_ : floats(A_, first, columns, memory, [](int64_t, int64_t) {});
    char* to = static_cast<char*>(Q) + first * element_size(A_.type);
    micro<float>().triangle(in_floats_.data(), A_.r, rows, padded(columns), columns, {to, A_.type, A_.d}, past_caches);
  }
  if (past_caches) streamed();
}

void Orthonormal::write_factor(double* L) const {  // of A = diag(length) L₁ L₂ Q
  const int64_t r = A_.r;
  for (int64_t i = 0; i < r; ++i) {
    for (int64_t j = 0; j < r; ++j) {
      double sum = 0;
      for (int64_t k = j; k <= i; ++k) sum += upper_[0][k * r + i] * upper_[1][j * r + k];
      L[i * r + j] = length_[i] * sum;
    }
  }
}

}  // namespace mbf::cpu::linalg
