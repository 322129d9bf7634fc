// torch.ops.socpo.tree_attention and its backward: attention of the packed rows of a tree, fp32.
//
// Rows are cut into blocks whose rows see the same keys before the block, and one another causally.
// Those keys are a few ranges of rows, so that a block is a few matrix products without a mask; only
// the last columns, the block's own keys, are a triangle:
//
//              keys:   prompt | attempt 0 | attempt 1
//   rows of prompt     .....  |           |              .. the block's own keys are
//   rows of attempt 0  ###### | .....     |              a triangle, # all others seen
//   rows of attempt 1  ###### |           | .....        by every row of the block
//
// The query heads that share a KV head are rows of one matrix. A block keeps all scores of its rows,
// hence no running maximum: one softmax, one division.
//
// Each block, and in the backward each chunk of blocks, is computed by one thread whatever their
// number; gradients of keys and values are summed over chunks in order.

#include <ATen/core/Tensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "cpu.h"
#include "ops.h"

namespace socpo {
namespace {

constexpr int64_t BLOCK_ROWS = 192;   // query rows of a matrix, over all heads that share its keys
constexpr int64_t BACKWARD_ITEMS = 12;  // of the backward at least, where there are as many blocks

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

struct Block {
  Range queries;
  std::vector<Range> keys;  // ascending; the last one ends with the queries
  int64_t num_keys;
};

std::vector<Block> make_blocks(const at::Tensor& any_visible_until, int64_t max_queries) {
  const at::Tensor contiguous = any_visible_until.contiguous();
  const int32_t* visible_until = contiguous.const_data_ptr<int32_t>();
  const int64_t num_rows = contiguous.numel();
  std::vector<char> is_cut(num_rows + 1, 0);  // where what rows see, or who sees them, changes
  for (int64_t row = 0; row < num_rows; ++row) {
    is_cut[visible_until[row]] = 1;
    is_cut[row] |= row == 0 || visible_until[row] != visible_until[row - 1];
  }
  std::vector<Block> blocks;
  std::vector<Range> pieces;  // from cut to cut, all that end before the block
  for (int64_t begin = 0, cut = 0; begin < num_rows; begin = blocks.back().queries.end) {
    if (is_cut[begin] && begin > 0) pieces.push_back({cut, begin});
    if (is_cut[begin]) cut = begin;
    Block block{{begin, begin + 1}, {}, 0};
    while (block.queries.end < std::min(num_rows, begin + max_queries) && !is_cut[block.queries.end])
      ++block.queries.end;
    const auto add = [&block](Range range) {
      block.num_keys += range.size();
      if (!block.keys.empty() && block.keys.back().end == range.begin) {
        block.keys.back().end = range.end;
      } else {
        block.keys.push_back(range);
      }
    };
    for (const Range& piece : pieces)
      if (visible_until[piece.begin] > begin) add(piece);
    add({cut, block.queries.end});
    blocks.push_back(block);
  }
  return blocks;
}

// [T, H, ..] to [K, T G, ..], with G = H / K query heads beside each other.
at::Tensor fold(const at::Tensor& x, int64_t num_kv_heads) {
  return x.unflatten(1, {num_kv_heads, -1}).transpose(0, 1).flatten(1, 2).contiguous();
}

at::Tensor unfold(const at::Tensor& x, at::IntArrayRef sizes) {
  return x.unflatten(1, {sizes[0], -1}).transpose(0, 1).reshape(sizes);
}

// Of [K, rows, ..], the rows of a head.
at::Tensor part(const at::Tensor& x, int64_t head, Range rows) {
  return x.select(0, head).narrow(0, rows.begin, rows.size());
}

// One thread's scores of a block: rows padded to whole vectors.
class Scores {
 public:
  Scores(const std::vector<Block>& blocks, int64_t group, const at::TensorOptions& options) {
    int64_t size = 0;
    for (const Block& block : blocks)
      size = std::max(size, block.queries.size() * group * width(block));
    numbers_ = at::empty({size}, options);
  }
  static int64_t width(const Block& block) { return (block.num_keys + 15) / 16 * 16; }
  at::Tensor of(const Block& block, int64_t num_rows) const {
    return numbers_.narrow(0, 0, num_rows * width(block)).view({num_rows, width(block)});
  }

 private:
  at::Tensor numbers_;
};

// work(keys, the columns of x that are theirs, whether they are the first)
template <typename Work>
void for_each_range_of_keys(const Block& block, const at::Tensor& x, const Work& work) {
  int64_t column = 0;
  for (const Range& keys : block.keys) {
    work(keys, x.narrow(1, column, keys.size()), column == 0);
    column += keys.size();
  }
}

// Keys that row `row` of the block's matrix sees; the columns of those it does not come last.
int64_t num_visible(const Block& block, int64_t row, int64_t group) {
  return block.num_keys - block.queries.size() + row / group + 1;
}

// work(item, state) by one thread each: never fewer than two items, which would let the library's
// threads into one, and with them their number into its bits.
template <typename MakeState, typename Work>
void for_each_alone(int64_t num_items, const MakeState& make_state, const Work& work) {
  for_each_range(std::max<int64_t>(num_items, 2), 1, make_state, [&](int64_t item, int64_t, auto& state) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    if (item < num_items) work(item, state);
  });
}

std::tuple<at::Tensor, at::Tensor> tree_attention(const at::Tensor& any_q, const at::Tensor& any_k,
                                                  const at::Tensor& any_v,
                                                  const at::Tensor& visible_until, double scale) {
  const int64_t num_kv_heads = any_k.size(1), group = any_q.size(1) / num_kv_heads;
  const at::Tensor q = fold(any_q, num_kv_heads), k = fold(any_k, num_kv_heads), v = fold(any_v, num_kv_heads);
  const std::vector<Block> blocks = make_blocks(visible_until, std::max<int64_t>(1, BLOCK_ROWS / group));
  at::Tensor o = at::empty_like(q), logsumexp = at::empty({q.size(0), q.size(1)}, q.options());
  const auto make_scores = [&] { return Scores(blocks, group, q.options()); };
  for_each_alone(blocks.size() * num_kv_heads, make_scores, [&](int64_t item, const Scores& scratch) {
    const Block& block = blocks[blocks.size() - 1 - item / num_kv_heads];
    const int64_t head = item % num_kv_heads;
    const Range rows{block.queries.begin * group, block.queries.end * group};
    const at::Tensor q_rows = part(q, head, rows), o_rows = part(o, head, rows);
    const at::Tensor scores = scratch.of(block, rows.size());
    for_each_range_of_keys(block, scores, [&](Range keys, const at::Tensor& columns, bool) {
      matmul_(columns, q_rows, part(k, head, keys).t(), false);
    });
    float* scores_p = scores.mutable_data_ptr<float>();
    float* logsumexp_p = part(logsumexp, head, rows).mutable_data_ptr<float>();
    std::vector<float> sums(rows.size());
    for (int64_t row = 0; row < rows.size(); ++row) {
      const int64_t width = Scores::width(block), count = num_visible(block, row, group);
      const SoftmaxSums row_sums = kernels().softmax_row(scores_p + row * width, count, width, scale);
      sums[row] = row_sums.sum;
      logsumexp_p[row] = row_sums.max + std::log(row_sums.sum);
    }
    for_each_range_of_keys(block, scores, [&](Range keys, const at::Tensor& columns, bool is_first) {
      matmul_(o_rows, columns, part(v, head, keys), !is_first);
    });
    float* o_p = o_rows.mutable_data_ptr<float>();
    for (const float sum : sums)
      for (int64_t e = 0; e < q.size(2); ++e) *o_p++ /= sum;
  });
  return {unfold(o, any_q.sizes()), unfold(logsumexp, any_q.sizes().slice(0, 2))};
}

// [num_chunks + 1] blocks at which chunks of about the same work start.
std::vector<int64_t> split_work(const std::vector<Block>& blocks, int64_t num_chunks) {
  int64_t total = 0, so_far = 0;
  for (const Block& block : blocks) total += block.queries.size() * block.num_keys;
  std::vector<int64_t> starts(1, 0);
  for (int64_t i = 0; i < static_cast<int64_t>(blocks.size()); ++i) {
    so_far += blocks[i].queries.size() * blocks[i].num_keys;
    while (so_far * num_chunks >= total * static_cast<int64_t>(starts.size())) starts.push_back(i + 1);
  }
  return starts;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> tree_attention_backward(
    const at::Tensor& any_grad, const at::Tensor& any_q, const at::Tensor& any_k, const at::Tensor& any_v,
    const at::Tensor& any_o, const at::Tensor& any_logsumexp, const at::Tensor& visible_until, double scale) {
  const int64_t num_kv_heads = any_k.size(1), group = any_q.size(1) / num_kv_heads;
  const at::Tensor q = fold(any_q, num_kv_heads), k = fold(any_k, num_kv_heads), v = fold(any_v, num_kv_heads);
  const at::Tensor grad = fold(any_grad, num_kv_heads), logsumexp = fold(any_logsumexp, num_kv_heads);
  const at::Tensor delta = fold(at::mul(any_grad, any_o).sum(-1), num_kv_heads);
  const std::vector<Block> blocks = make_blocks(visible_until, std::max<int64_t>(1, BLOCK_ROWS / group));
  const int64_t num_chunks = (BACKWARD_ITEMS + num_kv_heads - 1) / num_kv_heads;
  const std::vector<int64_t> starts = split_work(blocks, num_chunks);
  const std::vector<int64_t> sizes{num_chunks, num_kv_heads, any_k.size(0), any_k.size(2)};
  at::Tensor grad_q = at::empty_like(q);
  const at::Tensor grad_k = at::zeros(sizes, q.options()), grad_v = at::zeros(sizes, q.options());
  const auto make_scores = [&] {
    return std::make_pair(Scores(blocks, group, q.options()), Scores(blocks, group, q.options()));
  };
  for_each_alone(num_chunks * num_kv_heads, make_scores, [&](int64_t item, const auto& scratch) {
    const int64_t chunk = item / num_kv_heads, head = item % num_kv_heads;
    const at::Tensor chunk_k = grad_k.select(0, chunk), chunk_v = grad_v.select(0, chunk);
    for (int64_t i = starts[chunk]; i < starts[chunk + 1]; ++i) {
      const Block& block = blocks[i];
      const Range rows{block.queries.begin * group, block.queries.end * group};
      const at::Tensor q_rows = part(q, head, rows), grad_rows = part(grad, head, rows);
      const at::Tensor scores = scratch.first.of(block, rows.size());
      const at::Tensor grads = scratch.second.of(block, rows.size());
      for_each_range_of_keys(block, scores, [&](Range keys, const at::Tensor& columns, bool) {
        matmul_(columns, q_rows, part(k, head, keys).t(), false);
      });
      for_each_range_of_keys(block, grads, [&](Range keys, const at::Tensor& columns, bool) {
        matmul_(columns, grad_rows, part(v, head, keys).t(), false);
      });
      float *scores_p = scores.mutable_data_ptr<float>(), *grads_p = grads.mutable_data_ptr<float>();
      const float* logsumexp_p = part(logsumexp, head, rows).const_data_ptr<float>();
      const float* delta_p = part(delta, head, rows).const_data_ptr<float>();
      for (int64_t row = 0; row < rows.size(); ++row) {
        const int64_t width = Scores::width(block), count = num_visible(block, row, group);
        kernels().softmax_backward_row(scores_p + row * width, grads_p + row * width, count, width, scale,
                                       logsumexp_p[row], delta_p[row]);
      }
      for_each_range_of_keys(block, scores, [&](Range keys, const at::Tensor& columns, bool) {
        matmul_(part(chunk_v, head, keys), columns.t(), grad_rows, true);
      });
      for_each_range_of_keys(block, grads, [&](Range keys, const at::Tensor& columns, bool is_first) {
        matmul_(part(chunk_k, head, keys), columns.t(), q_rows, true);
        matmul_(part(grad_q, head, rows), columns, part(k, head, keys), !is_first);
      });
    }
  });
  for (int64_t chunk = 1; chunk < num_chunks; ++chunk) {
    grad_k.select(0, 0).add_(grad_k.select(0, chunk));
    grad_v.select(0, 0).add_(grad_v.select(0, chunk));
  }
  return {unfold(grad_q, any_q.sizes()), unfold(grad_k.select(0, 0), any_k.sizes()),
          unfold(grad_v.select(0, 0), any_v.sizes())};
}

}  // namespace

TORCH_LIBRARY_IMPL(socpo, CPU, m) {
  m.impl("tree_attention", tree_attention);
  m.impl("tree_attention_backward", tree_attention_backward);
}

TORCH_LIBRARY_IMPL(socpo, Meta, m) {
  m.impl("tree_attention", +[](const at::Tensor& q, const at::Tensor&, const at::Tensor&, const at::Tensor&, double) {
    return std::make_tuple(at::empty_symint(q.sym_sizes(), q.options()),
                           at::empty_symint({q.sym_size(0), q.sym_size(1)}, q.options()));
  });
  m.impl("tree_attention_backward",
         +[](const at::Tensor&, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor&,
             const at::Tensor&, const at::Tensor&, double) {
           return std::make_tuple(at::empty_like(q), at::empty_like(k), at::empty_like(v));
         });
}

}  // namespace socpo
