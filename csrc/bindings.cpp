// Every op of the extension, as `torch.ops.socpo.*` once `socpo_fast._C` is imported. Call them
// through socpo_fast/ops, which checks what the code here relies on: shapes, contiguity, page
// numbers.

#include <Python.h>
#include <torch/library.h>
#include <torch/version.h>

// socpo_fast/ops/_impl.py reads it out of the file, before it loads the library.
[[gnu::used]] static const char BUILT_FOR[] = "socpo_fast._C is built for torch " TORCH_VERSION;

TORCH_LIBRARY(socpo, m) {
  // keys [G, A]: attempts that agree in every row are a group; last [A]: whose reward each attempt
  // earns
  m.def(
      "decay_advantage(Tensor rewards, Tensor attempt_idx, Tensor? num_tokens, Tensor? keys, "
      "Tensor? last, "
      "float[]? factors, int num_factors, str baseline, bool divides_by_std, bool whitens, float "
      "eps) "
      "-> (Tensor earned, Tensor advantages, Tensor factors)");
  m.def(
      "sample(Tensor logits, Tensor row_keys, Tensor temperature, Tensor top_k, Tensor top_p, "
      "Tensor min_p) "
      "-> (Tensor token_ids, Tensor logprobs, Tensor kept_mass)");
  m.def(
      "paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor "
      "seq_lens, "
      "Tensor cu_seqlens_q, float scale, bool cascade=True) -> Tensor");
  // Work items a KV head of that call falls into; tests count by it what cascade brings together.
  m.def(
      "paged_attention_items(Tensor block_table, Tensor seq_lens, Tensor cu_seqlens_q, int "
      "page_size, int group, "
      "bool cascade) -> int");
  m.def(
      "linear_sample(Tensor hidden, Tensor weight, Tensor row_keys, Tensor temperature, Tensor "
      "top_k, Tensor top_p, "
      "Tensor min_p, Tensor? rows) -> (Tensor token_ids, Tensor logprobs, Tensor entropy, Tensor "
      "kept_mass)");
  m.def("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  // without a residual the second output is empty
  m.def("rms_norm(Tensor x, Tensor weight, float eps, Tensor? residual) -> (Tensor y, Tensor sum)");
  // grad_sum: what reaches x by other ways, added
  m.def(
      "rms_norm_backward(Tensor x, Tensor weight, float eps, Tensor grad_y, Tensor? grad_sum) "
      "-> (Tensor grad_x, Tensor grad_weight)");
  m.def("swiglu(Tensor gate_up) -> Tensor");
  m.def("swiglu_backward(Tensor gate_up, Tensor grad) -> Tensor");
  m.def("rotary(Tensor x, Tensor cos, Tensor sin, bool inverse) -> Tensor");
  m.def(
      "rotary_write(Tensor qkv, Tensor cos, Tensor sin, Tensor(a!) k_cache, Tensor(b!) v_cache, "
      "Tensor slots) -> Tensor");
  // weights: Layer.weights() of model/decoder.py; update is what is still to be added to x
  m.def(
      "decoder_layer(Tensor x, Tensor? update, Tensor?[] weights, float eps, Tensor cos, Tensor "
      "sin, Tensor(a!) k_cache, "
      "Tensor(b!) v_cache, Tensor slots, Tensor block_table, Tensor seq_lens, Tensor cu_seqlens_q, "
      "float scale, "
      "bool cascade) -> (Tensor x, Tensor update)");
  // o and logsumexp [T, H] of q [T, H, E]; row t sees row s when s <= t < visible_until[s]
  m.def(
      "tree_attention(Tensor q, Tensor k, Tensor v, Tensor visible_until, float scale) -> (Tensor "
      "o, Tensor logsumexp)");
  m.def(
      "tree_attention_backward(Tensor grad_o, Tensor q, Tensor k, Tensor v, Tensor visible_until, "
      "float scale) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)");
  // factors: those of StepFactors in socpo_fast/ops/adamw.py, in its order
  m.def(
      "adamw(Tensor(a!) param, Tensor(b!)? low_bits, Tensor(c!) exp_avg, Tensor(d!) exp_avg_sq, "
      "Tensor grad, "
      "Tensor? scale, float decay, float beta1, float new_in_avg, float beta2, float "
      "new_in_avg_sq, "
      "float root_correction, float eps, float step_size) -> ()");
  m.def("matmul_(Tensor(a!) out, Tensor a, Tensor b, bool accumulate) -> ()");
  // grad_logits may be logits itself; then that, too, is overwritten
  m.def(
      "policy_rows(Tensor logits, Tensor(a!)? grad_logits, Tensor targets, Tensor old_logprobs, "
      "Tensor advantages, "
      "Tensor? attempt_of_token, Tensor weights, Tensor inv_temperature, float clip_low, float "
      "clip_high, "
      "float dual_clip, float entropy_coef, Tensor? ref_logprobs, float kl_coef, int kl_estimator, "
      "bool need_entropy) "
      "-> Tensor values");
  m.def("logprob_rows(Tensor logits, Tensor targets, Tensor inv_temperature) -> Tensor values");
  m.def(
      "logprob_rows_backward(Tensor logits, Tensor(a!) grad_logits, Tensor targets, Tensor "
      "inv_temperature, "
      "Tensor logsumexp, Tensor entropy, Tensor grad_logprobs, Tensor? grad_entropy) -> ()");
}

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", "Registers torch.ops.socpo.*", -1,
                               nullptr};
  return PyModule_Create(&module);
}
