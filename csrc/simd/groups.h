// Vectors as groups of four floats: shuffles of whole groups and of lanes within groups.

#pragma once

#include "lanes.h"

namespace {  // internal linkage, as in simd.h

constexpr int GROUPS = LANES / 4;

// Repeats a pattern of four in each 128-bit group, for shuffles of two vectors; the lanes of the
// second vector count from LANES.
#if SOCPO_LANES == 16
#define IN_GROUPS(a, b, c, d) \
  a, b, c, d, a + 4, b + 4, c + 4, d + 4, a + 8, b + 8, c + 8, d + 8, a + 12, b + 12, c + 12, d + 12
#elif SOCPO_LANES == 8
#define IN_GROUPS(a, b, c, d) a, b, c, d, a + 4, b + 4, c + 4, d + 4
#else
#define IN_GROUPS(a, b, c, d) a, b, c, d
#endif
#ifdef __clang__
#define SHUFFLE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define SHUFFLE(x, y, ...) __builtin_shuffle(x, y, VecInt{__VA_ARGS__})
#endif

// Returns a vector whose lane 4 m + j is the sum of group m of x[j].
inline Vec sum_groups(const Vec* x) {
  constexpr int L = LANES;
  const Vec a = SHUFFLE(x[0], x[1], IN_GROUPS(0, L, 1, L + 1)) +
                SHUFFLE(x[0], x[1], IN_GROUPS(2, L + 2, 3, L + 3));
  const Vec b = SHUFFLE(x[2], x[3], IN_GROUPS(0, L, 1, L + 1)) +
                SHUFFLE(x[2], x[3], IN_GROUPS(2, L + 2, 3, L + 3));
  return SHUFFLE(a, b, IN_GROUPS(0, 1, L, L + 1)) + SHUFFLE(a, b, IN_GROUPS(2, 3, L + 2, L + 3));
}

// Transposes within groups: lane i of each group of x[j] becomes lane j of that group of x[i].
inline void transpose_in_groups(Vec* x) {
  constexpr int L = LANES;
  const Vec a = SHUFFLE(x[0], x[1], IN_GROUPS(0, L, 1, L + 1));
  const Vec b = SHUFFLE(x[0], x[1], IN_GROUPS(2, L + 2, 3, L + 3));
  const Vec c = SHUFFLE(x[2], x[3], IN_GROUPS(0, L, 1, L + 1));
  const Vec d = SHUFFLE(x[2], x[3], IN_GROUPS(2, L + 2, 3, L + 3));
  x[0] = SHUFFLE(a, c, IN_GROUPS(0, 1, L, L + 1));
  x[1] = SHUFFLE(a, c, IN_GROUPS(2, 3, L + 2, L + 3));
  x[2] = SHUFFLE(b, d, IN_GROUPS(0, 1, L, L + 1));
  x[3] = SHUFFLE(b, d, IN_GROUPS(2, 3, L + 2, L + 3));
}

// Transposes whole groups: group i of x[m] becomes group m of x[i].
inline void transpose_groups(Vec* x) {
#if SOCPO_LANES == 16
#define TWO_GROUPS(a, b) a, a + 1, a + 2, a + 3, b, b + 1, b + 2, b + 3
  const Vec a = SHUFFLE(x[0], x[1], TWO_GROUPS(0, 4), TWO_GROUPS(16, 20));
  const Vec b = SHUFFLE(x[2], x[3], TWO_GROUPS(0, 4), TWO_GROUPS(16, 20));
  const Vec c = SHUFFLE(x[0], x[1], TWO_GROUPS(8, 12), TWO_GROUPS(24, 28));
  const Vec d = SHUFFLE(x[2], x[3], TWO_GROUPS(8, 12), TWO_GROUPS(24, 28));
  x[0] = SHUFFLE(a, b, TWO_GROUPS(0, 8), TWO_GROUPS(16, 24));
  x[1] = SHUFFLE(a, b, TWO_GROUPS(4, 12), TWO_GROUPS(20, 28));
  x[2] = SHUFFLE(c, d, TWO_GROUPS(0, 8), TWO_GROUPS(16, 24));
  x[3] = SHUFFLE(c, d, TWO_GROUPS(4, 12), TWO_GROUPS(20, 28));
#elif SOCPO_LANES == 8
  const Vec a = x[0], b = x[1];
  x[0] = SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11);
  x[1] = SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
#endif
}

// Transposes LANES vectors: lane i of x[j] becomes lane j of x[i].
inline void transpose(Vec* x) {
  for (int row = 0; row < LANES; row += 4) transpose_in_groups(x + row);
  for (int i = 0; i < 4; ++i) {
    Vec y[GROUPS];
    for (int m = 0; m < GROUPS; ++m) y[m] = x[4 * m + i];
    transpose_groups(y);
    for (int m = 0; m < GROUPS; ++m) x[4 * m + i] = y[m];
  }
}

}  // namespace
