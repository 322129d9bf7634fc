// A row of logits as a softmax: its sums, log-prob and entropy, and the gradient of a function of
// both.
//
// fp32 runs csrc/simd/softmax_rows.cpp; fp64, which serves gradient checks, the plain loops below.

#pragma once

#include <ATen/core/Tensor.h>

#include <cmath>
#include <limits>

#include "cpu.h"

namespace socpo {

inline RowSums row_sums(const float* logits, int64_t vocab, float inverse_temperature,
                        bool need_weighted) {
  return kernels().row_sums(logits, vocab, inverse_temperature, need_weighted);
}

inline RowSums row_sums(const double* logits, int64_t vocab, double inverse_temperature, bool) {
  RowSums row{-INFINITY, 0, 0};
  for (int64_t i = 0; i < vocab; ++i) row.max = logits[i] > row.max ? logits[i] : row.max;
  for (int64_t i = 0; i < vocab; ++i) {
    const double x = (logits[i] - row.max) * inverse_temperature, e = std::exp(x);
    row.sum += e;
    row.weighted += e == 0 ? 0 : e * x;
  }
  return row;
}

inline void row_gradient(const float* logits, float* grad, int64_t vocab, float inverse_temperature,
                         double max, double scale, double slope) {
  kernels().row_gradient(logits, grad, vocab, inverse_temperature, static_cast<float>(max),
                         static_cast<float>(scale), static_cast<float>(slope));
}

inline void row_gradient(const double* logits, double* grad, int64_t vocab,
                         double inverse_temperature, double max, double scale, double slope) {
  for (int64_t i = 0; i < vocab; ++i) {
    const double x = (logits[i] - max) * inverse_temperature, e = std::exp(x);
    grad[i] = e == 0 ? 0 : e * (scale + slope * x);
  }
}

template <typename scalar_t>
struct SoftmaxRow {
  const scalar_t* logits;
  int64_t vocab, target;
  scalar_t inverse_temperature;
  RowSums sums;
  double target_x;  // (target's logit - max) * inverse_temperature; kept, as the gradient may
                    // overwrite the logits
  double logprob, entropy;

  SoftmaxRow(const scalar_t* logits, int64_t vocab, int64_t target, scalar_t inverse_temperature,
             bool need_entropy)
      : logits(logits),
        vocab(vocab),
        target(target),
        inverse_temperature(inverse_temperature),
        sums(row_sums(logits, vocab, inverse_temperature, need_entropy)),
        target_x((logits[target] - sums.max) * inverse_temperature) {
    const double log_sum = std::log(sums.sum);
    logprob = target_x - log_sum;
    entropy = need_entropy ? log_sum - sums.weighted / sums.sum
                           : std::numeric_limits<double>::quiet_NaN();
  }

  // grad = d loss / d logits for d loss / d logprob and d loss / d entropy of this row; exact zeros
  // when both are 0.
  void gradient(double grad_logprob, double grad_entropy, scalar_t* grad) const {
    if (grad_logprob == 0 && grad_entropy == 0) {
      std::fill(grad, grad + vocab, scalar_t(0));
      return;
    }
    // d logprob / d z_v = [v is the target] - p_v;  d entropy / d z_v = -p_v (x_v - mean of x)
    const double per_weight = inverse_temperature / sums.sum;
    const double mean = grad_entropy == 0 ? 0 : sums.weighted / sums.sum;
    const double scale = per_weight * (grad_entropy * mean - grad_logprob);
    const double slope = -per_weight * grad_entropy;
    row_gradient(logits, grad, vocab, inverse_temperature, sums.max, scale, slope);
    // 1 - p from the log-prob: the difference of two rounded numbers would lose a p near 1
    const double target_weight = std::exp(target_x);
    const double entropy_part =
        target_weight == 0 ? 0 : target_weight * per_weight * grad_entropy * (mean - target_x);
    grad[target] = static_cast<scalar_t>(inverse_temperature * grad_logprob * -std::expm1(logprob) +
                                         entropy_part);
  }
};

}  // namespace socpo
