// Packed tables with AVX512-BF16, for x of bf16: a processor that multiplies pairs of bf16 takes 32 products at a time.
//
// They are exact, because codes of 4 and of 8 bits are bf16 numbers; products and sums are fp32. With 4 bits a half word is a lane, which
// looks up one of sixteen bf16 numbers by its lowest bits. Up to four tokens meet the codes as they are read; for more of them rows
// are expanded, some columns at a time, and multiplied from the cache. A scale meets the sums of its group, or of its row.
#include "table_avx512.h"

#if defined(__GNUC__) && defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 10)

#define AVX512BF16 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")))

namespace littlebit {
namespace {

// In the order of half words: of every chunk, the columns that nibbles 0 and 4, 1 and 5, 2 and 6, 3 and 7 meet. 8 bits: as it is.
void arrange(const Table& table, const uint16_t* x, uint16_t* out) {
  for (int64_t k = 0; k < table.columns; ++k) {
    const int64_t inside = k % kChunk, q = inside % 64 / 8, i = inside / 64 * 8 + k % 8;
    out[table.bits == 8 ? k : k - inside + 32 * (q % 4) + 2 * i + q / 4] = x[k];
  }
}

// -8 .. 7 in bf16, twice: bit 4 of an index belongs to the next nibble.
AVX512BF16 inline __m512i values4() {
  alignas(64) static const uint16_t table[32] = {
      0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
      0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};
  return _mm512_load_si512(table);
}

// sum + the products of pairs. In words of its own, because gcc carries operands of type __m512bh by way of the stack.
AVX512BF16 inline __m512 dot(__m512 sum, __m512i a, __m512i b) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
}

template <int rows, int tokens>
AVX512BF16 inline void dot4(const Table& table, const uint16_t* x, int64_t pitch, int64_t first, float* out, int64_t ldo) {
  const __m512i lookup = values4();
  const int64_t blocks = table.blocks(), chunks = (blocks + 1) / 2, ahead = rows * table.row_bytes();
  __m512 sums[rows][tokens], scale[rows];
  const char* codes[rows];
  LITTLEBIT_UNROLL
  for (int r = 0; r < rows; ++r) {
    scale[r] = _mm512_setzero_ps(), codes[r] = shared::codes_of(table, first + r);
    LITTLEBIT_UNROLL
    for (int t = 0; t < tokens; ++t) sums[r][t] = _mm512_setzero_ps();
  }
  for (int64_t c = 0; c < chunks; ++c, x += kChunk) {
    if (c % kScales == 0) {
      LITTLEBIT_UNROLL
      for (int r = 0; r < rows; ++r) scale[r] = avx512::scales(table.scale, (first + r) * table.groups + 2 * c, table.groups - 2 * c);
    }
    const __m512i place = avx512::places(static_cast<int>(c % kScales));
    const bool whole = 2 * c + 1 < blocks;
    __m512i w[rows][4];
    __m512 own[rows];
    LITTLEBIT_UNROLL
    for (int r = 0; r < rows; ++r) {
      const char* now = codes[r] + 64 * c;
      LITTLEBIT_PREFETCH(reinterpret_cast<uintptr_t>(now) + static_cast<uintptr_t>(ahead), 1);
      const __m512i all = avx512::words(now, whole);
      w[r][0] = _mm512_permutexvar_epi16(all, lookup);
      w[r][1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(all, 4), lookup);
      w[r][2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(all, 8), lookup);
      w[r][3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(all, 12), lookup);
      own[r] = _mm512_permutexvar_ps(place, scale[r]);
    }
    LITTLEBIT_UNROLL
    for (int t = 0; t < tokens; ++t) {
      const uint16_t* values = x + t * pitch;
      const __m512i x0 = _mm512_loadu_si512(values), x1 = _mm512_loadu_si512(values + 32);
      const __m512i x2 = _mm512_loadu_si512(values + 64), x3 = _mm512_loadu_si512(values + 96);
      LITTLEBIT_UNROLL
      for (int r = 0; r < rows; ++r) {
        __m512 part = dot(_mm512_setzero_ps(), w[r][0], x0);
        part = dot(part, w[r][1], x1);
        part = dot(part, w[r][2], x2);
        part = dot(part, w[r][3], x3);
        sums[r][t] = _mm512_fmadd_ps(part, own[r], sums[r][t]);
      }
    }
  }
  LITTLEBIT_UNROLL
  for (int t = 0; t < tokens; ++t) {
    LITTLEBIT_UNROLL
    for (int r = 0; r < rows; ++r) out[t * ldo + r] = _mm512_reduce_add_ps(sums[r][t]);
  }
}

// Codes of 32 columns, of which `count` are there, as bf16.
AVX512BF16 inline __m512i codes8(const char* codes, int64_t count) {
  const __mmask32 mask = count >= 32 ? ~0u : (1u << count) - 1;
  const __m256i bytes = _mm256_maskz_loadu_epi8(mask, codes);
  const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(bytes)));
  const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(bytes, 1)));
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

template <int rows, int tokens>
AVX512BF16 inline void dot8(const Table& table, const uint16_t* x, int64_t pitch, int64_t first, float* out, int64_t ldo) {
  const int64_t ahead = rows * table.row_bytes();
  __m512 sums[rows][tokens];
  const char* codes[rows];
  LITTLEBIT_UNROLL
  for (int r = 0; r < rows; ++r) {
    codes[r] = shared::codes_of(table, first + r);
    LITTLEBIT_UNROLL
    for (int t = 0; t < tokens; ++t) sums[r][t] = _mm512_setzero_ps();
  }
  for (int64_t k = 0; k < table.columns; k += 32, x += 32) {
    __m512i w[rows];
    LITTLEBIT_UNROLL
    for (int r = 0; r < rows; ++r) {
      LITTLEBIT_PREFETCH(reinterpret_cast<uintptr_t>(codes[r]) + static_cast<uintptr_t>(k + ahead), 1);
      w[r] = codes8(codes[r] + k, table.columns - k);
    }
    LITTLEBIT_UNROLL
    for (int t = 0; t < tokens; ++t) {
      const __m512i values = _mm512_loadu_si512(x + t * pitch);
      LITTLEBIT_UNROLL
      for (int r = 0; r < rows; ++r) sums[r][t] = dot(sums[r][t], w[r], values);
    }
  }
  LITTLEBIT_UNROLL
  for (int r = 0; r < rows; ++r) {
    const float scale = shared::scale_at(table.scale, first + r);
    LITTLEBIT_UNROLL
    for (int t = 0; t < tokens; ++t) out[t * ldo + r] = _mm512_reduce_add_ps(sums[r][t]) * scale;
  }
}

constexpr int64_t kStep = kScales * kChunk;  // columns of expanded rows at a time: with x's they stay in the first-level cache
constexpr int64_t kWidth = kStep + 32;       // of an expanded row: no power of two
constexpr int64_t kLanes = 16, kGains = kScales * kLanes;

// The codes of columns [begin, end) of a row as bf16, in the order of x; of 4 bits also the scales, in the lanes that they meet.
AVX512BF16 inline void expand(const Table& table, int64_t row, int64_t begin, int64_t end, uint16_t* out, float* gains) {
  const char* codes = shared::codes_of(table, row);
  if (table.bits == 8) {
    for (int64_t k = begin; k < end; k += 32, out += 32) _mm512_storeu_si512(out, codes8(codes + k, table.columns - k));
    return;
  }
  const __m512i lookup = values4();
  const __m512 scale = avx512::scales(table.scale, row * table.groups + begin / 64, table.groups - begin / 64);
  for (int64_t b = begin / 64, c = 0; b < (end + 63) / 64; b += 2, ++c, out += kChunk) {
    _mm512_store_ps(gains + c * kLanes, _mm512_permutexvar_ps(avx512::places(static_cast<int>(c)), scale));
    const __m512i all = avx512::words(codes + 32 * b, b + 1 < table.blocks());
    _mm512_storeu_si512(out, _mm512_permutexvar_epi16(all, lookup));
    _mm512_storeu_si512(out + 32, _mm512_permutexvar_epi16(_mm512_srli_epi16(all, 4), lookup));
    _mm512_storeu_si512(out + 64, _mm512_permutexvar_epi16(_mm512_srli_epi16(all, 8), lookup));
    _mm512_storeu_si512(out + 96, _mm512_permutexvar_epi16(_mm512_srli_epi16(all, 12), lookup));
  }
}

// The columns [begin, end) of `rows` rows, from `first` on, that are expanded in w; x of all tokens from `begin` on.
struct Expanded {
  const Table& table;
  const uint16_t *w, *x;
  const float* gains;
  int64_t pitch, begin, end;
};

// sums[t][r] of sixteen lanes, `rows` of them apart for a token, += rows times tokens. 4 bits: two rows at a time are all that
// the registers hold.
template <int rows, int tokens>
AVX512BF16 inline void tile4(const Expanded& all, int row, int64_t token, float* sums, int apart) {
  const uint16_t *w = all.w + row * kWidth, *x = all.x + token * all.pitch;
  const float* gains = all.gains + row * kGains;
  __m512 own[rows][tokens];
  LITTLEBIT_UNROLL
  for (int r = 0; r < rows; ++r) {
    LITTLEBIT_UNROLL
    for (int t = 0; t < tokens; ++t) own[r][t] = _mm512_load_ps(sums + (t * apart + r) * kLanes);
  }
  for (int64_t k = all.begin; k < all.end; k += kChunk, x += kChunk, w += kChunk, gains += kLanes) {
    __m512i codes[rows][4];
    LITTLEBIT_UNROLL
    for (int r = 0; r < rows; ++r) {
      LITTLEBIT_UNROLL
      for (int q = 0; q < 4; ++q) codes[r][q] = _mm512_loadu_si512(w + r * kWidth + 32 * q);
    }
    LITTLEBIT_UNROLL
    for (int t = 0; t < tokens; ++t) {
      __m512 part[rows];
      LITTLEBIT_UNROLL
      for (int r = 0; r < rows; ++r) part[r] = _mm512_setzero_ps();
      LITTLEBIT_UNROLL
      for (int q = 0; q < 4; ++q) {
        const __m512i values = _mm512_loadu_si512(x + t * all.pitch + 32 * q);
        LITTLEBIT_UNROLL
        for (int r = 0; r < rows; ++r) part[r] = dot(part[r], codes[r][q], values);
      }
      LITTLEBIT_UNROLL
      for (int r = 0; r < rows; ++r) own[r][t] = _mm512_fmadd_ps(part[r], _mm512_load_ps(gains + r * kGains), own[r][t]);
    }
  }
  LITTLEBIT_UNROLL
  for (int r = 0; r < rows; ++r) {
    LITTLEBIT_UNROLL
    for (int t = 0; t < tokens; ++t) _mm512_store_ps(sums + (t * apart + r) * kLanes, own[r][t]);
  }
}

template <int rows, int tokens>
AVX512BF16 inline void tile8(const Expanded& all, int64_t token, float* sums) {
  const uint16_t *w = all.w, *x = all.x + token * all.pitch;
  __m512 own[rows][tokens];
  LITTLEBIT_UNROLL
  for (int r = 0; r < rows; ++r) {
    LITTLEBIT_UNROLL
    for (int t = 0; t < tokens; ++t) own[r][t] = _mm512_load_ps(sums + (t * rows + r) * kLanes);
  }
  for (int64_t k = all.begin; k < all.end; k += 32, x += 32, w += 32) {
    __m512i codes[rows];
    LITTLEBIT_UNROLL
    for (int r = 0; r < rows; ++r) codes[r] = _mm512_loadu_si512(w + r * kWidth);
    LITTLEBIT_UNROLL
    for (int t = 0; t < tokens; ++t) {
      const __m512i values = _mm512_loadu_si512(x + t * all.pitch);
      LITTLEBIT_UNROLL
      for (int r = 0; r < rows; ++r) own[r][t] = dot(own[r][t], codes[r], values);
    }
  }
  LITTLEBIT_UNROLL
  for (int r = 0; r < rows; ++r) {
    LITTLEBIT_UNROLL
    for (int t = 0; t < tokens; ++t) _mm512_store_ps(sums + (t * rows + r) * kLanes, own[r][t]);
  }
}

template <int rows>
AVX512BF16 inline void tiles(const Expanded& all, int64_t tokens, float* sums) {
  int64_t t = 0;
  if (all.table.bits == 4) {
    constexpr int some = rows > 2 ? 2 : rows;
    for (; t + 8 <= tokens; t += 8) {
      for (int r = 0; r < rows; r += some) tile4<some, 8>(all, r, t, sums + (t * rows + r) * kLanes, rows);
    }
    for (; t + 4 <= tokens; t += 4) {
      for (int r = 0; r < rows; r += some) tile4<some, 4>(all, r, t, sums + (t * rows + r) * kLanes, rows);
    }
    for (; t < tokens; ++t) {
      for (int r = 0; r < rows; r += some) tile4<some, 1>(all, r, t, sums + (t * rows + r) * kLanes, rows);
    }
  } else {
    for (; t + 6 <= tokens; t += 6) tile8<rows, 6>(all, t, sums + t * rows * kLanes);
    for (; t + 4 <= tokens; t += 4) tile8<rows, 4>(all, t, sums + t * rows * kLanes);
    for (; t < tokens; ++t) tile8<rows, 1>(all, t, sums + t * rows * kLanes);
  }
}

// `count` rows, `rows` at a time, each expanded once for all tokens: kStep columns of all rows, then the next ones.
template <int rows>
AVX512BF16 inline void expanded(const Table& table, const Inputs& x, int64_t tokens, int64_t first, int64_t count, float* out, int64_t ldo,
                                float* scratch) {
  uint16_t* const w = reinterpret_cast<uint16_t*>(scratch);
  float* const gains = scratch + rows * kWidth / 2;
  float* const sums = gains + rows * kGains;  // [count, tokens, 16]
  std::memset(sums, 0, static_cast<size_t>(count * tokens * kLanes) * sizeof(float));
  const int64_t bytes = table.bits == 8 ? kStep : kStep / 2;
  for (int64_t begin = 0; begin < table.columns; begin += kStep) {
    const int64_t end = begin + kStep < table.columns ? begin + kStep : table.columns;
    for (int64_t i = 0; i < count; i += rows) {
      LITTLEBIT_UNROLL
      for (int r = 0; r < rows; ++r) {
        const char* next = shared::codes_of(table, first + i + rows + r) + begin * bytes / kStep;
        for (int64_t line = 0; line < bytes; line += 64) LITTLEBIT_PREFETCH(reinterpret_cast<uintptr_t>(next) + static_cast<uintptr_t>(line), 2);
        expand(table, first + i + r, begin, end, w + r * kWidth, gains + r * kGains);
      }
      tiles<rows>({table, w, x.halves + begin, gains, x.pitch, begin, end}, tokens, sums + i * tokens * kLanes);
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    const float scale = table.bits == 8 ? shared::scale_at(table.scale, first + i) : 1.0f;
    for (int64_t t = 0; t < tokens; ++t) {
      const float* own = sums + ((i / rows * tokens + t) * rows + i % rows) * kLanes;
      out[t * ldo + i] = _mm512_reduce_add_ps(_mm512_load_ps(own)) * scale;
    }
  }
}

// Rows whose codes meet all tokens as they are read.
template <int tokens>
AVX512BF16 inline void block(const Table& table, const Inputs& x, int64_t first, int64_t count, float* out, int64_t ldo) {
  constexpr int rows = shared::kRows;
  int64_t i = 0;
  for (; i + rows <= count; i += rows) {
    if (table.bits == 4) dot4<rows, tokens>(table, x.halves, x.pitch, first + i, out + i, ldo);
    else dot8<rows, tokens>(table, x.halves, x.pitch, first + i, out + i, ldo);
  }
  for (; i < count; ++i) {
    if (table.bits == 4) dot4<1, tokens>(table, x.halves, x.pitch, first + i, out + i, ldo);
    else dot8<1, tokens>(table, x.halves, x.pitch, first + i, out + i, ldo);
  }
}

int64_t scratch(const Inputs& x, int64_t count, int64_t tokens) {
  return x.halves ? shared::kRows * (kWidth / 2 + kGains) + count * tokens * kLanes : shared::scratch(x, count, tokens);
}

AVX512BF16 void product(const Table& table, const Inputs& x, int64_t tokens, int64_t first, int64_t count, float* out, int64_t ldo,
                        float* scratch) {
  if (!x.halves) return avx512::product(table, x, tokens, first, count, out, ldo, scratch);
  if (tokens == 1) return block<1>(table, x, first, count, out, ldo);
  if (tokens == 2) return block<2>(table, x, first, count, out, ldo);
  if (tokens == 3) return block<3>(table, x, first, count, out, ldo);
  if (tokens == 4) return block<4>(table, x, first, count, out, ldo);
  const int64_t whole = count / shared::kRows * shared::kRows;
  expanded<shared::kRows>(table, x, tokens, first, whole, out, ldo, scratch);
  expanded<1>(table, x, tokens, first + whole, count - whole, out + whole, ldo, scratch);
}

}  // namespace

const TableKernels* bf16_table() {
  static const TableKernels kernels = {"avx512bf16", arrange, scratch, product, avx512::unpack, avx512::accumulate};
  return avx512_kernels() && __builtin_cpu_supports("avx512bf16") ? &kernels : nullptr;
}

}  // namespace littlebit
#elif defined(__GNUC__) && defined(__x86_64__)
namespace littlebit {
const TableKernels* bf16_table() { return nullptr; }
}  // namespace littlebit
#endif
