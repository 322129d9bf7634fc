// Ops that other files call directly (decoder_layer.cpp, tree_attention.cpp), as they are
// registered.

#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace socpo {

using MaybeTensor = std::optional<at::Tensor>;

inline const float* floats(const at::Tensor& x) { return x.const_data_ptr<float>(); }

at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const MaybeTensor& bias);
std::tuple<at::Tensor, at::Tensor> rms_norm(const at::Tensor& x, const at::Tensor& weight,
                                            double eps, const MaybeTensor& residual);
// Writes out = a b, or out + a b.
void matmul_(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b, bool accumulate);
at::Tensor swiglu(const at::Tensor& gate_up);
at::Tensor rotary_write(const at::Tensor& qkv, const at::Tensor& cos, const at::Tensor& sin,
                        const at::Tensor& k_cache, const at::Tensor& v_cache,
                        const at::Tensor& slots);
at::Tensor paged_attention(const at::Tensor& q, const at::Tensor& k_cache,
                           const at::Tensor& v_cache, const at::Tensor& block_table,
                           const at::Tensor& seq_lens, const at::Tensor& cu_seqlens_q, double scale,
                           bool cascade);

}  // namespace socpo
