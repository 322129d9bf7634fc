// torch.ops.socpo.adamw: a step of AdamW on one parameter, in place; the arithmetic is in
// csrc/simd/adamw.cpp.

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <cmath>

#include "cpu.h"
#include "ops.h"

namespace socpo {
namespace {

constexpr int64_t ELEMENT_COST = 4;  // of an element, in those that for_rows counts by

void adamw(const at::Tensor& param, const MaybeTensor& low_bits, const at::Tensor& exp_avg,
           const at::Tensor& exp_avg_sq, const at::Tensor& grad, const MaybeTensor& any_scale,
           double decay, double beta1, double new_in_avg, double beta2, double new_in_avg_sq,
           double root_correction, double eps, double step_size) {
  const float scale = any_scale ? *any_scale->const_data_ptr<float>() : 1.0f;
  if (!std::isfinite(scale) || scale <= 0) return;
  const AdamWStep step{
      param.mutable_data_ptr(),
      low_bits ? low_bits->mutable_data_ptr<int16_t>() : nullptr,
      exp_avg.mutable_data_ptr<float>(),
      exp_avg_sq.mutable_data_ptr<float>(),
      grad.const_data_ptr<float>(),
      scale,
      (float)decay,
      (float)beta1,
      (float)new_in_avg,
      (float)beta2,
      (float)new_in_avg_sq,
      (float)root_correction,
      (float)eps,
      (float)step_size,
  };
  for_rows(param.numel(), ELEMENT_COST,
           [&](int64_t begin, int64_t end) { kernels().adamw_range(step, begin, end); });
}

}  // namespace

TORCH_LIBRARY_IMPL(socpo, CPU, m) { m.impl("adamw", adamw); }

}  // namespace socpo
