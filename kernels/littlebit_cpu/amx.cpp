// The product for many tokens with AMX: tiles of ±1 and of inputs, both bf16, multiplied into fp32.
//
// A row of words is unpacked to two 16 x 16 tiles of pairs: the pair of output n in tile row j holds bits j and j + 16 of
// word n, which one shift and one and-or bring to the sign bits of 1.0 (0x3f803f80), and the inputs lie in the same order
// (0, 16, 1, 17, ...). An fp32 input is the exact sum of three bf16 numbers of 8 bits each, taken from the top by cutting,
// so three tile products are exact; inputs with 16 significant bits (bf16 times a bf16 scale) need only two. The unpacked
// tiles (32 columns of 16 rows of words) stay in the first-level cache while the tokens pass, and nothing else is unpacked.
#include "kernels.h"

#if defined(__GNUC__) && defined(__x86_64__) && defined(__linux__) && (!defined(__clang__) || __clang_major__ >= 12)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <memory>

#define AMX __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,amx-tile,amx-bf16")))

namespace littlebit {
namespace {

// The tiles of a group of tokens and of 32 columns, over kRows rows of words, stay in the first-level cache together.
constexpr int64_t kRows = 4;
constexpr int64_t kGroup[] = {0, 64, 64, 32};  // by the pieces of an input
constexpr int64_t kTile = 512;  // bf16 numbers in a tile

// From here on the tiles win over looking up sums token by token; fewer tokens leave most of a tile empty.
constexpr int64_t kBatch = 8;

template <int pieces>
struct alignas(64) Scratch {
  uint16_t inputs[kGroup[pieces] / 16][kRows][pieces][kTile];
  uint16_t signs[kRows][2][kTile];
  float sums[2][2][16][16];
};

struct alignas(64) Config {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

AMX void unpack(const uint32_t* words, int64_t count, uint16_t* tile) {
  const __mmask16 mask = static_cast<__mmask16>(count >= 16 ? 0xffff : count > 0 ? (1 << count) - 1 : 0);
  const __m512i w = _mm512_maskz_loadu_epi32(mask, words);
  const __m512i one = _mm512_set1_epi32(0x3f803f80), sign = _mm512_set1_epi32(static_cast<int>(0x80008000u));
  for (unsigned j = 0; j < 16; ++j) {
    // 0xf8: one | (shifted & sign)
    const __m512i pairs = _mm512_ternarylogic_epi32(one, _mm512_slli_epi32(w, 15 - j), sign, 0xf8);
    _mm512_store_si512(tile + 32 * j, pairs);
  }
}

// The top 16 bits of every number, and what is left; an infinity or a NaN leaves nothing.
AMX inline __m512i cut(__m512& value) {
  const __m512i top = _mm512_and_si512(_mm512_castps_si512(value), _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
  const __mmask16 finite = _mm512_cmplt_epu32_mask(_mm512_slli_epi32(top, 1), _mm512_set1_epi32(static_cast<int>(0xff000000u)));
  value = _mm512_maskz_sub_ps(finite, value, _mm512_castsi512_ps(top));
  return top;
}

// One token's 32 inputs as a row of `pieces` tiles.
template <int pieces>
AMX inline void split(const float* x, uint16_t* tile) {
  __m512 low = _mm512_load_ps(x), high = _mm512_load_ps(x + 16);
  for (int piece = 0; piece < pieces; ++piece, tile += kTile) {
    const __m512i even = _mm512_srli_epi32(cut(low), 16);
    _mm512_store_si512(tile, _mm512_or_si512(even, cut(high)));
  }
}

// sums[i][j] = the product of token tile `tile + i` and column block j over `rows` rows of words, i < tiles.
template <int tiles, int pieces>
AMX inline void multiply(Scratch<pieces>& s, int64_t tile, int64_t rows) {
  _tile_zero(0);
  _tile_zero(1);
  if (tiles == 2) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t row = 0; row < rows; ++row) {
    _tile_loadd(4, s.signs[row][0], 64);
    _tile_loadd(5, s.signs[row][1], 64);
    for (int piece = 0; piece < pieces; ++piece) {
      _tile_loadd(6, s.inputs[tile][row][piece], 64);
      _tile_dpbf16ps(0, 6, 4);
      _tile_dpbf16ps(1, 6, 5);
      if (tiles == 2) {
        _tile_loadd(7, s.inputs[tile + 1][row][piece], 64);
        _tile_dpbf16ps(2, 7, 4);
        _tile_dpbf16ps(3, 7, 5);
      }
    }
  }
  _tile_stored(0, s.sums[0][0], 64);
  _tile_stored(1, s.sums[0][1], 64);
  if (tiles == 2) {
    _tile_stored(2, s.sums[1][0], 64);
    _tile_stored(3, s.sums[1][1], 64);
  }
}

// out[t * lda + n] += sums, for t < tokens <= 32 and n < columns, 32 at most.
template <int pieces>
AMX inline void add(const Scratch<pieces>& s, int64_t tokens, int64_t columns, float* out, int64_t lda) {
  const auto mask = [](int64_t count) { return static_cast<__mmask16>(count >= 16 ? 0xffff : count > 0 ? (1 << count) - 1 : 0); };
  const __mmask16 left = mask(columns), right = mask(columns - 16);
  for (int64_t t = 0; t < tokens; ++t, out += lda) {
    const float* low = s.sums[t / 16][0][t % 16];
    const float* high = s.sums[t / 16][1][t % 16];
    _mm512_mask_storeu_ps(out, left, _mm512_add_ps(_mm512_maskz_loadu_ps(left, out), _mm512_load_ps(low)));
    if (!right) continue;
    float* next = out + 16;
    _mm512_mask_storeu_ps(next, right, _mm512_add_ps(_mm512_maskz_loadu_ps(right, next), _mm512_load_ps(high)));
  }
}

template <int pieces>
AMX void product(const Words& words, const Input& input, int64_t tokens, float* acc, int64_t lda) {
  static thread_local const auto scratch = std::make_unique<Scratch<pieces>>();
  Scratch<pieces>& s = *scratch;
  alignas(64) float gain[kRows][32], x[32];
  const Config config;
  _tile_loadconfig(&config);
  for (int64_t first = 0; first < tokens; first += kGroup[pieces]) {
    const int64_t group = std::min(kGroup[pieces], tokens - first), tiles = (group + 15) / 16;
    for (int64_t begin = 0; begin < words.rows; begin += kRows) {
      const int64_t rows = std::min(kRows, words.rows - begin), start = words.first + begin;
      for (int64_t row = 0; row < rows; ++row) shared::gains(input, 32 * (start + row), gain[row]);
      for (int64_t t = 0; t < group; ++t) {
        for (int64_t row = 0; row < rows; ++row) {
          shared::inputs(input, first + t, 32 * (start + row), gain[row], x);
          split<pieces>(x, s.inputs[t / 16][row][0] + 32 * (t % 16));
        }
      }
      for (int64_t column = 0; column < words.columns; column += 32) {
        const int64_t count = std::min<int64_t>(32, words.columns - column);
        for (int64_t row = 0; row < rows; ++row) {
          const uint32_t* from = words.words + (begin + row) * words.stride + column;
          unpack(from, count, s.signs[row][0]);
          unpack(count > 16 ? from + 16 : from, count - 16, s.signs[row][1]);
        }
        float* out = acc + first * lda + column;
        for (int64_t tile = 0; tile < tiles; tile += 2, out += 32 * lda) {
          tile + 1 < tiles ? multiply<2, pieces>(s, tile, rows) : multiply<1, pieces>(s, tile, rows);
          add<pieces>(s, std::min<int64_t>(32, group - 16 * tile), count, out, lda);
        }
      }
    }
  }
  _tile_release();
}

void batch_product(const Words& words, const Input& input, int64_t tokens, float* acc, int64_t lda) {
  // 8 bits by 8 bits are 16: two pieces hold them all.
  const bool short_inputs = input.values.dtype == Dtype::bf16 && input.gain.data && input.gain.dtype == Dtype::bf16;
  (short_inputs ? product<2> : product<3>)(words, input, tokens, acc, lda);
}

// The kernel gives a process the tiles' registers on request.
bool permitted() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool tile = d >> 24 & 1, bf16 = d >> 22 & 1;
  constexpr long request = 0x1023, data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return tile && bf16 && syscall(SYS_arch_prctl, request, data) == 0;
}

}  // namespace

const Kernels* amx_kernels() {
  static const Kernels* const avx512 = avx512_kernels();
  static const bool has = avx512 && permitted();
  static const Kernels kernels = has ? Kernels{"amx", avx512->product, avx512->combine, avx512->store, avx512->transpose,
                                               avx512->signs, avx512->signs_grad, batch_product, kBatch}
                                     : Kernels{};
  return has ? &kernels : nullptr;
}

}  // namespace littlebit
#else
namespace littlebit {
const Kernels* amx_kernels() { return nullptr; }
}  // namespace littlebit
#endif
