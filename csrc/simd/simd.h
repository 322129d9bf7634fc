// Vectors as wide as the instruction set of the translation unit, in the notation gcc and clang share.

#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define SOCPO_LANES 16
#elif defined(__AVX2__)
#define SOCPO_LANES 8
#else
#define SOCPO_LANES 4
#endif

namespace {  // internal linkage: each instruction set keeps its own copy

constexpr int LANES = SOCPO_LANES;
typedef float Vec __attribute__((vector_size(SOCPO_LANES * 4)));
typedef int32_t VecInt __attribute__((vector_size(SOCPO_LANES * 4)));
typedef uint32_t VecUint __attribute__((vector_size(SOCPO_LANES * 4)));
typedef float Vec4 __attribute__((vector_size(16)));

template <typename V>
inline V load(const float* from) {
  V x;
  memcpy(&x, from, sizeof(V));
  return x;
}

template <typename V>
inline void store(float* to, V x) {
  memcpy(to, &x, sizeof(V));
}

inline Vec broadcast(float x) { return Vec{} + x; }

// Lane l holds l.
inline VecUint lane_index() {
  VecUint x;
  for (int lane = 0; lane < LANES; ++lane) x[lane] = lane;
  return x;
}

inline Vec max(Vec a, Vec b) { return a > b ? a : b; }

// Lanes summed as a balanced tree, so the order is fixed.
inline float sum_lanes(Vec x) {
  float lane[LANES];
  store(lane, x);
  for (int width = LANES / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  return lane[0];
}

// exp(x) for x <= 0, relative error under 2e-7; 0 below -87, where it would be nearly denormal. NaN stays NaN.
inline Vec exp_nonpositive(Vec x) {
  const VecInt underflows = x < -87.0f;
  const Vec y = underflows ? broadcast(-87.0f) : x;
  const Vec round = broadcast(12582912.0f);  // 1.5 * 2^23: adding it leaves an integer in the low bits
  const Vec shifted = y * 1.44269504f + round;
  const Vec n = shifted - round;
  const Vec r = (y - n * 0.693359375f) - n * -2.12194440e-4f;  // log(2) in two parts (Cody and Waite)
  Vec p = broadcast(1.9875691500e-4f);  // minimax polynomial of Cephes' expf
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const VecInt exponent = ((VecInt)shifted - (VecInt)round + 127) << 23;
  const Vec result = p * (Vec)exponent;
  return underflows ? Vec{} : result;
}

}  // namespace
