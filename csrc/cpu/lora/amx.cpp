#include "amx.h"

#include "micro.h"

#if defined(__x86_64__) && defined(__GNUC__) && defined(__linux__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>

#include "torch.h"

// Without a mask GCC 12 passes its own intrinsics an undefined vector, and warns of it.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"

namespace mbf::cpu::amx {
namespace {

bool probe() {
  if (!multiplies_natively(ScalarType::BFloat16)) return false;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool bf16 = (d >> 22) & 1, tiles = (d >> 24) & 1;
  constexpr int kRequest = 0x1023, kTileData = 18;  // Linux lends the state to those that ask
  return bf16 && tiles && syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

}  // namespace

bool usable() {
  static const bool found = probe();
  return found;
}

bool worthwhile(int64_t m, int64_t n, int64_t k) { return usable() && m >= 64 && n >= 32 && k >= 64; }

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")

namespace {

constexpr int64_t kPanel = 32;        // rows of left and columns of right in a panel: two tiles
constexpr int64_t kDepth = 32;        // of the sum, in one tile
constexpr int64_t kTile = 1024;       // bytes
constexpr int64_t kPart = 2 * kTile;  // of a step of a panel: one of the three parts
constexpr int64_t kStep = 3 * kPart;  // of a panel
// What is packed at once and stays in the second-level cache. Deep, as out is visited for every block of the depth; two
// panels wide, as one would visit the pages of W too often.
constexpr int64_t kMostRows = 256, kMostColumns = 64, kMostDepth = 576;

// All eight tiles: 16 rows of 64 bytes. Released at the end, as oneDNN expects them.
class Tiles {
 public:
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    static_assert(sizeof(config) == 64);
    asm volatile("ldtilecfg %0" ::"m"(config) : "memory");
  }
  ~Tiles() { asm volatile("tilerelease" ::: "memory"); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// The compiler's intrinsics for tiles don't say that they read memory.
#define MBF_ZERO(tile) asm volatile("tilezero %%tmm" #tile::: "memory")
#define MBF_LOAD(tile, at, bytes) \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #tile::"r"(at), "r"(static_cast<int64_t>(bytes)) : "memory")
#define MBF_STORE(tile, at, bytes) \
  asm volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(at), "r"(static_cast<int64_t>(bytes)) : "memory")
#define MBF_DOT(sum, left, right) asm volatile("tdpbf16ps %%tmm" #right ", %%tmm" #left ", %%tmm" #sum:::)
// With a sixth of the next step's left panel fetched.
#define MBF_DOTS(sixth)                                                      \
  do {                                                                       \
    for (int line = 0; line < 16; ++line) {                                  \
      _mm_prefetch(left + kStep + (sixth) * kTile + line * 64, _MM_HINT_T0); \
    }                                                                        \
    MBF_DOT(0, 4, 6);                                                        \
    MBF_DOT(1, 4, 7);                                                        \
    MBF_DOT(2, 5, 6);                                                        \
    MBF_DOT(3, 5, 7);                                                        \
  } while (false)
#define MBF_LEFT(part)                              \
  do {                                              \
    MBF_LOAD(4, left + (part) * kPart, 64);         \
    MBF_LOAD(5, left + (part) * kPart + kTile, 64); \
  } while (false)
#define MBF_RIGHT(part)                              \
  do {                                               \
    MBF_LOAD(6, right + (part) * kPart, 64);         \
    MBF_LOAD(7, right + (part) * kPart + kTile, 64); \
  } while (false)

// out [32, 32] = a packed panel of left times one of right.
void multiply_panels(const char* left, const char* right, int64_t steps, float* out, int64_t ldo) {
  const int64_t bytes = ldo * static_cast<int64_t>(sizeof(float));
  float* below = out + 16 * ldo;
  for (int64_t t = 0; t < kPanel; ++t) {
    _mm_prefetch(reinterpret_cast<const char*>(out + t * ldo), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(out + t * ldo + 16), _MM_HINT_T0);
  }
  MBF_ZERO(0);
  MBF_ZERO(1);
  MBF_ZERO(2);
  MBF_ZERO(3);
  for (int64_t step = 0; step < steps; ++step) {  // each product needs new tiles on one side only
    MBF_LEFT(2);
    MBF_RIGHT(0);
    MBF_DOTS(0);
    MBF_LEFT(1);
    MBF_DOTS(1);
    MBF_RIGHT(1);
    MBF_DOTS(2);
    MBF_LEFT(0);
    MBF_DOTS(3);
    MBF_RIGHT(2);
    MBF_DOTS(4);
    MBF_RIGHT(0);
    MBF_DOTS(5);
    left += kStep;
    right += kStep;
  }
  MBF_STORE(0, out, bytes);
  MBF_STORE(1, out + 16, bytes);
  MBF_STORE(2, below, bytes);
  MBF_STORE(3, below + 16, bytes);
}

// Writes the three parts of 16 pairs (u, v) as a row of a tile each.
inline void split(__m512 u, __m512 v, char* to) {
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  for (int part = 0; part < 3; ++part, to += kPart) {
    const __m512i top_u = _mm512_and_si512(_mm512_castps_si512(u), high);
    const __m512i top_v = _mm512_and_si512(_mm512_castps_si512(v), high);
    _mm512_store_si512(to, _mm512_or_si512(_mm512_srli_epi32(top_u, 16), top_v));
    u = _mm512_sub_ps(u, _mm512_castsi512_ps(top_u));
    v = _mm512_sub_ps(v, _mm512_castsi512_ps(top_v));
  }
}

// The 16 of `count` numbers that begin with the one at `first`.
inline __mmask16 of(int64_t count, int64_t first) {
  const int64_t n = std::clamp<int64_t>(count - first, 0, 16);
  return static_cast<__mmask16>((1u << n) - 1);
}

// Rows of left, 32 a panel and padded with zeros, as tiles: a row of tile is a row's 32 numbers of the sum, number j
// beside number j + 16.
void pack_left(Strided left, int64_t rows, int64_t depth, char* to) {
  const int64_t steps = (depth + kDepth - 1) / kDepth, padded = (rows + kPanel - 1) / kPanel * kPanel;
  for (int64_t t = 0; t < padded; ++t) {
    char* at = to + t / kPanel * steps * kStep + t % kPanel / 16 * kTile + t % 16 * 64;
    const float* from = left.data + t * left.row;
    const int64_t count = t < rows ? depth : 0;
    for (int64_t k = 0; k < steps * kDepth; k += kDepth, at += kStep) {
      if (count >= k + kDepth) {
        split(_mm512_loadu_ps(from + k), _mm512_loadu_ps(from + k + 16), at);
      } else {
        split(_mm512_maskz_loadu_ps(of(count, k), from + k), _mm512_maskz_loadu_ps(of(count, k + 16), from + k + 16),
              at);
      }
    }
  }
}

inline void transpose(__m512i* rows) {
  __m512i t[16];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    rows[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    rows[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    rows[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    rows[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    rows[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    rows[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    rows[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    rows[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// Columns of right, 32 a panel and padded with zeros: row j of a tile is numbers j and j + 16 of the sum for 16
// columns.
void pack_right(Strided right, int64_t columns, int64_t depth, char* to) {
  const int64_t steps = (depth + kDepth - 1) / kDepth, padded = (columns + kPanel - 1) / kPanel * kPanel;
  for (int64_t k = 0; k < depth; k += kDepth, to += kStep) {
    for (int64_t first = 0; first < padded; first += 16) {
      char* at = to + first / kPanel * steps * kStep + first % kPanel / 16 * kTile;
      if (right.row == 1) {
        __m512i u[16], v[16];
        const __mmask16 low = of(depth, k), top = of(depth, k + 16);
        for (int64_t j = 0; j < 16; ++j) {
          const float* from = right.data + (first + j) * right.column + k;
          const bool there = first + j < columns;
          u[j] = _mm512_maskz_loadu_epi32(there ? low : 0, from);
          v[j] = _mm512_maskz_loadu_epi32(there ? top : 0, from + 16);
        }
        transpose(u);
        transpose(v);
        for (int64_t j = 0; j < 16; ++j) split(_mm512_castsi512_ps(u[j]), _mm512_castsi512_ps(v[j]), at + 64 * j);
      } else {
        const __mmask16 there = of(columns, first);
        for (int64_t j = 0; j < 16; ++j) {
          const float* from = right.data + (k + j) * right.row + first;
          split(_mm512_maskz_loadu_ps(k + j < depth ? there : 0, from),
                _mm512_maskz_loadu_ps(k + j + 16 < depth ? there : 0, from + 16 * right.row), at + 64 * j);
        }
      }
    }
  }
}

// The same where the output ends inside the panel, and where it is added to. Sums of a block of the depth are begun
// anew and added as a whole: added to one by one, they would round at the size of all blocks before them.
void multiply_through_scratch(const char* left, const char* right, int64_t steps, float* out, int64_t ldo, int64_t rows,
                              int64_t columns, bool add) {
  alignas(64) float block[kPanel * kPanel];
  for (int64_t t = 0; t < rows; ++t) {
    _mm_prefetch(reinterpret_cast<const char*>(out + t * ldo), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(out + t * ldo + columns - 1), _MM_HINT_T0);
  }
  multiply_panels(left, right, steps, block, kPanel);
  const __mmask16 masks[2] = {of(columns, 0), of(columns, 16)};
  for (int64_t t = 0; t < rows; ++t) {
    for (int half = 0; half < 2; ++half) {
      float* to = out + t * ldo + 16 * half;
      __m512 sum = _mm512_load_ps(block + t * kPanel + 16 * half);
      if (add) sum = _mm512_add_ps(_mm512_maskz_loadu_ps(masks[half], to), sum);
      _mm512_mask_storeu_ps(to, masks[half], sum);
    }
  }
}

// Equal parts, multiples of `unit`, of at most `most`.
struct Cut {
  Cut(int64_t whole, int64_t most, int64_t unit) : whole(whole) {
    const int64_t parts = std::max<int64_t>(1, (whole + most - 1) / most);
    size = ((whole + parts - 1) / parts + unit - 1) / unit * unit;
  }
  int64_t at(int64_t from) const { return std::min(size, whole - from); }

  int64_t whole, size;
};

}  // namespace

void multiply(float* out, int64_t ldo, int64_t m, int64_t n, int64_t k, Strided left, Strided right, bool add) {
  const Cut depths(k, kMostDepth, kDepth), widths(n, kMostColumns, kPanel);
  static thread_local const Scratch<char> packed_left(kMostRows / kPanel * kMostDepth / kDepth * kStep),
      packed_right(kMostColumns / kPanel * kMostDepth / kDepth * kStep);
  const Tiles tiles;
  for (int64_t row = 0; row < m; row += kMostRows) {
    const int64_t rows = std::min(kMostRows, m - row);
    for (int64_t from = 0; from < k; from += depths.size) {
      const int64_t depth = depths.at(from), steps = (depth + kDepth - 1) / kDepth;
      const bool onto = add || from > 0;
      pack_left({left.data + row * left.row + from, left.row, 1}, rows, depth, packed_left.get());
      for (int64_t column = 0; column < n; column += widths.size) {
        const int64_t columns = widths.at(column);
        pack_right({right.data + from * right.row + column * right.column, right.row, right.column}, columns, depth,
                   packed_right.get());
        for (int64_t panel = 0; panel < columns; panel += kPanel) {
          const char* right_panel = packed_right.get() + panel / kPanel * steps * kStep;
          const int64_t width = std::min(kPanel, columns - panel);
          for (int64_t t = 0; t < rows; t += kPanel) {
            const char* left_panel = packed_left.get() + t / kPanel * steps * kStep;
            float* to = out + (row + t) * ldo + column + panel;
            if (!onto && width == kPanel && t + kPanel <= rows) {
              multiply_panels(left_panel, right_panel, steps, to, ldo);
            } else {
              multiply_through_scratch(left_panel, right_panel, steps, to, ldo, std::min(kPanel, rows - t), width,
                                       onto);
            }
          }
        }
      }
    }
  }
}

#pragma GCC pop_options

}  // namespace mbf::cpu::amx

#else

namespace mbf::cpu::amx {

bool usable() { return false; }
bool worthwhile(int64_t, int64_t, int64_t) { return false; }
void multiply(float*, int64_t, int64_t, int64_t, int64_t, Strided, Strided, bool) {}

}  // namespace mbf::cpu::amx
#endif
