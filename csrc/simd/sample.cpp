// A tile of one row's logits: its softmax sums, and its best token by logit + Gumbel noise.
//
// The score is x_i - log(E_i) with x_i = (logit_i - max) / temperature and E_i = -log1p(-v_i),
// which is exponentially distributed. The winner has the largest w_i / E_i with w_i = exp(x_i).
// Since E_i >= v_i, a token whose w_i / v_i is below the w / E of some other token cannot win. So
// one logarithm, of a token that is nearly best by w / v, rules out almost all others.
//
// The maximum is subtracted before the division by the temperature, so that a small temperature
// does not overflow; csrc/sample.cpp brings the tiles of a row to a common maximum.

#include <math.h>

#include "kernels.h"
#include "lanes.h"

namespace socpo::SOCPO_ISA {
namespace {

constexpr float SLACK = 0.999f;  // far above the rounding of w, v and the logarithms
constexpr int MAX_VECTORS =
    256;  // of a tile: a power of two, since a vector's index is kept in low bits
static_assert(SAMPLE_TILE % (4 * LANES) == 0 && SAMPLE_TILE / LANES <= MAX_VECTORS,
              "a tile is whole vectors");

// Mixes 32 bits bijectively ("lowbias32" of Chris Wellons' hash-prospector).
inline VecUint mix(VecUint x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// Returns v = (32 hashed bits + 0.5) / 2^32 for tokens; `products` are their ids times ID_FACTOR.
constexpr uint32_t ID_FACTOR = 0x9e3779b1u;
inline Vec uniform(VecUint products, uint64_t row_key) {
  const VecUint low = mix(products ^ (uint32_t)row_key);
  return __builtin_convertvector(mix(low ^ (uint32_t)(row_key >> 32)), Vec) * 0x1p-32f + 0x1p-33f;
}

// Returns E = -log1p(-v); rounding may have made v = 1, which is clamped below it.
inline float exponential(float v) { return -log1pf(-(v < 0x1.fffffep-1f ? v : 0x1.fffffep-1f)); }

struct Token {
  int idx;  // in the tile
  float exponential;
};

// Finds a token whose w / v is about the largest, by the difference of their bits, which is nearly
// the difference of their logarithms. Writes the v of all tokens to `noise`.
inline Token nearly_best(const float* weights, int count, int64_t first_id, uint64_t row_key,
                         float* noise) {
  VecInt best = VecInt{} + INT32_MIN;
  VecUint products = (lane_index() + (uint32_t)first_id) * ID_FACTOR;
  for (int i = 0; i < count; i += LANES) {
    const Vec v = uniform(products, row_key);
    products += LANES * ID_FACTOR;
    store(noise + i, v);
    const VecInt ratio =
        (((VecInt)load<Vec>(weights + i) - (VecInt)v) & -MAX_VECTORS) | (i / LANES);
    best = ratio > best ? ratio : best;
  }
  int32_t lanes[LANES], lane = 0;
  memcpy(lanes, &best, sizeof(best));
  for (int l = 1; l < LANES; ++l) lane = lanes[l] > lanes[lane] ? l : lane;
  const int idx = (lanes[lane] & (MAX_VECTORS - 1)) * LANES + lane;
  return {idx, exponential(noise[idx])};
}

inline int count_above(const float* weights, const float* noise, int count, float bound) {
  VecInt hits = {};
  for (int i = 0; i < count; i += LANES)
    hits -= load<Vec>(weights + i) > load<Vec>(noise + i) * bound;
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
  for (; i < count; i += LANES)
    lanes[0] = max(load_first(logits + i, count - i, -INFINITY), lanes[0]);
  return max_lane(max(max(lanes[0], lanes[1]), max(lanes[2], lanes[3])));
}

TileSums tile_weights(const float* logits, int count, float max, float inverse_temperature,
                      float* weights) {
  // A tile of nothing but -inf has no weight; NaN still shows.
  const float base = max == -INFINITY ? 0 : max;
  Vec sum = {}, weighted = {};
  for (int i = 0; i < count; i += LANES) {
    const Vec far = broadcast(-88.0f);
    const Vec exact = (load_first(logits + i, count - i, -INFINITY) - base) * inverse_temperature;
    const Vec x = exact < far ? far : exact;  // finite, so that a weight of 0 gives x * 0 = 0
    const Vec w = exp_nonpositive(x);
    store(weights + i, w);
    sum += w;
    weighted += w * x;
  }
  return {sum_lanes(sum), sum_lanes(weighted)};
}

void tile_draw(const float* logits, const float* weights, int count, int64_t first_id,
               float inverse_temperature, uint64_t row_key, TileDraw& draw) {
  float noise[SAMPLE_TILE];
  const Token likely = nearly_best(weights, count, first_id, row_key, noise);
  const float bound = weights[likely.idx] / likely.exponential * SLACK;
  const auto consider = [&](int idx, float exponential) {
    const float score = (logits[idx] - draw.max) * inverse_temperature - logf(exponential);
    if (score > draw.score) {
      draw.token_id = (int32_t)(first_id + idx);
      draw.logit = logits[idx];
      draw.score = score;
    }
  };
  if (count_above(weights, noise, count, bound) == 1)
    return consider(likely.idx, likely.exponential);
  for (int i = 0; i < count; ++i)
    if (weights[i] > noise[i] * bound) consider(i, exponential(noise[i]));
}

}  // namespace socpo::SOCPO_ISA
