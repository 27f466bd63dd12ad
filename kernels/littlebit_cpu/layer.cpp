// The layer's two stages and its gradient over the products of kernels.h, and how they are split over threads.
//
// Stage 1 (V) splits the inputs: every thread sums its rows of words into a buffer of its own, and the buffers are added in
// a fixed order. Stage 2 (U) splits the outputs. Many tokens are split themselves. The bounds depend on the number of
// threads alone, so results do too.
#include <algorithm>
#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "factor.h"

namespace littlebit {
namespace {

constexpr int64_t kSmall = 4 << 20;      // multiply-adds under which waking a second thread costs more than it brings
constexpr int64_t kTokens = 64;          // tokens at a time: bounds the buffers
constexpr int64_t kOutputs = 2048;       // outputs at a time in stage 2, for more than one token
constexpr int64_t kOutputsOfOne = 8192;
constexpr int64_t kLanes = 16;
constexpr int64_t kFar = 2048;           // words of V that one token asks for ahead of their use

std::atomic<const Kernels*> chosen{nullptr};

const Kernels* find(const std::string& isa) {
  const Kernels* found[] = {amx_kernels(), avx512_kernels(), avx2_kernels(), neon_kernels(), generic_kernels()};
  for (const Kernels* kernels : found) {
    if (kernels && (isa == "auto" || isa == kernels->name)) return kernels;
  }
  return nullptr;
}

using Floats = std::unique_ptr<float[]>;

Floats floats(int64_t count) { return Floats(new float[static_cast<size_t>(std::max<int64_t>(count, 1))]); }

Array shifted(Array array, int64_t offset) {
  const int64_t size = array.dtype == Dtype::f32 ? 4 : 2;
  return {static_cast<const char*>(array.data) + offset * size, array.dtype};
}

// Rows of a buffer are kept from beginning a power of two apart: they would share a few lines of the cache.
int64_t pitch(int64_t columns) { return columns + kLanes; }

struct Shape {
  int64_t in, out, rank;

  explicit Shape(const Layer& layer) : in(layer.in_features), out(layer.out_features), rank(0) {
    for (int64_t p = 0; p < layer.paths; ++p) rank += layer.ranks[p];
  }
};

Factor factor_v(const Layer& layer, const Shape& shape) { return {layer.v, layer.v_tail, shape.rank, shape.in}; }

// Calls f(path, first rank of the path, its U) for every path.
template <class F>
void each_path(const Layer& layer, const Shape& shape, const F& f) {
  int64_t word = 0, byte = 0, first = 0;
  for (int64_t p = 0; p < layer.paths; ++p) {
    const int64_t rank = layer.ranks[p];
    const uint8_t* tail = layer.u_tail ? layer.u_tail + byte * shape.out : nullptr;
    f(p, first, Factor{layer.u + word * shape.out, tail, shape.out, rank});
    word += rank / 32, byte += (rank % 32 + 7) / 8, first += rank;
  }
}

// Stage 1 over the rows [begin, end) of V's words: rank_acts[t, r] = sum_k scale_in[k] x[t, k] V[k, r]. `next`: words used after
// them.
void reduce(const Kernels& isa, const Layer& layer, const Shape& shape, Array x, int64_t stride, int64_t tokens,
            int64_t begin, int64_t end, float* rank_acts, uintptr_t next) {
  std::fill_n(rank_acts, tokens * pitch(shape.rank), 0.0f);
  // One token takes V in the order of memory, a row with all its paths: every page is then entered once.
  const bool in_order = tokens == 1;
  const int64_t step = in_order ? 1 : std::max<int64_t>(end - begin, 1);
  for (int64_t row = begin; row < end; row += step) {
    each_path(layer, shape, [&](int64_t p, int64_t first, const Factor& u) {
      const Input input = {x, stride, shifted(layer.scale_in, p * shape.in), shape.in};
      const int64_t ahead = row * shape.rank + first + (in_order ? kFar : u.length), left = ahead - end * shape.rank;
      const bool inside = in_order ? left < 0 : p + 1 < layer.paths;
      const uintptr_t after = inside ? address(layer.v, ahead) : address(next, in_order ? left : 0);
      multiply(isa, factor_v(layer, shape), first, u.length, row, row + step, input, tokens, rank_acts + first,
               pitch(shape.rank), after, in_order ? 0 : shape.rank);
    });
  }
}

// Between the stages: rank_acts *= scale_rank.
void scale_rank_acts(const Layer& layer, const Shape& shape, int64_t tokens, float* rank_acts) {
  Floats scale = floats(shape.rank);
  shared::load(layer.scale_rank, 0, shape.rank, scale.get());
  for (int64_t t = 0; t < tokens; ++t, rank_acts += pitch(shape.rank)) {
    for (int64_t r = 0; r < shape.rank; ++r) rank_acts[r] *= scale[static_cast<size_t>(r)];
  }
}

// Stage 2 for the outputs [begin, end): y = sum_p scale_out_p * (U_p rank_acts_p) + bias. `next`: words used after U's, or 0.
void expand(const Kernels& isa, const Layer& layer, const Shape& shape, const float* rank_acts, int64_t tokens,
            int64_t begin, int64_t end, void* y, Dtype dtype, uintptr_t next) {
  const int64_t step = std::min(end - begin, tokens > 1 ? kOutputs : kOutputsOfOne);
  const int64_t row = pitch(step);
  Floats buffer = floats(2 * tokens * row);
  float* part = buffer.get();
  float* total = part + tokens * row;
  for (int64_t column = begin; column < end; column += step) {
    const int64_t count = std::min(step, end - column);
    each_path(layer, shape, [&](int64_t p, int64_t first, const Factor& u) {
      std::fill_n(part, tokens * row, 0.0f);
      const Input input = {{rank_acts + first, Dtype::f32}, pitch(shape.rank), {}, u.length};
      const bool last = p + 1 == layer.paths;
      const uintptr_t after = !last                 ? address(u.words, u.whole() * shape.out + column)
                              : column + step < end ? address(layer.u, column + step)
                                                    : next;
      multiply(isa, u, column, count, 0, u.rows(), input, tokens, part, row, after, last ? 0 : shape.out);
      const Array scale = shifted(layer.scale_out, p * shape.out);
      for (int64_t t = 0; t < tokens; ++t) {
        isa.combine(part + t * row, scale, column, layer.bias, p == 0, count, total + t * row);
      }
    });
    for (int64_t t = 0; t < tokens; ++t) isa.store(total + t * row, count, y, dtype, t * shape.out + column);
  }
}

void* advance(void* y, Dtype dtype, int64_t offset) {
  return static_cast<char*>(y) + offset * (dtype == Dtype::f32 ? 4 : 2);
}

// One layer of a call: into how many parts its inputs are cut, and where the parts' sums begin in the buffer.
struct Job {
  const Layer* layer;
  Shape shape;
  void* y;
  int64_t parts, place;
};

struct Call {
  const Kernels& isa;
  const std::vector<Job>& jobs;
  Array x;
  int64_t stride, tokens;
  float* buffer;

  float* rank_acts(const Job& job, int64_t part) const { return buffer + job.place + part * tokens * pitch(job.shape.rank); }

  // The row of V's words with which a part of stage 1 begins, and the output with which a part of stage 2 does.
  int64_t row(const Job& job, int64_t part) const {
    return share(factor_v(*job.layer, job.shape).rows(), part, job.parts);
  }
  int64_t output(const Job& job, int64_t part, int64_t parts) const {
    const int64_t lanes = (job.shape.out + kLanes - 1) / kLanes;
    return std::min(job.shape.out, kLanes * share(lanes, part, parts));
  }

  uintptr_t v(const Job& job, int64_t part) const { return address(job.layer->v, row(job, part) * job.shape.rank); }
  uintptr_t u(const Job& job, int64_t part, int64_t parts) const { return address(job.layer->u, output(job, part, parts)); }

  void first(const Job& job, int64_t part, uintptr_t next) const {
    reduce(isa, *job.layer, job.shape, x, stride, tokens, row(job, part), row(job, part + 1), rank_acts(job, part), next);
  }

  void between(const Job& job) const {
    float* sum = rank_acts(job, 0);
    for (int64_t part = 1; part < job.parts; ++part) {
      const float* other = rank_acts(job, part);
      for (int64_t k = 0; k < tokens * pitch(job.shape.rank); ++k) sum[k] += other[k];
    }
    scale_rank_acts(*job.layer, job.shape, tokens, sum);
  }

  void second(const Job& job, int64_t token, int64_t part, int64_t parts, uintptr_t next) const {
    const int64_t begin = output(job, part, parts), end = output(job, part + 1, parts);
    if (begin == end) return;
    void* y = advance(job.y, x.dtype, token * job.shape.out);
    expand(isa, *job.layer, job.shape, rank_acts(job, 0), tokens, begin, end, y, x.dtype, next);
  }
};

// The tokens from `token` on. One thread takes layer after layer; several meet twice, however many layers there are.
void forward_tokens(const Call& call, int64_t token, const Pool& pool, int64_t threads) {
  const std::vector<Job>& jobs = call.jobs;
  if (threads == 1) {
    for (size_t j = 0; j < jobs.size(); ++j) {
      call.first(jobs[j], 0, call.u(jobs[j], 0, 1));
      call.between(jobs[j]);
      call.second(jobs[j], token, 0, 1, j + 1 < jobs.size() ? call.v(jobs[j + 1], 0) : 0);
    }
    return;
  }
  // A layer that is not cut goes to one thread whole, the next such layer to the next thread.
  const auto part = [&](size_t j, int64_t i) {
    return jobs[j].parts > 1 ? i : i == static_cast<int64_t>(j) % threads ? 0 : jobs[j].parts;
  };
  run(pool, threads, [&](int64_t i) {
    for (size_t j = 0; j < jobs.size(); ++j) {
      const uintptr_t next = j + 1 < jobs.size() ? call.v(jobs[j + 1], part(j + 1, i)) : call.u(jobs[0], i, threads);
      if (part(j, i) < jobs[j].parts) call.first(jobs[j], part(j, i), next);
    }
  });
  for (const Job& job : jobs) call.between(job);
  run(pool, threads, [&](int64_t i) {
    for (size_t j = 0; j < jobs.size(); ++j) {
      call.second(jobs[j], token, i, threads, j + 1 < jobs.size() ? call.u(jobs[j + 1], i, threads) : 0);
    }
  });
}

void backward_tokens(const Kernels& isa, const Layer& layer, const Shape& shape, Array grad, int64_t stride,
                     int64_t tokens, void* grad_x) {
  // The transposed products write whole rows of words: a path's ranks begin at a multiple of 32 of `wide`.
  int64_t longest = 0;
  for (int64_t p = 0; p < layer.paths; ++p) longest = std::max(longest, 32 * ((layer.ranks[p] + 31) / 32));
  longest = pitch(longest);
  Floats rank_acts = floats(tokens * pitch(shape.rank)), wide = floats(tokens * longest);
  each_path(layer, shape, [&](int64_t p, int64_t first, const Factor& u) {
    std::fill_n(wide.get(), tokens * longest, 0.0f);
    const Input input = {grad, stride, shifted(layer.scale_out, p * shape.out), shape.out};
    multiply_transposed(isa, u, 0, shape.out, 0, u.rows(), input, tokens, wide.get(), longest);
    for (int64_t t = 0; t < tokens; ++t) {
      std::copy_n(wide.get() + t * longest, u.length, rank_acts.get() + t * pitch(shape.rank) + first);
    }
  });
  scale_rank_acts(layer, shape, tokens, rank_acts.get());
  const Factor v = factor_v(layer, shape);
  const int64_t step = kOutputs / 32, row = pitch(kOutputs);
  Floats buffer = floats(2 * tokens * row);
  float* part = buffer.get();
  float* total = part + tokens * row;
  for (int64_t begin = 0; begin < v.rows(); begin += step) {
    const int64_t end = std::min(begin + step, v.rows());
    const int64_t count = std::min(shape.in, 32 * end) - 32 * begin;
    each_path(layer, shape, [&](int64_t p, int64_t first, const Factor& u) {
      std::fill_n(part, tokens * row, 0.0f);
      const Input input = {{rank_acts.get() + first, Dtype::f32}, pitch(shape.rank), {}, u.length};
      multiply_transposed(isa, v, first, u.length, begin, end, input, tokens, part, row);
      const Array scale = shifted(layer.scale_in, p * shape.in);
      for (int64_t t = 0; t < tokens; ++t) {
        isa.combine(part + t * row, scale, 32 * begin, {}, p == 0, count, total + t * row);
      }
    });
    for (int64_t t = 0; t < tokens; ++t) {
      isa.store(total + t * row, count, grad_x, grad.dtype, t * shape.in + 32 * begin);
    }
  }
}

}  // namespace

const Kernels& kernels() {
  const Kernels* now = chosen.load(std::memory_order_relaxed);
  if (!now) chosen.store(now = find("auto"), std::memory_order_relaxed);
  return *now;
}

void forward(const Layer* layers, int64_t count, Array x, int64_t stride, int64_t tokens, void* const* y,
             const Pool& pool) {
  const Kernels& isa = kernels();
  const int64_t chunks = (tokens + kTokens - 1) / kTokens;
  const auto small = [&](const Shape& shape) { return shape.rank * (shape.in + shape.out) * tokens < kSmall; };
  std::vector<Job> jobs;
  int64_t threads = 1;
  for (int64_t i = 0; i < count; ++i) {
    jobs.push_back({layers + i, Shape(layers[i]), y[i], 1, 0});
    if (!small(jobs.back().shape)) threads = pool.threads;
  }
  // Many tokens are cut themselves, and then no layer is.
  const bool by_tokens = threads > 1 && chunks >= threads;
  int64_t size = 0;
  for (Job& job : jobs) {
    // As it would be cut alone, so that a layer's result does not depend on its company.
    if (!by_tokens && !small(job.shape)) job.parts = std::min(threads, std::max<int64_t>((job.shape.in + 31) / 32, 1));
    job.place = size;
    size += job.parts * std::min(tokens, kTokens) * pitch(job.shape.rank);
  }
  const auto some = [&](int64_t begin, int64_t end, int64_t parts) {
    const Floats buffer = floats(size);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * kTokens;
      const Call call = {isa, jobs, shifted(x, first * stride), stride, std::min(kTokens, tokens - first), buffer.get()};
      forward_tokens(call, first, pool, parts);
    }
  };
  if (by_tokens) {
    run(pool, threads, [&](int64_t i) { some(share(chunks, i, threads), share(chunks, i + 1, threads), 1); });
  } else {
    some(0, chunks, threads);
  }
}

void backward(const Layer& layer, Array grad, int64_t stride, int64_t tokens, void* grad_x, const Pool& pool) {
  const Kernels& isa = kernels();
  const Shape shape(layer);
  const int64_t work = shape.rank * (shape.in + shape.out) * tokens;
  const int64_t threads = std::max<int64_t>(1, std::min(work < kSmall ? 1 : pool.threads, tokens));
  run(pool, threads, [&](int64_t i) {
    const int64_t last = share(tokens, i + 1, threads);
    for (int64_t begin = share(tokens, i, threads); begin < last; begin += kTokens) {
      backward_tokens(isa, layer, shape, shifted(grad, begin * stride), stride, std::min(kTokens, last - begin),
                      advance(grad_x, grad.dtype, begin * shape.in));
    }
  });
}

bool select(const char* isa) {
  const Kernels* found = find(isa);
  if (found) chosen.store(found);
  return found != nullptr;
}

const char* selected() { return kernels().name; }

}  // namespace littlebit
