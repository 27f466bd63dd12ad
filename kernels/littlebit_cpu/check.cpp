// Runs the kernel without torch over odd shapes, in buffers of exactly the size that the layout gives, against fp64: meant to
// be built with -fsanitize=address,undefined, or run under valgrind or qemu-user. Prints the worst error of every
// instruction set; returns 1 if one is above the limit.
//
//     error = |y - exact| / sum of magnitudes, and for the passes over latents also relative to the slope's peak
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "check.h"

namespace {

using namespace littlebit::checks;
using littlebit::Dtype;

constexpr double kLimit = 1e-6;

// Sign k of column n of a factor whose words begin at row `word` and whose tail begins at row `byte`.
double sign(const std::vector<uint32_t>& words, const std::vector<uint8_t>& tail, int64_t word, int64_t byte,
            int64_t stride, int64_t length, int64_t k, int64_t n) {
  const int64_t rest = k - length / 32 * 32;
  const size_t at = static_cast<size_t>(rest < 0 ? (word + k / 32) * stride + n : (byte + rest / 8) * stride + n);
  return ((rest < 0 ? words[at] >> (k % 32) : tail[at] >> (rest % 8)) & 1) ? -1.0 : 1.0;
}

// Whether layers of one x have the bits that they have alone; `alone` are those of `layer`.
bool check_company(const littlebit::Layer& layer, const Buffer& x, int64_t stride, int64_t tokens, const Buffer& alone,
                   const littlebit::Pool& pool) {
  // The first path as a layer of its own reads a part of the arrays.
  littlebit::Layer one = layer;
  one.paths = 1;
  const littlebit::Layer layers[] = {one, layer, one};
  const Dtype dtype = x.array().dtype;
  Buffer first(dtype, tokens * layer.out_features), company[] = {first, first, first};
  void* data[] = {company[0].bytes.data(), company[1].bytes.data(), company[2].bytes.data()};
  void* own = first.bytes.data();
  littlebit::forward(&one, 1, x.array(), stride, tokens, &own, pool);
  littlebit::forward(layers, 3, x.array(), stride, tokens, data, pool);
  return company[0].bytes == first.bytes && company[1].bytes == alone.bytes && company[2].bytes == first.bytes;
}

double check(int64_t in, int64_t out, std::vector<int64_t> ranks, int64_t tokens, Dtype dtype, Dtype scales, bool bias,
             int64_t pool) {
  const int64_t paths = static_cast<int64_t>(ranks.size());
  int64_t rank = 0, words = 0, bytes = 0;
  for (const int64_t r : ranks) rank += r, words += r / 32, bytes += (r % 32 + 7) / 8;
  const std::vector<uint32_t> u = bits<uint32_t>(words * out), v = bits<uint32_t>(in / 32 * rank);
  const std::vector<uint8_t> ut = bits<uint8_t>(bytes * out), vt = bits<uint8_t>((in % 32 + 7) / 8 * rank);
  const Buffer h(scales, paths * out), l(scales, rank), g(scales, paths * in), b(dtype, bias ? out : 0);
  const littlebit::Layer layer = {in, out, paths, ranks.data(), u.data(), ut.data(), v.data(), vt.data(),
                                  h.array(), l.array(), g.array(), bias ? b.array() : littlebit::Array{}};
  // w [out, in], and the magnitudes that are summed in its place.
  std::vector<double> w(static_cast<size_t>(in * out)), size(w.size());
  int64_t first = 0, word = 0, byte = 0;
  for (int64_t p = 0; p < paths; ++p) {
    const int64_t r = ranks[static_cast<size_t>(p)];
    for (int64_t n = 0; n < out; ++n) {
      for (int64_t k = 0; k < in; ++k) {
        double sum = 0.0, magnitude = 0.0;
        for (int64_t j = 0; j < r; ++j) {
          const double left = sign(u, ut, word, byte, out, r, j, n), right = sign(v, vt, 0, 0, rank, in, k, first + j);
          sum += left * right * l.at(first + j), magnitude += std::fabs(l.at(first + j));
        }
        const double scale = h.at(p * out + n) * g.at(p * in + k);
        w[static_cast<size_t>(n * in + k)] += sum * scale, size[static_cast<size_t>(n * in + k)] += magnitude * std::fabs(scale);
      }
    }
    first += r, word += r / 32, byte += (r % 32 + 7) / 8;
  }
  const littlebit::Pool runner = {pool, threads};
  double worst = 0.0;
  for (const bool back : {false, true}) {
    const int64_t from = back ? out : in, to = back ? in : out, stride = from + below(3);
    const Buffer x(dtype, tokens ? (tokens - 1) * stride + from : 0);
    Buffer y(dtype, tokens * to);
    void* data = y.bytes.data();
    if (back) {
      littlebit::backward(layer, x.array(), stride, tokens, data, runner);
    } else {
      littlebit::forward(&layer, 1, x.array(), stride, tokens, &data, runner);
      if (!check_company(layer, x, stride, tokens, y, runner)) return INFINITY;
    }
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t n = 0; n < to; ++n) {
        double sum = !back && bias ? b.at(n) : 0.0, magnitude = std::fabs(sum);
        for (int64_t k = 0; k < from; ++k) {
          const size_t at = static_cast<size_t>(back ? k * in + n : n * in + k);
          sum += x.at(t * stride + k) * w[at], magnitude += std::fabs(x.at(t * stride + k)) * size[at];
        }
        const double off = std::fabs(y.at(t * to + n) - sum) - kRounding[static_cast<int>(dtype)] * std::fabs(sum);
        if (magnitude > 0 && off / magnitude > worst) worst = off / magnitude;
      }
    }
  }
  return worst;
}

// The passes over latents, with results checked as above; the latents straddle the slope's steep part.
double check_latents(int64_t rows, std::vector<int64_t> ranks, Dtype dtype, bool scaled, bool smooth, int64_t pool) {
  const int64_t paths = static_cast<int64_t>(ranks.size());
  int64_t rank = 0;
  for (const int64_t r : ranks) rank += r;
  const size_t size = static_cast<size_t>(rows * rank);
  const int64_t stride = rank + below(3);
  const float steepness = 3.0f;
  std::vector<float> latent(size), scale_feature(static_cast<size_t>(paths * rows));
  std::vector<float> scale_rank(static_cast<size_t>(scaled ? rank : 0));
  for (float& number : latent) number = static_cast<float>(2 * uniform());
  for (std::vector<float>* scales : {&scale_feature, &scale_rank}) {
    for (float& number : *scales) number = static_cast<float>(exact());
  }
  const littlebit::Latents latents = {rows, paths, ranks.data(), latent.data(), scale_feature.data(),
                                      scaled ? scale_rank.data() : nullptr, stride};
  const littlebit::Pool runner = {pool, threads};
  Buffer y(dtype, rows * stride);
  const Buffer grad(dtype, rows * stride);
  std::vector<float> latent_grad(size), feature_grad(scale_feature.size()), rank_grad(scale_rank.size());
  littlebit::scaled_signs(latents, y.bytes.data(), dtype, runner);
  littlebit::scaled_signs_grad(latents, grad.array(), smooth ? &steepness : nullptr, latent_grad.data(), feature_grad.data(),
                               rank_grad.data(), runner);
  double worst = 0.0;
  const auto compare = [&](double found, double right, double magnitude, double rounding) {
    const double off = std::fabs(found - right) - rounding * std::fabs(right);
    if (magnitude > 0 && off / magnitude > worst) worst = off / magnitude;
  };
  std::vector<double> columns(static_cast<size_t>(rank)), column_sizes(columns.size());
  for (int64_t row = 0; row < rows; ++row) {
    int64_t first = 0;
    for (int64_t p = 0; p < paths; first += ranks[static_cast<size_t>(p++)]) {
      const double h = scale_feature[static_cast<size_t>(p * rows + row)];
      double sum = 0.0, sum_size = 0.0;
      for (int64_t r = first; r < first + ranks[static_cast<size_t>(p)]; ++r) {
        const int64_t at = row * rank + r;
        const double x = latent[static_cast<size_t>(at)], l = scaled ? scale_rank[static_cast<size_t>(r)] : 1.0;
        const double g = grad.at(row * stride + r);
        const double turned = x < 0 ? -g : g, tanh = std::tanh(steepness * x);
        const double slope = smooth ? steepness * (1 - tanh * tanh) : std::fabs(x) < 1 ? 1.0 : 0.0;
        compare(y.at(row * stride + r), h * l * (x < 0 ? -1 : 1), std::fabs(h * l), kRounding[static_cast<int>(dtype)]);
        compare(latent_grad[static_cast<size_t>(at)], g * h * l * slope, std::fabs(g * h * l) * (smooth ? steepness : 1), 0);
        sum += turned * l, sum_size += std::fabs(turned * l);
        columns[static_cast<size_t>(r)] += turned * h, column_sizes[static_cast<size_t>(r)] += std::fabs(turned * h);
      }
      for (int64_t r = rank; r < stride; ++r) compare(y.at(row * stride + r), 0, 1, 0);
      compare(feature_grad[static_cast<size_t>(p * rows + row)], sum, sum_size, 0);
    }
  }
  for (size_t r = 0; r < scale_rank.size(); ++r) compare(rank_grad[r], columns[r], column_sizes[r], 0);
  return worst;
}

}  // namespace

int main(int count, char** arguments) {
  const int rounds = count > 1 ? std::atoi(arguments[1]) : 40;
  bool good = true;
  for (const char* isa : {"amx", "avx512", "avx2", "neon", "generic"}) {
    if (!littlebit::select(isa)) continue;
    double worst = 0.0;
    const int64_t tokens[] = {0, 1, 2, 3, 8, 17, 33, 64, 70};
    for (int round = 0; round < rounds; ++round) {
      std::vector<int64_t> ranks;
      for (int64_t p = 0; p < 1 + round % 3; ++p) ranks.push_back(round % 5 ? 8 * (1 + below(8)) : 1 + below(70));
      const Dtype dtype = static_cast<Dtype>(round % 3), scales = static_cast<Dtype>(round / 3 % 3);
      const double error = check(1 + below(round % 7 ? 90 : 300), 1 + below(round % 4 ? 90 : 300), ranks,
                                 tokens[round % 9], dtype, scales, round % 2, 1);
      const double trained = check_latents(round % 9 ? below(90) : 300, ranks, dtype, round % 2, round % 4 < 2, 1);
      worst = std::fmax(worst, std::fmax(error, trained));
    }
    const double wide = check(96, 2500, {40}, 3, Dtype::f32, Dtype::bf16, true, 1);
    const double threaded = check(600, 700, {104, 40}, 70, Dtype::f32, Dtype::bf16, true, 3);
    worst = std::fmax(worst, std::fmax(wide, threaded));
    worst = std::fmax(worst, check_latents(1200, {37, 24}, Dtype::bf16, true, true, 3));
    worst = std::fmax(worst, littlebit::check_tables(rounds));
    good = good && worst < kLimit;
    std::printf("%-8s worst error %.2e of %.0e: %s\n", isa, worst, kLimit, worst < kLimit ? "ok" : "TOO LARGE");
  }
  return good ? 0 : 1;
}
