// What one instruction set provides for packed tables, and the parts that all share: vectors of the compiler's own kind, whose
// arithmetic becomes the instructions of whatever function they are inlined into.
#pragma once

#include "kernels.h"
#include "table.h"

namespace littlebit {

// x of some tokens, as kernels read it: zeros from `columns` on to `pitch`, which is more than the next multiple of 128.
struct Inputs {
  const float* values;     // [tokens, pitch]
  const uint16_t* halves;  // bf16 [tokens, pitch] in the set's own order; null where x is not bf16 or the set takes none
  int64_t pitch;
};

struct TableKernels {
  const char* name;
  // Puts bf16 x [columns] into the order of Inputs::halves; null: the set takes no bf16.
  void (*arrange)(const Table& table, const uint16_t* x, uint16_t* out);
  // Floats that `product` needs for so many rows and tokens.
  int64_t (*scratch)(const Inputs& x, int64_t count, int64_t tokens);
  // out[t * ldo + i] = sum_k W[first + i, k] x[t, k] for i < count; scratch begins with a line of the cache
  void (*product)(const Table& table, const Inputs& x, int64_t tokens, int64_t first, int64_t count, float* out, int64_t ldo,
                  float* scratch);
  // out[k] = W[row, k] for k below the columns rounded up to 64, where zeros follow
  void (*unpack)(const Table& table, int64_t row, float* out);
  // acc[t * pitch + k] += sum_(r < count) grad[t * ldg + r] rows[r * pitch + k], k < pitch
  void (*accumulate)(const float* rows, int64_t count, const float* grad, int64_t ldg, int64_t tokens, float* acc, int64_t pitch);
};

const TableKernels* plain_table();   // on ARM its vectors are NEON's
const TableKernels* avx2_table();    // null where the machine has it not, as the next
const TableKernels* avx512_table();

namespace shared {

constexpr int64_t kGroup = 64;  // columns of a scale
constexpr int kRows = 4;        // rows side by side: x is loaded once for all

template <int lanes>
struct Vector {
  typedef float F __attribute__((vector_size(4 * lanes), aligned(4), may_alias));
  typedef int32_t I __attribute__((vector_size(4 * lanes), aligned(4), may_alias));
};

template <int lanes>
LITTLEBIT_INLINE float sum(const typename Vector<lanes>::F& vector) {
  float each[lanes];
  std::memcpy(each, &vector, sizeof each);
  for (int half = lanes / 2; half; half /= 2) {
    LITTLEBIT_UNROLL
    for (int i = 0; i < half; ++i) each[i] += each[i + half];
  }
  return each[0];
}

LITTLEBIT_INLINE float scale_at(Array scale, int64_t i) {
  if (scale.dtype == Dtype::f32) return static_cast<const float*>(scale.data)[i];
  const uint16_t half = static_cast<const uint16_t*>(scale.data)[i];
  return scale.dtype == Dtype::bf16 ? float_of(static_cast<uint32_t>(half) << 16) : from_f16(half);
}

LITTLEBIT_INLINE const char* codes_of(const Table& table, int64_t row) {
  return static_cast<const char*>(table.codes) + row * table.row_bytes();
}

// sums[r] += the codes of one block of 64 columns times x, without their scale. `codes` has all 64.
template <int bits, int lanes>
LITTLEBIT_INLINE void block(const char* codes, const float* x, typename Vector<lanes>::F& sum0, typename Vector<lanes>::F& sum1) {
  using F = typename Vector<lanes>::F;
  using I = typename Vector<lanes>::I;
  if constexpr (bits == 8) {
    // A plain loop, which is vectorized; a conversion of vectors from bytes gcc takes apart.
    alignas(64) float values[kGroup];
    const int8_t* bytes = reinterpret_cast<const int8_t*>(codes);
    for (int k = 0; k < kGroup; ++k) values[k] = static_cast<float>(bytes[k]);
    for (int k = 0; k < kGroup; k += 2 * lanes) {
      sum0 += *reinterpret_cast<const F*>(values + k) * *reinterpret_cast<const F*>(x + k);
      sum1 += *reinterpret_cast<const F*>(values + k + lanes) * *reinterpret_cast<const F*>(x + k + lanes);
    }
  } else {
    static_assert(lanes <= 8, "a group has 8 words");
    LITTLEBIT_UNROLL
    for (int i = 0; i < 8; i += lanes) {
      // As two's complement, so that a nibble is its value after a shift up and an arithmetic one down.
      const I words = *reinterpret_cast<const I*>(codes + 4 * i) ^ static_cast<int32_t>(0x88888888u);
      LITTLEBIT_UNROLL
      for (int q = 0; q < 8; q += 2) {
        sum0 += __builtin_convertvector((words << (28 - 4 * q)) >> 28, F) * *reinterpret_cast<const F*>(x + 8 * q + i);
        sum1 += __builtin_convertvector((words << (24 - 4 * q)) >> 28, F) * *reinterpret_cast<const F*>(x + 8 * q + 8 + i);
      }
    }
  }
}

// Products of one token with `rows` rows.
template <int bits, int lanes, int rows, bool grouped>
LITTLEBIT_INLINE void dot(const Table& table, const float* x, int64_t first, float* out) {
  using F = typename Vector<lanes>::F;
  F sums[2 * rows] = {};
  const char* codes[rows];
  LITTLEBIT_UNROLL
  for (int r = 0; r < rows; ++r) codes[r] = codes_of(table, first + r);
  const int64_t ahead = rows * table.row_bytes(), bytes = bits == 8 ? 64 : 32;
  const int64_t blocks = table.blocks(), whole = bits == 8 ? table.columns / kGroup : blocks;
  for (int64_t b = 0; b < blocks; ++b) {
    LITTLEBIT_UNROLL
    for (int r = 0; r < rows; ++r) {
      const char* now = codes[r] + b * bytes;
      char last[kGroup];
      if (bits == 8 && b == whole) {
        std::memset(last, 0, sizeof last);
        std::memcpy(last, now, static_cast<size_t>(table.columns - whole * kGroup));
        now = last;
      } else {
        LITTLEBIT_PREFETCH(reinterpret_cast<uintptr_t>(now) + static_cast<uintptr_t>(ahead), 1);
      }
      if constexpr (grouped) {
        F part0 = {}, part1 = {};
        block<bits, lanes>(now, x + b * kGroup, part0, part1);
        sums[2 * r] += (part0 + part1) * scale_at(table.scale, (first + r) * table.groups + b);
      } else {
        block<bits, lanes>(now, x + b * kGroup, sums[2 * r], sums[2 * r + 1]);
      }
    }
  }
  LITTLEBIT_UNROLL
  for (int r = 0; r < rows; ++r) {
    out[r] = sum<lanes>(sums[2 * r] + sums[2 * r + 1]) * (grouped ? 1.0f : scale_at(table.scale, first + r));
  }
}

template <int bits, int lanes, bool grouped>
LITTLEBIT_INLINE void dots(const Table& table, const float* x, int64_t first, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + kRows <= count; i += kRows) dot<bits, lanes, kRows, grouped>(table, x, first + i, out + i);
  for (; i < count; ++i) dot<bits, lanes, 1, grouped>(table, x, first + i, out + i);
}

LITTLEBIT_INLINE void unpack(const Table& table, int64_t row, float* LITTLEBIT_RESTRICT out) {
  const char* codes = codes_of(table, row);
  for (int64_t b = 0; b < table.blocks(); ++b, out += kGroup) {
    const float scale = scale_at(table.scale, row * table.groups + (table.groups > 1 ? b : 0));
    if (table.bits == 8) {
      const int8_t* LITTLEBIT_RESTRICT now = reinterpret_cast<const int8_t*>(codes) + b * kGroup;
      const int64_t count = table.columns - b * kGroup < kGroup ? table.columns - b * kGroup : kGroup;
      if (count == kGroup) {
        for (int64_t k = 0; k < kGroup; ++k) out[k] = static_cast<float>(now[k]) * scale;
      } else {
        for (int64_t k = 0; k < kGroup; ++k) out[k] = k < count ? static_cast<float>(now[k]) * scale : 0.0f;
      }
    } else {
      uint32_t words[8];
      std::memcpy(words, codes + 32 * b, sizeof words);
      LITTLEBIT_UNROLL
      for (int q = 0; q < 8; ++q) {
        LITTLEBIT_UNROLL
        for (int i = 0; i < 8; ++i) out[8 * q + i] = static_cast<float>(static_cast<int32_t>(words[i] >> (4 * q) & 15) - 8) * scale;
      }
    }
  }
}

// out[t * ldo + r] = rows[r] . x[t], both of `width` values, `pitch` apart.
template <int lanes, int rows, int tokens>
LITTLEBIT_INLINE void tile(const float* w, const float* x, int64_t width, int64_t pitch, float* out, int64_t ldo) {
  using F = typename Vector<lanes>::F;
  F sums[rows * tokens] = {};
  for (int64_t k = 0; k < width; k += lanes) {
    F own[rows];
    LITTLEBIT_UNROLL
    for (int r = 0; r < rows; ++r) own[r] = *reinterpret_cast<const F*>(w + r * pitch + k);
    LITTLEBIT_UNROLL
    for (int t = 0; t < tokens; ++t) {
      const F value = *reinterpret_cast<const F*>(x + t * pitch + k);
      LITTLEBIT_UNROLL
      for (int r = 0; r < rows; ++r) sums[r * tokens + t] += own[r] * value;
    }
  }
  LITTLEBIT_UNROLL
  for (int t = 0; t < tokens; ++t) {
    LITTLEBIT_UNROLL
    for (int r = 0; r < rows; ++r) out[t * ldo + r] = sum<lanes>(sums[r * tokens + t]);
  }
}

inline int64_t scratch(const Inputs& x, int64_t, int64_t) { return kRows * x.pitch; }

// One token reads codes; several share rows that are unpacked to fp32, `many` tokens at a time.
template <int lanes, int words, int many>
LITTLEBIT_INLINE void product(const Table& table, const Inputs& x, int64_t tokens, int64_t first, int64_t count, float* out,
                              int64_t ldo, float* rows) {
  if (tokens == 1) {
    if (table.bits == 4) return dots<4, words, true>(table, x.values, first, count, out);
    if (table.groups > 1) return dots<8, lanes, true>(table, x.values, first, count, out);
    return dots<8, lanes, false>(table, x.values, first, count, out);
  }
  const int64_t width = kGroup * table.blocks();
  for (int64_t i = 0; i < count; i += kRows) {
    const int64_t left = count - i < kRows ? count - i : kRows;
    for (int64_t r = 0; r < left; ++r) unpack(table, first + i + r, rows + r * x.pitch);
    for (int64_t t = 0; t < tokens; t += many) {
      const float* own = x.values + t * x.pitch;
      float* place = out + t * ldo + i;
      if (left == kRows && tokens - t >= many) {
        tile<lanes, kRows, many>(rows, own, width, x.pitch, place, ldo);
      } else {
        for (int64_t u = 0; u < many && t + u < tokens; ++u) {
          for (int64_t r = 0; r < left; ++r) {
            tile<lanes, 1, 1>(rows + r * x.pitch, own + u * x.pitch, width, x.pitch, place + u * ldo + r, ldo);
          }
        }
      }
    }
  }
}

LITTLEBIT_INLINE void accumulate(const float* LITTLEBIT_RESTRICT rows, int64_t count, const float* grad, int64_t ldg, int64_t tokens,
                                 float* LITTLEBIT_RESTRICT acc, int64_t pitch) {
  int64_t r = 0;
  for (; r + 4 <= count; r += 4, rows += 4 * pitch) {
    for (int64_t t = 0; t < tokens; ++t) {
      const float* g = grad + t * ldg + r;
      const float a = g[0], b = g[1], c = g[2], d = g[3];
      float* LITTLEBIT_RESTRICT own = acc + t * pitch;
      for (int64_t k = 0; k < pitch; ++k) {
        own[k] += (a * rows[k] + b * rows[pitch + k]) + (c * rows[2 * pitch + k] + d * rows[3 * pitch + k]);
      }
    }
  }
  for (; r < count; ++r, rows += pitch) {
    for (int64_t t = 0; t < tokens; ++t) {
      const float a = grad[t * ldg + r];
      float* LITTLEBIT_RESTRICT own = acc + t * pitch;
      for (int64_t k = 0; k < pitch; ++k) own[k] += a * rows[k];
    }
  }
}

}  // namespace shared
}  // namespace littlebit
