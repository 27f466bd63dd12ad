// Packed tables: heads, their gradients and embeddings over the kernels of table_kernels.h, and how they are split over threads.
//
// A head splits its rows, and every result is one sum in an order that depends on nothing else. The gradient sums over rows: every
// thread has sums of its own, which are added in a fixed order.
#include <algorithm>
#include <cstring>
#include <memory>
#include <string>

#include "table_kernels.h"

namespace littlebit {
namespace {

constexpr int64_t kSmall = 1 << 20;  // weights under which waking a second thread costs more than it brings
constexpr int64_t kBlock = 32;       // rows whose results are stored at a time: their codes stay in the cache while tokens pass
constexpr int64_t kTokens = 64;      // tokens at a time: bounds the buffers

// Memory that begins with a line of the cache, or every second load of 64 bytes would touch two.
class Floats {
 public:
  explicit Floats(int64_t count) : held_(new float[static_cast<size_t>(count) + kLine / sizeof(float)]) {
    const uintptr_t past = reinterpret_cast<uintptr_t>(held_.get()) % kLine;
    start_ = held_.get() + (past ? (kLine - past) / sizeof(float) : 0);
  }
  float* get() const { return start_; }

 private:
  static constexpr uintptr_t kLine = 64;
  std::unique_ptr<float[]> held_;
  float* start_;
};

const TableKernels& chosen() {
  const std::string name = selected();
  const TableKernels* found = name == "avx512" || name == "amx" ? avx512_table() : name == "avx2" ? avx2_table() : nullptr;
  return found ? *found : *plain_table();
}

// Rows of a buffer are kept from beginning a power of two apart: they would share a few lines of the cache.
int64_t pitch_of(const Table& table) { return (table.columns + 127) / 128 * 128 + 32; }

const void* advance(const void* x, Dtype dtype, int64_t offset) {
  return static_cast<const char*>(x) + offset * (dtype == Dtype::f32 ? 4 : 2);
}

// x as the kernels read it.
struct Prepared {
  Floats memory;
  Inputs inputs;

  Prepared(const TableKernels& isa, const Table& table, Array x, int64_t stride, int64_t tokens)
      : memory(tokens * pitch_of(table)), inputs{nullptr, nullptr, pitch_of(table)} {
    std::fill_n(memory.get(), tokens * inputs.pitch, 0.0f);
    // Codes of 8 bits in groups are left to fp32.
    if (x.dtype == Dtype::bf16 && isa.arrange && (table.bits == 4 || table.groups == 1)) {
      uint16_t* const halves = reinterpret_cast<uint16_t*>(memory.get());
      for (int64_t t = 0; t < tokens; ++t) {
        isa.arrange(table, static_cast<const uint16_t*>(x.data) + t * stride, halves + t * inputs.pitch);
      }
      inputs.halves = halves;
    } else {
      for (int64_t t = 0; t < tokens; ++t) shared::load(x, t * stride, table.columns, memory.get() + t * inputs.pitch);
      inputs.values = memory.get();
    }
  }
};

void plain_product(const Table& table, const Inputs& x, int64_t tokens, int64_t first, int64_t count, float* out, int64_t ldo,
                   float* scratch) {
  shared::product<4, 4, 2>(table, x, tokens, first, count, out, ldo, scratch);
}

void plain_unpack(const Table& table, int64_t row, float* out) { shared::unpack(table, row, out); }

void plain_accumulate(const float* rows, int64_t count, const float* grad, int64_t ldg, int64_t tokens, float* acc, int64_t pitch) {
  shared::accumulate(rows, count, grad, ldg, tokens, acc, pitch);
}

}  // namespace

const TableKernels* plain_table() {
  static const TableKernels kernels = {"plain", nullptr, shared::scratch, plain_product, plain_unpack, plain_accumulate};
  return &kernels;
}

void head(const Table& table, Array x, int64_t stride, int64_t tokens, Array bias, void* y, const Pool& pool) {
  const TableKernels& isa = chosen();
  for (int64_t begin = 0; begin < tokens; begin += kTokens) {
    const int64_t some = std::min(kTokens, tokens - begin);
    const Prepared x_of(isa, table, {advance(x.data, x.dtype, begin * stride), x.dtype}, stride, some);
    const int64_t blocks = (table.rows + kBlock - 1) / kBlock;
    const int64_t threads = std::max<int64_t>(1, std::min(blocks, table.rows * table.columns * some < kSmall ? 1 : pool.threads));
    run(pool, threads, [&](int64_t thread) {
      const Floats buffer(some * kBlock + isa.scratch(x_of.inputs, kBlock, some)), offsets(kBlock);
      float* const out = buffer.get();
      for (int64_t block = share(blocks, thread, threads); block < share(blocks, thread + 1, threads); ++block) {
        const int64_t first = block * kBlock, count = std::min(kBlock, table.rows - first);
        isa.product(table, x_of.inputs, some, first, count, out, kBlock, out + some * kBlock);
        if (bias.data) shared::load(bias, first, count, offsets.get());
        for (int64_t t = 0; t < some; ++t) {
          float* own = out + t * kBlock;
          if (bias.data) {
            for (int64_t i = 0; i < count; ++i) own[i] += offsets.get()[i];
          }
          shared::store(own, count, y, x.dtype, (begin + t) * table.rows + first);
        }
      }
    });
  }
}

void head_grad(const Table& table, Array grad, int64_t stride, int64_t tokens, void* grad_x, const Pool& pool) {
  const TableKernels& isa = chosen();
  const int64_t pitch = pitch_of(table);
  for (int64_t begin = 0; begin < tokens; begin += kTokens) {
    const int64_t some = std::min(kTokens, tokens - begin);
    const int64_t blocks = (table.rows + kBlock - 1) / kBlock;
    const int64_t threads = std::max<int64_t>(1, std::min(blocks, table.rows * table.columns * some < kSmall ? 1 : pool.threads));
    const Floats sums(threads * some * pitch);
    std::fill_n(sums.get(), threads * some * pitch, 0.0f);
    run(pool, threads, [&](int64_t thread) {
      const Floats buffer(shared::kRows * pitch + some * kBlock);
      float* const rows = buffer.get();
      float* const own = rows + shared::kRows * pitch;
      std::fill_n(rows, shared::kRows * pitch, 0.0f);
      float* const acc = sums.get() + thread * some * pitch;
      for (int64_t block = share(blocks, thread, threads); block < share(blocks, thread + 1, threads); ++block) {
        const int64_t first = block * kBlock, count = std::min(kBlock, table.rows - first);
        for (int64_t t = 0; t < some; ++t) shared::load(grad, (begin + t) * stride + first, count, own + t * kBlock);
        for (int64_t i = 0; i < count; i += shared::kRows) {
          const int64_t left = std::min<int64_t>(shared::kRows, count - i);
          for (int64_t r = 0; r < left; ++r) isa.unpack(table, first + i + r, rows + r * pitch);
          isa.accumulate(rows, left, own + i, kBlock, some, acc, pitch);
        }
      }
    });
    for (int64_t thread = 1; thread < threads; ++thread) {
      const float* other = sums.get() + thread * some * pitch;
      for (int64_t k = 0; k < some * pitch; ++k) sums.get()[k] += other[k];
    }
    for (int64_t t = 0; t < some; ++t) {
      shared::store(sums.get() + t * pitch, table.columns, grad_x, grad.dtype, (begin + t) * table.columns);
    }
  }
}

void embedding(const Table& table, const int64_t* indices, int64_t count, void* y, Dtype dtype, const Pool& pool) {
  const TableKernels& isa = chosen();
  const int64_t threads = std::max<int64_t>(1, std::min(count, count * table.columns < kSmall ? 1 : pool.threads));
  run(pool, threads, [&](int64_t thread) {
    const Floats row(pitch_of(table));
    for (int64_t i = share(count, thread, threads); i < share(count, thread + 1, threads); ++i) {
      isa.unpack(table, indices[i], row.get());
      shared::store(row.get(), table.columns, y, dtype, i * table.columns);
    }
  });
}

}  // namespace littlebit
