// Draws from rows of logits, tile by tile: argmax over tokens of logit + Gumbel noise, the softmax sums in the same pass.
//
// score_i = z_i - log(E_i) with E_i = -log1p(-v_i) exponential, so the winner has the largest w_i / E_i, w_i = exp(z_i - max).
// As E_i >= v_i, a token whose w_i / v_i is below the best w / E so far cannot win: only the few others need logarithms.
// `so far` may be any tokens of the row, so which tiles a thread has seen before changes its work and not the winner.

#include <math.h>

#include "kernels.h"
#include "simd.h"

namespace socpo::SOCPO_ISA {
namespace {

constexpr float FLOOR = -88.0f;   // exp_nonpositive is 0 there; keeps 0 * x from being NaN where x is -inf
constexpr int GROUP = 4 * LANES;  // tokens tested for a possible winner at once
constexpr float SLACK = 0.999f;   // far above the rounding of w, v and the logarithms

// Bijective mixing of 32 bits ("lowbias32" of Chris Wellons' hash-prospector); U is uint32_t or VecUint.
template <typename U>
inline U mix(U x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

template <typename U>
inline U noise_bits(U token_ids, uint64_t row_key) {
  const U low = mix<U>((token_ids * 0x9e3779b1u) ^ (uint32_t)row_key);
  return mix<U>(low ^ (uint32_t)(row_key >> 32));
}

// The largest of `count` logits, NaN passed over. (logit - max) / T is then exactly 0 there and positive nowhere.
inline float max_of(const float* logits, int64_t count) {
  float lane[LANES], result = -INFINITY;
  Vec lanes = broadcast(-INFINITY);
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) lanes = max(load<Vec>(logits + i), lanes);
  store(lane, lanes);
  for (int l = 0; l < LANES; ++l) result = lane[l] > result ? lane[l] : result;
  for (; i < count; ++i) result = logits[i] > result ? logits[i] : result;
  return result;
}

// weights[i] = exp(x_i), x_i = (logits[i] - max) * inverse_temperature, filled up to a whole vector with 0. Adds up the
// weights and weight times x.
inline void softmax_sums(const float* logits, int64_t count, float max, float inverse_temperature, float* weights, float& sum,
                         float& weighted) {
  Vec sums = {}, products = {};
  for (int64_t i = 0; i < count; i += LANES) {
    Vec some;
    if (i + LANES <= count) {
      some = load<Vec>(logits + i);
    } else {
      some = broadcast(-INFINITY);
      for (int l = 0; i + l < count; ++l) some[l] = logits[i + l];
    }
    const Vec x = (some - max) * inverse_temperature, w = exp_nonpositive(x);
    store(weights + i, w);
    sums += w;
    products += w * (x < FLOOR ? broadcast(FLOOR) : x);
  }
  sum = sum_lanes(sums);
  weighted = sum_lanes(products);
}

// Whether a token of the group from `id` may beat `ratio`.
inline bool may_win(const float* weights, int64_t id, uint64_t row_key, float ratio) {
  VecInt hits = {};
  for (int i = 0; i < GROUP; i += LANES) {
    const VecUint ids = lane_index() + (uint32_t)(id + i);
    const Vec v = (__builtin_convertvector(noise_bits(ids, row_key), Vec) + 0.5f) * 0x1p-32f;
    hits |= load<Vec>(weights + i) > v * (ratio * SLACK);
  }
  int64_t words[LANES / 2], any = 0;
  memcpy(words, &hits, sizeof(hits));
  for (int i = 0; i < LANES / 2; ++i) any |= words[i];
  return any != 0;
}

// The best of `count` tokens from id `first` on, whose weights are relative to `max`, padded with 0 to whole groups.
// `ratio` is w / E of the best token known, in the same measure; tokens of a tile that cannot beat it are not looked at.
inline void search(const SampleRow& row, const float* logits, const float* weights, int64_t first, int64_t count, float max,
                   float& ratio, TileDraw& draw) {
  for (int64_t start = 0; start < count; start += GROUP) {
    if (!may_win(weights + start, first + start, row.row_key, ratio)) continue;
    for (int64_t i = start; i < start + GROUP; ++i) {
      const float v = ((float)noise_bits<uint32_t>((uint32_t)(first + i), row.row_key) + 0.5f) * 0x1p-32f;
      if (!(weights[i] > v * (ratio * SLACK))) continue;
      const float exponential = -log1pf(-(v < 0x1.fffffep-1f ? v : 0x1.fffffep-1f));  // rounding may give v = 1
      const float score = (logits[i] - max) * row.inverse_temperature - logf(exponential);
      if (score > draw.score) {
        draw.score = score;
        draw.token_id = first + i;
        draw.logit = logits[i];
      }
      ratio = weights[i] / exponential > ratio ? weights[i] / exponential : ratio;
    }
  }
}

}  // namespace

TileDraw sample_tile(const SampleRow& row, const float* logits, int64_t first, int64_t count, BestSoFar& best) {
  float weights[SAMPLE_TILE + GROUP];
  TileDraw draw{max_of(logits, count), 0, 0, -1, 0, -INFINITY};
  const float max = draw.max == -INFINITY ? 0.0f : draw.max;  // a tile of nothing but -inf weighs 0, not NaN
  float sum, weighted;
  softmax_sums(logits, count, max, row.inverse_temperature, weights, sum, weighted);
  draw.sum = sum;
  draw.weighted = weighted;
  if (row.is_greedy) {
    for (int64_t i = 0; i < count && draw.token_id < 0; ++i)
      if (logits[i] == draw.max) draw.token_id = first + i;
    draw.logit = draw.max;
    draw.score = 0;
    return draw;
  }
  for (int64_t i = (count + LANES - 1) / LANES * LANES; i < (count + GROUP - 1) / GROUP * GROUP; ++i) weights[i] = 0;
  // exp here is exp_nonpositive's twin for either sign; infinity is right: nothing of this tile can win then
  float ratio = best.ratio > 0 ? best.ratio * expf((best.max - max) * row.inverse_temperature) : 0.0f;
  search(row, logits, weights, first, count, max, ratio, draw);
  if (draw.token_id >= 0) best = {ratio, max};
  return draw;
}

void sample_kept(const SampleRow& row, const float* logits, int64_t vocab, const float* kept_weights, TileDraw& draw) {
  const float max = draw.max = max_of(logits, vocab);
  float weights[GROUP], ratio = 0;
  draw.token_id = -1;
  draw.score = -INFINITY;
  for (int64_t start = 0; start < vocab; start += GROUP) {
    const int64_t count = vocab - start < GROUP ? vocab - start : GROUP;
    for (int64_t i = 0; i < GROUP; ++i) weights[i] = i < count ? kept_weights[start + i] : 0.0f;
    search(row, logits + start, weights, start, count, max, ratio, draw);
  }
}

double softmax_weights(const SampleRow& row, const float* logits, int64_t vocab, float* weights) {
  const float max = max_of(logits, vocab);
  double sum = 0;
  for (int64_t start = 0; start < vocab; start += SAMPLE_TILE) {
    const int64_t count = vocab - start < SAMPLE_TILE ? vocab - start : SAMPLE_TILE;
    float tile[SAMPLE_TILE + LANES], tile_sum, weighted;
    softmax_sums(logits + start, count, max, row.inverse_temperature, tile, tile_sum, weighted);
    sum += tile_sum;
    memcpy(weights + start, tile, count * sizeof(float));
  }
  return sum;
}

}  // namespace socpo::SOCPO_ISA
