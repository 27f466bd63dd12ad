// The product with NEON: the 16 signed sums of 4 inputs are 64 bytes, which a table lookup of four registers reads.
//
// Four neighbouring words are the lanes of a register. A nibble i of a lane becomes the byte numbers 4 i .. 4 i + 3 of its
// sum, so that one lookup gives 4 outputs x 4 inputs. Eight such tables are all 32 registers, so a row of words is passed
// twice, four tables at a time.
#include "kernels.h"

#if defined(__aarch64__)
#include <arm_neon.h>

namespace littlebit {
namespace {

inline uint8x16x4_t table(const float* x) {
  alignas(16) static const uint32_t pattern[3][4] = {{0, 1u << 31, 0, 1u << 31}, {0, 0, 1u << 31, 1u << 31}, {0, 0, 0, 0}};
  const auto flip = [](float value, const uint32_t* signs) {
    return vreinterpretq_f32_u32(veorq_u32(vreinterpretq_u32_f32(vdupq_n_f32(value)), vld1q_u32(signs)));
  };
  const float32x4_t low = vaddq_f32(flip(x[0], pattern[0]), flip(x[1], pattern[1]));
  const float32x4_t both = vdupq_n_f32(x[2] + x[3]), apart = vdupq_n_f32(x[3] - x[2]);
  uint8x16x4_t sums;
  sums.val[0] = vreinterpretq_u8_f32(vaddq_f32(low, both));
  sums.val[1] = vreinterpretq_u8_f32(vaddq_f32(low, apart));
  sums.val[2] = vreinterpretq_u8_f32(vsubq_f32(low, apart));
  sums.val[3] = vreinterpretq_u8_f32(vsubq_f32(low, both));
  return sums;
}

inline float32x4_t look(const uint8x16x4_t& sums, uint32x4_t nibble) {
  const uint32x4_t bytes = vmlaq_u32(vdupq_n_u32(0x03020100), nibble, vdupq_n_u32(0x04040404));
  return vreinterpretq_f32_u8(vqtbl4q_u8(sums, vreinterpretq_u8_u32(bytes)));
}

template <int shift>
inline float32x4_t four(const uint8x16x4_t* t, uint32x4_t w) {
  const uint32x4_t mask = vdupq_n_u32(15);
  w = shift ? vshrq_n_u32(w, shift ? shift : 1) : w;
  const float32x4_t a = vaddq_f32(look(t[0], vandq_u32(w, mask)), look(t[1], vandq_u32(vshrq_n_u32(w, 4), mask)));
  const float32x4_t b =
      vaddq_f32(look(t[2], vandq_u32(vshrq_n_u32(w, 8), mask)), look(t[3], vandq_u32(vshrq_n_u32(w, 12), mask)));
  return vaddq_f32(a, b);
}

template <int half>
inline void pass(float* acc, const float* x, const uint32_t* words, int64_t count) {
  const uint8x16x4_t t[4] = {table(x), table(x + 4), table(x + 8), table(x + 12)};
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    vst1q_f32(acc + i, vaddq_f32(vld1q_f32(acc + i), four<16 * half>(t, vld1q_u32(words + i))));
  }
  if (i < count) {
    uint32_t w[4] = {};
    float sum[4];
    for (int64_t j = i; j < count; ++j) w[j - i] = words[j];
    vst1q_f32(sum, four<16 * half>(t, vld1q_u32(w)));
    for (int64_t j = i; j < count; ++j) acc[j] += sum[j - i];
  }
}

void sweep(float* acc, const float* x, const uint32_t* words, int64_t count, uintptr_t) {
  constexpr int64_t step = 512;  // the second pass finds the words and the sums in the first-level cache
  for (int64_t begin = 0; begin < count; begin += step) {
    const int64_t size = count - begin < step ? count - begin : step;
    pass<0>(acc + begin, x, words + begin, size);
    pass<1>(acc + begin, x + 16, words + begin, size);
  }
}

void product(const Words& words, const Input& input, int64_t tokens, float* acc, int64_t lda) {
  shared::product<sweep>(words, input, tokens, acc, lda);
}

}  // namespace

const Kernels* neon_kernels() {
  static const Kernels* const plain = generic_kernels();
  static const Kernels kernels = {"neon", product, plain->combine, plain->store, plain->transpose,
                                  plain->signs, plain->signs_grad, nullptr, 0};
  return &kernels;
}

}  // namespace littlebit
#else
namespace littlebit {
const Kernels* neon_kernels() { return nullptr; }
}  // namespace littlebit
#endif
