// The row-wise parts of a decoder layer between its GEMMs, each read and written once.
//
// A row's tail is computed as a whole vector filled up with zeros, by the same arithmetic.

#include <math.h>

#include "kernels.h"
#include "simd.h"

namespace socpo::SOCPO_ISA {
namespace {

// body(i, left, j): numbers i .. i + LANES - 1 of a row, of which `left` are there; j < 4 is the sum they belong to. A
// body inlined for whole vectors keeps its sums in registers, which the call that copies a tail would not.
#define SOCPO_BODY [&](int64_t i, int64_t left, [[maybe_unused]] int j) __attribute__((always_inline))
template <typename Body>
inline __attribute__((always_inline)) void for_vectors(int64_t width, const Body& body) {
  int64_t i = 0;
  for (; i + 4 * LANES <= width; i += 4 * LANES)
    for (int j = 0; j < 4; ++j) body(i + j * LANES, LANES, j);
  for (; i + LANES <= width; i += LANES) body(i, LANES, 0);
  if (i < width) body(i, width - i, 0);
}

inline Vec load_some(const float* from, int64_t left) { return left >= LANES ? load<Vec>(from) : load_first(from, (int)left); }

inline void store_some(float* to, Vec x, int64_t left) {
  if (left >= LANES) {
    store(to, x);
  } else {
    memcpy(to, &x, left * sizeof(float));
  }
}

// To bf16, nearest even; NaN stays NaN.
inline uint16_t narrow(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  if (x != x) return 0x7fc0;
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline Vec sigmoid(Vec x) {
  const Vec e = exp_nonpositive(x > 0 ? -x : x);
  return (x > 0 ? broadcast(1.0f) : e) / (e + 1.0f);
}

inline float sum_all(const Vec (&sums)[4]) { return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3])); }

inline float inverse_rms(const Vec (&squares)[4], int64_t width, float eps) {
  return 1.0f / sqrtf(sum_all(squares) / (float)width + eps);
}

}  // namespace

void rms_norm_row(const float* x, const float* residual, const float* weight, float eps, int64_t width, float* sum, float* y) {
  Vec squares[4] = {};
  if (residual == nullptr) {
    for_vectors(width, SOCPO_BODY {
      const Vec s = load_some(x + i, left);
      squares[j] += s * s;
    });
  } else {
    for_vectors(width, SOCPO_BODY {
      const Vec s = load_some(x + i, left) + load_some(residual + i, left);
      store_some(sum + i, s, left);
      squares[j] += s * s;
    });
  }
  const float scale = inverse_rms(squares, width, eps);
  const float* from = residual == nullptr ? x : sum;
  for_vectors(width, SOCPO_BODY {
    store_some(y + i, load_some(from + i, left) * scale * load_some(weight + i, left), left);
  });
}

void rms_norm_backward_row(const float* x, const float* weight, const float* grad_y, const float* grad_sum, float eps,
                           int64_t width, float* grad_x, float* grad_weight) {
  Vec squares[4] = {}, products[4] = {};
  for_vectors(width, SOCPO_BODY {
    const Vec s = load_some(x + i, left);
    squares[j] += s * s;
    products[j] += s * (load_some(grad_y + i, left) * load_some(weight + i, left));
  });
  const float scale = inverse_rms(squares, width, eps);
  const float slope = sum_all(products) * scale * scale / (float)width;
  for_vectors(width, SOCPO_BODY {
    const Vec s = load_some(x + i, left), g = load_some(grad_y + i, left);
    Vec grad = (g * load_some(weight + i, left) - s * slope) * scale;
    if (grad_sum != nullptr) grad += load_some(grad_sum + i, left);
    store_some(grad_x + i, grad, left);
    store_some(grad_weight + i, load_some(grad_weight + i, left) + g * (s * scale), left);
  });
}

void swiglu_row(const float* gate, const float* up, int64_t width, float* out) {
  for_vectors(width, SOCPO_BODY {
    const Vec g = load_some(gate + i, left);
    store_some(out + i, g * sigmoid(g) * load_some(up + i, left), left);
  });
}

void swiglu_backward_row(const float* gate, const float* up, const float* grad, int64_t width, float* grad_gate, float* grad_up) {
  for_vectors(width, SOCPO_BODY {
    const Vec g = load_some(gate + i, left), d = load_some(grad + i, left), s = sigmoid(g);
    store_some(grad_gate + i, d * load_some(up + i, left) * (s * (g * (1.0f - s) + 1.0f)), left);
    store_some(grad_up + i, d * (g * s), left);
  });
}

void rotary_head(const float* x, const float* cos, const float* sin, int64_t half, float* out) {
  for_vectors(half, SOCPO_BODY {
    const Vec low = load_some(x + i, left), high = load_some(x + half + i, left);
    const Vec new_low = low * load_some(cos + i, left) - high * load_some(sin + i, left);
    const Vec new_high = high * load_some(cos + half + i, left) + low * load_some(sin + half + i, left);
    store_some(out + i, new_low, left);
    store_some(out + half + i, new_high, left);
  });
}

void narrow_row(const float* x, int64_t width, uint16_t* out) {
  for (int64_t i = 0; i < width; ++i) out[i] = narrow(x[i]);
}

}  // namespace socpo::SOCPO_ISA
