// A step of AdamW over some elements of a parameter, bitwise equal to adamw_ref of
// socpo_fast/ops/adamw.py: one rounding an operation, in the same order. setup.py compiles this
// file so that a product and a sum stay two roundings.

#include <math.h>
#include <string.h>

#include "kernels.h"

namespace socpo::SOCPO_ISA {
namespace {

constexpr uint32_t INFINITY_BITS = 0x7f800000, MAGNITUDE = 0x7fffffff, HALF_OF_LOW = 0x8000;

inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

// Weights stored as fp32 numbers.
struct Fp32Weights {
  float* __restrict param;
  static constexpr uint32_t ROOM = 0;  // a new value must lie this far below infinity, in bits
  float read(int64_t i) const { return param[i]; }
  void write(int64_t i, float x) const { param[i] = x; }
};

// Weights stored in two halves, the high one rounded to nearest, ties away from zero.
struct SplitWeights {
  uint16_t* __restrict high;
  int16_t* __restrict low;
  static constexpr uint32_t ROOM = HALF_OF_LOW;
  float read(int64_t i) const {
    return float_of(((uint32_t)high[i] << 16) + (uint32_t)(int32_t)low[i]);
  }
  void write(int64_t i, float x) const {
    const uint32_t bits = bits_of(x), rounded = bits + HALF_OF_LOW;
    high[i] = (uint16_t)(rounded >> 16);
    low[i] = (int16_t)(bits - (rounded & 0xffff0000));
  }
};

template <typename Weights>
inline void step(const Weights weights, const AdamWStep& s, int64_t begin, int64_t end) {
  float* __restrict exp_avg = s.exp_avg;
  float* __restrict exp_avg_sq = s.exp_avg_sq;
  const float* __restrict grad = s.grad;
  const float scale = s.scale, decay = s.decay, eps = s.eps, step_size = s.step_size;
  const float beta1 = s.beta1;
  const float new_in_avg = s.new_in_avg;
  const float beta2 = s.beta2;
  const float new_in_avg_sq = s.new_in_avg_sq;
  const float root_correction = s.root_correction;
  for (int64_t i = begin; i < end; ++i) {
    const float old_weight = weights.read(i), g = grad[i] * scale;
    const float avg = exp_avg[i] * beta1 + g * new_in_avg;
    const float avg_sq = exp_avg_sq[i] * beta2 + g * g * new_in_avg_sq;
    const float denominator = sqrtf(avg_sq) / root_correction + eps;
    const float new_weight = old_weight - (avg / denominator * step_size + old_weight * decay);
    // Compares bit patterns, in which NaN is larger than infinity.
    const bool is_taken = (bits_of(new_weight) & MAGNITUDE) + Weights::ROOM < INFINITY_BITS &&
                          bits_of(avg_sq) < INFINITY_BITS;
    exp_avg[i] = is_taken ? avg : exp_avg[i];
    exp_avg_sq[i] = is_taken ? avg_sq : exp_avg_sq[i];
    weights.write(i, is_taken ? new_weight : old_weight);
  }
}

}  // namespace

void adamw_range(const AdamWStep& s, int64_t begin, int64_t end) {
  if (s.low_bits == nullptr) {
    step(Fp32Weights{(float*)s.param}, s, begin, end);
  } else {
    step(SplitWeights{(uint16_t*)s.param, s.low_bits}, s, begin, end);
  }
}

}  // namespace socpo::SOCPO_ISA
