// The functions of micro.h in GCC's vector extension, compiled once an instruction set by micro_*.cpp, which define
// MBF_ISA (the namespace), MBF_BYTES (of a vector) and the block sizes below, and switch the target on before they
// include this file. Nothing of the standard library may be used here: an instance compiled for AVX-512 would be linked
// into code that runs everywhere.
//
// Block sizes, so that the accumulators and operands of a tile stay in registers:
//   MBF_TILE_ROWS × MBF_TILE_VECTORS   of expand and outer
//   3 × MBF_DOT_RANKS                  of project

namespace mbf::cpu::MBF_ISA {
namespace {

#define MBF_INLINE inline __attribute__((always_inline))
#define MBF_UNROLL _Pragma("GCC unroll 16")
// Keeps a vector in a register that the compiler would rather read from memory again for each of its uses.
#if defined(__x86_64__)
#define MBF_PIN(v) asm("" : "+v"(v))
#else
#define MBF_PIN(v) (void)(v)
#endif

using torch::headeronly::ScalarType;

template <typename C>
struct Vector {
  static constexpr int lanes = MBF_BYTES / sizeof(C);
  typedef C type __attribute__((vector_size(MBF_BYTES)));
  typedef C unaligned __attribute__((vector_size(MBF_BYTES), aligned(sizeof(C)), may_alias));
};

template <typename C>
using Vec = typename Vector<C>::type;
template <typename C>
constexpr int kLanes = Vector<C>::lanes;

using Bits32 = uint32_t __attribute__((vector_size(MBF_BYTES)));
using Int32 = int32_t __attribute__((vector_size(MBF_BYTES)));
using Int64 = int64_t __attribute__((vector_size(MBF_BYTES)));
using Bits16 = uint16_t __attribute__((vector_size(MBF_BYTES / 2)));
using Bits16Unaligned = uint16_t __attribute__((vector_size(MBF_BYTES / 2), aligned(2), may_alias));

template <int n>
struct Size {
  static constexpr int value = n;
};

template <typename C>
MBF_INLINE Vec<C> broadcast(C value) {
  return value - Vec<C>{};
}

// -- loads and stores, whole and partial --------------------------------------------------------------------

MBF_INLINE Vec<float> load(const float* p) { return *reinterpret_cast<const Vector<float>::unaligned*>(p); }
MBF_INLINE Vec<double> load(const double* p) { return *reinterpret_cast<const Vector<double>::unaligned*>(p); }
MBF_INLINE void store(float* p, Vec<float> v) { *reinterpret_cast<Vector<float>::unaligned*>(p) = v; }
MBF_INLINE void store(double* p, Vec<double> v) { *reinterpret_cast<Vector<double>::unaligned*>(p) = v; }

MBF_INLINE Vec<float> load(const BFloat16* p) {
  const Bits16 bits = *reinterpret_cast<const Bits16Unaligned*>(p);
  return reinterpret_cast<Vec<float>>(__builtin_convertvector(bits, Bits32) << 16);
}

MBF_INLINE void store(BFloat16* p, Vec<float> v) {
  const Bits32 bits = reinterpret_cast<Bits32>(v);
  const Bits32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Bits32 nan = reinterpret_cast<Bits32>(v != v);
  *reinterpret_cast<Bits16Unaligned*>(p) = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), Bits16);
}

#if MBF_BYTES == 64
MBF_INLINE Vec<float> load(const Half* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
MBF_INLINE void store(Half* p, Vec<float> v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
#elif MBF_BYTES == 32
MBF_INLINE Vec<float> load(const Half* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
MBF_INLINE void store(Half* p, Vec<float> v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
#else
MBF_INLINE Vec<float> load(const Half* p) {
  Vec<float> v;
  for (int lane = 0; lane < kLanes<float>; ++lane) v[lane] = static_cast<float>(p[lane]);
  return v;
}
MBF_INLINE void store(Half* p, Vec<float> v) {
  for (int lane = 0; lane < kLanes<float>; ++lane) p[lane] = static_cast<Half>(v[lane]);
}
#endif

// The first n < lanes elements, zeros behind them.
template <typename C, typename T>
MBF_INLINE Vec<C> load_first(const T* p, int64_t n) {
  alignas(64) T padded[kLanes<C>] = {};
  __builtin_memcpy(padded, p, n * sizeof(T));
  return load(padded);
}

template <typename C, typename T>
MBF_INLINE void store_first(T* p, Vec<C> v, int64_t n) {
  alignas(64) T padded[kLanes<C>];
  store(padded, v);
  __builtin_memcpy(p, padded, n * sizeof(T));
}

// -- dropout ------------------------------------------------------------------------------------------------

// v where bit `position + lane` of the stream is set, else 0.
template <typename C>
MBF_INLINE Vec<C> keep(Vec<C> v, const uint8_t* bits, int64_t position) {
  uint32_t word;
  __builtin_memcpy(&word, bits + (position >> 3), 4);
  word >>= position & 7;
  if constexpr (sizeof(C) == 4) {
#if MBF_BYTES == 64
    return _mm512_maskz_mov_ps(static_cast<__mmask16>(word), v);
#else
    Int32 bit;
    for (int lane = 0; lane < kLanes<C>; ++lane) bit[lane] = 1 << lane;
    const Int32 kept = ((static_cast<int32_t>(word) - Int32{}) & bit) == bit;
    return reinterpret_cast<Vec<C>>(reinterpret_cast<Int32>(v) & kept);
#endif
  } else {
    Int64 bit;
    for (int lane = 0; lane < kLanes<C>; ++lane) bit[lane] = 1 << lane;
    const Int64 kept = ((static_cast<int64_t>(word) - Int64{}) & bit) == bit;
    return reinterpret_cast<Vec<C>>(reinterpret_cast<Int64>(v) & kept);
  }
}

constexpr uint32_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;
constexpr uint32_t kStep0 = 0x9E3779B9, kStep1 = 0xBB67AE85;

// Philox 4x32-10 (Salmon et al., SC 2011) of one block, and which of its eight half-words reach the threshold.
MBF_INLINE uint8_t mask_byte(uint32_t key0, uint32_t key1, uint64_t block, uint32_t threshold) {
  uint32_t c0 = static_cast<uint32_t>(block), c1 = static_cast<uint32_t>(block >> 32), c2 = 0, c3 = 0;
  for (int round = 0; round < 10; ++round, key0 += kStep0, key1 += kStep1) {
    const uint64_t p0 = uint64_t{kMultiplier0} * c0, p1 = uint64_t{kMultiplier1} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ key0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ key1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
  }
  const uint32_t words[4] = {c0, c1, c2, c3};
  uint32_t byte = 0;
  for (int w = 0; w < 4; ++w) {
    byte |= static_cast<uint32_t>((words[w] & 0xffff) >= threshold) << (2 * w);
    byte |= static_cast<uint32_t>((words[w] >> 16) >= threshold) << (2 * w + 1);
  }
  return static_cast<uint8_t>(byte);
}

#if MBF_BYTES == 64
// Eight blocks, one a 64-bit lane: a product reads the low halves only, so what stands in the high ones does not
// matter.
MBF_INLINE void mask_8_bytes(uint32_t key0, uint32_t key1, __m512i counter, uint32_t high, __m512i threshold,
                             uint8_t* out) {
  const __m512i m0 = _mm512_set1_epi64(kMultiplier0), m1 = _mm512_set1_epi64(kMultiplier1);
  __m512i c0 = counter, c1 = _mm512_set1_epi64(high), c2 = _mm512_setzero_si512(), c3 = c2;
  MBF_UNROLL
  for (int round = 0; round < 10; ++round) {
    const __m512i p0 = _mm512_mul_epu32(c0, m0), p1 = _mm512_mul_epu32(c2, m1);
    const __m512i k0 = _mm512_set1_epi64(key0), k1 = _mm512_set1_epi64(key1);
    c0 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), c1, k0, 0x96);
    c2 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), c3, k1, 0x96);
    c1 = p1;
    c3 = p0;
    key0 += kStep0;
    key1 += kStep1;
  }
  const __m512i low = _mm512_set1_epi64(0xffffffff);
  const __m512i a = _mm512_or_si512(_mm512_and_si512(c0, low), _mm512_slli_epi64(c1, 32));
  const __m512i b = _mm512_or_si512(_mm512_and_si512(c2, low), _mm512_slli_epi64(c3, 32));
  const __m512i first = _mm512_permutex2var_epi64(a, _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), b);
  const __m512i second = _mm512_permutex2var_epi64(a, _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15), b);
  const uint32_t bits[2] = {_mm512_cmpge_epu16_mask(first, threshold), _mm512_cmpge_epu16_mask(second, threshold)};
  __builtin_memcpy(out, bits, 8);
}
#elif MBF_BYTES == 32
// Four blocks, one a 64-bit lane, as above.
MBF_INLINE void mask_4_bytes(uint32_t key0, uint32_t key1, __m256i counter, uint32_t high, __m256i threshold,
                             uint8_t* out) {
  const __m256i m0 = _mm256_set1_epi64x(kMultiplier0), m1 = _mm256_set1_epi64x(kMultiplier1);
  __m256i c0 = counter, c1 = _mm256_set1_epi64x(high), c2 = _mm256_setzero_si256(), c3 = c2;
  MBF_UNROLL
  for (int round = 0; round < 10; ++round) {
    const __m256i p0 = _mm256_mul_epu32(c0, m0), p1 = _mm256_mul_epu32(c2, m1);
    const __m256i k0 = _mm256_set1_epi64x(key0), k1 = _mm256_set1_epi64x(key1);
    c0 = _mm256_xor_si256(_mm256_srli_epi64(p1, 32), _mm256_xor_si256(c1, k0));
    c2 = _mm256_xor_si256(_mm256_srli_epi64(p0, 32), _mm256_xor_si256(c3, k1));
    c1 = p1;
    c3 = p0;
    key0 += kStep0;
    key1 += kStep1;
  }
  const __m256i a = _mm256_blend_epi32(c0, _mm256_slli_epi64(c1, 32), 0xaa);
  const __m256i b = _mm256_blend_epi32(c2, _mm256_slli_epi64(c3, 32), 0xaa);
  const __m256i even = _mm256_unpacklo_epi64(a, b), odd = _mm256_unpackhi_epi64(a, b);
  const __m256i kept_even = _mm256_cmpeq_epi16(_mm256_max_epu16(even, threshold), even);
  const __m256i kept_odd = _mm256_cmpeq_epi16(_mm256_max_epu16(odd, threshold), odd);
  const int bits = _mm256_movemask_epi8(_mm256_packs_epi16(kept_even, kept_odd));
  __builtin_memcpy(out, &bits, 4);
}
#endif

void mask_bits(uint64_t seed, uint32_t threshold, uint64_t first, int64_t blocks, uint8_t* bits) {
  const uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  int64_t n = 0;
#if MBF_BYTES >= 32
  constexpr int kStep = MBF_BYTES / 8;
  for (; n + kStep <= blocks; n += kStep) {
    const uint64_t block = first + n;
    if (static_cast<uint32_t>(block) > UINT32_MAX - kStep) break;  // the counter's high word would change within a step
    const int64_t low = static_cast<uint32_t>(block);
    const uint32_t high = static_cast<uint32_t>(block >> 32);
#if MBF_BYTES == 64
    const __m512i counter = _mm512_add_epi64(_mm512_set1_epi64(low), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
    mask_8_bytes(key0, key1, counter, high, _mm512_set1_epi16(static_cast<short>(threshold)), bits + n);
#else
    const __m256i counter = _mm256_add_epi64(_mm256_set1_epi64x(low), _mm256_setr_epi64x(0, 1, 2, 3));
    mask_4_bytes(key0, key1, counter, high, _mm256_set1_epi16(static_cast<short>(threshold)), bits + n);
#endif
  }
#endif
  for (; n < blocks; ++n) bits[n] = mask_byte(key0, key1, first + n, threshold);
}

// -- project ------------------------------------------------------------------------------------------------

template <typename C>
MBF_INLINE C sum(Vec<C> v) {
#if MBF_BYTES == 64
  if constexpr (sizeof(C) == 4) return _mm512_reduce_add_ps(v);
#endif
  C total = 0;
  for (int lane = 0; lane < kLanes<C>; ++lane) total += v[lane];
  return total;
}

// The sums of four vectors.
template <typename C>
MBF_INLINE void sum_4(const Vec<C> v[4], C out[4]) {
#if MBF_BYTES >= 32
  if constexpr (sizeof(C) == 4) {
    __m256 folded[4];
    MBF_UNROLL
    for (int n = 0; n < 4; ++n) {
#if MBF_BYTES == 64
      folded[n] = _mm256_add_ps(_mm512_castps512_ps256(v[n]), _mm512_extractf32x8_ps(v[n], 1));
#else
      folded[n] = v[n];
#endif
    }
    const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(folded[0], folded[1]), _mm256_hadd_ps(folded[2], folded[3]));
    const __m128 sums = _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
    _mm_storeu_ps(out, sums);
    return;
  }
#endif
  for (int n = 0; n < 4; ++n) out[n] = sum<C>(v[n]);
}

// Columns of a that are taken at once, so that MBF_DOT_RANKS rows of a stay in the first-level cache.
constexpr int64_t kDotColumns = 1024;

template <typename C, typename T, int R, int J>
MBF_INLINE void dot_tile(const T* x, int64_t ldx, int64_t columns, const C* a, int64_t lda, Mask mask, C* h,
                         int64_t ldh, bool add) {
  Vec<C> s[R][J];
  MBF_UNROLL
  for (int t = 0; t < R; ++t) {
    MBF_UNROLL
    for (int j = 0; j < J; ++j) s[t][j] = Vec<C>{};
  }
  const auto step = [&](int64_t i, const Vec<C>(&v)[R]) __attribute__((always_inline)) {
    MBF_UNROLL
    for (int j = 0; j < J; ++j) {
      Vec<C> row = load(a + j * lda + i);
      MBF_PIN(row);
      MBF_UNROLL
      for (int t = 0; t < R; ++t) s[t][j] += v[t] * row;
    }
  };
  int64_t i = 0;
  if (mask.bits == nullptr) {
    for (; i + kLanes<C> <= columns; i += kLanes<C>) {
      Vec<C> v[R];
      MBF_UNROLL
      for (int t = 0; t < R; ++t) v[t] = load(x + t * ldx + i);
      step(i, v);
    }
  } else {
    for (; i + kLanes<C> <= columns; i += kLanes<C>) {
      Vec<C> v[R];
      MBF_UNROLL
      for (int t = 0; t < R; ++t) v[t] = keep<C>(load(x + t * ldx + i), mask.bits, mask.first + t * mask.ld + i);
      step(i, v);
    }
  }
  if (i < columns) {
    Vec<C> v[R];
    MBF_UNROLL
    for (int t = 0; t < R; ++t) {
      v[t] = load_first<C>(x + t * ldx + i, columns - i);
      if (mask.bits != nullptr) v[t] = keep<C>(v[t], mask.bits, mask.first + t * mask.ld + i);
    }
    step(i, v);
  }
  MBF_UNROLL
  for (int t = 0; t < R; ++t) {
    C sums[J];
    if constexpr (J % 4 == 0) {
      MBF_UNROLL
      for (int j = 0; j < J; j += 4) sum_4<C>(&s[t][j], &sums[j]);
    } else {
      MBF_UNROLL
      for (int j = 0; j < J; ++j) sums[j] = sum<C>(s[t][j]);
    }
    MBF_UNROLL
    for (int j = 0; j < J; ++j) h[t * ldh + j] = add ? h[t * ldh + j] + sums[j] : sums[j];
  }
}

// All rows against J rows of a.
template <typename C, typename T, int J>
__attribute__((noinline)) void dot_ranks(const T* x, int64_t ldx, int64_t rows, int64_t columns, const C* a,
                                         int64_t lda, Mask mask, C* h, int64_t ldh, bool add) {
  const int64_t parts = (columns + kDotColumns - 1) / kDotColumns;
  const int64_t part = ((columns + parts - 1) / parts + kLanes<C> - 1) / kLanes<C> * kLanes<C>;
  for (int64_t i = 0; i < columns; i += part) {
    const int64_t width = columns - i < part ? columns - i : part;
    int64_t t = 0;
    for (; t + 3 <= rows; t += 3) {
      dot_tile<C, T, 3, J>(x + t * ldx + i, ldx, width, a + i, lda, {mask.bits, mask.first + t * mask.ld + i, mask.ld},
                           h + t * ldh, ldh, add || i > 0);
    }
    for (; t < rows; ++t) {
      dot_tile<C, T, 1, J>(x + t * ldx + i, ldx, width, a + i, lda, {mask.bits, mask.first + t * mask.ld + i, mask.ld},
                           h + t * ldh, ldh, add || i > 0);
    }
  }
}

template <typename C, typename T>
void dot_all(const T* x, int64_t ldx, int64_t rows, int64_t columns, const C* a, int64_t lda, int64_t r, Mask mask,
             C* h, bool add) {
  int64_t j = 0;
#if MBF_DOT_RANKS >= 8
  for (; j + 8 <= r; j += 8) dot_ranks<C, T, 8>(x, ldx, rows, columns, a + j * lda, lda, mask, h + j, r, add);
#endif
  for (; j + 4 <= r; j += 4) dot_ranks<C, T, 4>(x, ldx, rows, columns, a + j * lda, lda, mask, h + j, r, add);
  for (; j + 2 <= r; j += 2) dot_ranks<C, T, 2>(x, ldx, rows, columns, a + j * lda, lda, mask, h + j, r, add);
  for (; j < r; ++j) dot_ranks<C, T, 1>(x, ldx, rows, columns, a + j * lda, lda, mask, h + j, r, add);
}

// Where every visit to x would mask it anew, and that is dear, visits after the first are to a copy in the first cache.
constexpr bool copies(int64_t visits) { return visits > (MBF_BYTES == 64 ? 3 : 2); }

template <typename C, typename T>
void copy_kept(const T* x, int64_t ldx, int64_t rows, int64_t columns, Mask mask, C* out, int64_t ld) {
  for (int64_t t = 0; t < rows; ++t) {
    const int64_t first = mask.first + t * mask.ld;
    int64_t i = 0;
    for (; i + kLanes<C> <= columns; i += kLanes<C>) {
      store(out + t * ld + i, keep<C>(load(x + t * ldx + i), mask.bits, first + i));
    }
    if (i < columns) {
      const int64_t last = columns - i;
      store_first<C>(out + t * ld + i, keep<C>(load_first<C>(x + t * ldx + i, last), mask.bits, first + i), last);
    }
  }
}

template <typename C, typename T>
void project_rows(const T* x, int64_t ldx, int64_t rows, int64_t columns, const C* a, int64_t lda, int64_t r, Mask mask,
                  C* h) {
  if (mask.bits == nullptr || !copies((r + MBF_DOT_RANKS - 1) / MBF_DOT_RANKS)) {
    dot_all<C, T>(x, ldx, rows, columns, a, lda, r, mask, h, false);
    return;
  }
  constexpr int64_t kRows = 12, kColumns = 512;
  alignas(64) C kept[kRows * kColumns];
  for (int64_t t = 0; t < rows; t += kRows) {
    const int64_t some = rows - t < kRows ? rows - t : kRows;
    for (int64_t i = 0; i < columns; i += kColumns) {
      const int64_t width = columns - i < kColumns ? columns - i : kColumns;
      copy_kept<C, T>(x + t * ldx + i, ldx, some, width, {mask.bits, mask.first + t * mask.ld + i, mask.ld}, kept,
                      kColumns);
      dot_all<C, C>(kept, kColumns, some, width, a + i, lda, r, {}, h + t * r, i > 0);
    }
  }
}

// -- expand and outer: c[i, :] (+)= Σ_k a[i, k] b[k, :] on R × N vectors ------------------------------------

enum class Masked { kNothing, kFactor, kProduct };

// One tile; `last` is the number of valid lanes of its last vector. Element (i, k) of a lies at a[i * ai + k * ak].
template <typename C, typename B, typename Out, int R, int N, Masked masked>
MBF_INLINE void product_tile(int64_t depth, const C* a, int64_t ai, int64_t ak, const B* b, int64_t ldb, Out* c,
                             int64_t ldc, Mask mask, bool add, int64_t last) {
  constexpr int L = kLanes<C>;
  const bool whole = last == L;
  Vec<C> s[R][N];
  MBF_UNROLL
  for (int i = 0; i < R; ++i) {
    MBF_UNROLL
    for (int n = 0; n < N; ++n) s[i][n] = Vec<C>{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec<C> row[N];
    MBF_UNROLL
    for (int n = 0; n < N; ++n) {
      row[n] = n + 1 < N || whole ? load(b + k * ldb + n * L) : load_first<C>(b + k * ldb + n * L, last);
      if constexpr (masked == Masked::kFactor) {
        row[n] = keep<C>(row[n], mask.bits, mask.first + k * mask.ld + n * L);
      }
    }
    MBF_UNROLL
    for (int i = 0; i < R; ++i) {
      Vec<C> factor = broadcast<C>(a[i * ai + k * ak]);
      MBF_PIN(factor);
      MBF_UNROLL
      for (int n = 0; n < N; ++n) s[i][n] += factor * row[n];
    }
  }
  MBF_UNROLL
  for (int i = 0; i < R; ++i) {
    MBF_UNROLL
    for (int n = 0; n < N; ++n) {
      Vec<C> v = s[i][n];
      Out* out = c + i * ldc + n * L;
      if constexpr (masked == Masked::kProduct) {
        v = keep<C>(v, mask.bits, mask.first + i * mask.ld + n * L);
      }
      if (n + 1 < N || whole) {
        store(out, add ? v + load(out) : v);
      } else {
        store_first<C>(out, add ? v + load_first<C>(out, last) : v, last);
      }
    }
  }
}

// All of c's columns for R of its rows at a time; rows run inside columns, so that b's panel stays in the first cache.
template <typename C, typename B, typename Out, int N, Masked masked>
__attribute__((noinline)) void product_panel(int64_t rows, int64_t depth, const C* a, int64_t ai, int64_t ak,
                                             const B* b, int64_t ldb, Out* c, int64_t ldc, Mask mask, bool add,
                                             int64_t last) {
  int64_t i = 0;
  const auto tile = [&](auto size) __attribute__((always_inline)) {
    constexpr int R = decltype(size)::value;
    for (; i + R <= rows; i += R) {
      Mask here = mask;
      if (masked == Masked::kProduct) here.first += i * mask.ld;
      product_tile<C, B, Out, R, N, masked>(depth, a + i * ai, ai, ak, b, ldb, c + i * ldc, ldc, here, add, last);
    }
  };
  tile(Size<MBF_TILE_ROWS>{});
#if MBF_TILE_ROWS > 4
  tile(Size<4>{});
#endif
  tile(Size<2>{});
  tile(Size<1>{});
}

template <typename C, typename B, typename Out, Masked masked>
void product(int64_t rows, int64_t columns, int64_t depth, const C* a, int64_t ai, int64_t ak, const B* b, int64_t ldb,
             Out* c, int64_t ldc, Mask mask, bool add) {
  constexpr int L = kLanes<C>;
  constexpr int N = MBF_TILE_VECTORS;
  int64_t n = 0;
  for (; n + N * L <= columns; n += N * L, mask.first += N * L) {
    product_panel<C, B, Out, N, masked>(rows, depth, a, ai, ak, b + n, ldb, c + n, ldc, mask, add, L);
  }
  for (; n < columns; n += L, mask.first += L) {
    const int64_t last = columns - n < L ? columns - n : L;
    product_panel<C, B, Out, 1, masked>(rows, depth, a, ai, ak, b + n, ldb, c + n, ldc, mask, add, last);
  }
}

template <typename C, typename T>
void expand_rows(T* y, int64_t ldy, int64_t rows, int64_t columns, const C* z, int64_t r, const C* e, int64_t lde,
                 Mask mask, bool add) {
  if (mask.bits == nullptr) {
    product<C, C, T, Masked::kNothing>(rows, columns, r, z, r, 1, e, lde, y, ldy, mask, add);
  } else {
    product<C, C, T, Masked::kProduct>(rows, columns, r, z, r, 1, e, lde, y, ldy, mask, add);
  }
}

template <typename C, typename T>
void outer_rows(const T* x, int64_t ldx, int64_t rows, int64_t columns, const C* z, int64_t r, Mask mask, C* g,
                int64_t ldg, bool add) {
  if (mask.bits == nullptr) {
    product<C, T, C, Masked::kNothing>(r, columns, rows, z, 1, r, x, ldx, g, ldg, mask, add);
    return;
  }
  if (!copies((r + MBF_TILE_ROWS - 1) / MBF_TILE_ROWS)) {
    product<C, T, C, Masked::kFactor>(r, columns, rows, z, 1, r, x, ldx, g, ldg, mask, add);
    return;
  }
  constexpr int64_t kRows = 48, kColumns = MBF_TILE_VECTORS * kLanes<C>;
  alignas(64) C kept[kRows * kColumns];
  for (int64_t i = 0; i < columns; i += kColumns) {
    const int64_t width = columns - i < kColumns ? columns - i : kColumns;
    for (int64_t t = 0; t < rows; t += kRows) {
      const int64_t some = rows - t < kRows ? rows - t : kRows;
      copy_kept<C, T>(x + t * ldx + i, ldx, some, width, {mask.bits, mask.first + t * mask.ld + i, mask.ld}, kept,
                      kColumns);
      product<C, C, C, Masked::kNothing>(r, width, some, z + t * r, 1, r, kept, kColumns, g + i, ldg, {}, add || t > 0);
    }
  }
}

// -- the MLP's activation -----------------------------------------------------------------------------------

// exp to about one unit in the last place: 2^n · P(remainder), n = round(x / ln 2). Arguments beyond ±87 are clamped.
MBF_INLINE Vec<float> exponential(Vec<float> x) {
  const Vec<float> most = broadcast(87.0f), least = broadcast(-87.0f);
  x = x > most ? most : x;
  x = x < least ? least : x;
  const Vec<float> shifted = x * 1.44269504088896341f + 12582912.0f;  // 1.5 · 2^23: rounds to the nearest integer
  const Vec<float> n = shifted - 12582912.0f;
  const Vec<float> f = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec<float> p = f * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * f * f + f + 1.0f;
  const Int32 exponent = (reinterpret_cast<Int32>(shifted) - 0x4b400000 + 127) << 23;
  return p * reinterpret_cast<Vec<float>>(exponent);
}

MBF_INLINE Vec<double> exponential(Vec<double> x) {
  for (int lane = 0; lane < kLanes<double>; ++lane) x[lane] = __builtin_exp(x[lane]);
  return x;
}

// act(g) and its derivative. silu: g σ(g). gelu_tanh: g σ(2c (g + 0.044715 g³)), c = √(2/π), as 1 + tanh(v) = 2 σ(2v).
template <typename C>
MBF_INLINE void activation(Vec<C> g, bool gelu, Vec<C>& value, Vec<C>& slope) {
  constexpr C k2c = static_cast<C>(1.5957691216057307117597842397375), kCubic = static_cast<C>(0.044715);
  const Vec<C> one = broadcast(static_cast<C>(1));
  const Vec<C> inner = gelu ? k2c * (g + kCubic * g * g * g) : g;
  const Vec<C> sigma = one / (one + exponential(-inner));
  const Vec<C> inner_slope = gelu ? k2c * (one + 3 * kCubic * g * g) : one;
  value = g * sigma;
  slope = sigma + value * (one - sigma) * inner_slope;
}

template <typename C, typename Step>
MBF_INLINE void over(int64_t n, const Step& step) {
  int64_t i = 0;
  for (; i + kLanes<C> <= n; i += kLanes<C>) step(i, kLanes<C>);
  if (i < n) step(i, n - i);
}

template <typename C>
MBF_INLINE Vec<C> load_some(const C* p, int64_t n) {
  return n == kLanes<C> ? load(p) : load_first<C>(p, n);
}

template <typename C>
MBF_INLINE void store_some(C* p, Vec<C> v, int64_t n) {
  if (n == kLanes<C>) {
    store(p, v);
  } else {
    store_first<C>(p, v, n);
  }
}

template <typename C>
void gated(const C* g, const C* u, int64_t n, bool gelu, C* out) {
  over<C>(n, [&](int64_t i, int64_t some) __attribute__((always_inline)) {
    Vec<C> value, slope;
    activation<C>(load_some(g + i, some), gelu, value, slope);
    store_some<C>(out + i, value * load_some(u + i, some), some);
  });
}

template <typename C>
void gated_backward(const C* da, const C* g, const C* u, int64_t n, bool gelu, C* dg, C* du) {
  over<C>(n, [&](int64_t i, int64_t some) __attribute__((always_inline)) {
    Vec<C> value, slope;
    activation<C>(load_some(g + i, some), gelu, value, slope);
    const Vec<C> d = load_some(da + i, some), up = load_some(u + i, some);
    store_some<C>(dg + i, d * up * slope, some);
    store_some<C>(du + i, d * value, some);
  });
}

// -- by the type of the activations -------------------------------------------------------------------------

template <typename C, typename Use>
MBF_INLINE void with_type(ScalarType type, void* data, const Use& use) {
  if constexpr (sizeof(C) == 8) {
    use(static_cast<double*>(data));
  } else if (type == ScalarType::Float) {
    use(static_cast<float*>(data));
  } else if (type == ScalarType::BFloat16) {
    use(static_cast<BFloat16*>(data));
  } else {
    use(static_cast<Half*>(data));
  }
}

template <typename C>
void project(Rows x, int64_t rows, int64_t columns, const C* a, int64_t lda, int64_t r, Mask mask, C* h) {
  with_type<C>(x.type, x.data, [&](auto* p) { project_rows<C>(p, x.ld, rows, columns, a, lda, r, mask, h); });
}

template <typename C>
void expand(Rows y, int64_t rows, int64_t columns, const C* z, int64_t r, const C* e, int64_t lde, Mask mask,
            bool add) {
  with_type<C>(y.type, y.data, [&](auto* p) { expand_rows<C>(p, y.ld, rows, columns, z, r, e, lde, mask, add); });
}

template <typename C>
void outer(Rows x, int64_t rows, int64_t columns, const C* z, int64_t r, Mask mask, C* g, int64_t ldg, bool add) {
  with_type<C>(x.type, x.data, [&](auto* p) { outer_rows<C>(p, x.ld, rows, columns, z, r, mask, g, ldg, add); });
}

template <typename C>
void widen(const void* from, ScalarType type, int64_t n, C* to) {
  with_type<C>(type, const_cast<void*>(from), [&](auto* p) {
    int64_t i = 0;
    for (; i + kLanes<C> <= n; i += kLanes<C>) store(to + i, load(p + i));
    if (i < n) store_first<C>(to + i, load_first<C>(p + i, n - i), n - i);
  });
}

template <typename C>
void narrow(const C* from, int64_t n, void* to, ScalarType type) {
  with_type<C>(type, to, [&](auto* p) {
    int64_t i = 0;
    for (; i + kLanes<C> <= n; i += kLanes<C>) store(p + i, load(from + i));
    if (i < n) store_first<C>(p + i, load_first<C>(from + i, n - i), n - i);
  });
}

}  // namespace

template <typename C>
const Micro<C>& micro() {
  static constexpr Micro<C> table = {kLanes<C>, project<C>, expand<C>, outer<C>,         mask_bits,
                                     widen<C>,  narrow<C>,  gated<C>,  gated_backward<C>};
  return table;
}

template const Micro<float>& micro<float>();
template const Micro<double>& micro<double>();

}  // namespace mbf::cpu::MBF_ISA
