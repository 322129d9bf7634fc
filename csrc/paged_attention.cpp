// torch.ops.socpo.paged_attention: work items are (query block, KV head); see csrc/simd/paged_attention.cpp.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <vector>

#include "cpu.h"

namespace socpo {
namespace {

constexpr int64_t ROWS_PER_BLOCK = 32;  // query rows (tokens x heads of a group) that share a tile of keys

at::Tensor paged_attention(const at::Tensor& q, const at::Tensor& k_cache, const at::Tensor& v_cache,
                           const at::Tensor& block_table, const at::Tensor& seq_lens, const at::Tensor& cu_seqlens_q,
                           double scale) {
  const int64_t num_heads = q.size(1), head_dim = q.size(2), num_kv_heads = k_cache.size(2);
  const int64_t group = num_heads / num_kv_heads, page_size = k_cache.size(1), max_pages = block_table.size(1);
  const int64_t tokens_per_block = std::max<int64_t>(1, ROWS_PER_BLOCK / group);
  const int32_t *block_table_p = block_table.const_data_ptr<int32_t>(), *seq_lens_p = seq_lens.const_data_ptr<int32_t>();
  const int32_t* cu_seqlens_q_p = cu_seqlens_q.const_data_ptr<int32_t>();
  const float *q_p = q.const_data_ptr<float>(), *k_p = k_cache.const_data_ptr<float>();
  const float* v_p = v_cache.const_data_ptr<float>();
  at::Tensor o = at::empty_like(q);
  float* o_p = o.mutable_data_ptr<float>();

  std::vector<AttentionBlock> blocks;  // without KV head and scratch
  for (int64_t b = 0; b < seq_lens.size(0); ++b) {
    const int64_t begin = cu_seqlens_q_p[b], end = cu_seqlens_q_p[b + 1];
    for (int64_t t = begin; t < end; t += tokens_per_block) {
      AttentionBlock block{};
      block.q = q_p + t * num_heads * head_dim;
      block.o = o_p + t * num_heads * head_dim;
      block.token_stride = num_heads * head_dim;
      block.slot_stride = num_kv_heads * head_dim;
      block.block_table = block_table_p + b * max_pages;
      block.page_size = page_size;
      block.first_position = seq_lens_p[b] - (end - t);
      block.num_tokens = std::min(tokens_per_block, end - t);
      block.group = group;
      block.head_dim = head_dim;
      block.scale = static_cast<float>(scale);
      blocks.push_back(block);
    }
  }
  for_each_item(static_cast<int64_t>(blocks.size()) * num_kv_heads, [&](int64_t item) {
    AttentionBlock block = blocks[item / num_kv_heads];
    const int64_t kv_head = item % num_kv_heads;
    std::vector<float> scratch(block.num_tokens * group * (head_dim + 2));
    block.q += kv_head * group * head_dim;
    block.o += kv_head * group * head_dim;
    block.k_cache = k_p + kv_head * head_dim;
    block.v_cache = v_p + kv_head * head_dim;
    block.scratch = scratch.data();
    kernels().attend_block(block);
  });
  return o;
}

at::Tensor paged_attention_meta(const at::Tensor& q, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                const at::Tensor&, const at::Tensor&, double) {
  return at::empty_like(q);
}

}  // namespace

TORCH_LIBRARY_IMPL(socpo, CPU, m) { m.impl("paged_attention", paged_attention); }
TORCH_LIBRARY_IMPL(socpo, Meta, m) { m.impl("paged_attention", paged_attention_meta); }

}  // namespace socpo
