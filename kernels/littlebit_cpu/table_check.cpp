// Packed tables in check.cpp's run: odd shapes in buffers of exactly the size that the layout gives, against fp64.
#include <cmath>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "table.h"

namespace littlebit {
namespace {

std::mt19937 source(2);

int64_t below(int64_t limit) { return static_cast<int64_t>(source() % static_cast<uint64_t>(limit)); }

// Multiples of 1/64 of at most seven bits, which all types hold exactly, as values of `dtype`.
struct Numbers {
  Dtype dtype;
  std::vector<double> right;
  std::vector<char> bytes;

  Numbers(Dtype type, int64_t count) : dtype(type), right(static_cast<size_t>(count)), bytes(right.size() * (type == Dtype::f32 ? 4 : 2)) {
    for (size_t i = 0; i < right.size(); ++i) {
      const float number = static_cast<float>((1 + below(127)) * (source() & 1 ? 1 : -1)) / 64;
      uint32_t bits;
      std::memcpy(&bits, &number, 4);
      uint16_t half = static_cast<uint16_t>(bits >> 16);
      if (type == Dtype::f16) half = static_cast<uint16_t>((bits >> 16 & 0x8000) | ((bits >> 13 & 0x3ffff) - (112u << 10)));
      if (type == Dtype::f32) std::memcpy(bytes.data() + 4 * i, &bits, 4);
      else std::memcpy(bytes.data() + 2 * i, &half, 2);
      right[i] = number;
    }
    bytes.shrink_to_fit();
  }
  Array array() const { return {bytes.data(), dtype}; }
};

double value(const std::vector<char>& bytes, Dtype dtype, int64_t i) {
  uint32_t bits = 0;
  uint16_t half;
  if (dtype == Dtype::f32) {
    std::memcpy(&bits, bytes.data() + 4 * i, 4);
  } else {
    std::memcpy(&half, bytes.data() + 2 * i, 2);
    if (dtype == Dtype::f16) {
      const int exponent = half >> 10 & 31, fraction = half & 1023;
      const double size = exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
      return half & 0x8000 ? -size : size;
    }
    bits = static_cast<uint32_t>(half) << 16;
  }
  float single;
  std::memcpy(&single, &bits, 4);
  return single;
}

void threads(int64_t count, void (*task)(int64_t, void*), void* context) {
  std::vector<std::thread> running;
  for (int64_t i = 0; i < count; ++i) running.emplace_back(task, i, context);
  for (std::thread& thread : running) thread.join();
}

// The largest error of a table's head, gradient and embedding, relative to the sums of magnitudes.
double check(int64_t rows, int64_t columns, int bits, bool grouped, int64_t tokens, Dtype dtype, Dtype scales, bool bias, int64_t pool) {
  const int64_t blocks = (columns + 63) / 64, groups = grouped ? blocks : 1;
  std::vector<uint8_t> codes(static_cast<size_t>(rows * (bits == 8 ? columns : 32 * blocks)));
  for (uint8_t& code : codes) code = static_cast<uint8_t>(source());
  const Numbers scale(scales, rows * groups), offsets(dtype, bias ? rows : 0);
  const Table table = {rows, columns, bits, groups, codes.data(), scale.array()};
  std::vector<double> w(static_cast<size_t>(rows * columns));
  for (int64_t n = 0; n < rows; ++n) {
    for (int64_t k = 0; k < columns; ++k) {
      const int64_t group = k / 64, q = k % 64 / 8, place = n * 32 * blocks + 32 * group + 4 * (k % 8) + q / 2;
      const int code = bits == 8 ? static_cast<int8_t>(codes[static_cast<size_t>(n * columns + k)])
                                 : (codes[static_cast<size_t>(place)] >> (4 * (q % 2)) & 15) - 8;
      w[static_cast<size_t>(n * columns + k)] = code * scale.right[static_cast<size_t>(n * groups + (groups > 1 ? group : 0))];
    }
  }
  const double rounding = dtype == Dtype::f32 ? 0 : dtype == Dtype::bf16 ? 1.0 / 256 : 1.0 / 2048;
  const Pool runner = {pool, threads};
  double worst = 0.0;
  for (const bool back : {false, true}) {
    const int64_t from = back ? rows : columns, to = back ? columns : rows, stride = from + below(3);
    const Numbers x(dtype, tokens ? (tokens - 1) * stride + from : 0);
    std::vector<char> y(static_cast<size_t>(tokens * to * (dtype == Dtype::f32 ? 4 : 2)));
    if (back) head_grad(table, x.array(), stride, tokens, y.data(), runner);
    else head(table, x.array(), stride, tokens, bias ? offsets.array() : Array{}, y.data(), runner);
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t n = 0; n < to; ++n) {
        double sum = !back && bias ? offsets.right[static_cast<size_t>(n)] : 0.0, magnitude = std::fabs(sum);
        for (int64_t k = 0; k < from; ++k) {
          const double product = x.right[static_cast<size_t>(t * stride + k)] * w[static_cast<size_t>(back ? k * columns + n : n * columns + k)];
          sum += product, magnitude += std::fabs(product);
        }
        if (dtype == Dtype::f16 && std::fabs(sum) > 65000) continue;
        const double off = std::fabs(value(y, dtype, t * to + n) - sum) - rounding * std::fabs(sum);
        if (magnitude > 0) worst = std::fmax(worst, off / magnitude);
      }
    }
  }
  std::vector<int64_t> indices(static_cast<size_t>(tokens));
  for (int64_t& index : indices) index = below(rows);
  std::vector<char> found(static_cast<size_t>(tokens * columns * (dtype == Dtype::f32 ? 4 : 2)));
  embedding(table, indices.data(), tokens, found.data(), dtype, runner);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t k = 0; k < columns; ++k) {
      const double right = w[static_cast<size_t>(indices[static_cast<size_t>(t)] * columns + k)];
      const double off = std::fabs(value(found, dtype, t * columns + k) - right) - rounding * std::fabs(right);
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
