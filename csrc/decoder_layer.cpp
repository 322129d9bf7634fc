// torch.ops.socpo.decoder_layer: one layer over pages in one call, the ops of Layer in
// model/decoder.py one by one. At one token a step, calling them from Python would take a quarter
// of the time.

#include <ATen/core/List.h>
#include <ATen/ops/empty_like.h>
#include <ATen/record_function.h>
#include <torch/library.h>

#include "ops.h"

namespace socpo {
namespace {

// Names of Layer.weights(), in its order.
enum {
  INPUT_NORM,
  QKV,
  QKV_BIAS,
  Q_NORM,
  K_NORM,
  O,
  O_BIAS,
  MLP_NORM,
  GATE_UP,
  GATE_UP_BIAS,
  DOWN,
  DOWN_BIAS
};

// Calls work(), shown by profilers under `name` as if Python had called the op.
template <typename Work>
auto recorded(const char* name, const Work& work) {
  RECORD_FUNCTION(name, c10::ArrayRef<const c10::IValue>{});
  return work();
}

std::tuple<at::Tensor, at::Tensor> decoder_layer(
    const at::Tensor& x, const MaybeTensor& update, const c10::List<MaybeTensor>& weights,
    double eps, const at::Tensor& cos, const at::Tensor& sin, const at::Tensor& k_cache,
    const at::Tensor& v_cache, const at::Tensor& slots, const at::Tensor& block_table,
    const at::Tensor& seq_lens, const at::Tensor& cu_seqlens_q, double scale, bool cascade) {
  const auto weight = [&](int64_t name) { return weights.get(name).value(); };
  const auto layer_linear = [&](const at::Tensor& rows, int64_t name) {
    return recorded("socpo::linear",
                    [&] { return linear(rows, weight(name), weights.get(name + 1)); });
  };
  const auto norm = [&](const at::Tensor& rows, int64_t name, const MaybeTensor& residual) {
    return recorded("socpo::rms_norm", [&] { return rms_norm(rows, weight(name), eps, residual); });
  };
  at::Tensor normed, sum = x;
  if (update) {
    std::tie(normed, sum) = norm(*update, INPUT_NORM, x);
  } else {
    normed = std::get<0>(norm(x, INPUT_NORM, std::nullopt));
  }
  const at::Tensor qkv = layer_linear(normed, QKV).view({x.size(0), -1, cos.size(1)});
  const int64_t num_kv_heads = k_cache.size(2), num_heads = qkv.size(1) - 2 * num_kv_heads;
  if (weights.get(Q_NORM)) {
    at::Tensor q = qkv.narrow(1, 0, num_heads), k = qkv.narrow(1, num_heads, num_kv_heads);
    q.copy_(std::get<0>(norm(q, Q_NORM, std::nullopt)));
    k.copy_(std::get<0>(norm(k, K_NORM, std::nullopt)));
  }
  const at::Tensor q = recorded(
      "socpo::rotary_write", [&] { return rotary_write(qkv, cos, sin, k_cache, v_cache, slots); });
  const at::Tensor o = recorded("socpo::paged_attention", [&] {
    return paged_attention(q, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q, scale,
                           cascade);
  });
  std::tie(normed, sum) = norm(layer_linear(o.flatten(1), O), MLP_NORM, sum);
  const at::Tensor gate_up = layer_linear(normed, GATE_UP);
  return {sum, layer_linear(recorded("socpo::swiglu", [&] { return swiglu(gate_up); }), DOWN)};
}

}  // namespace

TORCH_LIBRARY_IMPL(socpo, CPU, m) { m.impl("decoder_layer", decoder_layer); }
TORCH_LIBRARY_IMPL(socpo, Meta, m) {
  m.impl(
      "decoder_layer",
      +[](const at::Tensor& x, const MaybeTensor&, const c10::List<MaybeTensor>&, double,
          const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
          const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, double,
          bool) { return std::make_tuple(at::empty_like(x), at::empty_like(x)); });
}

}  // namespace socpo
