// The row-wise parts of a decoder layer between its GEMMs, each read and written once.
//
// A row's tail is computed on a vector filled up with zeros, so that an element's bits do not depend on where it stands.

#include <math.h>

#include "kernels.h"
#include "simd.h"

namespace socpo::SOCPO_ISA {
namespace {

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

inline float inverse_rms(Vec sum_squares, int64_t width, float eps) {
  return 1.0f / sqrtf(sum_lanes(sum_squares) / (float)width + eps);
}

}  // namespace

void rms_norm_row(const float* x, const float* residual, const float* weight, float eps, int64_t width, float* sum, float* y) {
  Vec squares = {};
  for (int64_t i = 0; i < width; i += LANES) {
    Vec s = load_some(x + i, width - i);
    if (residual != nullptr) {
      s += load_some(residual + i, width - i);
      store_some(sum + i, s, width - i);
    }
    squares += s * s;
  }
  const float scale = inverse_rms(squares, width, eps);
  const float* from = residual != nullptr ? sum : x;
  for (int64_t i = 0; i < width; i += LANES)
    store_some(y + i, load_some(from + i, width - i) * scale * load_some(weight + i, width - i), width - i);
}

void rms_norm_backward_row(const float* x, const float* weight, const float* grad_y, const float* grad_sum, float eps,
                           int64_t width, float* grad_x, float* grad_weight) {
  Vec squares = {}, products = {};
  for (int64_t i = 0; i < width; i += LANES) {
    const Vec s = load_some(x + i, width - i);
    squares += s * s;
    products += s * (load_some(grad_y + i, width - i) * load_some(weight + i, width - i));
  }
  const float scale = inverse_rms(squares, width, eps);
  const float slope = sum_lanes(products) * scale * scale / (float)width;
  for (int64_t i = 0; i < width; i += LANES) {
    const Vec s = load_some(x + i, width - i), g = load_some(grad_y + i, width - i);
    Vec grad = (g * load_some(weight + i, width - i) - s * slope) * scale;
    if (grad_sum != nullptr) grad += load_some(grad_sum + i, width - i);
    store_some(grad_x + i, grad, width - i);
    store_some(grad_weight + i, load_some(grad_weight + i, width - i) + g * (s * scale), width - i);
  }
}

void swiglu_row(const float* gate, const float* up, int64_t width, float* out) {
  for (int64_t i = 0; i < width; i += LANES) {
    const Vec g = load_some(gate + i, width - i);
    store_some(out + i, g * sigmoid(g) * load_some(up + i, width - i), width - i);
  }
}

void swiglu_backward_row(const float* gate, const float* up, const float* grad, int64_t width, float* grad_gate, float* grad_up) {
  for (int64_t i = 0; i < width; i += LANES) {
    const Vec g = load_some(gate + i, width - i), d = load_some(grad + i, width - i), s = sigmoid(g);
    store_some(grad_gate + i, d * load_some(up + i, width - i) * (s * (g * (1.0f - s) + 1.0f)), width - i);
    store_some(grad_up + i, d * (g * s), width - i);
  }
}

void rotary_head(const float* x, const float* cos, const float* sin, int64_t half, float* out) {
  for (int64_t i = 0; i < half; i += LANES) {
    const Vec low = load_some(x + i, half - i), high = load_some(x + half + i, half - i);
    const Vec new_low = low * load_some(cos + i, half - i) - high * load_some(sin + i, half - i);
    const Vec new_high = high * load_some(cos + half + i, half - i) + low * load_some(sin + half + i, half - i);
    store_some(out + i, new_low, half - i);
    store_some(out + half + i, new_high, half - i);
  }
}

void narrow_row(const float* x, int64_t width, uint16_t* out) {
  for (int64_t i = 0; i < width; ++i) out[i] = narrow(x[i]);
}

}  // namespace socpo::SOCPO_ISA
