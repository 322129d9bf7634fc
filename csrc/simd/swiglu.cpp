// SwiGLU of a row and its gradient.
//
// The tail of a row is a whole vector padded with zeros and takes the same arithmetic.

#include "kernels.h"
#include "lanes.h"

namespace socpo::SOCPO_ISA {
namespace {

inline Vec sigmoid(Vec x) {
  const Vec e = exp_nonpositive(x > 0 ? -x : x);
  return (x > 0 ? broadcast(1.0f) : e) / (e + 1.0f);
}

}  // namespace

void swiglu_row(const float* gate, const float* up, int64_t width, float* out) {
  for_vectors(
      width, SOCPO_BODY {
        const Vec g = load_first(gate + i, left);
        store_first(out + i, g * sigmoid(g) * load_first(up + i, left), left);
      });
}

void swiglu_backward_row(const float* gate, const float* up, const float* grad, int64_t width,
                         float* grad_gate, float* grad_up) {
  for_vectors(
      width, SOCPO_BODY {
        const Vec g = load_first(gate + i, left), d = load_first(grad + i, left), s = sigmoid(g);
        store_first(grad_gate + i, d * load_first(up + i, left) * (s * (g * (1.0f - s) + 1.0f)),
                    left);
        store_first(grad_up + i, d * (g * s), left);
      });
}

}  // namespace socpo::SOCPO_ISA
