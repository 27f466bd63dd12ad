// What the AVX-512 kernels of packed tables share: the words of 4-bit codes, and their scales in the lanes that they meet.
#pragma once

#include "table_kernels.h"

#if defined(__GNUC__) && defined(__x86_64__)
#include <immintrin.h>

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))

namespace littlebit {

constexpr int64_t kChunk = 128;  // columns of sixteen words of 4-bit codes: two groups
constexpr int64_t kScales = 8;   // chunks whose scales are loaded at once

namespace avx512 {

// The kernels for x of any dtype, in table_x86.cpp.
void product(const Table& table, const Inputs& x, int64_t tokens, int64_t first, int64_t count, float* out, int64_t ldo, float* scratch);
void unpack(const Table& table, int64_t row, float* out);
void accumulate(const float* rows, int64_t count, const float* grad, int64_t ldg, int64_t tokens, float* acc, int64_t pitch);

// Scales of the groups first .. first + 15 of a row, of which `count` are there.
AVX512 inline __m512 scales(Array scale, int64_t first, int64_t count) {
  const __mmask16 mask = count >= 16 ? static_cast<__mmask16>(0xffff) : static_cast<__mmask16>((1u << count) - 1);
  if (scale.dtype == Dtype::f32) return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(scale.data) + first);
  const __m256i halves = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(scale.data) + first);
  if (scale.dtype == Dtype::f16) return _mm512_cvtph_ps(halves);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

// Lane i of chunk j of kScales: the scale of group 2 j + i / 8.
AVX512 inline __m512i places(int j) {
  const __m512i half = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
  return _mm512_add_epi32(half, _mm512_set1_epi32(2 * j));
}

// The words of a chunk; of the last one of a row with an odd number of groups, the first eight.
AVX512 inline __m512i words(const char* codes, bool whole) {
  return whole ? _mm512_loadu_si512(codes) : _mm512_maskz_loadu_epi32(0x00ff, codes);
}

}  // namespace avx512

const TableKernels* bf16_table();  // table_bf16.cpp; null where the machine has no AVX512-BF16

}  // namespace littlebit
#endif
