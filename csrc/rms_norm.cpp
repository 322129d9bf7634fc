// torch.ops.socpo.rms_norm and its backward: rows split among threads.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "cpu.h"
#include "ops.h"

namespace socpo {
namespace {

// Rows of one partial sum of a weight's gradient: a fixed number keeps it thread-invariant.
constexpr int64_t ROWS_PER_SUM = 64;

std::vector<float> wide_weight(const at::Tensor& any_weight) {
  const at::Tensor weight = any_weight.contiguous();
  const int64_t width = weight.numel();
  std::vector<float> wide(width);
  if (weight.scalar_type() == at::kFloat) {
    std::copy_n(floats(weight), width, wide.data());
  } else {
    std::copy_n(weight.const_data_ptr<at::BFloat16>(), width, wide.data());
  }
  return wide;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> rms_norm(const at::Tensor& any_x, const at::Tensor& any_weight,
                                            double eps, const MaybeTensor& any_residual) {
  const at::Tensor x = any_x.contiguous();
  const at::Tensor residual = any_residual ? any_residual->contiguous() : at::Tensor();
  const std::vector<float> weight = wide_weight(any_weight);
  const int64_t width = any_weight.numel(), num_rows = x.numel() / width;
  at::Tensor y = at::empty_like(x);
  at::Tensor sum = residual.defined() ? at::empty_like(x) : at::empty({0}, x.options());
  const float *x_p = floats(x), *residual_p = residual.defined() ? floats(residual) : nullptr;
  float *y_p = y.mutable_data_ptr<float>(), *sum_p = sum.mutable_data_ptr<float>();
  for_rows(num_rows, 2 * width, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * width; i < end * width; i += width)
      kernels().rms_norm_row(x_p + i, residual_p == nullptr ? nullptr : residual_p + i,
                             weight.data(), static_cast<float>(eps), width, sum_p + i, y_p + i);
  });
  return {y, sum};
}

namespace {

std::tuple<at::Tensor, at::Tensor> rms_norm_backward(const at::Tensor& any_x,
                                                     const at::Tensor& any_weight, double eps,
                                                     const at::Tensor& any_grad_y,
                                                     const MaybeTensor& any_grad_sum) {
  const at::Tensor x = any_x.contiguous(), grad_y = any_grad_y.contiguous();
  const at::Tensor grad_sum = any_grad_sum ? any_grad_sum->contiguous() : at::Tensor();
  const std::vector<float> weight = wide_weight(any_weight);
  const int64_t width = any_weight.numel(), num_rows = x.numel() / width;
  const int64_t num_sums = (num_rows + ROWS_PER_SUM - 1) / ROWS_PER_SUM;
  at::Tensor grad_x = at::empty_like(x), sums = at::zeros({num_sums, width}, x.options());
  const float* x_p = floats(x);
  const float* grad_y_p = floats(grad_y);
  const float* grad_sum_p = grad_sum.defined() ? floats(grad_sum) : nullptr;
  float *grad_x_p = grad_x.mutable_data_ptr<float>(), *sums_p = sums.mutable_data_ptr<float>();
  for_rows(num_sums, ROWS_PER_SUM * 4 * width, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin * ROWS_PER_SUM; row < std::min(end * ROWS_PER_SUM, num_rows); ++row) {
      const int64_t i = row * width;
      kernels().rms_norm_backward_row(
          x_p + i, weight.data(), grad_y_p + i, grad_sum_p == nullptr ? nullptr : grad_sum_p + i,
          static_cast<float>(eps), width, grad_x_p + i, sums_p + row / ROWS_PER_SUM * width);
    }
  });
  at::Tensor grad_weight = at::zeros({width}, x.options());
  float* grad_weight_p = grad_weight.mutable_data_ptr<float>();
  for (int64_t i = 0; i < num_sums; ++i)
    for (int64_t j = 0; j < width; ++j) grad_weight_p[j] += sums_p[i * width + j];
  return {grad_x, grad_weight};
}

}  // namespace

TORCH_LIBRARY_IMPL(socpo, CPU, m) {
  m.impl("rms_norm", rms_norm);
  m.impl("rms_norm_backward", rms_norm_backward);
}

TORCH_LIBRARY_IMPL(socpo, Meta, m) {
  m.impl(
      "rms_norm", +[](const at::Tensor& x, const at::Tensor&, double, const MaybeTensor& residual) {
        return std::make_tuple(at::empty_like(x),
                               residual ? at::empty_like(x) : at::empty({0}, x.options()));
      });
  m.impl(
      "rms_norm_backward", +[](const at::Tensor& x, const at::Tensor& weight, double,
                               const at::Tensor&, const MaybeTensor&) {
        return std::make_tuple(at::empty_like(x),
                               at::empty_symint(weight.sym_sizes(), x.options()));
      });
}

}  // namespace socpo
