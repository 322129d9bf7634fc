// Every op of the extension, as `torch.ops.socpo.*` once `socpo_fast._C` is imported. Call them through
// socpo_fast/ops, which checks what the code here relies on: shapes, contiguity, page numbers.

#include <Python.h>
#include <torch/library.h>

TORCH_LIBRARY(socpo, m) {
  m.def(
      "sample(Tensor logits, Tensor row_keys, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p) "
      "-> (Tensor token_ids, Tensor logprobs, Tensor kept_mass)");
  m.def(
      "paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor seq_lens, "
      "Tensor cu_seqlens_q, float scale) -> Tensor");
}

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", "Registers torch.ops.socpo.*", -1, nullptr};
  return PyModule_Create(&module);
}
