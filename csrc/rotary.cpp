// torch.ops.socpo.{rotary, rotary_write}: tokens split among threads.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <cstring>
#include <vector>

#include "cpu.h"
#include "ops.h"

namespace socpo {
namespace {

// Returns x if the heads of each token are contiguous, as in a slice of the heads; else a copy.
at::Tensor whole_tokens(const at::Tensor& x) {
  return x.stride(2) == 1 && x.stride(1) == x.size(2) ? x : x.contiguous();
}

// Rotates the first num_heads heads of token x into out, heads side by side.
void rotate_token(const float* x, const float* cos, const float* sin, int64_t num_heads,
                  int64_t head_dim, float* out) {
  for (int64_t h = 0; h < num_heads; ++h)
    kernels().rotary_head(x + h * head_dim, cos, sin, head_dim / 2, out + h * head_dim);
}

at::Tensor rotary(const at::Tensor& any_x, const at::Tensor& any_cos, const at::Tensor& any_sin,
                  bool inverse) {
  const at::Tensor x = whole_tokens(any_x);
  const at::Tensor cos = any_cos.contiguous();
  const at::Tensor sin = (inverse ? any_sin.neg() : any_sin).contiguous();
  const int64_t num_tokens = x.size(0);
  const int64_t num_heads = x.size(1);
  const int64_t head_dim = x.size(2);
  const int64_t stride = x.stride(0);
  at::Tensor out = at::empty(x.sizes(), x.options());
  const float *x_p = floats(x), *cos_p = floats(cos), *sin_p = floats(sin);
  float* out_p = out.mutable_data_ptr<float>();
  for_rows(num_tokens, num_heads * head_dim, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      rotate_token(x_p + t * stride, cos_p + t * head_dim, sin_p + t * head_dim, num_heads,
                   head_dim, out_p + t * num_heads * head_dim);
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

at::Tensor rotary_write(const at::Tensor& any_qkv, const at::Tensor& any_cos,
                        const at::Tensor& any_sin, const at::Tensor& k_cache,
                        const at::Tensor& v_cache, const at::Tensor& any_slots) {
  const at::Tensor qkv = whole_tokens(any_qkv);
  const at::Tensor cos = any_cos.contiguous();
  const at::Tensor sin = any_sin.contiguous();
  const at::Tensor slots = any_slots.contiguous();
  const int64_t num_tokens = qkv.size(0), head_dim = qkv.size(2), num_kv_heads = k_cache.size(2);
  const int64_t num_heads = qkv.size(1) - 2 * num_kv_heads;
  const int64_t stride = qkv.stride(0);
  const int64_t kv_width = num_kv_heads * head_dim;
  at::Tensor q = at::empty({num_tokens, num_heads, head_dim}, qkv.options());
  const float *qkv_p = floats(qkv), *cos_p = floats(cos), *sin_p = floats(sin);
  const int64_t* slots_p = slots.const_data_ptr<int64_t>();
  float* q_p = q.mutable_data_ptr<float>();
  for_rows(num_tokens, qkv.size(1) * head_dim, [&](int64_t begin, int64_t end) {
    std::vector<float> k(kv_width);
    for (int64_t t = begin; t < end; ++t) {
      const float* token = qkv_p + t * stride;
      const float* cos_t = cos_p + t * head_dim;
      const float* sin_t = sin_p + t * head_dim;
      rotate_token(token, cos_t, sin_t, num_heads, head_dim, q_p + t * num_heads * head_dim);
      if (slots_p[t] < 0) continue;
      rotate_token(token + num_heads * head_dim, cos_t, sin_t, num_kv_heads, head_dim, k.data());
      write_slot(k_cache, slots_p[t], k.data());
      write_slot(v_cache, slots_p[t], token + num_heads * head_dim + kv_width);
    }
  });
  return q;
}

TORCH_LIBRARY_IMPL(socpo, CPU, m) {
  m.impl("rotary", rotary);
  m.impl("rotary_write", rotary_write);
}

TORCH_LIBRARY_IMPL(socpo, Meta, m) {
  m.impl(
      "rotary", +[](const at::Tensor& x, const at::Tensor&, const at::Tensor&, bool) {
        return at::empty_symint(x.sym_sizes(), x.options());
      });
  m.impl(
      "rotary_write", +[](const at::Tensor& qkv, const at::Tensor&, const at::Tensor&,
                          const at::Tensor& k_cache, const at::Tensor&, const at::Tensor&) {
        const auto num_heads = qkv.sym_size(1) - 2 * k_cache.sym_size(2);
        return at::empty_symint({qkv.sym_size(0), num_heads, qkv.sym_size(2)}, qkv.options());
      });
}

}  // namespace socpo
