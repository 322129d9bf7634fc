// torch.ops.socpo.decay_advantage: from the raw rewards of a batch to advantages, in fp64 and in
// the steps of credit_attempts_ref in socpo_fast/ops/decay_advantage.py. A batch has hundreds of
// attempts: one thread, every sum in index order.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <map>
#include <optional>
#include <tuple>
#include <vector>

namespace socpo {
namespace {

using MaybeTensor = std::optional<at::Tensor>;
using MaybeFactors = std::optional<at::ArrayRef<double>>;

constexpr double WHITEN_EPS = 1e-8;

struct Group {
  double sum = 0, square_sum = 0;
  int64_t count = 0;
};

// Computes f_0 = 1, f_n = mean of the decayed rewards of all attempts with an index below n.
void batch_means(const double* rewards, const int64_t* attempt_idx, int64_t num_attempts,
                 double* factors, int64_t num_factors) {
  std::vector<double> sums(num_factors);
  std::vector<int64_t> counts(num_factors);
  for (int64_t i = 0; i < num_attempts; ++i) {
    sums[attempt_idx[i]] += rewards[i];
    ++counts[attempt_idx[i]];
  }
  double decayed_sum = 0;
  int64_t count = 0;
  for (int64_t n = 0; n < num_factors; ++n) {
    factors[n] = n > 0 ? decayed_sum / count : 1;
    decayed_sum += factors[n] * sums[n];
    count += counts[n];
  }
}

// Returns the group of each attempt: those that agree in every row of keys [G, A].
std::vector<Group*> find_groups(const at::Tensor& keys,
                                std::map<std::vector<int64_t>, Group>& groups) {
  const int64_t num_keys = keys.size(0), num_attempts = keys.size(1);
  const int64_t* keys_p = keys.const_data_ptr<int64_t>();
  std::vector<Group*> group_of(num_attempts);
  std::vector<int64_t> key(num_keys);
  for (int64_t i = 0; i < num_attempts; ++i) {
    for (int64_t g = 0; g < num_keys; ++g) key[g] = keys_p[g * num_attempts + i];
    group_of[i] = &groups[key];  // a map's entries stay where they are
  }
  return group_of;
}

void subtract_baseline(std::vector<double>& x, const std::vector<Group*>& group_of,
                       bool of_others) {
  for (size_t i = 0; i < x.size(); ++i) {
    group_of[i]->sum += x[i];
    ++group_of[i]->count;
  }
  for (size_t i = 0; i < x.size(); ++i) {
    const Group& group = *group_of[i];
    if (group.count == 1) continue;
    x[i] -= of_others ? (group.sum - x[i]) / (group.count - 1) : group.sum / group.count;
  }
}

void divide_by_std(std::vector<double>& x, const std::vector<Group*>& group_of, double eps) {
  for (size_t i = 0; i < x.size(); ++i) group_of[i]->square_sum += x[i] * x[i];
  for (size_t i = 0; i < x.size(); ++i) {
    const Group& group = *group_of[i];
    x[i] /= (group.count == 1 ? 1 : std::sqrt(group.square_sum / (group.count - 1))) + eps;
  }
}

// Shifts and scales to mean 0 and unbiased variance 1 over loss tokens; attempt i counts
// num_tokens[i] times.
void whiten(std::vector<double>& x, const int64_t* num_tokens) {
  double total = 0, sum = 0, square_sum = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    total += num_tokens[i];
    sum += num_tokens[i] * x[i];
  }
  for (double& value : x) value -= sum / total;
  for (size_t i = 0; i < x.size(); ++i) square_sum += num_tokens[i] * (x[i] * x[i]);
  const double scale = std::sqrt(square_sum / (total - 1) + WHITEN_EPS);
  for (double& value : x) value /= scale;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> decay_advantage(
    const at::Tensor& rewards, const at::Tensor& attempt_idx, const MaybeTensor& num_tokens,
    const MaybeTensor& keys, const MaybeTensor& last, MaybeFactors given_factors,
    int64_t num_factors, c10::string_view baseline, bool divides_by_std, bool whitens, double eps) {
  const int64_t num_attempts = rewards.size(0);
  const auto float_options = rewards.options().dtype(at::kFloat);
  at::Tensor earned = at::empty({num_attempts}, float_options);
  at::Tensor advantages = at::empty({num_attempts}, float_options);
  at::Tensor factors = at::empty({num_factors}, rewards.options());
  const at::Tensor raw = rewards.contiguous(), index = attempt_idx.contiguous();
  const double* raw_p = raw.const_data_ptr<double>();
  const int64_t* index_p = index.const_data_ptr<int64_t>();
  const int64_t* last_p = last ? last->const_data_ptr<int64_t>() : nullptr;
  double* factors_p = factors.mutable_data_ptr<double>();
  if (given_factors)
    std::copy(given_factors->begin(), given_factors->end(), factors_p);
  else
    batch_means(raw_p, index_p, num_attempts, factors_p, num_factors);
  float* earned_p = earned.mutable_data_ptr<float>();
  float* advantages_p = advantages.mutable_data_ptr<float>();
  std::vector<double> x(num_attempts);
  for (int64_t i = 0; i < num_attempts; ++i) {
    const int64_t source = last_p ? last_p[i] : i;
    earned_p[i] = static_cast<float>(raw_p[source] * factors_p[index_p[source]]);
    x[i] = earned_p[i];
  }
  if (keys) {
    std::map<std::vector<int64_t>, Group> groups;
    const std::vector<Group*> group_of = find_groups(keys->contiguous(), groups);
    subtract_baseline(x, group_of, baseline == "others");
    if (divides_by_std) divide_by_std(x, group_of, eps);
  }
  if (whitens) whiten(x, num_tokens->contiguous().const_data_ptr<int64_t>());
  std::copy(x.begin(), x.end(), advantages_p);
  return {earned, advantages, factors};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> decay_advantage_meta(
    const at::Tensor& rewards, const at::Tensor&, const MaybeTensor&, const MaybeTensor&,
    const MaybeTensor&, MaybeFactors, int64_t num_factors, c10::string_view, bool, bool, double) {
  const auto attempts = [&] {
    return at::empty_symint({rewards.sym_size(0)}, rewards.options().dtype(at::kFloat));
  };
  return {attempts(), attempts(), at::empty({num_factors}, rewards.options())};
}

}  // namespace

TORCH_LIBRARY_IMPL(socpo, CPU, m) { m.impl("decay_advantage", decay_advantage); }
TORCH_LIBRARY_IMPL(socpo, Meta, m) { m.impl("decay_advantage", decay_advantage_meta); }

}  // namespace socpo
