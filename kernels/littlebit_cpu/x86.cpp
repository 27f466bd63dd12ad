// The product with AVX-512 and AVX2: a table of signed sums is a register, and a permutation looks it up in every lane.
//
// Sixteen neighbouring words are one AVX-512 register whose lanes are sixteen outputs. The 32 signed sums of 5 inputs are
// two registers, so that
//
//     acc += permutex2var(low, word >> 5 q, high)         16 outputs x 5 inputs, exact
//
// for q = 0 .. 5 and a last table of the 2 inputs that are left are 20 instructions for 512 multiply-adds; the permutation
// reads only the low five bits of its index, so nothing is masked. AVX2 permutes 8 lanes: tables of 3 inputs, ten of them
// and one of 2. The tables are built from the scaled inputs once for each row of words and live in registers.
#include "kernels.h"
#include "latents.h"

#if defined(__GNUC__) && defined(__x86_64__)
#include <immintrin.h>

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#define AVX2 __attribute__((target("avx2,fma")))

namespace littlebit {
namespace {

namespace avx512 {

// +1 or -1 by bit `bit` of the lane's number.
AVX512 inline __m512 pattern(int bit) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i one = _mm512_castps_si512(_mm512_set1_ps(1.0f));
  const __m512i sign = _mm512_slli_epi32(_mm512_srli_epi32(lane, static_cast<unsigned>(bit)), 31);
  return _mm512_castsi512_ps(_mm512_or_si512(one, sign));
}

struct Table {
  __m512 low, high;
};

AVX512 inline Table table(const float* x, __m512 p0, __m512 p1, __m512 p2, __m512 p3) {
  __m512 sum = _mm512_mul_ps(p0, _mm512_set1_ps(x[0]));
  sum = _mm512_fmadd_ps(p1, _mm512_set1_ps(x[1]), sum);
  sum = _mm512_fmadd_ps(p2, _mm512_set1_ps(x[2]), sum);
  sum = _mm512_fmadd_ps(p3, _mm512_set1_ps(x[3]), sum);
  const __m512 last = _mm512_set1_ps(x[4]);
  return {_mm512_add_ps(sum, last), _mm512_sub_ps(sum, last)};
}

AVX512 inline __m512 look(Table t, __m512i index) { return _mm512_permutex2var_ps(t.low, index, t.high); }

struct Tables {
  Table t0, t1, t2, t3, t4, t5;
  __m512 t6;
};

AVX512 inline __m512 add(__m512 acc, __m512i w, const Tables& t) {
  const __m512 a = _mm512_add_ps(look(t.t0, w), look(t.t1, _mm512_srli_epi32(w, 5)));
  const __m512 b = _mm512_add_ps(look(t.t2, _mm512_srli_epi32(w, 10)), look(t.t3, _mm512_srli_epi32(w, 15)));
  const __m512 c = _mm512_add_ps(look(t.t4, _mm512_srli_epi32(w, 20)), look(t.t5, _mm512_srli_epi32(w, 25)));
  const __m512 d = _mm512_add_ps(acc, _mm512_permutexvar_ps(_mm512_srli_epi32(w, 30), t.t6));
  return _mm512_add_ps(_mm512_add_ps(a, b), _mm512_add_ps(c, d));
}

AVX512 void sweep(float* acc, const float* x, const uint32_t* words, int64_t count, uintptr_t next) {
  const __m512 p0 = pattern(0), p1 = pattern(1), p2 = pattern(2), p3 = pattern(3);
  Tables t;
  t.t0 = table(x, p0, p1, p2, p3);
  t.t1 = table(x + 5, p0, p1, p2, p3);
  t.t2 = table(x + 10, p0, p1, p2, p3);
  t.t3 = table(x + 15, p0, p1, p2, p3);
  t.t4 = table(x + 20, p0, p1, p2, p3);
  t.t5 = table(x + 25, p0, p1, p2, p3);
  t.t6 = _mm512_fmadd_ps(p1, _mm512_set1_ps(x[31]), _mm512_mul_ps(p0, _mm512_set1_ps(x[30])));
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    shared::prefetch(words, next, i);
    const __m512i w = _mm512_loadu_si512(words + i);
    _mm512_storeu_ps(acc + i, add(_mm512_loadu_ps(acc + i), w, t));
  }
  if (i < count) {
    const __mmask16 rest = static_cast<__mmask16>((1u << (count - i)) - 1);
    const __m512i w = _mm512_maskz_loadu_epi32(rest, words + i);
    _mm512_mask_storeu_ps(acc + i, rest, add(_mm512_maskz_loadu_ps(rest, acc + i), w, t));
  }
}

AVX512 void product(const Words& words, const Input& input, int64_t tokens, float* acc, int64_t lda) {
  shared::product<sweep>(words, input, tokens, acc, lda);
}

AVX512 void combine(const float* part, Array scale, int64_t offset, Array bias, bool first, int64_t count, float* out) {
  shared::combine(part, scale, offset, bias, first, count, out);
}

AVX512 void store(const float* values, int64_t count, void* y, Dtype dtype, int64_t offset) {
  shared::store(values, count, y, dtype, offset);
}

// Bit k of sixteen words is a mask register: half of a transposed word.
AVX512 void transpose(const uint32_t* words, int64_t stride, int64_t rows, int64_t count, uint32_t* out) {
  const uint32_t all = count >= 32 ? ~0u : (1u << count) - 1;
  for (int64_t row = 0; row < rows; ++row, words += stride, out += 32) {
    const __m512i low = _mm512_maskz_loadu_epi32(static_cast<__mmask16>(all), words);
    const __m512i high = _mm512_maskz_loadu_epi32(static_cast<__mmask16>(all >> 16), words + 16);
    for (int k = 0; k < 32; ++k) {
      const __m512i bit = _mm512_set1_epi32(static_cast<int>(1u << k));
      const uint32_t left = _mm512_test_epi32_mask(low, bit), right = _mm512_test_epi32_mask(high, bit);
      out[k] = left | right << 16;
    }
  }
}

AVX512 void signs(const float* latent, int64_t count, float scale_feature, const float* scale_rank, void* y,
                  Dtype dtype, int64_t offset) {
  shared::signs(latent, count, scale_feature, scale_rank, y, dtype, offset);
}

AVX512 float signs_grad(const float* latent, Array grad, int64_t offset, int64_t count, float scale_feature,
                        const float* scale_rank, const float* steepness, float* latent_grad, float* rank_grad) {
  return shared::signs_grad(latent, grad, offset, count, scale_feature, scale_rank, steepness, latent_grad, rank_grad);
}

}  // namespace avx512

namespace avx2 {

AVX2 inline __m256 pattern(int bit) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i one = _mm256_castps_si256(_mm256_set1_ps(1.0f));
  return _mm256_castsi256_ps(_mm256_or_si256(one, _mm256_slli_epi32(_mm256_srli_epi32(lane, bit), 31)));
}

AVX2 inline __m256 table(const float* x, __m256 p0, __m256 p1, __m256 p2) {
  const __m256 sum = _mm256_fmadd_ps(p1, _mm256_set1_ps(x[1]), _mm256_mul_ps(p0, _mm256_set1_ps(x[0])));
  return _mm256_fmadd_ps(p2, _mm256_set1_ps(x[2]), sum);
}

struct Tables {
  __m256 t0, t1, t2, t3, t4, t5, t6, t7, t8, t9, t10;
};

AVX2 inline __m256 add(__m256 acc, __m256i w, const Tables& t) {
  __m256 a = _mm256_add_ps(acc, _mm256_permutevar8x32_ps(t.t0, w));
  __m256 b = _mm256_permutevar8x32_ps(t.t1, _mm256_srli_epi32(w, 3));
  a = _mm256_add_ps(a, _mm256_permutevar8x32_ps(t.t2, _mm256_srli_epi32(w, 6)));
  b = _mm256_add_ps(b, _mm256_permutevar8x32_ps(t.t3, _mm256_srli_epi32(w, 9)));
  a = _mm256_add_ps(a, _mm256_permutevar8x32_ps(t.t4, _mm256_srli_epi32(w, 12)));
  b = _mm256_add_ps(b, _mm256_permutevar8x32_ps(t.t5, _mm256_srli_epi32(w, 15)));
  a = _mm256_add_ps(a, _mm256_permutevar8x32_ps(t.t6, _mm256_srli_epi32(w, 18)));
  b = _mm256_add_ps(b, _mm256_permutevar8x32_ps(t.t7, _mm256_srli_epi32(w, 21)));
  a = _mm256_add_ps(a, _mm256_permutevar8x32_ps(t.t8, _mm256_srli_epi32(w, 24)));
  b = _mm256_add_ps(b, _mm256_permutevar8x32_ps(t.t9, _mm256_srli_epi32(w, 27)));
  a = _mm256_add_ps(a, _mm256_permutevar8x32_ps(t.t10, _mm256_srli_epi32(w, 30)));
  return _mm256_add_ps(a, b);
}

AVX2 void sweep(float* acc, const float* x, const uint32_t* words, int64_t count, uintptr_t next) {
  const __m256 p0 = pattern(0), p1 = pattern(1), p2 = pattern(2);
  Tables t;
  t.t0 = table(x, p0, p1, p2);
  t.t1 = table(x + 3, p0, p1, p2);
  t.t2 = table(x + 6, p0, p1, p2);
  t.t3 = table(x + 9, p0, p1, p2);
  t.t4 = table(x + 12, p0, p1, p2);
  t.t5 = table(x + 15, p0, p1, p2);
  t.t6 = table(x + 18, p0, p1, p2);
  t.t7 = table(x + 21, p0, p1, p2);
  t.t8 = table(x + 24, p0, p1, p2);
  t.t9 = table(x + 27, p0, p1, p2);
  t.t10 = _mm256_fmadd_ps(p1, _mm256_set1_ps(x[31]), _mm256_mul_ps(p0, _mm256_set1_ps(x[30])));
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    shared::prefetch(words, next, i);
    const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words + i));
    _mm256_storeu_ps(acc + i, add(_mm256_loadu_ps(acc + i), w, t));
  }
  if (i < count) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i rest = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count - i)), lane);
    const __m256i w = _mm256_maskload_epi32(reinterpret_cast<const int*>(words + i), rest);
    _mm256_maskstore_ps(acc + i, rest, add(_mm256_maskload_ps(acc + i, rest), w, t));
  }
}

AVX2 void product(const Words& words, const Input& input, int64_t tokens, float* acc, int64_t lda) {
  shared::product<sweep>(words, input, tokens, acc, lda);
}

AVX2 void combine(const float* part, Array scale, int64_t offset, Array bias, bool first, int64_t count, float* out) {
  shared::combine(part, scale, offset, bias, first, count, out);
}

AVX2 void store(const float* values, int64_t count, void* y, Dtype dtype, int64_t offset) {
  shared::store(values, count, y, dtype, offset);
}

AVX2 void transpose(const uint32_t* words, int64_t stride, int64_t rows, int64_t count, uint32_t* out) {
  shared::transpose(words, stride, rows, count, out);
}

AVX2 void signs(const float* latent, int64_t count, float scale_feature, const float* scale_rank, void* y,
                Dtype dtype, int64_t offset) {
  shared::signs(latent, count, scale_feature, scale_rank, y, dtype, offset);
}

AVX2 float signs_grad(const float* latent, Array grad, int64_t offset, int64_t count, float scale_feature,
                      const float* scale_rank, const float* steepness, float* latent_grad, float* rank_grad) {
  return shared::signs_grad(latent, grad, offset, count, scale_feature, scale_rank, steepness, latent_grad, rank_grad);
}

}  // namespace avx2
}  // namespace

const Kernels* avx512_kernels() {
  static const Kernels kernels = {"avx512", avx512::product, avx512::combine, avx512::store, avx512::transpose,
                                  avx512::signs, avx512::signs_grad, nullptr, 0};
  const bool has = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && avx2_kernels();
  return has ? &kernels : nullptr;
}

const Kernels* avx2_kernels() {
  static const Kernels kernels = {"avx2", avx2::product, avx2::combine, avx2::store, avx2::transpose,
                                  avx2::signs, avx2::signs_grad, nullptr, 0};
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &kernels : nullptr;
}

}  // namespace littlebit
#else
namespace littlebit {
const Kernels* avx512_kernels() { return nullptr; }
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace littlebit
#endif
