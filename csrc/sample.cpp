// torch.ops.socpo.sample: a thread a row. csrc/simd/sample.cpp draws from a tile; here tiles are
// merged into a row, and rows are filtered by top-k, top-p and min-p.

#include "sample.h"

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

namespace socpo {
namespace {

// Buckets of tokens of about equal weight: they share the exponent and the first four bits of the
// mantissa. Weights are <= 1.
constexpr int NUM_BUCKETS = 2048, BUCKET_BITS = 19;

int bucket_of(float weight) {
  uint32_t bits;
  std::memcpy(&bits, &weight, sizeof(bits));
  return bits >> BUCKET_BITS;
}

float smallest_of(uint32_t bucket) {
  const uint32_t bits = bucket << BUCKET_BITS;
  float weight;
  std::memcpy(&weight, &bits, sizeof(weight));
  return weight;
}

// Zeroes all but the first tokens by (weight descending, id ascending): a token stays while fewer
// than max_count stand before it and they weigh less than `share` of all. Sorts only the bucket in
// which the limit falls.
void keep_first(std::vector<float>& weights, int64_t max_count, double share) {
  std::array<int64_t, NUM_BUCKETS> count{};
  std::array<double, NUM_BUCKETS> mass{};
  for (const float weight : weights) {
    if (weight == 0) continue;  // removed by an earlier filter
    const int bucket = bucket_of(weight);
    ++count[bucket];
    mass[bucket] += weight;
  }
  const double max_mass = share * std::accumulate(mass.begin(), mass.end(), 0.0);
  int64_t count_before = 0;
  double mass_before = 0;
  int limit = NUM_BUCKETS - 1;
  while (limit > 0 && count_before + count[limit] <= max_count &&
         mass_before + mass[limit] < max_mass) {
    count_before += count[limit];
    mass_before += mass[limit--];
  }
  std::vector<size_t> at_limit;
  const float floor = smallest_of(limit);
  for (float& weight : weights) weight = weight < floor ? 0 : weight;
  for (size_t id = 0; id < weights.size(); ++id)
    if (weights[id] > 0 && bucket_of(weights[id]) == limit) at_limit.push_back(id);
  std::stable_sort(at_limit.begin(), at_limit.end(),
                   [&](size_t a, size_t b) { return weights[a] > weights[b]; });
  for (const size_t id : at_limit) {
    const float weight = weights[id];
    if (count_before >= max_count || mass_before >= max_mass) weights[id] = 0;
    ++count_before;
    mass_before += weight;
  }
}

// Applies the filters; the largest weight is 1 and stays.
void filter(std::vector<float>& weights, int64_t top_k, double top_p, float min_p) {
  if (top_k > 0) keep_first(weights, top_k, std::numeric_limits<double>::infinity());
  if (top_p < 1) keep_first(weights, weights.size(), top_p);
  for (float& weight : weights) weight = weight < min_p ? 0 : weight;
}

// The tiles of a row on a common scale.
struct MergedRow {
  double max = -std::numeric_limits<double>::infinity();
  double sum = 0, weighted = 0;  // with x against `max`
  int64_t token_id = 0;
  double logit = 0;  // of token_id
};

// Merges tiles in order, in fp64. exp and noise of a tile are relative to its own maximum; `shift`
// brings them to the row's. A shift is at least -1000, where the scale is 0 and scale * shift is
// too. A row without a finite logit has shift NaN, and so have all its results.
MergedRow merge(const TileDraw* tiles, int64_t num_tiles, float inverse_temperature) {
  MergedRow row;
  for (int64_t t = 0; t < num_tiles; ++t) row.max = std::max<double>(row.max, tiles[t].max);
  double best = -std::numeric_limits<double>::infinity();
  for (int64_t t = 0; t < num_tiles; ++t) {
    const double exact = (tiles[t].max - row.max) * inverse_temperature, floor = -1000;
    const double shift = exact < floor ? floor : exact, scale = shift == 0 ? 1 : std::exp(shift);
    row.sum += scale * tiles[t].sums.sum;
    row.weighted += scale * (tiles[t].sums.weighted + shift * tiles[t].sums.sum);
    if (tiles[t].score + shift > best) {
      best = tiles[t].score + shift;
      row.token_id = tiles[t].token_id;
      row.logit = tiles[t].logit;
    }
  }
  return row;
}

// Makes the draw; `all` covers the whole vocabulary, `kept` what the filters leave.
Drawn finish(const MergedRow& all, const MergedRow& kept, float inverse_temperature) {
  const double log_sum = std::log(all.sum);
  const double kept_sum = kept.sum * std::exp((kept.max - all.max) * inverse_temperature);
  return {kept.token_id, static_cast<float>((kept.logit - all.max) * inverse_temperature - log_sum),
          static_cast<float>(log_sum - all.weighted / all.sum),
          static_cast<float>(kept_sum / all.sum)};
}

Drawn draw_filtered(const float* logits, int64_t vocab, const DrawSettings& settings,
                    const MergedRow& all) {
  std::vector<float> weights(num_tiles_of(vocab) * SAMPLE_TILE);
  kernels().tile_weights(logits, vocab, all.max, settings.inverse_temperature, weights.data());
  weights.resize(vocab);
  filter(weights, settings.top_k, settings.top_p, settings.min_p);
  std::vector<TileDraw> tiles;
  for (int64_t first = 0; first < vocab; first += SAMPLE_TILE) {
    const int count = std::min<int64_t>(SAMPLE_TILE, vocab - first);
    float kept[SAMPLE_TILE], kept_weights[SAMPLE_TILE];
    for (int i = 0; i < count; ++i)
      kept[i] =
          weights[first + i] > 0 ? logits[first + i] : -std::numeric_limits<float>::infinity();
    tiles.push_back(sum_tile(kept, count, settings.inverse_temperature, kept_weights));
    pick_token(kept, kept_weights, first, count, settings, tiles.back());
  }
  return finish(all, merge(tiles.data(), tiles.size(), settings.inverse_temperature),
                settings.inverse_temperature);
}

}  // namespace

std::vector<DrawSettings> read_settings(const at::Tensor& row_keys, const at::Tensor& temperature,
                                        const at::Tensor& top_k, const at::Tensor& top_p,
                                        const at::Tensor& min_p) {
  const float* temperature_p = temperature.const_data_ptr<float>();
  const float* top_p_p = top_p.const_data_ptr<float>();
  const int64_t* row_keys_p = row_keys.const_data_ptr<int64_t>();
  const int64_t* top_k_p = top_k.const_data_ptr<int64_t>();
  const float* min_p_p = min_p.const_data_ptr<float>();
  std::vector<DrawSettings> settings;
  for (int64_t b = 0; b < row_keys.size(0); ++b) {
    const bool is_greedy = temperature_p[b] == 0;
    const float inverse =
        is_greedy ? 1 : std::min(1 / temperature_p[b], std::numeric_limits<float>::max());
    settings.push_back({inverse, static_cast<uint64_t>(row_keys_p[b]), is_greedy, top_k_p[b],
                        top_p_p[b], min_p_p[b]});
  }
  return settings;
}

TileDraw sum_tile(const float* logits, int count, float inverse_temperature, float* weights) {
  const float max = kernels().tile_max(logits, count);
  const TileSums sums = kernels().tile_weights(logits, count, max, inverse_temperature, weights);
  return {max, sums, 0, 0, -std::numeric_limits<float>::infinity()};
}

void pick_token(const float* logits, const float* weights, int64_t first_id, int count,
                const DrawSettings& settings, TileDraw& tile) {
  tile.score = -std::numeric_limits<float>::infinity();
  if (!settings.is_greedy) {
    kernels().tile_draw(logits, weights, count, first_id, settings.inverse_temperature,
                        settings.row_key, tile);
  } else if (tile.max > tile.score) {
    tile.token_id = first_id + (std::find(logits, logits + count, tile.max) - logits);
    tile.logit = tile.max;
    tile.score = 0;
  }
}

Drawn merge_tiles(const TileDraw* tiles, int64_t num_tiles, const DrawSettings& settings) {
  const MergedRow row = merge(tiles, num_tiles, settings.inverse_temperature);
  return finish(row, row, settings.inverse_temperature);
}

Drawn draw_row(const float* logits, int64_t vocab, const DrawSettings& settings) {
  const bool is_filtered = settings.is_filtered();
  std::vector<TileDraw> tiles;
  for (int64_t first = 0; first < vocab; first += SAMPLE_TILE) {
    const int count = std::min<int64_t>(SAMPLE_TILE, vocab - first);
    float weights[SAMPLE_TILE];
    tiles.push_back(sum_tile(logits + first, count, settings.inverse_temperature, weights));
    if (!is_filtered) pick_token(logits + first, weights, first, count, settings, tiles.back());
  }
  const MergedRow row = merge(tiles.data(), tiles.size(), settings.inverse_temperature);
  if (is_filtered && std::isfinite(row.sum)) return draw_filtered(logits, vocab, settings, row);
  return finish(row, row,
                settings.inverse_temperature);  // NaN for a row that has it or no finite logit
}

namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> sample(
    const at::Tensor& logits, const at::Tensor& row_keys, const at::Tensor& temperature,
    const at::Tensor& top_k, const at::Tensor& top_p, const at::Tensor& min_p) {
  const int64_t num_rows = logits.size(0), vocab = logits.size(1);
  at::Tensor token_ids = at::empty({num_rows}, row_keys.options());
  at::Tensor logprobs = at::empty({num_rows}, logits.options());
  at::Tensor kept_mass = at::empty({num_rows}, logits.options());
  const std::vector<DrawSettings> settings =
      read_settings(row_keys, temperature, top_k, top_p, min_p);
  const float* logits_p = logits.const_data_ptr<float>();
  int64_t* token_ids_p = token_ids.mutable_data_ptr<int64_t>();
  float* logprobs_p = logprobs.mutable_data_ptr<float>();
  float* kept_mass_p = kept_mass.mutable_data_ptr<float>();
  for_each_item(num_rows, [&](int64_t b) {
    const Drawn drawn = draw_row(logits_p + b * vocab, vocab, settings[b]);
    token_ids_p[b] = drawn.token_id;
    logprobs_p[b] = drawn.logprob;
    kept_mass_p[b] = drawn.kept_mass;
  });
  return {token_ids, logprobs, kept_mass};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> sample_meta(const at::Tensor& logits,
                                                           const at::Tensor& row_keys,
                                                           const at::Tensor&, const at::Tensor&,
                                                           const at::Tensor&, const at::Tensor&) {
  const auto logprobs = [&] { return at::empty_symint({logits.sym_size(0)}, logits.options()); };
  return {at::empty_symint({logits.sym_size(0)}, row_keys.options()), logprobs(), logprobs()};
}

}  // namespace

TORCH_LIBRARY_IMPL(socpo, CPU, m) { m.impl("sample", sample); }
TORCH_LIBRARY_IMPL(socpo, Meta, m) { m.impl("sample", sample_meta); }

}  // namespace socpo
