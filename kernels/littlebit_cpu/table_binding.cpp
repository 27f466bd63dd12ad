// The operators of packed tables, on torch's stable ABI as those of binding.cpp.
//
//     hf_littlebit_cpu::head, head_grad, embedding      the kernels by themselves, as used by torch-ext/littlebit/table_cpu.py
//     hf_littlebit::head, head_grad, embedding          the same functions for the CPU dispatch key of the plugin's operators, whose
//                                                       schemas are in hf_littlebit/layers/table_ops.py
#include <algorithm>

#include "binding.h"
#include "table.h"

namespace {

using littlebit::Array;
using littlebit::check;
using littlebit::Table;
using littlebit::Tensor;

// A table whose arrays point into the parts, which outlive it, or into contiguous copies of them that it holds. The checks and
// their texts are those of torch-ext/littlebit/table.py.
struct Bound {
  std::vector<Tensor> copies;
  Table table{};

  const void* plain(const Tensor& tensor, const char* name) {
    check(tensor.is_cpu(), name, " is not on the CPU, but the input is; move both to one device");
    if (tensor.is_contiguous()) return tensor.data();
    copies.push_back(tensor.contiguous());
    return copies.back().data();
  }

  Bound(const Tensor& codes, const Tensor& scale, int64_t columns) {
    const int32_t dtype = codes.dtype();
    const bool eight = dtype == aoti_torch_dtype_int8();
    check(eight || dtype == aoti_torch_dtype_int32(), "codes is ", littlebit::dtype_name(dtype),
          ", but must be int8 (8 bits) or int32 (4 bits)");
    check(codes.dim() == 2 && scale.dim() == 2, "codes and scale have ", codes.dim(), " and ", scale.dim(),
          " dimensions, but must have 2: [rows, ...]");
    check(columns > 0, "a table has ", columns, " columns, but needs one or more");
    table.rows = codes.size(0), table.columns = columns, table.bits = eight ? 8 : 4, table.groups = scale.size(1);
    const int64_t width = eight ? columns : 8 * table.blocks();
    check(codes.size(1) == width, "codes is [", table.rows, ", ", codes.size(1), "], but must be [rows, ", width, "] for ", columns,
          " columns in ", table.bits, " bits");
    check(scale.size(0) == table.rows && (table.groups == table.blocks() || (eight && table.groups == 1)), "scale is [", scale.size(0),
          ", ", table.groups, "], but must be [", table.rows, ", ", eight ? "1] or [" + std::to_string(table.rows) + ", " : "",
          table.blocks(), "]");
    table.codes = plain(codes, "codes");
    table.scale = {plain(scale, "scale"), littlebit::dtype_of(scale.dtype(), "scale")};
  }

  Bound(const Bound&) = delete;
  Bound& operator=(const Bound&) = delete;
};

int64_t last(const Tensor& x) {
  check(x.dim() > 0, "x has no dimension, but must be [..., columns]");
  return x.size(x.dim() - 1);
}

Tensor head(const Tensor& x, const Tensor& codes, const Tensor& scale, std::optional<Tensor> bias) {
  Bound bound(codes, scale, last(x));
  const littlebit::Rows rows(x, "x", bound.table.columns);
  Array offsets{};
  if (bias) {
    check(bias->dim() == 1 && bias->size(0) == bound.table.rows, "bias has another shape than [", bound.table.rows, "]");
    offsets = {bound.plain(*bias, "bias"), littlebit::dtype_of(bias->dtype(), "bias")};
  }
  Tensor y = rows.empty(x, bound.table.rows);
  littlebit::head(bound.table, rows.values, rows.stride, rows.tokens, offsets, y.mutable_data(), littlebit::pool());
  return y;
}

Tensor head_grad(const Tensor& grad, const Tensor& codes, const Tensor& scale, int64_t columns) {
  const Bound bound(codes, scale, columns);
  const littlebit::Rows rows(grad, "grad", bound.table.rows);
  Tensor x = rows.empty(grad, columns);
  littlebit::head_grad(bound.table, rows.values, rows.stride, rows.tokens, x.mutable_data(), littlebit::pool());
  return x;
}

Tensor embedding(const Tensor& indices, const Tensor& codes, const Tensor& scale, int64_t columns, int32_t dtype) {
  const Bound bound(codes, scale, columns);
  const littlebit::Dtype known = littlebit::dtype_of(dtype, "the result");
  const bool wide = indices.dtype() == aoti_torch_dtype_int64();
  check(wide || indices.dtype() == aoti_torch_dtype_int32(), "indices is ", littlebit::dtype_name(indices.dtype()),
        ", but must be int64 or int32");
  check(indices.is_cpu(), "indices is not on the CPU, as the table is; move both to one device");
  std::vector<int64_t> sizes = indices.sizes();
  int64_t count = 1;
  for (const int64_t size : sizes) count *= size;
  std::optional<Tensor> copy;
  if (!indices.is_contiguous()) copy = indices.contiguous();
  const void* data = (copy ? *copy : indices).data();
  std::vector<int64_t> rows(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
    check(row >= 0 && row < bound.table.rows, "index ", row, " is out of range: the table has ", bound.table.rows, " rows");
    rows[static_cast<size_t>(i)] = row;
  }
  sizes.push_back(columns);
  Tensor y = Tensor::empty(sizes, dtype, scale);
  littlebit::embedding(bound.table, rows.data(), count, y.mutable_data(), known, littlebit::pool());
  return y;
}

void implement(littlebit::Library& library) {
  library.implement<&head>("head");
  library.implement<&head_grad>("head_grad");
  library.implement<&embedding>("embedding");
}

const littlebit::Library definitions("hf_littlebit_cpu", nullptr, [](littlebit::Library& library) {
  library.define("head(Tensor x, Tensor codes, Tensor scale, Tensor? bias) -> Tensor");
  library.define("head_grad(Tensor grad, Tensor codes, Tensor scale, int columns) -> Tensor");
  library.define("embedding(Tensor indices, Tensor codes, Tensor scale, int columns, ScalarType dtype) -> Tensor");
});
const littlebit::Library for_tensors("hf_littlebit_cpu", "CPU", implement);
const littlebit::Library for_the_plugin("hf_littlebit", "CPU", implement);

}  // namespace
