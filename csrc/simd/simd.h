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

// Lane l holds l.
inline VecUint lane_index() {
  VecUint x;
  for (int lane = 0; lane < LANES; ++lane) x[lane] = lane;
  return x;
}

// x, of which the compiler knows nothing: what it does with x it does as with any other vector, fusing a multiplication
// with an addition among the rest.
inline Vec opaque(Vec x) {
  asm("" : "+m"(x));
  return x;
}

inline int smaller(int64_t a, int64_t b) { return (int)(a < b ? a : b); }

inline Vec max(Vec a, Vec b) { return a > b ? a : b; }

// Lanes summed as a balanced tree, so the order is fixed.
inline float sum_lanes(Vec x) {
  float lane[LANES];
  store(lane, x);
  for (int width = LANES / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  return lane[0];
}

// In fp32: bf16 is the upper half of an fp32 number.
inline float widen(float x) { return x; }
inline float widen(uint16_t x) {
  const uint32_t bits = (uint32_t)x << 16;
  float wide;
  memcpy(&wide, &bits, sizeof(wide));
  return wide;
}

// A Vec or Vec4 of them.
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

// The first `count` < LANES numbers; the other lanes are 0.
template <typename T>
inline Vec load_first(const T* from, int count) {
  T lane[LANES] = {};
  for (int l = 0; l < count; ++l) lane[l] = from[l];
  return load_wide(lane);
}

template <int... LANE>
struct Lanes {};
template <int COUNT, int... LANE>
struct FirstLanes : FirstLanes<COUNT - 1, COUNT - 1, LANE...> {};
template <int... LANE>
struct FirstLanes<0, LANE...> {
  typedef Lanes<LANE...> type;
};

// Where lane `lane` of one half of fold's step comes from, numbered through a and then b. Within four lanes (what one
// instruction shuffles at once) pairs (0, 2) and then (0, 1) are halved, then the fours among themselves.
constexpr int fold_source(int level, int half, int lane) {
  if (level == 0) return lane % 2 * LANES + lane / 4 * 4 + half * 2 + lane % 4 / 2;
  if (level == 1) return lane % 4 / 2 * LANES + lane / 4 * 4 + half * 2 + lane % 2;
  const int fours = LANES / 4, kept = level == 2 ? fours / 2 : 1, four = lane / 4;  // of a, then as many of b
  if (level == 2) return (four / kept * fours + half * kept + four % kept) * 4 + lane % 4;
  return (four * 2 + half) * 4 + lane % 4;
}

template <int LEVEL, int HALF, int... LANE>
inline Vec half_of(Vec a, Vec b, Lanes<LANE...>) {
  return __builtin_shufflevector(a, b, fold_source(LEVEL, HALF, LANE)...);
}

// out[i] = the sum of the lanes of sums[i], COUNT <= LANES vectors, each in the same fixed order; writes LANES numbers.
template <int COUNT, int LEVEL = 0>
inline void fold(Vec* sums, float* out) {
  typedef typename FirstLanes<LANES>::type All;
  if constexpr (1 << LEVEL == LANES) {
    store(out, sums[0]);
  } else {
    for (int i = 0; i < (COUNT + 1) / 2; ++i) {
      const Vec a = sums[2 * i], b = sums[2 * i + 1 < COUNT ? 2 * i + 1 : 0];
      sums[i] = half_of<LEVEL, 0>(a, b, All()) + half_of<LEVEL, 1>(a, b, All());
    }
    fold<(COUNT + 1) / 2, LEVEL + 1>(sums, out);
  }
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
