// The two passes over a row of attention scores: its softmax, and the gradient of that.

#include <float.h>
#include <math.h>

#include "kernels.h"
#include "simd.h"

namespace socpo::SOCPO_ISA {
namespace {

// The lanes of x, which start at i, that are below `count`; the others are `otherwise`.
inline Vec visible(Vec x, int64_t i, int64_t count, float otherwise) {
  const VecInt is_visible = (VecInt)lane_index() < VecInt{} + smaller(count - i, LANES);
  return is_visible ? x : broadcast(otherwise);
}

}  // namespace

SoftmaxSums softmax_row(float* scores, int64_t count, int64_t width, float scale) {
  Vec largest = broadcast(-FLT_MAX);  // finite: a row of nothing but -inf has sum 0
  for (int64_t i = 0; i < count; i += LANES)
    largest = max(largest, visible(load<Vec>(scores + i) * scale, i, count, -FLT_MAX));
  float max_score = largest[0];
  for (int lane = 1; lane < LANES; ++lane)
    max_score = largest[lane] > max_score ? largest[lane] : max_score;
  Vec sum = {};
  int64_t i = 0;
  for (; i < count; i += LANES) {
    const Vec e = exp_nonpositive(load<Vec>(scores + i) * scale - max_score);
    const Vec weight = visible(e, i, count, 0.0f);
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
    dot += load<Vec>(scores + i) * visible(load<Vec>(grads + i), i, count, 0.0f);
  const float mean = sum_lanes(dot) * factor;
  for (int64_t i = 0; i < width; i += LANES) {
    const Vec weight = load<Vec>(scores + i) * factor;
    store(scores + i, weight);
    store(grads + i, visible(weight * (load<Vec>(grads + i) - mean) * scale, i, count, 0.0f));
  }
}

}  // namespace socpo::SOCPO_ISA
