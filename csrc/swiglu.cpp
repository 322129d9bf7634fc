// torch.ops.socpo.swiglu and its backward: rows split among threads.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "cpu.h"
#include "ops.h"

namespace socpo {

at::Tensor swiglu(const at::Tensor& any_gate_up) {
  const at::Tensor gate_up = any_gate_up.contiguous();
  const int64_t num_rows = gate_up.size(0), width = gate_up.size(1) / 2;
  at::Tensor out = at::empty({num_rows, width}, gate_up.options());
  const float* from = floats(gate_up);
  float* to = out.mutable_data_ptr<float>();
  for_rows(num_rows, 4 * width, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      kernels().swiglu_row(from + row * 2 * width, from + (row * 2 + 1) * width, width,
                           to + row * width);
  });
  return out;
}

namespace {

at::Tensor swiglu_backward(const at::Tensor& any_gate_up, const at::Tensor& any_grad) {
  const at::Tensor gate_up = any_gate_up.contiguous(), grad = any_grad.contiguous();
  const int64_t num_rows = grad.size(0), width = grad.size(1);
  at::Tensor out = at::empty_like(gate_up);
  const float *from = floats(gate_up), *grad_p = floats(grad);
  float* to = out.mutable_data_ptr<float>();
  for_rows(num_rows, 6 * width, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      kernels().swiglu_backward_row(from + row * 2 * width, from + (row * 2 + 1) * width,
                                    grad_p + row * width, width, to + row * 2 * width,
                                    to + (row * 2 + 1) * width);
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(socpo, CPU, m) {
  m.impl("swiglu", swiglu);
  m.impl("swiglu_backward", swiglu_backward);
}

TORCH_LIBRARY_IMPL(socpo, Meta, m) {
  m.impl(
      "swiglu", +[](const at::Tensor& x) {
        return at::empty_symint({x.sym_size(0), x.sym_size(1) / 2}, x.options());
      });
  m.impl(
      "swiglu_backward", +[](const at::Tensor& x, const at::Tensor&) { return at::empty_like(x); });
}

}  // namespace socpo
