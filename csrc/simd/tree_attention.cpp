// The two passes over a row of attention scores: its softmax, and the gradient of that.

#include <float.h>
#include <math.h>

#include "kernels.h"
#include "lanes.h"

namespace socpo::SOCPO_ISA {

SoftmaxSums softmax_row(float* scores, int64_t count, int64_t width, float scale) {
  Vec largest = broadcast(-FLT_MAX);  // finite: a row of nothing but -inf has sum 0
  for (int64_t i = 0; i < count; i += LANES)
    largest = max(largest, keep_first(load<Vec>(scores + i) * scale, count - i, -FLT_MAX));
  const float max_score = max_lane(largest);
  Vec sum = {};
  int64_t i = 0;
  for (; i < count; i += LANES) {
    const Vec e = exp_nonpositive(load<Vec>(scores + i) * scale - max_score);
    const Vec weight = keep_first(e, count - i, 0.0f);
    store(scores + i, weight);
    sum += weight;
  }
  for (; i < width; i += LANES) store(scores + i, Vec{});
  return {max_score, sum_lanes(sum)};
}

void softmax_backward_row(float* scores, float* grads, int64_t count, int64_t width, float scale) {
  const float factor = 1.0f / softmax_row(scores, count, width, scale).sum;
  Vec dot = {};
  for (int64_t i = 0; i < count; i += LANES)
    dot += load<Vec>(scores + i) * keep_first(load<Vec>(grads + i), count - i, 0.0f);
  const float mean = sum_lanes(dot) * factor;
  for (int64_t i = 0; i < width; i += LANES) {
    const Vec weight = load<Vec>(scores + i) * factor;
    store(scores + i, weight);
    store(grads + i, keep_first(weight * (load<Vec>(grads + i) - mean) * scale, count - i, 0.0f));
  }
}

}  // namespace socpo::SOCPO_ISA
