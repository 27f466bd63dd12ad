// Packed tables with AVX-512 and AVX2, for x of any dtype.
//
// With 4 bits the sixteen values of a code are a table in a register, which a permutation looks up in every lane by the lowest bits
// of a shifted word: sixteen products take a shift, a permutation and a multiply-add, exact in fp32. A scale meets the sums of its
// group.
#include "table_avx512.h"

#if defined(__GNUC__) && defined(__x86_64__)

#define AVX2 __attribute__((target("avx2,fma")))

namespace littlebit {
namespace avx512 {

AVX512 inline __m512 values4() {
  return _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
}

// Nibble q of all words, at both of a word's groups, meets columns 8 q .. 8 q + 7 of these groups.
AVX512 inline __m512 pairs(const float* x, int q) {
  const __m512 low = _mm512_castps256_ps512(_mm256_loadu_ps(x + 8 * q));
  return _mm512_insertf32x8(low, _mm256_loadu_ps(x + 64 + 8 * q), 1);
}

template <int rows>
AVX512 inline void dot4(const Table& table, const float* x, int64_t first, float* out) {
  const __m512 lookup = values4();
  const int64_t blocks = table.blocks(), chunks = (blocks + 1) / 2, ahead = rows * table.row_bytes();
  __m512 sums[rows], scale[rows];
  const char* codes[rows];
  LITTLEBIT_UNROLL
  for (int r = 0; r < rows; ++r) sums[r] = scale[r] = _mm512_setzero_ps(), codes[r] = shared::codes_of(table, first + r);
  for (int64_t c = 0; c < chunks; ++c, x += kChunk) {
    if (c % kScales == 0) {
      LITTLEBIT_UNROLL
      for (int r = 0; r < rows; ++r) scale[r] = scales(table.scale, (first + r) * table.groups + 2 * c, table.groups - 2 * c);
    }
    const __m512i place = places(static_cast<int>(c % kScales));
    const bool whole = 2 * c + 1 < blocks;
    __m512 values[8];
    LITTLEBIT_UNROLL
    for (int q = 0; q < 8; ++q) values[q] = pairs(x, q);
    LITTLEBIT_UNROLL
    for (int r = 0; r < rows; ++r) {
      const char* now = codes[r] + 64 * c;
      LITTLEBIT_PREFETCH(reinterpret_cast<uintptr_t>(now) + static_cast<uintptr_t>(ahead), 1);
      const __m512i w = words(now, whole);
      __m512 a = _mm512_mul_ps(_mm512_permutexvar_ps(w, lookup), values[0]);
      __m512 b = _mm512_mul_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(w, 4), lookup), values[1]);
      a = _mm512_fmadd_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(w, 8), lookup), values[2], a);
      b = _mm512_fmadd_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(w, 12), lookup), values[3], b);
      a = _mm512_fmadd_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(w, 16), lookup), values[4], a);
      b = _mm512_fmadd_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(w, 20), lookup), values[5], b);
      a = _mm512_fmadd_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(w, 24), lookup), values[6], a);
      b = _mm512_fmadd_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(w, 28), lookup), values[7], b);
      sums[r] = _mm512_fmadd_ps(_mm512_add_ps(a, b), _mm512_permutexvar_ps(place, scale[r]), sums[r]);
    }
  }
  LITTLEBIT_UNROLL
  for (int r = 0; r < rows; ++r) out[r] = _mm512_reduce_add_ps(sums[r]);
}

// Codes of sixteen columns, of which `count` are there.
AVX512 inline __m512 codes8(const char* codes, int64_t count) {
  const __mmask16 mask = count >= 16 ? static_cast<__mmask16>(0xffff) : count > 0 ? static_cast<__mmask16>((1u << count) - 1) : 0;
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, codes)));
}

// With a scale for a row.
template <int rows>
AVX512 inline void dot8(const Table& table, const float* x, int64_t first, float* out) {
  const int64_t ahead = rows * table.row_bytes();
  __m512 sums[rows], more[rows];
  const char* codes[rows];
  LITTLEBIT_UNROLL
  for (int r = 0; r < rows; ++r) sums[r] = more[r] = _mm512_setzero_ps(), codes[r] = shared::codes_of(table, first + r);
  for (int64_t k = 0; k < table.columns; k += 32) {
    const __m512 low = _mm512_loadu_ps(x + k), high = _mm512_loadu_ps(x + k + 16);
    LITTLEBIT_UNROLL
    for (int r = 0; r < rows; ++r) {
      LITTLEBIT_PREFETCH(reinterpret_cast<uintptr_t>(codes[r]) + static_cast<uintptr_t>(k + ahead), 1);
      sums[r] = _mm512_fmadd_ps(codes8(codes[r] + k, table.columns - k), low, sums[r]);
      more[r] = _mm512_fmadd_ps(codes8(codes[r] + k + 16, table.columns - k - 16), high, more[r]);
    }
  }
  LITTLEBIT_UNROLL
  for (int r = 0; r < rows; ++r) {
    out[r] = _mm512_reduce_add_ps(_mm512_add_ps(sums[r], more[r])) * shared::scale_at(table.scale, first + r);
  }
}

template <int rows>
AVX512 inline void one(const Table& table, const float* x, int64_t first, float* out) {
  if (table.bits == 4) return dot4<rows>(table, x, first, out);
  dot8<rows>(table, x, first, out);
}

AVX512 void product(const Table& table, const Inputs& x, int64_t tokens, int64_t first, int64_t count, float* out, int64_t ldo,
                    float* scratch) {
  if (tokens > 1 || (table.bits == 8 && table.groups > 1)) {
    return shared::product<16, 8, 4>(table, x, tokens, first, count, out, ldo, scratch);
  }
  int64_t i = 0;
  for (; i + shared::kRows <= count; i += shared::kRows) one<shared::kRows>(table, x.values, first + i, out + i);
  for (; i < count; ++i) one<1>(table, x.values, first + i, out + i);
}

AVX512 void unpack(const Table& table, int64_t row, float* out) { shared::unpack(table, row, out); }

AVX512 void accumulate(const float* rows, int64_t count, const float* grad, int64_t ldg, int64_t tokens, float* acc, int64_t pitch) {
  shared::accumulate(rows, count, grad, ldg, tokens, acc, pitch);
}

}  // namespace avx512

namespace {
namespace avx2 {

AVX2 void product(const Table& table, const Inputs& x, int64_t tokens, int64_t first, int64_t count, float* out, int64_t ldo,
                  float* scratch) {
  shared::product<8, 8, 2>(table, x, tokens, first, count, out, ldo, scratch);
}

AVX2 void unpack(const Table& table, int64_t row, float* out) { shared::unpack(table, row, out); }

AVX2 void accumulate(const float* rows, int64_t count, const float* grad, int64_t ldg, int64_t tokens, float* acc, int64_t pitch) {
  shared::accumulate(rows, count, grad, ldg, tokens, acc, pitch);
}

}  // namespace avx2
}  // namespace

const TableKernels* avx512_table() {
  static const TableKernels kernels = {"avx512", nullptr, shared::scratch, avx512::product, avx512::unpack, avx512::accumulate};
  if (!avx512_kernels()) return nullptr;
  const TableKernels* halves = bf16_table();
  return halves ? halves : &kernels;
}

const TableKernels* avx2_table() {
  static const TableKernels kernels = {"avx2", nullptr, shared::scratch, avx2::product, avx2::unpack, avx2::accumulate};
  return avx2_kernels() ? &kernels : nullptr;
}

}  // namespace littlebit
#else
namespace littlebit {
const TableKernels* avx512_table() { return nullptr; }
const TableKernels* avx2_table() { return nullptr; }
}  // namespace littlebit
#endif
