// torch.ops.socpo.policy_rows: the row pass of linear_policy_loss, from logits to their gradient, a
// thread a row.

#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "softmax_rows.h"

namespace socpo {
namespace {

constexpr double MAX_LOG_RATIO = 20;

struct Options {
  double clip_low, clip_high, dual_clip, entropy_coef, kl_coef;
  int64_t kl_estimator;
};

template <typename scalar_t>
struct Term {
  scalar_t value;
  scalar_t slope;  // the derivative of value with respect to the log-prob
  scalar_t ratio;
  bool clipped;
};

// Comparisons are written so that NaN, which fails each of them, stays NaN.
template <typename scalar_t>
scalar_t clamp(scalar_t x, double low, double high) {
  const scalar_t least = static_cast<scalar_t>(low), most = static_cast<scalar_t>(high);
  return x < least ? least : x > most ? most : x;
}

// Computes policy_loss_ref's terms without entropy and KL, in the same arithmetic. `flat` is false
// for NaN, so that NaN reaches the gradient; `clipped` is true for it.
template <typename scalar_t>
Term<scalar_t> clipped_term(scalar_t log_ratio, scalar_t advantage, const Options& options) {
  const scalar_t clamped = clamp(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO);
  const scalar_t ratio = std::exp(clamped);
  const scalar_t unclipped = -advantage * ratio;
  const scalar_t clipped = -advantage * clamp(ratio, 1 - options.clip_low, 1 + options.clip_high);
  const scalar_t limit = -advantage * static_cast<scalar_t>(options.dual_clip);
  scalar_t value = clipped > unclipped ? clipped : unclipped;
  if (advantage < 0 && value > limit) value = limit;
  const bool flat = value > unclipped || value < unclipped || log_ratio < -MAX_LOG_RATIO ||
                    log_ratio > MAX_LOG_RATIO;
  return {value, flat ? scalar_t(0) : unclipped, ratio, value != unclipped};
}

// Returns an estimator's term for difference = ref_logprob - logprob.
template <typename scalar_t>
Term<scalar_t> kl_term(scalar_t difference, int64_t estimator) {
  const scalar_t d = clamp(difference, -MAX_LOG_RATIO, MAX_LOG_RATIO);
  const bool flat = difference < -MAX_LOG_RATIO || difference > MAX_LOG_RATIO;
  const scalar_t value = estimator == 1 ? -d : estimator == 2 ? d * d / 2 : std::expm1(d) - d;
  const scalar_t slope = estimator == 1 ? scalar_t(1) : estimator == 2 ? -d : -std::expm1(d);
  return {value, flat ? scalar_t(0) : slope, scalar_t(0), false};
}

at::Tensor policy_rows(const at::Tensor& logits, const std::optional<at::Tensor>& grad_logits,
                       const at::Tensor& targets, const at::Tensor& old_logprobs,
                       const at::Tensor& advantages,
                       const std::optional<at::Tensor>& attempt_of_token, const at::Tensor& weights,
                       const at::Tensor& inv_temperature, double clip_low, double clip_high,
                       double dual_clip, double entropy_coef,
                       const std::optional<at::Tensor>& ref_logprobs, double kl_coef,
                       int64_t kl_estimator, bool need_entropy) {
  const int64_t num_rows = logits.size(0), vocab = logits.size(1), stride = logits.stride(0);
  const Options options{clip_low, clip_high, dual_clip, entropy_coef, kl_coef, kl_estimator};
  const int64_t* targets_p = targets.const_data_ptr<int64_t>();
  const int64_t* attempt_p =
      attempt_of_token ? attempt_of_token->const_data_ptr<int64_t>() : nullptr;
  const int64_t grad_stride = grad_logits ? grad_logits->stride(0) : 0;
  at::Tensor values = at::empty({6, num_rows}, logits.options());
  AT_DISPATCH_FLOATING_TYPES(logits.scalar_type(), "policy_rows", [&] {
    const auto data = [](const at::Tensor& x) { return x.const_data_ptr<scalar_t>(); };
    const scalar_t* logits_p = data(logits);
    const scalar_t* scale_p = data(inv_temperature);
    const scalar_t* old_p = data(old_logprobs);
    const scalar_t *advantages_p = data(advantages), *weights_p = data(weights);
    const scalar_t* ref_p = ref_logprobs && kl_coef != 0 ? data(*ref_logprobs) : nullptr;
    scalar_t* grad_p = grad_logits ? grad_logits->mutable_data_ptr<scalar_t>() : nullptr;
    scalar_t* values_p = values.mutable_data_ptr<scalar_t>();
    for_each_item(num_rows, [&](int64_t n) {
      const SoftmaxRow<scalar_t> row(logits_p + n * stride, vocab, targets_p[n], scale_p[n],
                                     need_entropy || entropy_coef != 0);
      const scalar_t logprob = static_cast<scalar_t>(row.logprob);
      const scalar_t entropy = static_cast<scalar_t>(row.entropy);
      const scalar_t weight = weights_p[n];
      Term<scalar_t> term =
          clipped_term(logprob - old_p[n], advantages_p[attempt_p ? attempt_p[n] : n], options);
      if (entropy_coef != 0) term.value -= static_cast<scalar_t>(entropy_coef) * entropy;
      if (ref_p != nullptr) {
        const Term<scalar_t> kl = kl_term(ref_p[n] - logprob, kl_estimator);
        term.value += static_cast<scalar_t>(kl_coef) * kl.value;
        term.slope += static_cast<scalar_t>(kl_coef) * kl.slope;
      }
      // a row of weight 0 is left out, whatever stands in it
      const scalar_t coefficient = weight == 0 ? scalar_t(0) : weight * term.slope;
      const scalar_t outputs[6] = {
          weight == 0 ? scalar_t(0) : weight * term.value, logprob,    entropy, term.ratio,
          scalar_t(term.clipped && weight != 0),           coefficient};
      for (int i = 0; i < 6; ++i) values_p[i * num_rows + n] = outputs[i];
      if (grad_p != nullptr)
        row.gradient(coefficient, -entropy_coef * weight, grad_p + n * grad_stride);
    });
  });
  return values;
}

at::Tensor policy_rows_meta(const at::Tensor& logits, const std::optional<at::Tensor>&,
                            const at::Tensor&, const at::Tensor&, const at::Tensor&,
                            const std::optional<at::Tensor>&, const at::Tensor&, const at::Tensor&,
                            double, double, double, double, const std::optional<at::Tensor>&,
                            double, int64_t, bool) {
  return at::empty_symint({6, logits.sym_size(0)}, logits.options());
}

}  // namespace

TORCH_LIBRARY_IMPL(socpo, CPU, m) { m.impl("policy_rows", policy_rows); }
TORCH_LIBRARY_IMPL(socpo, Meta, m) { m.impl("policy_rows", policy_rows_meta); }

}  // namespace socpo
