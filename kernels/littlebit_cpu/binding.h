// What the operators of binding.cpp and table_binding.cpp share: dtypes, threads, and x as rows of values.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "littlebit.h"
#include "torch_abi.h"

namespace littlebit {

inline Dtype dtype_of(int32_t dtype, const char* name) {
  if (dtype == aoti_torch_dtype_float32()) return Dtype::f32;
  if (dtype == aoti_torch_dtype_bfloat16()) return Dtype::bf16;
  check(dtype == aoti_torch_dtype_float16(), name, " is ", dtype_name(dtype),
        ", but must be float32, bfloat16 or float16");
  return Dtype::f16;
}

template <class Sizes>
std::string shape(const Sizes& sizes) {
  std::string text;
  for (const int64_t size : sizes) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "[" + text + "]";
}

struct Task {
  void (*run)(int64_t, void*);
  void* context;
};

inline Pool pool() {
  // The bounds of the work are ours (task i of `count`), so that they do not depend on how torch cuts the range.
  return {static_cast<int64_t>(ask<uint32_t>(torch_get_num_threads)),
          [](int64_t count, void (*run)(int64_t, void*), void* context) {
            Task task{run, context};
            const ParallelFunc some = [](int64_t begin, int64_t end, void* held) {
              const Task& own = *static_cast<const Task*>(held);
              for (int64_t i = begin; i < end; ++i) own.run(i, own.context);
            };
            call(torch_parallel_for(0, count, 1, some, &task));
          }};
}

// x [..., features] as rows of values; holds a copy where its elements are scattered.
struct Rows {
  std::optional<Tensor> copy;
  std::vector<int64_t> sizes;
  Array values{};
  int64_t stride = 0, tokens = 1;

  Rows(const Tensor& x, const char* name, int64_t features) : sizes(x.sizes()) {
    const bool same = !sizes.empty() && sizes.back() == features;
    if (!same) fail(name, " is ", shape(sizes), ", but its last dimension must be ", features);
    values.dtype = dtype_of(x.dtype(), name);
    // Rows may be apart (a slice of a batch); anything else is copied.
    const bool apart = sizes.size() == 2 && features > 0 && x.stride(1) == 1 && x.stride(0) >= features;
    stride = apart ? x.stride(0) : features;
    if (!apart && !x.is_contiguous()) copy = x.contiguous();
    values.data = (copy ? *copy : x).data();
    sizes.pop_back();
    for (const int64_t size : sizes) tokens *= size;
    check(values.data || !tokens || !features, name, " has no memory: it is released");
  }

  // Uninitialised, [..., features], of the dtype of x.
  Tensor empty(const Tensor& x, int64_t features) const {
    std::vector<int64_t> made = sizes;
    made.push_back(features);
    return Tensor::empty(made, x.dtype(), x);
  }
};

}  // namespace littlebit
