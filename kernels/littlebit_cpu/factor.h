// A packed factor and its products over the rows of words: whole words, then the tail, and the transposed way.
#pragma once

#include <algorithm>
#include <memory>

#include "kernels.h"

namespace littlebit {

constexpr int64_t kTransposed = 16;  // rows of transposed words at a time

// Columns of a packed factor: its whole words, then its tail as one more row of words whose missing bits are 0.
struct Factor {
  const uint32_t* words;
  const uint8_t* tail;
  int64_t stride, length;

  int64_t whole() const { return length / 32; }
  int64_t rows() const { return (length + 31) / 32; }

  // The row of words made of the tail's bytes, for `count` columns from `column` on.
  void assemble(int64_t column, int64_t count, uint32_t* out) const {
    switch ((length % 32 + 7) / 8) {
      case 1: return join<1>(column, count, out);
      case 2: return join<2>(column, count, out);
      case 3: return join<3>(column, count, out);
      case 4: return join<4>(column, count, out);
    }
  }

  template <int bytes>
  void join(int64_t column, int64_t count, uint32_t* LITTLEBIT_RESTRICT out) const {
    for (int64_t i = 0; i < count; ++i) {
      uint32_t word = 0;
      for (int byte = 0; byte < bytes; ++byte) word |= static_cast<uint32_t>(tail[byte * stride + column + i]) << (8 * byte);
      out[i] = word;
    }
  }
};

inline void call_product(const Kernels& isa, const Words& words, const Input& input, int64_t tokens, float* acc, int64_t lda) {
  const bool batch = isa.batch_product && tokens >= isa.batch;
  (batch ? isa.batch_product : isa.product)(words, input, tokens, acc, lda);
}

// acc[t, n - column] += sum over the rows [begin, end) of words of input(t, k) * factor(k, n), n = column .. + count
inline void multiply(const Kernels& isa, const Factor& factor, int64_t column, int64_t count, int64_t begin, int64_t end,
                     const Input& input, int64_t tokens, float* acc, int64_t lda, uintptr_t after, int64_t after_stride) {
  const int64_t whole = std::min(end, factor.whole());
  if (begin < whole) {
    const uint32_t* first = factor.words + begin * factor.stride + column;
    const Words words = {first, factor.stride, whole - begin, begin, count, after, after_stride};
    call_product(isa, words, input, tokens, acc, lda);
  }
  if (end > factor.whole() && begin < end) {
    std::unique_ptr<uint32_t[]> row(new uint32_t[static_cast<size_t>(count)]);
    factor.assemble(column, count, row.get());
    call_product(isa, {row.get(), count, 1, factor.whole(), count, after, after_stride}, input, tokens, acc, lda);
  }
}

// The transposed product: acc[t, k - 32 begin] += sum_n input(t, n) * factor(k, column + n), n < count, for the inputs k
// of the rows [begin, end) of words. `acc` has room for whole rows of words.
inline void multiply_transposed(const Kernels& isa, const Factor& factor, int64_t column, int64_t count, int64_t begin,
                                int64_t end, const Input& input, int64_t tokens, float* acc, int64_t lda) {
  const int64_t width = 32 * (end - begin), whole = std::max(begin, std::min(end, factor.whole()));
  std::unique_ptr<uint32_t[]> turned(new uint32_t[static_cast<size_t>(kTransposed * width)]);
  const int64_t blocks = (count + 31) / 32;
  for (int64_t first = 0; first < blocks; first += kTransposed) {
    const int64_t rows = std::min(kTransposed, blocks - first);
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t start = 32 * (first + row), size = std::min<int64_t>(32, count - start);
      uint32_t* out = turned.get() + row * width;
      if (begin < whole) {
        const uint32_t* words = factor.words + begin * factor.stride + column + start;
        isa.transpose(words, factor.stride, whole - begin, size, out);
      }
      if (end > factor.whole()) {
        uint32_t last[32];
        factor.assemble(column + start, size, last);
        isa.transpose(last, 32, 1, size, out + 32 * (whole - begin));
      }
    }
    call_product(isa, {turned.get(), width, rows, first, width}, input, tokens, acc, lda);
  }
}

}  // namespace littlebit
