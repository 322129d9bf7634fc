// A tile of one row's logits: its softmax sums, and its best token by logit + Gumbel noise.
//
// score_i = x_i - log(E_i) with x_i = (logit_i - max) / temperature and E_i = -log1p(-v_i) exponential, so the winner has
// the largest w_i / E_i, w_i = exp(x_i). As E_i >= v_i, a token whose w_i / v_i is below some token's w / E cannot win:
// after the logarithm of one that is nearly best by w / v, few others are left. The maximum is taken off before the
// division by the temperature, however small; csrc/sample.cpp brings tiles to a common one.

#include <math.h>

#include "kernels.h"
#include "simd.h"

namespace socpo::SOCPO_ISA {
namespace {

constexpr float SLACK = 0.999f;  // far above the rounding of w, v and the logarithms
constexpr int PLACES = 256;      // at least the vectors of a tile
static_assert(SAMPLE_TILE % (4 * LANES) == 0 && SAMPLE_TILE / LANES <= PLACES, "a tile is whole vectors");

// Bijective mixing of 32 bits ("lowbias32" of Chris Wellons' hash-prospector).
inline VecUint mix(VecUint x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// v of the tokens whose ids times ID_FACTOR are given: 32 bits, + 0.5, / 2^32.
constexpr uint32_t ID_FACTOR = 0x9e3779b1u;
inline Vec uniform(VecUint products, uint64_t row_key) {
  const VecUint low = mix(products ^ (uint32_t)row_key);
  return __builtin_convertvector(mix(low ^ (uint32_t)(row_key >> 32)), Vec) * 0x1p-32f + 0x1p-33f;
}

// The next `left` logits; lanes behind them hold -inf.
inline Vec load_logits(const float* logits, int left) {
  if (left >= LANES) return load<Vec>(logits);
  Vec x = broadcast(-INFINITY);
  for (int l = 0; l < left; ++l) x[l] = logits[l];
  return x;
}

inline float exponential(float v) { return -log1pf(-(v < 0x1.fffffep-1f ? v : 0x1.fffffep-1f)); }  // rounding may give v = 1

struct Token {
  int place;  // in the tile
  float exponential;
};

// A token whose w / v is about the largest, by the difference of the bits, which is nearly that of the logarithms.
// Writes the v of all tokens.
inline Token nearly_best(const float* weights, int count, int64_t first_id, uint64_t row_key, float* noise) {
  VecInt best = VecInt{} + INT32_MIN;
  VecUint products = (lane_index() + (uint32_t)first_id) * ID_FACTOR;
  for (int i = 0; i < count; i += LANES) {
    const Vec v = uniform(products, row_key);
    products += LANES * ID_FACTOR;
    store(noise + i, v);
    const VecInt ratio = (((VecInt)load<Vec>(weights + i) - (VecInt)v) & -PLACES) | (i / LANES);
    best = ratio > best ? ratio : best;
  }
  int32_t lanes[LANES], lane = 0;
  memcpy(lanes, &best, sizeof(best));
  for (int l = 1; l < LANES; ++l) lane = lanes[l] > lanes[lane] ? l : lane;
  const int place = (lanes[lane] & (PLACES - 1)) * LANES + lane;
  return {place, exponential(noise[place])};
}

inline int count_above(const float* weights, const float* noise, int count, float bound) {
  VecInt hits = {};
  for (int i = 0; i < count; i += LANES) hits -= load<Vec>(weights + i) > load<Vec>(noise + i) * bound;
  int32_t lanes[LANES], sum = 0;
  memcpy(lanes, &hits, sizeof(hits));
  for (int l = 0; l < LANES; ++l) sum += lanes[l];
  return sum;
}

}  // namespace

float tile_max(const float* logits, int count) {
  Vec lanes[4];
  for (int k = 0; k < 4; ++k) lanes[k] = broadcast(-INFINITY);
  int i = 0;
  for (; i + 4 * LANES <= count; i += 4 * LANES)
    for (int k = 0; k < 4; ++k) lanes[k] = max(load<Vec>(logits + i + k * LANES), lanes[k]);
  for (; i < count; i += LANES) lanes[0] = max(load_logits(logits + i, count - i), lanes[0]);
  float lane[LANES], result = -INFINITY;
  store(lane, max(max(lanes[0], lanes[1]), max(lanes[2], lanes[3])));
  for (int l = 0; l < LANES; ++l) result = lane[l] > result ? lane[l] : result;
  return result;
}

TileSums tile_weights(const float* logits, int count, float max, float inverse_temperature, float* weights) {
  const float base = max == -INFINITY ? 0 : max;  // no weight then, and NaN still shows
  Vec sum = {}, weighted = {};
  for (int i = 0; i < count; i += LANES) {
    const Vec far = broadcast(-88.0f), exact = (load_logits(logits + i, count - i) - base) * inverse_temperature;
    const Vec x = exact < far ? far : exact;  // of weight 0, where x * 0 must be 0
    const Vec w = exp_nonpositive(x);
    store(weights + i, w);
    sum += w;
    weighted += w * x;
  }
  return {sum_lanes(sum), sum_lanes(weighted)};
}

void tile_draw(const float* logits, const float* weights, int count, int64_t first_id, float inverse_temperature,
               uint64_t row_key, TileDraw& draw) {
  float noise[SAMPLE_TILE];
  const Token likely = nearly_best(weights, count, first_id, row_key, noise);
  const float bound = weights[likely.place] / likely.exponential * SLACK;
  const auto consider = [&](int place, float exponential) {
    const float score = (logits[place] - draw.max) * inverse_temperature - logf(exponential);
    if (score > draw.score) {
      draw.token_id = (int32_t)(first_id + place);
      draw.logit = logits[place];
      draw.score = score;
    }
  };
  if (count_above(weights, noise, count, bound) == 1) return consider(likely.place, likely.exponential);
  for (int i = 0; i < count; ++i)
    if (weights[i] > noise[i] * bound) consider(i, exponential(noise[i]));
}

}  // namespace socpo::SOCPO_ISA
