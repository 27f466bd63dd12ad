// The passes over latents of training (shared::signs, signs_grad), split over threads by blocks of rows.
//
// The column sums of a block are a buffer of its own, and the buffers are added in a fixed order. The blocks depend on the
// shape alone, so results are the same bits for any number of threads: training that is resumed elsewhere goes on alike.
#include <algorithm>
#include <vector>

#include "kernels.h"

namespace littlebit {
namespace {

constexpr int64_t kBlock = 32;      // rows
constexpr int64_t kFew = 64 << 10;  // latents under which waking a second thread costs more than it brings

int64_t blocks_of(const Latents& latents) { return (latents.rows + kBlock - 1) / kBlock; }

int64_t width(const Latents& latents) {
  int64_t total = 0;
  for (int64_t p = 0; p < latents.paths; ++p) total += latents.ranks[p];
  return total;
}

// Calls f(block, first row, row after the last) for every block of rows.
template <class F>
void each_block(const Latents& latents, const Pool& pool, const F& f) {
  const int64_t blocks = blocks_of(latents), all = latents.rows * width(latents);
  const int64_t tasks = std::min(blocks, all < kFew ? 1 : pool.threads);
  run(pool, tasks, [&](int64_t task) {
    for (int64_t block = share(blocks, task, tasks); block < share(blocks, task + 1, tasks); ++block) {
      f(block, block * kBlock, std::min(latents.rows, (block + 1) * kBlock));
    }
  });
}

// Calls f(path, its first column, its columns, its part of scale_rank) for every path.
template <class F>
void each_path(const Latents& latents, const F& f) {
  for (int64_t p = 0, first = 0; p < latents.paths; first += latents.ranks[p++]) {
    f(p, first, latents.ranks[p], latents.scale_rank ? latents.scale_rank + first : nullptr);
  }
}

}  // namespace

void scaled_signs(const Latents& latents, void* y, Dtype dtype, const Pool& pool) {
  const Kernels& isa = kernels();
  const int64_t total = width(latents), size = dtype == Dtype::f32 ? 4 : 2, rest = latents.stride - total;
  each_block(latents, pool, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      each_path(latents, [&](int64_t p, int64_t first, int64_t count, const float* scale_rank) {
        const float* const values = latents.values + row * total + first;
        const float scale_feature = latents.scale_feature[p * latents.rows + row];
        isa.signs(values, count, scale_feature, scale_rank, y, dtype, row * latents.stride + first);
      });
      std::fill_n(static_cast<char*>(y) + (row * latents.stride + total) * size, rest * size, '\0');
    }
  });
}

void scaled_signs_grad(const Latents& latents, Array grad, const float* steepness, float* latent_grad, float* feature_grad,
                       float* rank_grad, const Pool& pool) {
  const Kernels& isa = kernels();
  const int64_t total = width(latents), blocks = blocks_of(latents);
  std::vector<float> sums(static_cast<size_t>(latents.scale_rank ? blocks * total : 0));
  each_block(latents, pool, [&](int64_t block, int64_t begin, int64_t end) {
    float* const columns = latents.scale_rank ? sums.data() + block * total : nullptr;
    for (int64_t row = begin; row < end; ++row) {
      each_path(latents, [&](int64_t p, int64_t first, int64_t count, const float* scale_rank) {
        const int64_t at = row * total + first, of_row = p * latents.rows + row;
        feature_grad[of_row] = isa.signs_grad(latents.values + at, grad, row * latents.stride + first, count,
                                            latents.scale_feature[of_row], scale_rank, steepness, latent_grad + at,
                                            scale_rank ? columns + first : nullptr);
      });
    }
  });
  if (!latents.scale_rank) return;
  std::vector<double> all(static_cast<size_t>(total));
  for (int64_t block = 0; block < blocks; ++block) {
    for (int64_t i = 0; i < total; ++i) all[static_cast<size_t>(i)] += sums[static_cast<size_t>(block * total + i)];
  }
  for (int64_t i = 0; i < total; ++i) rank_grad[i] = static_cast<float>(all[static_cast<size_t>(i)]);
}

}  // namespace littlebit
