// torch.ops.socpo.logprob_rows and logprob_rows_backward: the row passes of linear_logprob, a
// thread a row.

#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "softmax_rows.h"

namespace socpo {
namespace {

at::Tensor logprob_rows(const at::Tensor& logits, const at::Tensor& targets,
                        const at::Tensor& inv_temperature) {
  const int64_t num_rows = logits.size(0), vocab = logits.size(1), stride = logits.stride(0);
  at::Tensor values = at::empty({3, num_rows}, logits.options());
  const int64_t* targets_p = targets.const_data_ptr<int64_t>();
  AT_DISPATCH_FLOATING_TYPES(logits.scalar_type(), "logprob_rows", [&] {
    const scalar_t* logits_p = logits.const_data_ptr<scalar_t>();
    const scalar_t* scale_p = inv_temperature.const_data_ptr<scalar_t>();
    scalar_t* values_p = values.mutable_data_ptr<scalar_t>();
    for_each_item(num_rows, [&](int64_t n) {
      const SoftmaxRow<scalar_t> row(logits_p + n * stride, vocab, targets_p[n], scale_p[n], true);
      values_p[n] = static_cast<scalar_t>(row.logprob);
      values_p[num_rows + n] = static_cast<scalar_t>(row.entropy);
      values_p[2 * num_rows + n] =
          static_cast<scalar_t>(row.sums.max * scale_p[n] + std::log(row.sums.sum));
    });
  });
  return values;
}

// The GPU's backward reads logsumexp and entropy, since reading a row twice would cost there. On a
// CPU the row is cached, and summing it again keeps the digits that a large common offset of the
// logits takes from a rounded logsumexp.
void logprob_rows_backward(const at::Tensor& logits, const at::Tensor& grad_logits,
                           const at::Tensor& targets, const at::Tensor& inv_temperature,
                           const at::Tensor&, const at::Tensor&, const at::Tensor& grad_logprobs,
                           const std::optional<at::Tensor>& grad_entropy) {
  const int64_t num_rows = logits.size(0), vocab = logits.size(1), stride = logits.stride(0);
  const int64_t grad_stride = grad_logits.stride(0), *targets_p = targets.const_data_ptr<int64_t>();
  AT_DISPATCH_FLOATING_TYPES(logits.scalar_type(), "logprob_rows_backward", [&] {
    const scalar_t* logits_p = logits.const_data_ptr<scalar_t>();
    const scalar_t* scale_p = inv_temperature.const_data_ptr<scalar_t>();
    const scalar_t* grad_logprobs_p = grad_logprobs.const_data_ptr<scalar_t>();
    const scalar_t* grad_entropy_p =
        grad_entropy ? grad_entropy->const_data_ptr<scalar_t>() : nullptr;
    scalar_t* grad_p = grad_logits.mutable_data_ptr<scalar_t>();
    for_each_item(num_rows, [&](int64_t n) {
      const bool has_entropy = grad_entropy_p != nullptr && grad_entropy_p[n] != 0;
      const SoftmaxRow<scalar_t> row(logits_p + n * stride, vocab, targets_p[n], scale_p[n],
                                     has_entropy);
      row.gradient(grad_logprobs_p[n], has_entropy ? grad_entropy_p[n] : 0,
                   grad_p + n * grad_stride);
    });
  });
}

at::Tensor logprob_rows_meta(const at::Tensor& logits, const at::Tensor&, const at::Tensor&) {
  return at::empty_symint({3, logits.sym_size(0)}, logits.options());
}

void logprob_rows_backward_meta(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                const at::Tensor&, const std::optional<at::Tensor>&) {}

}  // namespace

TORCH_LIBRARY_IMPL(socpo, CPU, m) {
  m.impl("logprob_rows", logprob_rows);
  m.impl("logprob_rows_backward", logprob_rows_backward);
}

TORCH_LIBRARY_IMPL(socpo, Meta, m) {
  m.impl("logprob_rows", logprob_rows_meta);
  m.impl("logprob_rows_backward", logprob_rows_backward_meta);
}

}  // namespace socpo
