// Vectors as wide as the instruction set of the translation unit, in the notation gcc and clang
// share.

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
typedef uint16_t VecHalf __attribute__((vector_size(SOCPO_LANES * 2)));
typedef uint16_t VecHalf4 __attribute__((vector_size(8)));
typedef uint32_t VecUint4 __attribute__((vector_size(16)));
typedef float Vec4 __attribute__((vector_size(16)));

template <typename V, typename T>
inline V load(const T* from) {
  V x;
  memcpy(&x, from, sizeof(V));
  return x;
}

template <typename V>
inline void store(float* to, V x) {
  memcpy(to, &x, sizeof(V));
}

inline Vec broadcast(float x) { return Vec{} + x; }

// Optimisation barrier: the compiler must treat x like any other vector, so that a * b + c is
// contracted to an FMA exactly as in the main loop.
inline Vec opaque(Vec x) {
  asm("" : "+m"(x));
  return x;
}

inline int smaller(int64_t a, int64_t b) { return (int)(a < b ? a : b); }

inline Vec max(Vec a, Vec b) { return a > b ? a : b; }

// Widens to fp32: a bf16 number is the upper half of an fp32 number.
inline float widen(float x) { return x; }
inline float widen(uint16_t x) {
  const uint32_t bits = (uint32_t)x << 16;
  float wide;
  memcpy(&wide, &bits, sizeof(wide));
  return wide;
}

// Loads a Vec or Vec4 of fp32 or bf16 numbers as fp32.
template <typename V = Vec>
inline V load_wide(const float* from) {
  return load<V>(from);
}

template <typename V = Vec>
inline V load_wide(const uint16_t* from) {
  if constexpr (sizeof(V) == sizeof(Vec)) {
    return (V)(__builtin_convertvector(load<VecHalf>(from), VecUint) << 16);
  } else {
    return (V)(__builtin_convertvector(load<VecHalf4>(from), VecUint4) << 16);
  }
}

// Computes exp(x) for x <= 0 with a relative error under 2e-7; 0 below -87, where it would be
// nearly denormal. NaN stays NaN.
inline Vec exp_nonpositive(Vec x) {
  const VecInt underflows = x < -87.0f;
  const Vec y = underflows ? broadcast(-87.0f) : x;
  // Adding 1.5 * 2^23 leaves an integer in the low bits.
  const Vec round = broadcast(12582912.0f);
  const Vec shifted = y * 1.44269504f + round;
  const Vec n = shifted - round;
  // log(2) is subtracted in two parts (Cody and Waite).
  const Vec r = (y - n * 0.693359375f) - n * -2.12194440e-4f;
  // The minimax polynomial of Cephes' expf.
  Vec p = broadcast(1.9875691500e-4f);
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
