// Packed tables in check.cpp's run: odd shapes in buffers of exactly the size that the layout gives, against fp64.
#include <cmath>
#include <vector>

#include "check.h"
#include "table.h"

namespace littlebit {
namespace {

using namespace checks;

// The largest error of a table's head, gradient and embedding, relative to the sums of magnitudes.
double check(int64_t rows, int64_t columns, int bits, bool grouped, int64_t tokens, Dtype dtype, Dtype scales, bool bias, int64_t pool) {
  const int64_t blocks = (columns + 63) / 64, groups = grouped ? blocks : 1;
  const std::vector<uint8_t> codes = checks::bits<uint8_t>(rows * (bits == 8 ? columns : 32 * blocks));
  const Buffer scale(scales, rows * groups, multiple), offsets(dtype, bias ? rows : 0, multiple);
  const Table table = {rows, columns, bits, groups, codes.data(), scale.array()};
  std::vector<double> w(static_cast<size_t>(rows * columns));
  for (int64_t n = 0; n < rows; ++n) {
    for (int64_t k = 0; k < columns; ++k) {
      const int64_t group = k / 64, q = k % 64 / 8, place = n * 32 * blocks + 32 * group + 4 * (k % 8) + q / 2;
      const int code = bits == 8 ? static_cast<int8_t>(codes[static_cast<size_t>(n * columns + k)])
                                 : (codes[static_cast<size_t>(place)] >> (4 * (q % 2)) & 15) - 8;
      w[static_cast<size_t>(n * columns + k)] = code * scale.at(n * groups + (groups > 1 ? group : 0));
    }
  }
  const double rounding = kRounding[static_cast<int>(dtype)];
  const Pool runner = {pool, threads};
  double worst = 0.0;
  for (const bool back : {false, true}) {
    const int64_t from = back ? rows : columns, to = back ? columns : rows, stride = from + below(3);
    const Buffer x(dtype, tokens ? (tokens - 1) * stride + from : 0, multiple);
    Buffer y(dtype, tokens * to);
    if (back) head_grad(table, x.array(), stride, tokens, y.bytes.data(), runner);
    else head(table, x.array(), stride, tokens, bias ? offsets.array() : Array{}, y.bytes.data(), runner);
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t n = 0; n < to; ++n) {
        double sum = !back && bias ? offsets.at(n) : 0.0, magnitude = std::fabs(sum);
        for (int64_t k = 0; k < from; ++k) {
          const double product = x.at(t * stride + k) * w[static_cast<size_t>(back ? k * columns + n : n * columns + k)];
          sum += product, magnitude += std::fabs(product);
        }
        if (dtype == Dtype::f16 && std::fabs(sum) > 65000) continue;
        const double off = std::fabs(y.at(t * to + n) - sum) - rounding * std::fabs(sum);
        if (magnitude > 0) worst = std::fmax(worst, off / magnitude);
      }
    }
  }
  std::vector<int64_t> indices(static_cast<size_t>(tokens));
  for (int64_t& index : indices) index = below(rows);
  Buffer found(dtype, tokens * columns);
  embedding(table, indices.data(), tokens, found.bytes.data(), dtype, runner);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t k = 0; k < columns; ++k) {
      const double right = w[static_cast<size_t>(indices[static_cast<size_t>(t)] * columns + k)];
      const double off = std::fabs(found.at(t * columns + k) - right) - rounding * std::fabs(right);
      if (right != 0) worst = std::fmax(worst, off / std::fabs(right));
    }
  }
  return worst;
}

}  // namespace

double check_tables(int rounds) {
  const int64_t tokens[] = {0, 1, 2, 3, 4, 5, 9, 16, 23, 70};
  double worst = 0.0;
  for (int round = 0; round < rounds; ++round) {
    const int kind = round % 3;
    const Dtype dtype = static_cast<Dtype>(round / 3 % 3), scales = static_cast<Dtype>(round / 2 % 3);
    const int64_t rows = 1 + below(round % 4 ? 40 : 150), columns = 1 + below(round % 5 ? 300 : 2500);
    worst = std::fmax(worst, check(rows, columns, kind ? 8 : 4, kind != 1, tokens[round % 10], dtype, scales, round % 2, 1));
  }
  for (const int bits : {8, 4}) worst = std::fmax(worst, check(1100, 1000, bits, bits == 4, 6, Dtype::bf16, Dtype::bf16, true, 3));
  return worst;
}

}  // namespace littlebit
