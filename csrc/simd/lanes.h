// Within one vector: partial loads and stores at the tail of a row, and reductions over lanes.

#pragma once

#include "simd.h"

namespace {  // internal linkage, as in simd.h

// Lane l holds l.
inline VecUint lane_index() {
  VecUint x;
  for (int lane = 0; lane < LANES; ++lane) x[lane] = lane;
  return x;
}

// Loads the first `count` numbers; the lanes behind them hold `fill`.
template <typename T>
inline Vec load_first(const T* from, int64_t count, T fill = T()) {
  if (count >= LANES) return load_wide(from);
  T lane[LANES];
  for (T& number : lane) number = fill;
  for (int l = 0; l < (int)count; ++l) lane[l] = from[l];
  return opaque(load_wide(lane));
}

// Stores the first `count` lanes, all of them when there are fewer than `count`.
inline void store_first(float* to, Vec x, int64_t count) {
  if (count >= LANES) return store(to, x);
  memcpy(to, &x, count * sizeof(float));
}

// Replaces the lanes from `count` on by `fill`.
inline Vec keep_first(Vec x, int64_t count, float fill) {
  const VecInt is_kept = (VecInt)lane_index() < VecInt{} + smaller(count, LANES);
  return is_kept ? x : broadcast(fill);
}

// Sums the lanes as a balanced tree, so that the order is fixed: with four, (0 + 2) + (1 + 3).
inline float sum_lanes(Vec x) {
  float lane[LANES];
  store(lane, x);
  for (int width = LANES / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  return lane[0];
}

// Returns the largest lane; NaN is skipped unless it is in lane 0.
inline float max_lane(Vec x) {
  float result = x[0];
  for (int lane = 1; lane < LANES; ++lane) result = x[lane] > result ? x[lane] : result;
  return result;
}

template <int... LANE>
struct Lanes {};
template <int COUNT, int... LANE>
struct FirstLanes : FirstLanes<COUNT - 1, COUNT - 1, LANE...> {};
template <int... LANE>
struct FirstLanes<0, LANE...> {
  typedef Lanes<LANE...> type;
};

// The source of lane `lane` in one half of a step of fold, counted through a and then b. Within
// four lanes, which one instruction shuffles, a step adds lanes (0, 2) and (1, 3), the next one (0,
// 1); further steps add whole groups of four.
constexpr int fold_source(int level, int half, int lane) {
  if (level == 0) return lane % 2 * LANES + lane / 4 * 4 + half * 2 + lane % 4 / 2;
  if (level == 1) return lane % 4 / 2 * LANES + lane / 4 * 4 + half * 2 + lane % 2;
  const int fours = LANES / 4, kept = level == 2 ? fours / 2 : 1, four = lane / 4;
  if (level == 2) return (four / kept * fours + half * kept + four % kept) * 4 + lane % 4;
  return (four * 2 + half) * 4 + lane % 4;
}

template <int LEVEL, int HALF, int... LANE>
inline Vec half_of(Vec a, Vec b, Lanes<LANE...>) {
  return __builtin_shufflevector(a, b, fold_source(LEVEL, HALF, LANE)...);
}

// Writes out[i] = the sum of the lanes of sums[i] for COUNT <= LANES vectors; writes LANES numbers.
// A step adds one half of each vector to its other half and puts two results into one vector:
//
//   a0 a1 a2 a3
//   b0 b1 b2 b3  ->  a0+a2 b0+b2 a1+a3 b1+b3
//   c0 c1 c2 c3      c0+c2 d0+d2 c1+c3 d1+d3  ->  sum(a) sum(b) sum(c) sum(d)
//   d0 d1 d2 d3
//
// The order of the additions is the same for each vector.
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

// Calls body(i, left, j) for numbers i .. i + LANES - 1 of a row, of which `left` exist; j < 4
// names the partial sum that they are added to. The body is inlined for whole vectors so that it
// keeps its sums in registers; the call for the tail would copy them.
//
// A body loads all its vectors before it computes. Its arithmetic is then one basic block, in which
// the compiler contracts the same products and sums to FMAs for a tail as for a whole vector.
#define SOCPO_BODY \
  [&](int64_t i, int64_t left, [[maybe_unused]] int j) __attribute__((always_inline))
template <typename Body>
inline __attribute__((always_inline)) void for_vectors(int64_t width, const Body& body) {
  int64_t i = 0;
  for (; i + 4 * LANES <= width; i += 4 * LANES)
    for (int j = 0; j < 4; ++j) body(i + j * LANES, LANES, j);
  for (; i + LANES <= width; i += LANES) body(i, LANES, 0);
  if (i < width) body(i, width - i, 0);
}

}  // namespace
