// The operators, on torch's stable ABI: one library serves every Python and every torch from 2.10 on.
//
//     hf_littlebit_cpu::linear, linear_grad     the kernel by itself, as used by torch-ext/littlebit/cpu.py
//     hf_littlebit_cpu::scaled_signs, scaled_signs_grad     passes over latents in training, as used by src/hf_littlebit/product.py
//     hf_littlebit_cpu::select(isa) -> isa      forces an instruction set ("auto": the best), for tests; "" only asks
//     hf_littlebit::linear, linear_grad         the same functions for the CPU dispatch key of the plugin's operators,
//                                               whose schemas are in src/hf_littlebit/ops.py; nothing calls these if absent
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "littlebit.h"

namespace {

using littlebit::Array;
using littlebit::Dtype;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Part = std::optional<Tensor>;

constexpr int64_t kMaxRank = int64_t{1} << 31;  // sums of ranks stay far from overflow

Dtype dtype_of(const Tensor& tensor, const char* name) {
  const ScalarType type = tensor.scalar_type();
  if (type == ScalarType::Float) return Dtype::f32;
  if (type == ScalarType::BFloat16) return Dtype::bf16;
  STD_TORCH_CHECK(type == ScalarType::Half, name, " is ", torch::headeronly::toString(type),
                  ", but must be float32, bfloat16 or float16");
  return Dtype::f16;
}

// A layer whose arrays point into the parts, which outlive it, or into contiguous copies of them that it holds. Every part
// is checked: a wrong shape must be an error, not a read past the end.
struct Bound {
  std::vector<Tensor> copies;
  std::vector<int64_t> ranks;
  littlebit::Layer layer{};

  const void* plain(const Tensor& tensor, const char* name, int64_t rows, int64_t columns) {
    const int64_t dim = tensor.dim();
    const int64_t height = dim == 2 ? tensor.size(0) : 1;
    STD_TORCH_CHECK(dim >= 1 && dim <= 2, name, " has ", dim, " dimensions, but must be [", rows, ", ", columns, "]");
    STD_TORCH_CHECK(height == rows && tensor.size(dim - 1) == columns, name, " is [", height, ", ", tensor.size(dim - 1),
                    "], but must be [", rows, ", ", columns, "]");
    STD_TORCH_CHECK(tensor.is_cpu(), name, " is not on the CPU, as x is");
    if (tensor.is_contiguous()) return tensor.const_data_ptr();
    copies.push_back(torch::stable::contiguous(tensor));
    return copies.back().const_data_ptr();
  }

  template <class T>
  const T* bits(const Part& part, ScalarType type, const char* name, int64_t rows, int64_t columns) {
    if (rows == 0) return nullptr;
    STD_TORCH_CHECK(part.has_value(), name, " is missing: the layer needs [", rows, ", ", columns, "]");
    return bits<T>(*part, type, name, rows, columns);
  }

  template <class T>
  const T* bits(const Tensor& part, ScalarType type, const char* name, int64_t rows, int64_t columns) {
    const ScalarType found = part.scalar_type();
    STD_TORCH_CHECK(found == type, name, " is ", torch::headeronly::toString(found), ", but must be ",
                    torch::headeronly::toString(type));
    return static_cast<const T*>(plain(part, name, rows, columns));
  }

  Array values(const Tensor& tensor, const char* name, int64_t rows, int64_t columns) {
    return {plain(tensor, name, rows, columns), dtype_of(tensor, name)};
  }

  Bound(const Tensor& u, const Part& u_tail, const Part& v, const Part& v_tail, const Tensor& scale_out,
        const Tensor& scale_rank, const Tensor& scale_in, const Part& bias, std::vector<int64_t> path_ranks)
      : ranks(std::move(path_ranks)) {
    STD_TORCH_CHECK(u.dim() == 2, "u has ", u.dim(), " dimensions, but must have 2");
    STD_TORCH_CHECK(scale_in.dim() == 2, "scale_in has ", scale_in.dim(), " dimensions, but must have 2");
    const int64_t in = scale_in.size(1), out = u.size(1), paths = static_cast<int64_t>(ranks.size());
    STD_TORCH_CHECK(paths > 0, "ranks is empty, but a layer has at least one path");
    int64_t rank = 0, words = 0, bytes = 0;
    for (const int64_t r : ranks) {
      STD_TORCH_CHECK(r >= 0 && r <= kMaxRank, "a rank is ", r, ", but must be from 0 to ", kMaxRank);
      rank += r, words += r / 32, bytes += (r % 32 + 7) / 8;
    }
    layer.in_features = in, layer.out_features = out, layer.paths = paths, layer.ranks = ranks.data();
    layer.u = bits<uint32_t>(u, ScalarType::Int, "u", words, out);
    layer.u_tail = bits<uint8_t>(u_tail, ScalarType::Byte, "u_tail", bytes, out);
    layer.v = bits<uint32_t>(v, ScalarType::Int, "v", in / 32, rank);
    layer.v_tail = bits<uint8_t>(v_tail, ScalarType::Byte, "v_tail", (in % 32 + 7) / 8, rank);
    layer.scale_out = values(scale_out, "scale_out", paths, out);
    layer.scale_rank = values(scale_rank, "scale_rank", 1, rank);
    layer.scale_in = values(scale_in, "scale_in", paths, in);
    if (bias) layer.bias = values(*bias, "bias", 1, out);
  }

  Bound(const Bound&) = delete;
  Bound& operator=(const Bound&) = delete;
};

littlebit::Pool pool() {
  // The bounds of the work are ours (task i of `count`), so that they do not depend on how torch cuts the range.
  return {static_cast<int64_t>(torch::stable::get_num_threads()),
          [](int64_t count, void (*task)(int64_t, void*), void* context) {
            torch::stable::parallel_for(0, count, 1, [=](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) task(i, context);
            });
          }};
}

// A tensor of its own, never a view: autograd refuses to modify a view from inside an operator. Called without the
// dispatcher, which would look the operator up by its name.
Tensor empty(const std::vector<int64_t>& sizes, ScalarType type, const Tensor& like) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size() - 1; i > 0; --i) strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
  const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  int32_t index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                         dtype, aoti_torch_device_type_cpu(), index, &made));
  return Tensor(made);
}

using Product = void (*)(const littlebit::Layer&, Array, int64_t, int64_t, void*, const littlebit::Pool&);

Tensor apply(Product product, const Bound& bound, const Tensor& x, const char* name, int64_t from, int64_t to) {
  const int64_t dim = x.dim();
  STD_TORCH_CHECK(dim >= 1 && x.size(dim - 1) == from, name, " has ", dim >= 1 ? x.size(dim - 1) : 0,
                  " values in its last dimension, but the layer takes ", from);
  const Dtype dtype = dtype_of(x, name);
  // Rows may be apart (a slice of a batch); anything else is copied.
  const bool rows = dim == 2 && from > 0 && x.stride(1) == 1 && x.stride(0) >= from;
  const Tensor flat = rows || x.is_contiguous() ? x : torch::stable::contiguous(x);
  int64_t tokens = 1;
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  for (int64_t i = 0; i + 1 < dim; ++i) tokens *= sizes[static_cast<size_t>(i)];
  sizes.back() = to;
  const Tensor y = empty(sizes, x.scalar_type(), x);
  if (tokens > 0 && to > 0) {
    product(bound.layer, {flat.const_data_ptr(), dtype}, rows ? x.stride(0) : from, tokens, y.mutable_data_ptr(), pool());
  }
  return y;
}

Tensor linear(const Tensor& x, const Tensor& u, Part u_tail, Part v, Part v_tail, const Tensor& scale_out,
              const Tensor& scale_rank, const Tensor& scale_in, Part bias, std::vector<int64_t> ranks) {
  const Bound bound(u, u_tail, v, v_tail, scale_out, scale_rank, scale_in, bias, std::move(ranks));
  return apply(littlebit::forward, bound, x, "x", bound.layer.in_features, bound.layer.out_features);
}

Tensor linear_grad(const Tensor& grad, const Tensor& u, Part u_tail, Part v, Part v_tail, const Tensor& scale_out,
                   const Tensor& scale_rank, const Tensor& scale_in, std::vector<int64_t> ranks) {
  const Bound bound(u, u_tail, v, v_tail, scale_out, scale_rank, scale_in, std::nullopt, std::move(ranks));
  return apply(littlebit::backward, bound, grad, "grad", bound.layer.out_features, bound.layer.in_features);
}

// A factor in training, its arrays as in Bound.
struct Factor {
  std::vector<Tensor> copies;
  std::vector<int64_t> ranks;
  littlebit::Latents latents{};
  int64_t rank = 0;

  const Tensor& plain(const Tensor& tensor, const char* name, const std::vector<int64_t>& sizes) {
    bool same = tensor.dim() == static_cast<int64_t>(sizes.size());
    for (size_t i = 0; same && i < sizes.size(); ++i) same = tensor.size(static_cast<int64_t>(i)) == sizes[i];
    STD_TORCH_CHECK(same, name, " is ", shape(tensor.sizes()), ", but must be ", shape(sizes));
    STD_TORCH_CHECK(tensor.is_cpu(), name, " is not on the CPU, as the latent is");
    if (tensor.is_contiguous()) return tensor;
    copies.push_back(torch::stable::contiguous(tensor));
    return copies.back();
  }

  const float* values(const Tensor& tensor, const char* name, const std::vector<int64_t>& sizes) {
    const ScalarType found = tensor.scalar_type();
    STD_TORCH_CHECK(found == ScalarType::Float, name, " is ", torch::headeronly::toString(found), ", but must be float32");
    return static_cast<const float*>(plain(tensor, name, sizes).const_data_ptr());
  }

  template <class Sizes>
  static std::string shape(const Sizes& sizes) {
    std::string text;
    for (const int64_t size : sizes) text += (text.empty() ? "" : ", ") + std::to_string(size);
    return "[" + text + "]";
  }

  Factor(const Tensor& latent, const Tensor& outer, const Part& inner, std::vector<int64_t> path_ranks)
      : ranks(std::move(path_ranks)) {
    for (const int64_t r : ranks) {
      STD_TORCH_CHECK(r >= 0 && r <= kMaxRank, "a rank is ", r, ", but must be from 0 to ", kMaxRank);
      rank += r;
    }
    STD_TORCH_CHECK(latent.dim() == 2, "latent has ", latent.dim(), " dimensions, but must have 2");
    const int64_t rows = latent.size(0), paths = static_cast<int64_t>(ranks.size());
    latents.rows = rows, latents.paths = paths, latents.ranks = ranks.data();
    latents.values = values(latent, "latent", {rows, rank});
    latents.outer = values(outer, "outer", {paths, rows});
    if (inner) latents.inner = values(*inner, "inner", {rank});
  }

  Factor(const Factor&) = delete;
  Factor& operator=(const Factor&) = delete;
};

Tensor scaled_signs(const Tensor& latent, const Tensor& outer, Part inner, std::vector<int64_t> ranks, ScalarType type,
                    int64_t width) {
  Factor factor(latent, outer, inner, std::move(ranks));
  STD_TORCH_CHECK(width >= factor.rank && width <= kMaxRank, "width is ", width, ", but must be from ", factor.rank, " to ",
                  kMaxRank);
  factor.latents.stride = width;
  const Tensor y = empty({factor.latents.rows, width}, type, latent);
  littlebit::scaled_signs(factor.latents, y.mutable_data_ptr(), dtype_of(y, "the result"), pool());
  return y;
}

std::tuple<Tensor, Tensor, Tensor> scaled_signs_grad(const Tensor& grad, const Tensor& latent, const Tensor& outer,
                                                     Part inner, std::vector<int64_t> ranks, std::optional<double> alpha) {
  Factor factor(latent, outer, inner, std::move(ranks));
  const littlebit::Latents& latents = factor.latents;
  const Dtype dtype = dtype_of(grad, "grad");
  factor.latents.stride = grad.dim() == 2 ? std::max(grad.size(1), factor.rank) : factor.rank;
  const Array given = {factor.plain(grad, "grad", {latents.rows, latents.stride}).const_data_ptr(), dtype};
  const float steepness = static_cast<float>(alpha.value_or(0.0));
  const auto made = [&](const std::vector<int64_t>& sizes) { return empty(sizes, ScalarType::Float, latent); };
  const Tensor of_latent = made({latents.rows, factor.rank}), of_outer = made({latents.paths, latents.rows});
  const Tensor of_inner = made({inner ? factor.rank : 0});  // a result may not be missing
  const auto data = [](const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); };
  littlebit::scaled_signs_grad(latents, given, alpha ? &steepness : nullptr, data(of_latent), data(of_outer),
                               data(of_inner), pool());
  return {of_latent, of_outer, of_inner};
}

std::string select_isa(std::string isa) {
  STD_TORCH_CHECK(isa.empty() || littlebit::select(isa.c_str()), "this machine has no instruction set '", isa,
                  "' (auto, amx, avx512, avx2, neon, generic)");
  return littlebit::selected();
}

#define PARTS "Tensor u, Tensor? u_tail, Tensor? v, Tensor? v_tail, Tensor scale_out, Tensor scale_rank, Tensor scale_in"

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(hf_littlebit_cpu, m) {
  m.def("linear(Tensor x, " PARTS ", Tensor? bias, int[] ranks) -> Tensor");
  m.def("linear_grad(Tensor grad, " PARTS ", int[] ranks) -> Tensor");
  m.def("scaled_signs(Tensor latent, Tensor outer, Tensor? inner, int[] ranks, ScalarType dtype, int width) -> Tensor");
  m.def("scaled_signs_grad(Tensor grad, Tensor latent, Tensor outer, Tensor? inner, int[] ranks, float? alpha)"
        " -> (Tensor, Tensor, Tensor)");
  m.def("select(str isa) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(hf_littlebit_cpu, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_grad", TORCH_BOX(&linear_grad));
  m.impl("scaled_signs", TORCH_BOX(&scaled_signs));
  m.impl("scaled_signs_grad", TORCH_BOX(&scaled_signs_grad));
}

STABLE_TORCH_LIBRARY_IMPL(hf_littlebit_cpu, CompositeExplicitAutograd, m) { m.impl("select", TORCH_BOX(&select_isa)); }

STABLE_TORCH_LIBRARY_IMPL(hf_littlebit, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_grad", TORCH_BOX(&linear_grad));
}
