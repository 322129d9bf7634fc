// The two passes over a row of logits behind log-probs and their gradients, in fp32.
//
// A pass computes one exponential a logit (relative error under 2e-7, simd.h), which is cheaper
// than reading the logit from memory. A row is read from memory once: the second pass finds it in
// the cache. Sums are fp32 within a block and fp64 over blocks. Blocks start at multiples of BLOCK
// in every row, so results are batch-invariant.

#include <math.h>

#include "kernels.h"
#include "lanes.h"

namespace socpo::SOCPO_ISA {
namespace {

constexpr int BLOCK = 1024;
// Below it exp_nonpositive is 0; x is raised to it so that 0 * x is 0 where x is -inf.
constexpr float FLOOR = -87.0f;

// Returns the largest of BLOCK logits; NaN is skipped.
inline float block_max(const float* logits) {
  Vec lanes[4];
  for (int j = 0; j < 4; ++j) lanes[j] = broadcast(-INFINITY);
  for (int i = 0; i < BLOCK; i += 4 * LANES)
    for (int j = 0; j < 4; ++j) lanes[j] = max(load<Vec>(logits + i + j * LANES), lanes[j]);
  return max_lane(max(max(lanes[0], lanes[1]), max(lanes[2], lanes[3])));
}

// Adds a block to the row's sums, which are relative to `shift`, and prefetches the next block.
template <bool WEIGHTED>
inline void add_block(const float* logits, const float* next, float shift,
                      float inverse_temperature, RowSums& row) {
  Vec sum = {}, weighted = {};
  for (int i = 0; i < BLOCK; i += LANES) {
    __builtin_prefetch(next + i);
    const Vec x = (load<Vec>(logits + i) - shift) * inverse_temperature, e = exp_nonpositive(x);
    sum += e;
    if (WEIGHTED) weighted += e * max(x, broadcast(FLOOR));
  }
  row.sum += sum_lanes(sum);
  if (WEIGHTED) row.weighted += sum_lanes(weighted);
}

template <bool WITH_SLOPE>
inline Vec gradient(Vec logits, float inverse_temperature, float max_logit, float scale,
                    float slope) {
  const Vec x = (logits - max_logit) * inverse_temperature, e = exp_nonpositive(x);
  return WITH_SLOPE ? e * (max(x, broadcast(FLOOR)) * slope + scale) : e * scale;
}

template <bool WITH_SLOPE>
inline void gradients(const float* logits, float* grad, int64_t vocab, float inverse_temperature,
                      float max_logit, float scale, float slope) {
  int64_t i = 0;
  for (; i + LANES <= vocab; i += LANES)
    store(grad + i, gradient<WITH_SLOPE>(load<Vec>(logits + i), inverse_temperature, max_logit,
                                         scale, slope));
  const Vec tail = load_first(logits + i, vocab - i);
  store_first(grad + i, gradient<WITH_SLOPE>(tail, inverse_temperature, max_logit, scale, slope),
              vocab - i);
}

}  // namespace

RowSums row_sums(const float* logits, int64_t vocab, float inverse_temperature,
                 bool need_weighted) {
  RowSums row{-INFINITY, 0, 0};
  for (int64_t start = 0; start < vocab; start += BLOCK) {
    const float* block = logits + start;
    float last[BLOCK];
    if (vocab - start < BLOCK) {  // padded with outcomes of probability 0
      for (int i = 0; i < BLOCK; ++i) last[i] = start + i < vocab ? block[i] : -INFINITY;
      block = last;
    }
    const double largest = block_max(block);
    if (largest > row.max) {
      if (row.max > -INFINITY) {  // the sums so far are relative to the old maximum
        const double step = (row.max - largest) * inverse_temperature, factor = exp(step);
        row.weighted = factor * (row.weighted + step * row.sum);
        row.sum *= factor;
      }
      row.max = largest;
    }
    const float shift = row.max > -INFINITY ? (float)row.max : 0.0f;  // -inf - -inf would be NaN
    if (need_weighted) {
      add_block<true>(block, logits + start + BLOCK, shift, inverse_temperature, row);
    } else {
      add_block<false>(block, logits + start + BLOCK, shift, inverse_temperature, row);
    }
  }
  return row;
}

void row_gradient(const float* logits, float* grad, int64_t vocab, float inverse_temperature,
                  float max_logit, float scale, float slope) {
  if (slope == 0) {
    gradients<false>(logits, grad, vocab, inverse_temperature, max_logit, scale, slope);
  } else {
    gradients<true>(logits, grad, vocab, inverse_temperature, max_logit, scale, slope);
  }
}

}  // namespace socpo::SOCPO_ISA
