// The operators, on torch's stable ABI (torch_abi.h): one library serves every Python and every torch from 2.10 on.
//
//     hf_littlebit_cpu::linear, linears, linear_grad        the kernel by itself, as used by torch-ext/littlebit/cpu.py
//     hf_littlebit_cpu::scaled_signs, scaled_signs_grad     passes over latents in training (hf_littlebit/layers/latent_matmul.py)
//     hf_littlebit_cpu::select(isa) -> isa                  forces an instruction set ("auto": the best), for tests; "" only asks
//     hf_littlebit::linear, linears, linear_grad            the same functions for the CPU dispatch key of the plugin's operators,
//                                                           whose schemas are in hf_littlebit/layers/ops.py; nothing calls these if absent
#include <algorithm>
#include <deque>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "binding.h"

namespace {

using littlebit::Array;
using littlebit::check;
using littlebit::Dtype;
using littlebit::dtype_of;
using littlebit::pool;
using littlebit::Rows;
using littlebit::shape;
using littlebit::Tensor;
using Part = std::optional<Tensor>;

constexpr size_t kParts = 8;  // of a layer: u, u_tail, v, v_tail, scale_out, scale_rank, scale_in and bias
constexpr int64_t kMaxRank = int64_t{1} << 31;  // sums of ranks stay far from overflow

// A layer whose arrays point into the parts, which outlive it, or into contiguous copies of them that it holds. Every part
// is checked, by the rules and in the words of torch-ext/littlebit/check.py: a wrong shape must be an error, not a read past
// the end. A part of no rows may be missing.
struct Bound {
  std::vector<Tensor> copies;
  std::vector<int64_t> ranks;
  littlebit::Layer layer{};

  const void* plain(const Tensor& tensor, const char* name, std::initializer_list<int64_t> sizes) {
    bool same = tensor.dim() == static_cast<int64_t>(sizes.size());
    for (size_t i = 0; same && i < sizes.size(); ++i) same = tensor.size(static_cast<int64_t>(i)) == sizes.begin()[i];
    if (!same) littlebit::fail(name, " is ", shape(tensor.sizes()), ", but must be ", shape(sizes));
    check(tensor.is_cpu(), name, " is not on the CPU, as x is; move both to one device");
    if (!tensor.is_contiguous()) {
      copies.push_back(tensor.contiguous());
      return copies.back().data();
    }
    const void* data = tensor.data();
    check(data || std::find(sizes.begin(), sizes.end(), 0) != sizes.end(), name,
          " has no memory: it is sharded or released; gather it, or call the layer through its wrapper");
    return data;
  }

  template <class T>
  const T* bits(const Tensor* part, int32_t type, const char* name, int64_t rows, int64_t columns) {
    check(part || rows == 0, name, " is missing: the layer needs [", rows, ", ", columns, "]");
    if (!part) return nullptr;
    const void* data = plain(*part, name, {rows, columns});
    const int32_t found = part->dtype();
    check(found == type, name, " is ", littlebit::dtype_name(found), ", but must be ", littlebit::dtype_name(type));
    return rows == 0 ? nullptr : static_cast<const T*>(data);
  }

  Array values(const Tensor& tensor, const char* name, std::initializer_list<int64_t> sizes) {
    const void* data = plain(tensor, name, sizes);
    return {data, dtype_of(tensor.dtype(), name)};
  }

  Bound(const Tensor& u, const Part& u_tail, const Part& v, const Part& v_tail, const Tensor& scale_out,
        const Tensor& scale_rank, const Tensor& scale_in, const Part& bias, std::vector<int64_t> path_ranks)
      : ranks(std::move(path_ranks)) {
    check(scale_out.dim() == 2, "scale_out has ", scale_out.dim(), " dimensions, but must have 2");
    check(scale_in.dim() == 2, "scale_in has ", scale_in.dim(), " dimensions, but must have 2");
    const int64_t in = scale_in.size(1), out = scale_out.size(1), paths = static_cast<int64_t>(ranks.size());
    check(paths > 0, "ranks is empty, but a layer has at least one path");
    int64_t rank = 0, words = 0, bytes = 0;
    for (const int64_t r : ranks) {
      check(r >= 1 && r <= kMaxRank, "a rank is ", r, ", but must be from 1 to ", kMaxRank);
      rank += r, words += r / 32, bytes += (r % 32 + 7) / 8;
    }
    const auto given = [](const Part& part) { return part ? &*part : nullptr; };
    layer.in_features = in, layer.out_features = out, layer.paths = paths, layer.ranks = ranks.data();
    layer.u = bits<uint32_t>(&u, aoti_torch_dtype_int32(), "u", words, out);
    layer.u_tail = bits<uint8_t>(given(u_tail), aoti_torch_dtype_uint8(), "u_tail", bytes, out);
    layer.v = bits<uint32_t>(given(v), aoti_torch_dtype_int32(), "v", in / 32, rank);
    layer.v_tail = bits<uint8_t>(given(v_tail), aoti_torch_dtype_uint8(), "v_tail", (in % 32 + 7) / 8, rank);
    layer.scale_out = values(scale_out, "scale_out", {paths, out});
    layer.scale_rank = values(scale_rank, "scale_rank", {rank});
    layer.scale_in = values(scale_in, "scale_in", {paths, in});
    if (bias) layer.bias = values(*bias, "bias", {out});
  }

  Bound(const Bound&) = delete;
  Bound& operator=(const Bound&) = delete;
};

Tensor linear(const Tensor& x, const Tensor& u, Part u_tail, Part v, Part v_tail, const Tensor& scale_out,
              const Tensor& scale_rank, const Tensor& scale_in, Part bias, std::vector<int64_t> ranks) {
  const Bound bound(u, u_tail, v, v_tail, scale_out, scale_rank, scale_in, bias, std::move(ranks));
  const Rows rows(x, "x", bound.layer.in_features);
  Tensor y = rows.empty(x, bound.layer.out_features);
  void* data = y.mutable_data();
  littlebit::forward(&bound.layer, 1, rows.values, rows.stride, rows.tokens, &data, pool());
  return y;
}

// Layers of one x: kParts parts each, `paths[i]` of the ranks belong to layer i.
std::vector<Tensor> linears(const Tensor& x, std::vector<Part> parts, std::vector<int64_t> ranks,
                            std::vector<int64_t> paths) {
  const size_t count = paths.size();
  check(parts.size() == kParts * count, parts.size(), " parts were given, but ", count, " layers have ", kParts * count);
  std::deque<Bound> bound;
  std::vector<littlebit::Layer> layers;
  std::vector<Tensor> results;
  std::vector<void*> data;
  size_t first = 0;
  for (size_t i = 0; i < count; ++i) {
    const Part* own = parts.data() + kParts * i;
    for (const int part : {0, 4, 5, 6}) check(own[part].has_value(), "u, scale_out, scale_rank or scale_in of layer ", i, " is missing");
    check(paths[i] >= 0 && first + static_cast<size_t>(paths[i]) <= ranks.size(), "layer ", i, " has ", paths[i], " paths, but ",
          ranks.size() - first, " ranks are left");
    const auto begin = ranks.begin() + static_cast<std::ptrdiff_t>(first);
    try {
      bound.emplace_back(*own[0], own[1], own[2], own[3], *own[4], *own[5], *own[6], own[7],
                         std::vector<int64_t>(begin, begin + paths[i]));
    } catch (const std::runtime_error& error) {
      littlebit::fail("layer ", i, ": ", error.what());
    }
    first += static_cast<size_t>(paths[i]);
    layers.push_back(bound.back().layer);
    check(layers[i].in_features == layers[0].in_features, "layer ", i, " takes ", layers[i].in_features, " values, but layer 0 ",
          layers[0].in_features);
  }
  check(first == ranks.size(), ranks.size(), " ranks were given, but the layers have ", first, " paths");
  if (!count) return results;
  const Rows rows(x, "x", layers[0].in_features);
  for (const littlebit::Layer& layer : layers) {
    results.push_back(rows.empty(x, layer.out_features));
    data.push_back(results.back().mutable_data());
  }
  littlebit::forward(layers.data(), static_cast<int64_t>(count), rows.values, rows.stride, rows.tokens, data.data(), pool());
  return results;
}

Tensor linear_grad(const Tensor& grad, const Tensor& u, Part u_tail, Part v, Part v_tail, const Tensor& scale_out,
                   const Tensor& scale_rank, const Tensor& scale_in, std::vector<int64_t> ranks) {
  const Bound bound(u, u_tail, v, v_tail, scale_out, scale_rank, scale_in, std::nullopt, std::move(ranks));
  const Rows rows(grad, "grad", bound.layer.out_features);
  Tensor x = rows.empty(grad, bound.layer.in_features);
  littlebit::backward(bound.layer, rows.values, rows.stride, rows.tokens, x.mutable_data(), pool());
  return x;
}

// A factor in training, its arrays as in Bound.
struct LatentFactor {
  std::vector<Tensor> copies;
  std::vector<int64_t> ranks;
  littlebit::Latents latents{};
  int64_t rank = 0;

  const Tensor& plain(const Tensor& tensor, const char* name, const std::vector<int64_t>& sizes) {
    bool same = tensor.dim() == static_cast<int64_t>(sizes.size());
    for (size_t i = 0; same && i < sizes.size(); ++i) same = tensor.size(static_cast<int64_t>(i)) == sizes[i];
    check(same, name, " is ", shape(tensor.sizes()), ", but must be ", shape(sizes));
    check(tensor.is_cpu(), name, " is not on the CPU, as the latent is");
    if (tensor.is_contiguous()) return tensor;
    copies.push_back(tensor.contiguous());
    return copies.back();
  }

  const float* values(const Tensor& tensor, const char* name, const std::vector<int64_t>& sizes) {
    const int32_t found = tensor.dtype();
    check(found == aoti_torch_dtype_float32(), name, " is ", littlebit::dtype_name(found), ", but must be float32");
    return static_cast<const float*>(plain(tensor, name, sizes).data());
  }

  LatentFactor(const Tensor& latent, const Tensor& scale_feature, const Part& scale_rank, std::vector<int64_t> path_ranks)
      : ranks(std::move(path_ranks)) {
    for (const int64_t r : ranks) {
      check(r >= 0 && r <= kMaxRank, "a rank is ", r, ", but must be from 0 to ", kMaxRank);
      rank += r;
    }
    check(latent.dim() == 2, "latent has ", latent.dim(), " dimensions, but must have 2");
    const int64_t rows = latent.size(0), paths = static_cast<int64_t>(ranks.size());
    latents.rows = rows, latents.paths = paths, latents.ranks = ranks.data();
    latents.values = values(latent, "latent", {rows, rank});
    latents.scale_feature = values(scale_feature, "scale_feature", {paths, rows});
    if (scale_rank) latents.scale_rank = values(*scale_rank, "scale_rank", {rank});
  }

  LatentFactor(const LatentFactor&) = delete;
  LatentFactor& operator=(const LatentFactor&) = delete;
};

Tensor scaled_signs(const Tensor& latent, const Tensor& scale_feature, Part scale_rank, std::vector<int64_t> ranks,
                    int32_t dtype, int64_t width) {
  LatentFactor factor(latent, scale_feature, scale_rank, std::move(ranks));
  check(width >= factor.rank && width <= kMaxRank, "width is ", width, ", but must be from ", factor.rank, " to ",
        kMaxRank);
  factor.latents.stride = width;
  const Dtype known = dtype_of(dtype, "the result");
  Tensor y = Tensor::empty({factor.latents.rows, width}, dtype, latent);
  littlebit::scaled_signs(factor.latents, y.mutable_data(), known, pool());
  return y;
}

std::tuple<Tensor, Tensor, Tensor> scaled_signs_grad(const Tensor& grad, const Tensor& latent, const Tensor& scale_feature,
                                                     Part scale_rank, std::vector<int64_t> ranks, std::optional<double> alpha) {
  LatentFactor factor(latent, scale_feature, scale_rank, std::move(ranks));
  const littlebit::Latents& latents = factor.latents;
  const Dtype dtype = dtype_of(grad.dtype(), "grad");
  factor.latents.stride = grad.dim() == 2 ? std::max(grad.size(1), factor.rank) : factor.rank;
  const Array given = {factor.plain(grad, "grad", {latents.rows, latents.stride}).data(), dtype};
  const float steepness = static_cast<float>(alpha.value_or(0.0));
  const auto made = [&](const std::vector<int64_t>& sizes) { return Tensor::empty(sizes, aoti_torch_dtype_float32(), latent); };
  Tensor of_latent = made({latents.rows, factor.rank}), of_feature = made({latents.paths, latents.rows});
  Tensor of_rank = made({scale_rank ? factor.rank : 0});  // a result may not be missing
  const auto data = [](const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data()); };
  littlebit::scaled_signs_grad(latents, given, alpha ? &steepness : nullptr, data(of_latent), data(of_feature),
                               data(of_rank), pool());
  return {std::move(of_latent), std::move(of_feature), std::move(of_rank)};
}

std::string select_isa(std::string isa) {
  check(isa.empty() || littlebit::select(isa.c_str()), "this machine has no instruction set '", isa,
        "' (auto, amx, avx512, avx2, neon, generic)");
  return littlebit::selected();
}

#define PARTS "Tensor u, Tensor? u_tail, Tensor? v, Tensor? v_tail, Tensor scale_out, Tensor scale_rank, Tensor scale_in"

void define(littlebit::Library& library) {
  library.define("linear(Tensor x, " PARTS ", Tensor? bias, int[] ranks) -> Tensor");
  library.define("linears(Tensor x, Tensor?[] parts, int[] ranks, int[] paths) -> Tensor[]");
  library.define("linear_grad(Tensor grad, " PARTS ", int[] ranks) -> Tensor");
  library.define("scaled_signs(Tensor latent, Tensor outer, Tensor? inner, int[] ranks, ScalarType dtype, int width) -> Tensor");
  library.define("scaled_signs_grad(Tensor grad, Tensor latent, Tensor outer, Tensor? inner, int[] ranks, float? alpha)"
                 " -> (Tensor, Tensor, Tensor)");
  library.define("select(str isa) -> str");
}

void implement(littlebit::Library& library) {
  library.implement<&linear>("linear");
  library.implement<&linears>("linears");
  library.implement<&linear_grad>("linear_grad");
}

const littlebit::Library definitions("hf_littlebit_cpu", nullptr, define);
const littlebit::Library for_tensors("hf_littlebit_cpu", "CPU", [](littlebit::Library& library) {
  implement(library);
  library.implement<&scaled_signs>("scaled_signs");
  library.implement<&scaled_signs_grad>("scaled_signs_grad");
});
const littlebit::Library without_tensors("hf_littlebit_cpu", "CompositeExplicitAutograd", [](littlebit::Library& library) {
  library.implement<&select_isa>("select");
});
const littlebit::Library for_the_plugin("hf_littlebit", "CPU", implement);

}  // namespace
