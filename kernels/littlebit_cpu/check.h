// What the programs that check the kernel share: random numbers, buffers of exactly their size, and their values in fp64.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "littlebit.h"

namespace littlebit {
namespace checks {

constexpr double kRounding[] = {0.0, 1.0 / 256, 1.0 / 2048};  // by Dtype
inline std::mt19937 source(1);

inline double uniform() { return std::uniform_real_distribution<double>(-1.0, 1.0)(source); }
inline int64_t below(int64_t limit) { return static_cast<int64_t>(source() % static_cast<uint64_t>(limit)); }

// Numbers that all three types hold exactly, of 7 significant bits: from 1 to 2, or multiples of 1/64 below 2.
inline double exact() { return std::ldexp(std::floor(64 * (1 + std::fabs(uniform()))), -6) * (source() & 1 ? 1 : -1); }
inline double multiple() { return static_cast<double>(1 + below(127)) / 64 * (source() & 1 ? 1 : -1); }

inline double value(const char* data, Dtype dtype, int64_t i) {
  uint32_t bits = 0;
  if (dtype == Dtype::f32) {
    std::memcpy(&bits, data + 4 * i, 4);
  } else {
    uint16_t half;
    std::memcpy(&half, data + 2 * i, 2);
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

struct Buffer {
  Dtype dtype;
  std::vector<char> bytes;

  Buffer(Dtype type, int64_t count, double (*draw)() = exact)
      : dtype(type), bytes(static_cast<size_t>(count) * (type == Dtype::f32 ? 4 : 2)) {
    for (int64_t i = 0; i < count; ++i) {
      const float number = static_cast<float>(draw());
      uint32_t bits;
      std::memcpy(&bits, &number, 4);
      uint16_t half = static_cast<uint16_t>(bits >> 16);
      if (type == Dtype::f16) half = static_cast<uint16_t>((bits >> 16 & 0x8000) | ((bits >> 13) - (112u << 10)) % 32768);
      if (type == Dtype::f32) std::memcpy(bytes.data() + 4 * i, &bits, 4);
      else std::memcpy(bytes.data() + 2 * i, &half, 2);
    }
    bytes.shrink_to_fit();
  }
  Array array() const { return {bytes.data(), dtype}; }
  double at(int64_t i) const { return value(bytes.data(), dtype, i); }
};

template <class T>
std::vector<T> bits(int64_t count) {
  std::vector<T> result(static_cast<size_t>(count));
  for (T& word : result) word = static_cast<T>(source());
  return result;
}

inline void threads(int64_t count, void (*task)(int64_t, void*), void* context) {
  std::vector<std::thread> running;
  for (int64_t i = 0; i < count; ++i) running.emplace_back(task, i, context);
  for (std::thread& thread : running) thread.join();
}

}  // namespace checks

double check_tables(int rounds);  // table_check.cpp: the largest error of packed tables

}  // namespace littlebit
