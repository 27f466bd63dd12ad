// One row of the passes over latents, in plain loops that every instruction set compiles for itself (inlined into each).
// The loops are short and branchless, or compilers would not vectorize them; between them values lie in a small buffer.
#pragma once

#include "kernels.h"

namespace littlebit {
namespace shared {

constexpr int64_t kColumnsOfRow = 128;  // at a time

// value * sign(latent); a zero and a NaN count as +1.
LITTLEBIT_INLINE float with_sign_of(float value, float latent) {
  return float_of(bits_of(value) ^ static_cast<uint32_t>(latent < 0.0f) << 31);
}

// 2^t for t of -127 to 0, relative error 1e-7, but 0 below the normal numbers; a NaN stays one.
LITTLEBIT_INLINE float exp2_of_negative(float t) {
  // Adding 1.5 * 2^23 leaves the nearest integer in the low bits.
  const float shifted = t + 0x1.8p23f, f = t - (shifted - 0x1.8p23f);
  const float power = float_of((bits_of(shifted) - bits_of(0x1.8p23f) + 127u) << 23);
  // The polynomial of degree 6 whose relative error on [-1/2, 1/2] is least, 2e-9 before its coefficients are rounded.
  float sum = 1.5345812e-4f;
  sum = sum * f + 1.3399931e-3f;
  sum = sum * f + 9.6184891e-3f;
  sum = sum * f + 5.5503286e-2f;
  sum = sum * f + 0.24022646f;
  sum = sum * f + 0.69314718f;
  sum = sum * f + 1.0f;
  return sum * power;
}

// out[i] = the slope of the sign's surrogate at x[i]: steepness (1 - tanh(steepness x)^2) = 4 steepness e / (1 + e)^2 with
// e = exp(-2 steepness |x|), which cannot overflow. Without a steepness: 1 for |x| < 1, else 0.
LITTLEBIT_INLINE void slopes(const float* LITTLEBIT_RESTRICT x, int64_t count, const float* steepness,
                             float* LITTLEBIT_RESTRICT out) {
  if (!steepness) {
    for (int64_t i = 0; i < count; ++i) out[i] = x[i] > -1.0f && x[i] < 1.0f ? 1.0f : 0.0f;
    return;
  }
  const float rate = -2.885390082f * float_of(bits_of(*steepness) & 0x7fffffffu), height = 4.0f * *steepness;  // 2 log2(e)
  for (int64_t i = 0; i < count; ++i) {
    const float t = rate * float_of(bits_of(x[i]) & 0x7fffffffu);
    out[i] = t < -127.0f ? -127.0f : t;
  }
  for (int64_t i = 0; i < count; ++i) {
    const float e = exp2_of_negative(out[i]), once = 1.0f + e;
    out[i] = height * e / (once * once);
  }
}

// y[offset + i] = scale_feature * sign(latent[i]) * scale_rank[i], multiplied in fp32 and rounded once.
LITTLEBIT_INLINE void signs(const float* LITTLEBIT_RESTRICT latent, int64_t count, float scale_feature,
                            const float* LITTLEBIT_RESTRICT scale_rank, void* y, Dtype dtype, int64_t offset) {
  alignas(64) float values[kColumnsOfRow];
  for (int64_t begin = 0; begin < count; begin += kColumnsOfRow) {
    const int64_t size = count - begin < kColumnsOfRow ? count - begin : kColumnsOfRow;
    const float* LITTLEBIT_RESTRICT x = latent + begin;
    if (scale_rank) {
      const float* LITTLEBIT_RESTRICT scale = scale_rank + begin;
      for (int64_t i = 0; i < size; ++i) values[i] = with_sign_of(scale_feature, x[i]) * scale[i];
    } else {
      for (int64_t i = 0; i < size; ++i) values[i] = with_sign_of(scale_feature, x[i]);
    }
    store(values, size, y, dtype, offset + begin);
  }
}

// The gradients of `signs` from grad[offset + i]: latent_grad[i] is set, rank_grad[i] is added to (not touched where scale_rank
// is null), and the gradient of `scale_feature` is returned. steepness: of the smooth gradient; null: straight through.
LITTLEBIT_INLINE float signs_grad(const float* LITTLEBIT_RESTRICT latent, Array grad, int64_t offset, int64_t count,
                                  float scale_feature, const float* LITTLEBIT_RESTRICT scale_rank, const float* steepness,
                                  float* LITTLEBIT_RESTRICT latent_grad, float* LITTLEBIT_RESTRICT rank_grad) {
  // One sum for each column of a piece, added up in halves: exact enough in fp32, and in the same order everywhere.
  alignas(64) float sums[kColumnsOfRow] = {}, values[kColumnsOfRow], slope[kColumnsOfRow];
  for (int64_t begin = 0; begin < count; begin += kColumnsOfRow) {
    const int64_t size = count - begin < kColumnsOfRow ? count - begin : kColumnsOfRow;
    const float* LITTLEBIT_RESTRICT x = latent + begin;
    float* LITTLEBIT_RESTRICT out = latent_grad + begin;
    load(grad, offset + begin, size, values);
    slopes(x, size, steepness, slope);
    if (scale_rank) {
      const float* LITTLEBIT_RESTRICT scale = scale_rank + begin;
      float* LITTLEBIT_RESTRICT total = rank_grad + begin;
      for (int64_t i = 0; i < size; ++i) {
        const float turned = with_sign_of(values[i], x[i]);
        sums[i] += turned * scale[i];
        total[i] += turned * scale_feature;
        out[i] = values[i] * scale[i] * scale_feature * slope[i];
      }
    } else {
      for (int64_t i = 0; i < size; ++i) {
        sums[i] += with_sign_of(values[i], x[i]);
        out[i] = values[i] * scale_feature * slope[i];
      }
    }
  }
  for (int64_t half = kColumnsOfRow / 2; half; half /= 2) {
    for (int64_t i = 0; i < half; ++i) sums[i] += sums[half + i];
  }
  return sums[0];
}

}  // namespace shared
}  // namespace littlebit
