// torch.ops.socpo.sample: a thread a row; see csrc/simd/sample.cpp for the draw and here for top-k, top-p and min-p.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <tuple>
#include <vector>

#include "sample.h"

namespace socpo {
namespace {

// Tokens of about equal weight: those that share the exponent and the first four bits behind it. Weights are <= 1.
constexpr int NUM_BUCKETS = 2048;

int bucket_of(float weight) {
  uint32_t bits;
  std::memcpy(&bits, &weight, sizeof(bits));
  return std::min(static_cast<int>(bits >> 19), NUM_BUCKETS - 1);
}

// Zeroes all but the first tokens by (weight descending, id ascending): a token stays while fewer than max_count
// stand before it and they weigh less than max_mass. Sorts only the bucket in which the limit falls.
void keep_first(std::vector<float>& weights, int64_t max_count, double max_mass) {
  std::array<int64_t, NUM_BUCKETS> count{};
  std::array<double, NUM_BUCKETS> mass{};
  for (const float weight : weights) {
    ++count[bucket_of(weight)];
    mass[bucket_of(weight)] += weight;
  }
  int64_t count_before = 0;
  double mass_before = 0;
  int limit = NUM_BUCKETS - 1;
  while (limit > 0 && count_before + count[limit] <= max_count && mass_before + mass[limit] < max_mass) {
    count_before += count[limit];
    mass_before += mass[limit--];
  }
  std::vector<size_t> at_limit;
  for (size_t id = 0; id < weights.size(); ++id) {
    if (bucket_of(weights[id]) == limit) at_limit.push_back(id);
    if (bucket_of(weights[id]) < limit) weights[id] = 0;
  }
  std::stable_sort(at_limit.begin(), at_limit.end(), [&](size_t a, size_t b) { return weights[a] > weights[b]; });
  for (const size_t id : at_limit) {
    const float weight = weights[id];
    if (count_before >= max_count || mass_before >= max_mass) weights[id] = 0;
    ++count_before;
    mass_before += weight;
  }
}

void filter(std::vector<float>& weights, int64_t top_k, double top_p, float min_p) {
  constexpr double all = std::numeric_limits<double>::infinity();
  if (top_k > 0) keep_first(weights, top_k, all);
  if (top_p < 1) keep_first(weights, weights.size(), top_p * std::accumulate(weights.begin(), weights.end(), 0.0));
  const float max_weight = *std::max_element(weights.begin(), weights.end());
  for (float& weight : weights)
    if (weight < min_p * max_weight) weight = 0;
}

}  // namespace

DrawSettings::DrawSettings(const at::Tensor& row_keys, const at::Tensor& temperature, const at::Tensor& top_k,
                           const at::Tensor& top_p, const at::Tensor& min_p)
    : row_keys(row_keys.const_data_ptr<int64_t>()),
      top_k(top_k.const_data_ptr<int64_t>()),
      temperature(temperature.const_data_ptr<float>()),
      top_p(top_p.const_data_ptr<float>()),
      min_p(min_p.const_data_ptr<float>()) {}

SampleRow DrawSettings::row(int64_t draw) const {
  const bool is_greedy = temperature[draw] == 0;
  return {is_greedy ? 1.0f : 1.0f / temperature[draw], static_cast<uint64_t>(row_keys[draw]), is_greedy};
}

Drawn merge_tiles(const SampleRow& row, const TileDraw* tiles, int64_t num_tiles) {
  float max = -INFINITY;
  for (int64_t i = 0; i < num_tiles; ++i) max = tiles[i].max > max ? tiles[i].max : max;
  double sum = 0, weighted = 0, best_score = -INFINITY;
  Drawn drawn{0, 0, 0, 1};
  float logit = max;
  for (int64_t i = 0; i < num_tiles; ++i) {
    const TileDraw& tile = tiles[i];
    if (tile.max == -INFINITY) {  // sums of 0, or NaN
      sum += tile.sum;
      continue;
    }
    const double shift = (tile.max - max) * row.inverse_temperature, scale = std::exp(shift);
    sum += scale * tile.sum;
    weighted += scale == 0 ? 0 : scale * (tile.weighted + shift * tile.sum);
    if (tile.token_id >= 0 && tile.score + shift > best_score) {
      best_score = tile.score + shift;
      drawn.token_id = tile.token_id;
      logit = tile.logit;
    }
  }
  const double log_sum = max == -INFINITY ? NAN : std::log(sum);  // no finite logit: NaN
  drawn.logprob = static_cast<float>((logit - max) * row.inverse_temperature - static_cast<float>(log_sum));
  drawn.entropy = static_cast<float>(log_sum - weighted / sum);
  return drawn;
}

Drawn draw_filtered(const DrawSettings& settings, int64_t draw, const float* logits, int64_t vocab, Drawn drawn) {
  std::vector<float> weights(vocab);
  const SampleRow row = settings.row(draw);
  const double sum_all = kernels().softmax_weights(row, logits, vocab, weights.data());
  if (!std::isfinite(sum_all)) return drawn;  // its log-prob is NaN
  filter(weights, settings.top_k[draw], settings.top_p[draw], settings.min_p[draw]);
  drawn.kept_mass = static_cast<float>(std::accumulate(weights.begin(), weights.end(), 0.0) / sum_all);
  if (row.is_greedy) return drawn;  // the filters keep the most likely token
  TileDraw kept{};
  kernels().sample_kept(row, logits, vocab, weights.data(), kept);
  drawn.token_id = kept.token_id;
  drawn.logprob = (kept.logit - kept.max) * row.inverse_temperature - static_cast<float>(std::log(sum_all));
  return drawn;
}

namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> sample(const at::Tensor& logits, const at::Tensor& row_keys,
                                                      const at::Tensor& temperature, const at::Tensor& top_k,
                                                      const at::Tensor& top_p, const at::Tensor& min_p) {
  const int64_t num_rows = logits.size(0), vocab = logits.size(1), num_tiles = (vocab + SAMPLE_TILE - 1) / SAMPLE_TILE;
  at::Tensor token_ids = at::empty({num_rows}, row_keys.options());
  at::Tensor logprobs = at::empty({num_rows}, logits.options());
  at::Tensor kept_mass = at::empty({num_rows}, logits.options());
  const float* logits_p = logits.const_data_ptr<float>();
  const DrawSettings settings(row_keys, temperature, top_k, top_p, min_p);
  int64_t* token_ids_p = token_ids.mutable_data_ptr<int64_t>();
  float *logprobs_p = logprobs.mutable_data_ptr<float>(), *kept_mass_p = kept_mass.mutable_data_ptr<float>();
  for_each_item(num_rows, [&](int64_t b) {
    const float* row_logits = logits_p + b * vocab;
    const SampleRow row = settings.row(b);
    std::vector<TileDraw> tiles(num_tiles);
    BestSoFar best{};
    for (int64_t i = 0; i < num_tiles; ++i) {
      const int64_t first = i * SAMPLE_TILE, count = std::min<int64_t>(SAMPLE_TILE, vocab - first);
      tiles[i] = kernels().sample_tile(row, row_logits + first, first, count, best);
    }
    Drawn drawn = merge_tiles(row, tiles.data(), num_tiles);
    if (settings.is_filtered(b)) drawn = draw_filtered(settings, b, row_logits, vocab, drawn);
    token_ids_p[b] = drawn.token_id;
    logprobs_p[b] = drawn.logprob;
    kept_mass_p[b] = drawn.kept_mass;
  });
  return {token_ids, logprobs, kept_mass};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> sample_meta(const at::Tensor& logits, const at::Tensor& row_keys,
                                                           const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                                           const at::Tensor&) {
  const auto logprobs = [&] { return at::empty_symint({logits.sym_size(0)}, logits.options()); };
  return {at::empty_symint({logits.sym_size(0)}, row_keys.options()), logprobs(), logprobs()};
}

}  // namespace

TORCH_LIBRARY_IMPL(socpo, CPU, m) { m.impl("sample", sample); }
TORCH_LIBRARY_IMPL(socpo, Meta, m) { m.impl("sample", sample_meta); }

}  // namespace socpo
