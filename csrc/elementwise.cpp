// torch.ops.socpo.{rms_norm, swiglu, rotary, rotary_write} and their backwards: rows split among threads.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

#include "cpu.h"
#include "ops.h"

namespace socpo {
namespace {

constexpr int64_t ROWS_PER_SUM = 64;  // of a weight's gradient: a fixed number, so that threads do not change the bits

const float* floats(const at::Tensor& x) { return x.const_data_ptr<float>(); }

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

std::tuple<at::Tensor, at::Tensor> rms_norm(const at::Tensor& any_x, const at::Tensor& any_weight, double eps,
                                            const MaybeTensor& any_residual) {
  const at::Tensor x = any_x.contiguous(), residual = any_residual ? any_residual->contiguous() : at::Tensor();
  const std::vector<float> weight = wide_weight(any_weight);
  const int64_t width = any_weight.numel(), num_rows = x.numel() / width;
  at::Tensor y = at::empty_like(x), sum = residual.defined() ? at::empty_like(x) : at::empty({0}, x.options());
  const float *x_p = floats(x), *residual_p = residual.defined() ? floats(residual) : nullptr;
  float *y_p = y.mutable_data_ptr<float>(), *sum_p = sum.mutable_data_ptr<float>();
  for_rows(num_rows, 2 * width, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * width; i < end * width; i += width)
      kernels().rms_norm_row(x_p + i, residual_p == nullptr ? nullptr : residual_p + i, weight.data(),
                             static_cast<float>(eps), width, sum_p + i, y_p + i);
  });
  return {y, sum};
}

namespace {

std::tuple<at::Tensor, at::Tensor> rms_norm_backward(const at::Tensor& any_x, const at::Tensor& any_weight, double eps,
                                                     const at::Tensor& any_grad_y,
                                                     const MaybeTensor& any_grad_sum) {
  const at::Tensor x = any_x.contiguous(), grad_y = any_grad_y.contiguous();
  const at::Tensor grad_sum = any_grad_sum ? any_grad_sum->contiguous() : at::Tensor();
  const std::vector<float> weight = wide_weight(any_weight);
  const int64_t width = any_weight.numel(), num_rows = x.numel() / width;
  const int64_t num_sums = (num_rows + ROWS_PER_SUM - 1) / ROWS_PER_SUM;
  at::Tensor grad_x = at::empty_like(x), sums = at::zeros({num_sums, width}, x.options());
  const float *x_p = floats(x), *grad_y_p = floats(grad_y), *grad_sum_p = grad_sum.defined() ? floats(grad_sum) : nullptr;
  float *grad_x_p = grad_x.mutable_data_ptr<float>(), *sums_p = sums.mutable_data_ptr<float>();
  for_rows(num_sums, ROWS_PER_SUM * 4 * width, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin * ROWS_PER_SUM; row < std::min(end * ROWS_PER_SUM, num_rows); ++row) {
      const int64_t i = row * width;
      kernels().rms_norm_backward_row(x_p + i, weight.data(), grad_y_p + i, grad_sum_p == nullptr ? nullptr : grad_sum_p + i,
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

at::Tensor swiglu(const at::Tensor& any_gate_up) {
  const at::Tensor gate_up = any_gate_up.contiguous();
  const int64_t num_rows = gate_up.size(0), width = gate_up.size(1) / 2;
  at::Tensor out = at::empty({num_rows, width}, gate_up.options());
  const float* from = floats(gate_up);
  float* to = out.mutable_data_ptr<float>();
  for_rows(num_rows, 4 * width, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      kernels().swiglu_row(from + row * 2 * width, from + (row * 2 + 1) * width, width, to + row * width);
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
      kernels().swiglu_backward_row(from + row * 2 * width, from + (row * 2 + 1) * width, grad_p + row * width, width,
                                    to + row * 2 * width, to + (row * 2 + 1) * width);
  });
  return out;
}

// x itself where each token's heads lie side by side, as those of a slice of the heads do; else a copy.
at::Tensor whole_tokens(const at::Tensor& x) {
  return x.stride(2) == 1 && x.stride(1) == x.size(2) ? x : x.contiguous();
}

// Rotates the first num_heads heads of token x into out, heads side by side.
void rotate_token(const float* x, const float* cos, const float* sin, int64_t num_heads, int64_t head_dim, float* out) {
  for (int64_t h = 0; h < num_heads; ++h)
    kernels().rotary_head(x + h * head_dim, cos, sin, head_dim / 2, out + h * head_dim);
}

at::Tensor rotary(const at::Tensor& any_x, const at::Tensor& any_cos, const at::Tensor& any_sin, bool inverse) {
  const at::Tensor x = whole_tokens(any_x), cos = any_cos.contiguous(), sin = (inverse ? any_sin.neg() : any_sin).contiguous();
  const int64_t num_tokens = x.size(0), num_heads = x.size(1), head_dim = x.size(2), stride = x.stride(0);
  at::Tensor out = at::empty(x.sizes(), x.options());
  const float *x_p = floats(x), *cos_p = floats(cos), *sin_p = floats(sin);
  float* out_p = out.mutable_data_ptr<float>();
  for_rows(num_tokens, num_heads * head_dim, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      rotate_token(x_p + t * stride, cos_p + t * head_dim, sin_p + t * head_dim, num_heads, head_dim,
                   out_p + t * num_heads * head_dim);
  });
  return out;
}

void write_slot(const at::Tensor& cache, int64_t slot, const float* row) {
  const int64_t width = cache.size(2) * cache.size(3);
  if (cache.scalar_type() == at::kBFloat16) {
    kernels().narrow_row(row, width, static_cast<uint16_t*>(cache.data_ptr()) + slot * width);
  } else {
    std::memcpy(static_cast<float*>(cache.data_ptr()) + slot * width, row, width * sizeof(float));
  }
}

}  // namespace

at::Tensor rotary_write(const at::Tensor& any_qkv, const at::Tensor& any_cos, const at::Tensor& any_sin,
                        const at::Tensor& k_cache, const at::Tensor& v_cache, const at::Tensor& any_slots) {
  const at::Tensor qkv = whole_tokens(any_qkv), cos = any_cos.contiguous(), sin = any_sin.contiguous();
  const at::Tensor slots = any_slots.contiguous();
  const int64_t num_tokens = qkv.size(0), head_dim = qkv.size(2), num_kv_heads = k_cache.size(2);
  const int64_t num_heads = qkv.size(1) - 2 * num_kv_heads, stride = qkv.stride(0), kv_width = num_kv_heads * head_dim;
  at::Tensor q = at::empty({num_tokens, num_heads, head_dim}, qkv.options());
  const float *qkv_p = floats(qkv), *cos_p = floats(cos), *sin_p = floats(sin);
  const int64_t* slots_p = slots.const_data_ptr<int64_t>();
  float* q_p = q.mutable_data_ptr<float>();
  for_rows(num_tokens, qkv.size(1) * head_dim, [&](int64_t begin, int64_t end) {
    std::vector<float> k(kv_width);
    for (int64_t t = begin; t < end; ++t) {
      const float *token = qkv_p + t * stride, *cos_t = cos_p + t * head_dim, *sin_t = sin_p + t * head_dim;
      rotate_token(token, cos_t, sin_t, num_heads, head_dim, q_p + t * num_heads * head_dim);
      if (slots_p[t] < 0) continue;
      rotate_token(token + num_heads * head_dim, cos_t, sin_t, num_kv_heads, head_dim, k.data());
      write_slot(k_cache, slots_p[t], k.data());
      write_slot(v_cache, slots_p[t], token + num_heads * head_dim + kv_width);
    }
  });
  return q;
}

namespace {

at::Tensor like(const at::Tensor& x) { return at::empty_like(x); }

}  // namespace

TORCH_LIBRARY_IMPL(socpo, CPU, m) {
  m.impl("rms_norm", rms_norm);
  m.impl("rms_norm_backward", rms_norm_backward);
  m.impl("swiglu", swiglu);
  m.impl("swiglu_backward", swiglu_backward);
  m.impl("rotary", rotary);
  m.impl("rotary_write", rotary_write);
}

TORCH_LIBRARY_IMPL(socpo, Meta, m) {
  m.impl("rms_norm", +[](const at::Tensor& x, const at::Tensor&, double, const MaybeTensor& residual) {
    return std::make_tuple(like(x), residual ? like(x) : at::empty({0}, x.options()));
  });
  m.impl("rms_norm_backward", +[](const at::Tensor& x, const at::Tensor& weight, double, const at::Tensor&,
                                  const MaybeTensor&) {
    return std::make_tuple(like(x), at::empty_symint(weight.sym_sizes(), x.options()));
  });
  m.impl("swiglu", +[](const at::Tensor& x) { return at::empty_symint({x.sym_size(0), x.sym_size(1) / 2}, x.options()); });
  m.impl("swiglu_backward", +[](const at::Tensor& x, const at::Tensor&) { return like(x); });
  m.impl("rotary", +[](const at::Tensor& x, const at::Tensor&, const at::Tensor&, bool) {
    return at::empty_symint(x.sym_sizes(), x.options());
  });
  m.impl("rotary_write", +[](const at::Tensor& qkv, const at::Tensor&, const at::Tensor&, const at::Tensor& k_cache,
                             const at::Tensor&, const at::Tensor&) {
    const auto num_heads = qkv.sym_size(1) - 2 * k_cache.sym_size(2);
    return at::empty_symint({qkv.sym_size(0), num_heads, qkv.sym_size(2)}, qkv.options());
  });
}

}  // namespace socpo
