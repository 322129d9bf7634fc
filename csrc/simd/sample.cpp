// One draw from a row of logits: argmax over tokens of logit + Gumbel noise, with the row's softmax sum in the same pass.
//
// score_i = z_i - log(E_i) with E_i = -log1p(-v_i) exponential, so the winner has the largest w_i / E_i, w_i = exp(z_i - max).
// As E_i >= v_i, a token whose w_i / v_i is below the best w / E so far cannot win: only the few others need logarithms.

#include <math.h>

#include "kernels.h"
#include "simd.h"

namespace socpo::SOCPO_ISA {
namespace {

constexpr int CHUNK = 512;         // tokens summed in fp32 before going to fp64
constexpr int GROUP = 4 * LANES;   // tokens tested for a possible winner at once
constexpr float SLACK = 0.999f;    // far above the rounding of w, v and the logarithms

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

// The largest logit, before temperature: (logit - max) / T is then exactly 0 there and positive nowhere, at any T > 0.
inline float row_max(const SampleRow& row) {
  float lane[LANES], result = -INFINITY;
  Vec lanes = broadcast(-INFINITY);
  int64_t i = 0;
  for (; i + LANES <= row.vocab; i += LANES) lanes = max(load<Vec>(row.logits + i), lanes);
  store(lane, lanes);
  for (int l = 0; l < LANES; ++l) result = lane[l] > result ? lane[l] : result;
  for (; i < row.vocab; ++i) result = row.logits[i] > result ? row.logits[i] : result;
  return result;
}

// weights[i] of `count` <= CHUNK tokens from `start`, filled up to a whole vector with 0; returns their sum.
inline float chunk_weights(const SampleRow& row, float max_logit, int64_t start, int count, float* weights) {
  Vec sum = {};
  for (int i = 0; i < count; i += LANES) {
    Vec logits;
    if (i + LANES <= count) {
      logits = load<Vec>(row.logits + start + i);
    } else {
      logits = broadcast(-INFINITY);
      for (int l = 0; i + l < count; ++l) logits[l] = row.logits[start + i + l];
    }
    const Vec w = exp_nonpositive((logits - max_logit) * row.inverse_temperature);
    store(weights + i, w);
    sum += w;
  }
  return sum_lanes(sum);
}

struct Best {
  int64_t token_id = 0;
  float score = -INFINITY;
  float ratio = 0;  // w / E of token_id
};

// Whether a token of the group from `start` may beat `ratio`.
inline bool may_win(const float* weights, int64_t start, uint64_t row_key, float ratio) {
  VecInt hits = {};
  for (int i = 0; i < GROUP; i += LANES) {
    const VecUint ids = lane_index() + (uint32_t)(start + i);
    const Vec v = (__builtin_convertvector(noise_bits(ids, row_key), Vec) + 0.5f) * 0x1p-32f;
    hits |= load<Vec>(weights + i) > v * (ratio * SLACK);
  }
  int64_t words[LANES / 2], any = 0;
  memcpy(words, &hits, sizeof(hits));
  for (int i = 0; i < LANES / 2; ++i) any |= words[i];
  return any != 0;
}

// The group's tokens one by one, with logarithms where the bound leaves a chance.
inline void update_best(const SampleRow& row, float max_logit, const float* weights, int64_t start, Best& best) {
  for (int i = 0; i < GROUP; ++i) {
    const int64_t id = start + i;
    const float v = ((float)noise_bits<uint32_t>((uint32_t)id, row.row_key) + 0.5f) * 0x1p-32f;
    if (!(weights[i] > v * (best.ratio * SLACK))) continue;
    const float exponential = -log1pf(-(v < 0x1.fffffep-1f ? v : 0x1.fffffep-1f));  // rounding may give v = 1
    const float score = (row.logits[id] - max_logit) * row.inverse_temperature - logf(exponential);
    if (score > best.score) best = {id, score, weights[i] / exponential};
  }
}

}  // namespace

Draw sample_row(const SampleRow& row, const float* given_weights) {
  const float max_logit = row_max(row);
  double sum = 0;
  Best best;
  for (int64_t start = 0; start < row.vocab; start += CHUNK) {
    const int count = (int)(row.vocab - start < CHUNK ? row.vocab - start : CHUNK);
    float weights[CHUNK] = {};
    if (given_weights == nullptr) {
      sum += chunk_weights(row, max_logit, start, count, weights);
    } else {
      for (int i = 0; i < count; ++i) weights[i] = given_weights[start + i];
      for (int i = 0; i < count; ++i) sum += weights[i];
    }
    if (row.is_greedy) continue;
    for (int i = 0; i < count; i += GROUP)
      if (may_win(weights + i, start + i, row.row_key, best.ratio)) update_best(row, max_logit, weights + i, start + i, best);
  }
  if (row.is_greedy)
    while (best.token_id < row.vocab - 1 && !(row.logits[best.token_id] == max_logit)) ++best.token_id;
  return {best.token_id, (row.logits[best.token_id] - max_logit) * row.inverse_temperature, sum};
}

double softmax_weights(const SampleRow& row, float* weights) {
  const float max_logit = row_max(row);
  double sum = 0;
  for (int64_t start = 0; start < row.vocab; start += CHUNK) {
    const int count = (int)(row.vocab - start < CHUNK ? row.vocab - start : CHUNK);
    float chunk[CHUNK];
    sum += chunk_weights(row, max_logit, start, count, chunk);
    memcpy(weights + start, chunk, count * sizeof(float));
  }
  return sum;
}

}  // namespace socpo::SOCPO_ISA
