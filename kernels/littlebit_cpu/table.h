// A packed table of rows, an output head or an embedding, with plain pointers. The layout is that of torch-ext/littlebit/table.py.
#pragma once

#include "littlebit.h"

namespace littlebit {

struct Table {
  int64_t rows, columns;
  int bits;           // 8: int8 [rows, columns];  4: words [rows, 8 ceil(columns / 64)]
  int64_t groups;     // scales of a row: 1, or one for 64 columns
  const void* codes;
  Array scale;        // [rows, groups]

  int64_t blocks() const { return (columns + 63) / 64; }
  int64_t row_bytes() const { return bits == 8 ? columns : 32 * blocks(); }
  bool grouped() const { return bits == 4 || groups > 1; }
};

// x [tokens, columns], its rows `stride` apart -> y [tokens, rows] contiguous, of x's dtype: y = x W^T + bias.
void head(const Table& table, Array x, int64_t stride, int64_t tokens, Array bias, void* y, const Pool& pool);

// grad [tokens, rows], rows `stride` apart -> grad W, [tokens, columns] contiguous, of grad's dtype.
void head_grad(const Table& table, Array grad, int64_t stride, int64_t tokens, void* grad_x, const Pool& pool);

// y [count, columns] of `dtype`: the rows at `indices`, every one of which is in [0, rows).
void embedding(const Table& table, const int64_t* indices, int64_t count, void* y, Dtype dtype, const Pool& pool);

}  // namespace littlebit
