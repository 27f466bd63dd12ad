// The product in portable C++: the 16 signed sums of 4 inputs are a table in memory, looked up by four bits of a word.
#include "kernels.h"
#include "latents.h"

namespace littlebit {
namespace {

void sweep(float* acc, const float* x, const uint32_t* words, int64_t count, uintptr_t) {
  alignas(64) float table[8][16];
  for (int q = 0; q < 8; ++q) {
    for (int index = 0; index < 16; ++index) {
      float sum = 0.0f;
      for (int j = 0; j < 4; ++j) sum += index >> j & 1 ? -x[4 * q + j] : x[4 * q + j];
      table[q][index] = sum;
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t w = words[i];
    const float low = (table[0][w & 15] + table[1][w >> 4 & 15]) + (table[2][w >> 8 & 15] + table[3][w >> 12 & 15]);
    const float high = (table[4][w >> 16 & 15] + table[5][w >> 20 & 15]) + (table[6][w >> 24 & 15] + table[7][w >> 28]);
    acc[i] += low + high;
  }
}

void product(const Words& words, const Input& input, int64_t tokens, float* acc, int64_t lda) {
  shared::product<sweep>(words, input, tokens, acc, lda);
}

void combine(const float* part, Array scale, int64_t offset, Array bias, bool first, int64_t count, float* out) {
  shared::combine(part, scale, offset, bias, first, count, out);
}

void store(const float* values, int64_t count, void* y, Dtype dtype, int64_t offset) {
  shared::store(values, count, y, dtype, offset);
}

void transpose(const uint32_t* words, int64_t stride, int64_t rows, int64_t count, uint32_t* out) {
  shared::transpose(words, stride, rows, count, out);
}

void signs(const float* latent, int64_t count, float scale_feature, const float* scale_rank, void* y,
           Dtype dtype, int64_t offset) {
  shared::signs(latent, count, scale_feature, scale_rank, y, dtype, offset);
}

float signs_grad(const float* latent, Array grad, int64_t offset, int64_t count, float scale_feature, const float* scale_rank,
                 const float* steepness, float* latent_grad, float* rank_grad) {
  return shared::signs_grad(latent, grad, offset, count, scale_feature, scale_rank, steepness, latent_grad, rank_grad);
}

}  // namespace

const Kernels* generic_kernels() {
  static const Kernels kernels = {"generic", product, combine, store, transpose, signs, signs_grad, nullptr, 0};
  return &kernels;
}

}  // namespace littlebit
