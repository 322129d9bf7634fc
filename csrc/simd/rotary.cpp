// Rotary embedding of one head, and the rounding of values that are written to bf16 pages.
//
// The tail of a row is a whole vector padded with zeros and takes the same arithmetic.

#include <string.h>

#include "kernels.h"
#include "lanes.h"

namespace socpo::SOCPO_ISA {
namespace {

// Rounds to bf16, to nearest even; NaN stays NaN.
inline uint16_t narrow(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  if (x != x) return 0x7fc0;
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace

void rotary_head(const float* x, const float* cos, const float* sin, int64_t half, float* out) {
  for_vectors(
      half, SOCPO_BODY {
        const Vec low = load_first(x + i, left);
        const Vec high = load_first(x + half + i, left);
        const Vec cos_low = load_first(cos + i, left);
        const Vec sin_low = load_first(sin + i, left);
        const Vec cos_high = load_first(cos + half + i, left);
        const Vec sin_high = load_first(sin + half + i, left);
        const Vec new_low = low * cos_low - high * sin_low;
        const Vec new_high = high * cos_high + low * sin_high;
        store_first(out + i, new_low, left);
        store_first(out + half + i, new_high, left);
      });
}

void narrow_row(const float* x, int64_t width, uint16_t* out) {
  for (int64_t i = 0; i < width; ++i) out[i] = narrow(x[i]);
}

}  // namespace socpo::SOCPO_ISA
