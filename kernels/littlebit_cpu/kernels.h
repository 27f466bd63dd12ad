// What one instruction set provides, and the parts that every one of them shares (inlined into each, so that the
// compiler vectorizes them for it).
#pragma once

#include <cstring>

#include "littlebit.h"

#if defined(__GNUC__)
#define LITTLEBIT_INLINE inline __attribute__((always_inline))
#define LITTLEBIT_RESTRICT __restrict__
#define LITTLEBIT_PREFETCH(address, level) __builtin_prefetch(reinterpret_cast<const void*>(address), 0, 4 - level)
#if defined(__clang__)
#define LITTLEBIT_UNROLL _Pragma("unroll")
#else
#define LITTLEBIT_UNROLL _Pragma("GCC unroll 16")
#endif
#else
#define LITTLEBIT_INLINE inline
#define LITTLEBIT_RESTRICT
#define LITTLEBIT_PREFETCH(address, level)
#define LITTLEBIT_UNROLL
#endif

namespace littlebit {

// The inputs of a product: token t's input k is values[t * stride + k] * gain[k]; zero from `length` on.
struct Input {
  Array values;
  int64_t stride;
  Array gain;  // null: 1
  int64_t length;
};

// `rows` rows of sign words, row i at words + i * stride and belonging to the inputs 32 (first + i) .. + 31.
struct Words {
  const uint32_t* words;
  int64_t stride, rows, first, columns;
  uintptr_t after = 0;  // the address of what will be multiplied next, its rows `after_stride` apart: a hint, or 0
  int64_t after_stride = 0;
};

// Of a word that may lie outside its array: for asking only.
inline uintptr_t address(uintptr_t words, int64_t offset) { return words + static_cast<uintptr_t>(offset) * sizeof(uint32_t); }
inline uintptr_t address(const uint32_t* words, int64_t offset) { return address(reinterpret_cast<uintptr_t>(words), offset); }

struct Kernels {
  const char* name;
  // acc[t * lda + n] += sum_k input(t, k) * sign(k, n)
  void (*product)(const Words& words, const Input& input, int64_t tokens, float* acc, int64_t lda);
  // out[n] = (first ? bias[n] : out[n]) + scale[n] * part[n]
  void (*combine)(const float* part, Array scale, int64_t offset, Array bias, bool first, int64_t count, float* out);
  // y[offset + n] = values[n], rounded to the nearest even
  void (*store)(const float* values, int64_t count, void* y, Dtype dtype, int64_t offset);
  // bit i of out[32 b + k] = bit k of words[b * stride + i], for i < count <= 32 (the rest 0) and b < rows
  void (*transpose)(const uint32_t* words, int64_t stride, int64_t rows, int64_t count, uint32_t* out);
  // latents.h: shared::signs and shared::signs_grad
  void (*signs)(const float* latent, int64_t count, float scale_feature, const float* scale_rank, void* y,
                Dtype dtype, int64_t offset);
  float (*signs_grad)(const float* latent, Array grad, int64_t offset, int64_t count, float scale_feature,
                      const float* scale_rank, const float* steepness, float* latent_grad, float* rank_grad);
  // The product for many tokens where there is one, used from `batch` tokens on.
  void (*batch_product)(const Words& words, const Input& input, int64_t tokens, float* acc, int64_t lda);
  int64_t batch;
};

const Kernels* generic_kernels();
const Kernels* avx2_kernels();    // null where the machine (or the compiler) has it not, as the next
const Kernels* avx512_kernels();
const Kernels* amx_kernels();
const Kernels* neon_kernels();
const Kernels& kernels();  // the selected ones

// f(i) for every i < count, on the pool's threads.
template <class F>
void run(const Pool& pool, int64_t count, const F& f) {
  if (count > 1 && pool.run) {
    pool.run(count, [](int64_t i, void* context) { (*static_cast<const F*>(context))(i); }, const_cast<F*>(&f));
  } else {
    for (int64_t i = 0; i < count; ++i) f(i);
  }
}

// Where part `index` of `count` begins.
inline int64_t share(int64_t total, int64_t index, int64_t count) { return total * index / count; }

namespace shared {

LITTLEBIT_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

LITTLEBIT_INLINE float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Without a branch, so that the loops around them are vectorized, and without subnormal floats on the way, which are 0 in
// a thread that flushes them.
LITTLEBIT_INLINE float from_f16(uint16_t half) {
  const uint32_t size = half & 0x7fff;
  const uint32_t small = bits_of(float_of(size | 0x4b000000u) - 0x1p23f) - (size ? 24u << 23 : 0u);  // size * 2^-24
  const uint32_t normal = (size << 13) + (size >= 0x7c00 ? 224u << 23 : 112u << 23);
  return float_of((size < 0x400 ? small : normal) | static_cast<uint32_t>(half & 0x8000) << 16);
}

LITTLEBIT_INLINE uint16_t to_f16(float value) {
  const uint32_t bits = bits_of(value), size = bits & 0x7fffffffu;
  const uint32_t small = bits_of(float_of(size) + 0.5f) - 0x3f000000u;  // the adder rounds to the subnormal grid
  const uint32_t normal = (size + 0xc8000fffu + ((size >> 13) & 1)) >> 13;
  const uint32_t special = size > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t result = size >= 0x47800000u ? special : size < 0x38800000u ? small : normal;
  return static_cast<uint16_t>(result | (bits >> 16 & 0x8000u));
}

LITTLEBIT_INLINE uint16_t to_bf16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1);
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded >> 16);
}

// out[i] = array[offset + i]
LITTLEBIT_INLINE void load(Array array, int64_t offset, int64_t count, float* LITTLEBIT_RESTRICT out) {
  if (array.dtype == Dtype::f32) {
    const float* LITTLEBIT_RESTRICT data = static_cast<const float*>(array.data) + offset;
    for (int64_t i = 0; i < count; ++i) out[i] = data[i];
  } else if (array.dtype == Dtype::bf16) {
    const uint16_t* LITTLEBIT_RESTRICT data = static_cast<const uint16_t*>(array.data) + offset;
    for (int64_t i = 0; i < count; ++i) out[i] = float_of(static_cast<uint32_t>(data[i]) << 16);
  } else {
    const uint16_t* LITTLEBIT_RESTRICT data = static_cast<const uint16_t*>(array.data) + offset;
    for (int64_t i = 0; i < count; ++i) out[i] = from_f16(data[i]);
  }
}

LITTLEBIT_INLINE void load32(Array array, int64_t offset, int64_t count, float* out) {
  if (count >= 32) return load(array, offset, 32, out);
  for (int64_t i = 0; i < 32; ++i) out[i] = 0.0f;
  load(array, offset, count, out);
}

// The 32 inputs of a row of words.
LITTLEBIT_INLINE void gains(const Input& input, int64_t k, float* out) {
  if (input.gain.data) return load32(input.gain, k, input.length - k, out);
  for (int64_t i = 0; i < 32; ++i) out[i] = 1.0f;
}

LITTLEBIT_INLINE void inputs(const Input& input, int64_t token, int64_t k, const float* LITTLEBIT_RESTRICT gain,
                             float* LITTLEBIT_RESTRICT out) {
  load32(input.values, token * input.stride + k, input.length - k, out);
  for (int64_t i = 0; i < 32; ++i) out[i] *= gain[i];
}

// Columns at a time: their accumulators and the words stay in the first-level cache while the tokens pass.
constexpr int64_t kColumns = 1024, kColumnsOfOne = 8192;

// Words that a sweep asks for ahead of their use, in two steps: far ones, a memory latency away and more, come into the
// second-level cache, and near ones from there into the first. A core has too few places for lines on their way from memory
// to the first level to keep the memory busy. The hardware foresees little, because every page is new.
constexpr int64_t kAhead = 1024, kNear = 128;


// Asks for what the word at `words` + i will be followed by; `next` are far words, or anything: an address, not a pointer.
LITTLEBIT_INLINE void prefetch(const uint32_t* words, uintptr_t next, int64_t i) {
  LITTLEBIT_PREFETCH(next + sizeof(uint32_t) * static_cast<uintptr_t>(i), 2);
  LITTLEBIT_PREFETCH(address(words, i + kNear), 1);
}

// sweep(acc, x, words, count, next): `next` are `count` words that will be swept soon.
template <void (*sweep)(float*, const float*, const uint32_t*, int64_t, uintptr_t)>
LITTLEBIT_INLINE void product(const Words& words, const Input& input, int64_t tokens, float* acc, int64_t lda) {
  alignas(64) float gain[32], x[32];
  const int64_t step = tokens > 1 ? kColumns : kColumnsOfOne;
  for (int64_t begin = 0; begin < words.columns; begin += step) {
    const int64_t count = words.columns - begin < step ? words.columns - begin : step, ahead = 1 + kAhead / count;
    for (int64_t row = 0; row < words.rows; ++row) {
      const int64_t k = 32 * (words.first + row);
      const uint32_t* now = words.words + row * words.stride + begin;
      const int64_t over = row + ahead - words.rows;
      const uintptr_t next = over < 0      ? address(now, ahead * words.stride)
                             : words.after ? address(words.after, over * words.after_stride)
                                           : address(now, 0);
      gains(input, k, gain);
      for (int64_t token = 0; token < tokens; ++token) {
        inputs(input, token, k, gain, x);
        sweep(acc + token * lda + begin, x, now, count, next);
      }
    }
  }
}

constexpr int64_t kPiece = 256;

LITTLEBIT_INLINE void combine(const float* LITTLEBIT_RESTRICT part, Array scale, int64_t offset, Array bias, bool first,
                              int64_t count, float* LITTLEBIT_RESTRICT out) {
  alignas(64) float h[kPiece];
  for (int64_t begin = 0; begin < count; begin += kPiece) {
    const int64_t size = count - begin < kPiece ? count - begin : kPiece;
    if (first && bias.data) load(bias, offset + begin, size, out + begin);
    if (first && !bias.data) std::memset(out + begin, 0, static_cast<size_t>(size) * sizeof(float));
    load(scale, offset + begin, size, h);
    for (int64_t i = 0; i < size; ++i) out[begin + i] += h[i] * part[begin + i];
  }
}

LITTLEBIT_INLINE void store(const float* values, int64_t count, void* y, Dtype dtype, int64_t offset) {
  if (dtype == Dtype::f32) {
    std::memcpy(static_cast<float*>(y) + offset, values, static_cast<size_t>(count) * sizeof(float));
  } else if (dtype == Dtype::bf16) {
    uint16_t* LITTLEBIT_RESTRICT out = static_cast<uint16_t*>(y) + offset;
    for (int64_t i = 0; i < count; ++i) out[i] = to_bf16(values[i]);
  } else {
    uint16_t* LITTLEBIT_RESTRICT out = static_cast<uint16_t*>(y) + offset;
    for (int64_t i = 0; i < count; ++i) out[i] = to_f16(values[i]);
  }
}

// A 32 x 32 bit matrix per row of words: halves are exchanged at distances 16, 8, 4, 2, 1.
LITTLEBIT_INLINE void transpose(const uint32_t* words, int64_t stride, int64_t rows, int64_t count, uint32_t* out) {
  for (int64_t row = 0; row < rows; ++row, words += stride, out += 32) {
    for (int64_t i = 0; i < 32; ++i) out[i] = i < count ? words[i] : 0;
    uint32_t mask = 0x0000ffffu;
    for (int distance = 16; distance; distance >>= 1, mask ^= mask << distance) {
      for (int i = 0; i < 32; i = ((i | distance) + 1) & ~distance) {
        const uint32_t swap = ((out[i] >> distance) ^ out[i | distance]) & mask;
        out[i] ^= swap << distance;
        out[i | distance] ^= swap;
      }
    }
  }
}

}  // namespace shared
}  // namespace littlebit
