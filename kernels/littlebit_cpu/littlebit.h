// The layer on packed bits, for a CPU, with plain pointers: no torch type here, so that it can be driven by any program.
//
//     y = sum_p scale_out_p * (U_p (scale_rank_p * (V_p^T (scale_in_p * x)))) + bias
//
// The layout of U and V is that of torch-ext/littlebit/packing.py, that of a layer parts.py. All strides are in elements.
#pragma once

#include <cstdint>

namespace littlebit {

enum class Dtype { f32, bf16, f16 };

struct Array {
  const void* data = nullptr;  // null where a layer has no such part
  Dtype dtype = Dtype::f32;
};

struct Layer {
  int64_t in_features, out_features, paths;
  const int64_t* ranks;     // [paths]
  const uint32_t* u;        // [sum_p r_p // 32, out]
  const uint8_t* u_tail;    // [sum_p ceil(r_p % 32 / 8), out] or null
  const uint32_t* v;        // [in // 32, sum_p r_p] or null
  const uint8_t* v_tail;    // [ceil(in % 32 / 8), sum_p r_p] or null
  Array scale_out;          // [paths, out]
  Array scale_rank;         // [sum_p r_p]
  Array scale_in;           // [paths, in]
  Array bias;               // [out] or null
};

// Runs task(i, context) for every i < count, in any order and on any threads. Results depend on `threads` alone.
struct Pool {
  int64_t threads = 1;
  void (*run)(int64_t count, void (*task)(int64_t, void*), void* context) = nullptr;
};

// x [tokens, in], its rows `stride` apart -> of every layer y[i] [tokens, out] contiguous, of x's dtype. The layers take the
// same `in`; each result has the bits that it has alone.
void forward(const Layer* layers, int64_t count, Array x, int64_t stride, int64_t tokens, void* const* y, const Pool& pool);

// grad [tokens, out], rows `stride` apart -> the gradient with respect to x, [tokens, in] contiguous, of grad's dtype.
void backward(const Layer& layer, Array grad, int64_t stride, int64_t tokens, void* grad_x, const Pool& pool);

// A factor in training: latents, of which the sign is used, and its scales. All fp32 and contiguous.
struct Latents {
  int64_t rows, paths;
  const int64_t* ranks;        // [paths]
  const float* values;         // [rows, R], R = sum_p r_p
  const float* scale_feature;  // [paths, rows]: scale_out for U, scale_in for V
  const float* scale_rank;     // [R], or null: 1
  int64_t stride;              // >= R: elements between the rows of scaled_signs' result, and of its gradient
};

// y [rows, stride] = scale_feature * sign(latent) * scale_rank, multiplied in fp32 and rounded once, then zeros; sign(±0) and
// sign(NaN) are +1.
void scaled_signs(const Latents& latents, void* y, Dtype dtype, const Pool& pool);

// The gradients of scaled_signs from grad [rows, stride]: latent_grad [rows, R], feature_grad [paths, rows] and, where the factor
// has a scale_rank, rank_grad [R]. The sign's slope at x is steepness * (1 - tanh(steepness * x)^2), or, where `steepness`
// is null, 1 for |x| < 1 and 0 elsewhere. Results do not depend on the number of threads.
void scaled_signs_grad(const Latents& latents, Array grad, const float* steepness, float* latent_grad, float* feature_grad,
                       float* rank_grad, const Pool& pool);

// The instruction sets, best first; "auto" is the best this machine has. `select` returns false for one it has not.
bool select(const char* isa);
const char* selected();

}  // namespace littlebit
