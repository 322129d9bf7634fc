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

#include "cpu.h"

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

std::tuple<at::Tensor, at::Tensor, at::Tensor> sample(const at::Tensor& logits, const at::Tensor& row_keys,
                                                      const at::Tensor& temperature, const at::Tensor& top_k,
                                                      const at::Tensor& top_p, const at::Tensor& min_p) {
  const int64_t num_rows = logits.size(0), vocab = logits.size(1);
  at::Tensor token_ids = at::empty({num_rows}, row_keys.options());
  at::Tensor logprobs = at::empty({num_rows}, logits.options());
  at::Tensor kept_mass = at::empty({num_rows}, logits.options());
  const float *logits_p = logits.const_data_ptr<float>(), *temperature_p = temperature.const_data_ptr<float>();
  const float *top_p_p = top_p.const_data_ptr<float>(), *min_p_p = min_p.const_data_ptr<float>();
  const int64_t *row_keys_p = row_keys.const_data_ptr<int64_t>(), *top_k_p = top_k.const_data_ptr<int64_t>();
  int64_t* token_ids_p = token_ids.mutable_data_ptr<int64_t>();
  float *logprobs_p = logprobs.mutable_data_ptr<float>(), *kept_mass_p = kept_mass.mutable_data_ptr<float>();
  for_each_item(num_rows, [&](int64_t b) {
    const bool is_greedy = temperature_p[b] == 0;
    const SampleRow row{logits_p + b * vocab, vocab, is_greedy ? 1.0f : 1.0f / temperature_p[b],
                        static_cast<uint64_t>(row_keys_p[b]), is_greedy};
    double sum_all;
    Draw draw;
    if (top_k_p[b] == 0 && top_p_p[b] == 1 && min_p_p[b] == 0) {
      draw = kernels().sample_row(row, nullptr);
      sum_all = draw.sum_weights;
    } else {
      std::vector<float> weights(vocab);
      sum_all = kernels().softmax_weights(row, weights.data());
      if (std::isfinite(sum_all)) filter(weights, top_k_p[b], top_p_p[b], min_p_p[b]);  // else the log-prob is NaN
      draw = kernels().sample_row(row, weights.data());
    }
    token_ids_p[b] = draw.token_id;
    logprobs_p[b] = draw.logit - static_cast<float>(std::log(sum_all));
    kept_mass_p[b] = static_cast<float>(draw.sum_weights / sum_all);
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
