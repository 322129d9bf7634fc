// RMSNorm of a row and its gradient; a row is read and written once.
//
// The tail of a row is a whole vector padded with zeros and takes the same arithmetic.

#include <math.h>

#include "kernels.h"
#include "lanes.h"

namespace socpo::SOCPO_ISA {
namespace {

inline float sum_all(const Vec (&sums)[4]) {
  return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

inline float inverse_rms(const Vec (&squares)[4], int64_t width, float eps) {
  return 1.0f / sqrtf(sum_all(squares) / (float)width + eps);
}

}  // namespace

void rms_norm_row(const float* x, const float* residual, const float* weight, float eps,
                  int64_t width, float* sum, float* y) {
  Vec squares[4] = {};
  if (residual == nullptr) {
    for_vectors(
        width, SOCPO_BODY {
          const Vec s = load_first(x + i, left);
          squares[j] += s * s;
        });
  } else {
    for_vectors(
        width, SOCPO_BODY {
          const Vec s = load_first(x + i, left) + load_first(residual + i, left);
          store_first(sum + i, s, left);
          squares[j] += s * s;
        });
  }
  const float scale = inverse_rms(squares, width, eps);
  const float* from = residual == nullptr ? x : sum;
  for_vectors(
      width, SOCPO_BODY {
        store_first(y + i, load_first(from + i, left) * scale * load_first(weight + i, left), left);
      });
}

void rms_norm_backward_row(const float* x, const float* weight, const float* grad_y,
                           const float* grad_sum, float eps, int64_t width, float* grad_x,
                           float* grad_weight) {
  Vec squares[4] = {}, products[4] = {};
  for_vectors(
      width, SOCPO_BODY {
        const Vec s = load_first(x + i, left);
        const Vec g = load_first(grad_y + i, left);
        const Vec w = load_first(weight + i, left);
        squares[j] += s * s;
        products[j] += s * (g * w);
      });
  const float scale = inverse_rms(squares, width, eps);
  const float slope = sum_all(products) * scale * scale / (float)width;
  for_vectors(
      width, SOCPO_BODY {
        const Vec s = load_first(x + i, left);
        const Vec g = load_first(grad_y + i, left);
        const Vec w = load_first(weight + i, left);
        const Vec old_grad_weight = load_first(grad_weight + i, left);
        Vec grad = (g * w - s * slope) * scale;
        if (grad_sum != nullptr) grad += load_first(grad_sum + i, left);
        store_first(grad_x + i, grad, left);
        store_first(grad_weight + i, old_grad_weight + g * (s * scale), left);
      });
}

}  // namespace socpo::SOCPO_ISA
