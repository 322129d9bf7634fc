// torch.ops.socpo.tree_attention and its backward: attention of the packed rows of a tree, fp32.
//
// Rows are cut into blocks. The rows of a block see the same keys before the block, and one another
// causally. Those keys are a few ranges of rows, so a block is a few matrix products without a
// mask; only its last columns, the block's own keys, are a triangle:
//
//              keys:   prompt | attempt 0 | attempt 1
//   rows of prompt     .....  |           |              .. the block's own keys are
//   rows of attempt 0  ###### | .....     |              a triangle, # all others seen
//   rows of attempt 1  ###### |           | .....        by every row of the block
//
// The query heads that share a KV head are rows of one matrix. A block keeps all scores of its
// rows, so there is no running maximum: one softmax, one division.
//
// Results are thread-invariant: each block, and in the backward each chunk of blocks, is computed
// by one thread, and gradients of keys and values are summed over chunks in order.

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
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

constexpr int64_t MATRIX_ROWS = 192;  // of a matrix: queries times the heads that share their keys
constexpr int64_t BACKWARD_ITEMS = 12;  // of work at least, where there are as many blocks

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

struct Block {
  Range queries;
  std::vector<Range> keys;  // ascending; the last one ends with the queries
  int64_t num_keys;
  int64_t width() const { return (num_keys + 15) / 16 * 16; }  // of scores: whole vectors
};

std::vector<Block> make_blocks(const at::Tensor& any_visible_until, int64_t max_queries) {
  const at::Tensor contiguous = any_visible_until.contiguous();
  const int32_t* visible_until = contiguous.const_data_ptr<int32_t>();
  const int64_t num_rows = contiguous.numel();
  // Where the keys that rows see, or the rows that see them, change.
  std::vector<char> is_cut(num_rows + 1, 0);
  for (int64_t row = 0; row < num_rows; ++row) {
    TORCH_CHECK_INDEX(visible_until[row] > row && visible_until[row] <= num_rows,
                      "visible_until ends in its row");
    is_cut[visible_until[row]] = 1;
    is_cut[row] |= row == 0 || visible_until[row] != visible_until[row - 1];
  }
  std::vector<Block> blocks;
  std::vector<Range> pieces;  // ranges from cut to cut; the last one ends where the block ends
  for (int64_t begin = 0; begin < num_rows; begin = blocks.back().queries.end) {
    Block block{{begin, begin + 1}, {}, 0};
    int64_t& end = block.queries.end;
    while (end < std::min(num_rows, begin + max_queries) && !is_cut[end]) ++end;
    if (is_cut[begin]) pieces.push_back({begin, begin});
    pieces.back().end = end;
    for (const Range& piece : pieces) {
      if (visible_until[piece.begin] <= begin) continue;
      block.num_keys += piece.size();
      if (!block.keys.empty() && block.keys.back().end == piece.begin) {
        block.keys.back().end = piece.end;
      } else {
        block.keys.push_back(piece);
      }
    }
    blocks.push_back(block);
  }
  return blocks;
}

// Returns [num_chunks + 1] blocks at which chunks of about the same work start.
std::vector<int64_t> split_work(const std::vector<Block>& blocks, int64_t num_chunks) {
  std::vector<int64_t> sums(1, 0), starts;
  for (const Block& block : blocks)
    sums.push_back(sums.back() + block.queries.size() * block.num_keys);
  for (int64_t chunk = 0; chunk <= num_chunks; ++chunk)
    starts.push_back(std::lower_bound(sums.begin(), sums.end(), sums.back() * chunk / num_chunks) -
                     sums.begin());
  starts.back() = blocks.size();
  return starts;
}

// Reorders [T, H, ..] to [K, T G, ..], with the G = H / K query heads of a KV head contiguous.
at::Tensor fold(const at::Tensor& x, int64_t num_kv_heads) {
  return x.unflatten(1, {num_kv_heads, -1}).transpose(0, 1).flatten(1, 2).contiguous();
}

// Reorders back, into a new tensor: callers could not change a view in place.
at::Tensor unfold(const at::Tensor& x, at::IntArrayRef sizes) {
  const at::Tensor out = at::empty(sizes, x.options());
  if (out.numel() == 0) return out;
  out.unflatten(1, {x.size(0), sizes[1] / x.size(0)})
      .copy_(x.unflatten(1, {sizes[0], -1}).transpose(0, 1));
  return out;
}

// The operands of one call, folded.
struct Problem {
  at::Tensor q, k, v;  // [K, T G, E], [K, T, E]
  int64_t num_kv_heads, group;
  std::vector<Block> blocks;

  Problem(const at::Tensor& q_THE, const at::Tensor& k_TKE, const at::Tensor& v_TKE,
          const at::Tensor& visible_until)
      : q(fold(q_THE, k_TKE.size(1))),
        k(fold(k_TKE, k_TKE.size(1))),
        v(fold(v_TKE, k_TKE.size(1))),
        num_kv_heads(k_TKE.size(1)),
        group(q_THE.size(1) / num_kv_heads),
        blocks(make_blocks(visible_until, std::max<int64_t>(1, MATRIX_ROWS / group))) {}

  // Returns the rows of a block in a head of x [K, T G, ..].
  at::Tensor rows(const at::Tensor& x, int64_t head, const Block& block) const {
    return x.select(0, head).narrow(0, block.queries.begin * group, block.queries.size() * group);
  }

  // Returns memory for the scores of any block; each thread has its own.
  at::Tensor scratch() const {
    int64_t size = 0;
    for (const Block& block : blocks)
      size = std::max(size, block.queries.size() * group * block.width());
    return at::empty({size}, q.options());
  }

  at::Tensor scores(const at::Tensor& scratch, const Block& block) const {
    const int64_t num_rows = block.queries.size() * group;
    return scratch.narrow(0, 0, num_rows * block.width()).view({num_rows, block.width()});
  }

  // Calls work(row, count) for the rows of a block; the row sees its first `count` keys.
  template <typename Work>
  void for_each_row(const Block& block, const Work& work) const {
    for (int64_t row = 0; row < block.queries.size() * group; ++row)
      work(row, block.num_keys - block.queries.size() + row / group + 1);
  }
};

// Calls work(rows of x [T, E], columns of scores) for each range of the block's keys.
template <typename Work>
void for_each_range_of_keys(const Block& block, const at::Tensor& x, const at::Tensor& scores,
                            const Work& work) {
  int64_t column = 0;
  for (const Range& keys : block.keys) {
    work(x.narrow(0, keys.begin, keys.size()), scores.narrow(1, column, keys.size()));
    column += keys.size();
  }
}

// scores = rows keys^T
void score(const at::Tensor& scores, const Block& block, const at::Tensor& rows,
           const at::Tensor& keys) {
  for_each_range_of_keys(block, keys, scores,
                         [&](const at::Tensor& some, const at::Tensor& columns) {
                           matmul_(columns, rows, some.t(), false);
                         });
}

// rows = weights values
void weigh(const at::Tensor& rows, const Block& block, const at::Tensor& weights,
           const at::Tensor& values) {
  bool is_first = true;
  for_each_range_of_keys(block, values, weights,
                         [&](const at::Tensor& some, const at::Tensor& columns) {
                           matmul_(rows, columns, some, !is_first);
                           is_first = false;
                         });
}

// keys += weights^T rows
void add_to_keys(const at::Tensor& keys, const Block& block, const at::Tensor& weights,
                 const at::Tensor& rows) {
  for_each_range_of_keys(block, keys, weights,
                         [&](const at::Tensor& some, const at::Tensor& columns) {
                           matmul_(some, columns.t(), rows, true);
                         });
}

// Calls work(item, state), each item on one thread. There are never fewer than two items: with one,
// the matrix library would use its own threads, and results would depend on their number.
template <typename MakeState, typename Work>
void for_each_alone(int64_t num_items, const MakeState& make_state, const Work& work) {
  for_each_range(std::max<int64_t>(num_items, 2), 1, make_state,
                 [&](int64_t item, int64_t, const auto& state) {
                   const at::AutoDispatchBelowADInplaceOrView guard;
                   if (item < num_items) work(item, state);
                 });
}

std::tuple<at::Tensor, at::Tensor> tree_attention(const at::Tensor& any_q, const at::Tensor& any_k,
                                                  const at::Tensor& any_v,
                                                  const at::Tensor& visible_until, double scale) {
  const Problem problem(any_q, any_k, any_v, visible_until);
  const int64_t num_blocks = problem.blocks.size(), num_kv_heads = problem.num_kv_heads;
  const at::Tensor o = at::empty_like(problem.q);
  const at::Tensor logsumexp = at::empty({o.size(0), o.size(1)}, o.options());
  const auto make_scratch = [&] { return problem.scratch(); };
  for_each_alone(
      num_blocks * num_kv_heads, make_scratch, [&](int64_t item, const at::Tensor& scratch) {
        const Block& block =
            problem.blocks[num_blocks - 1 - item / num_kv_heads];  // long ones come last in it
        const int64_t head = item % num_kv_heads;
        const at::Tensor scores = problem.scores(scratch, block);
        const at::Tensor o_rows = problem.rows(o, head, block);
        score(scores, block, problem.rows(problem.q, head, block), problem.k.select(0, head));
        std::vector<float> sums(scores.size(0));
        float* scores_p = scores.mutable_data_ptr<float>();
        float* logsumexp_p = problem.rows(logsumexp, head, block).mutable_data_ptr<float>();
        problem.for_each_row(block, [&](int64_t row, int64_t count) {
          const SoftmaxSums row_sums =
              kernels().softmax_row(scores_p + row * block.width(), count, block.width(), scale);
          sums[row] = row_sums.sum;
          logsumexp_p[row] = row_sums.max + std::log(row_sums.sum);
        });
        weigh(o_rows, block, scores, problem.v.select(0, head));
        float* o_p = o_rows.mutable_data_ptr<float>();
        for (const float sum : sums)
          for (int64_t e = 0; e < o.size(2); ++e) *o_p++ /= sum;
      });
  return {unfold(o, any_q.sizes()), unfold(logsumexp, any_q.sizes().slice(0, 2))};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> tree_attention_backward(
    const at::Tensor& any_grad, const at::Tensor& any_q, const at::Tensor& any_k,
    const at::Tensor& any_v, const at::Tensor& visible_until, double scale) {
  const Problem problem(any_q, any_k, any_v, visible_until);
  const int64_t num_kv_heads = problem.num_kv_heads;
  const int64_t num_chunks = (BACKWARD_ITEMS + num_kv_heads - 1) / num_kv_heads;
  const std::vector<int64_t> starts = split_work(problem.blocks, num_chunks);
  const at::Tensor grad = fold(any_grad, num_kv_heads), grad_q = at::empty_like(problem.q);
  const std::vector<int64_t> sizes{num_chunks, num_kv_heads, any_k.size(0), any_k.size(2)};
  const at::Tensor grad_k = at::zeros(sizes, grad.options());
  const at::Tensor grad_v = at::zeros(sizes, grad.options());
  const auto make_scratch = [&] { return std::make_pair(problem.scratch(), problem.scratch()); };
  for_each_alone(num_chunks * num_kv_heads, make_scratch, [&](int64_t item, const auto& scratch) {
    const int64_t chunk = item / num_kv_heads, head = item % num_kv_heads;
    const at::Tensor k = problem.k.select(0, head), v = problem.v.select(0, head);
    for (int64_t i = starts[chunk]; i < starts[chunk + 1]; ++i) {
      const Block& block = problem.blocks[i];
      const at::Tensor q_rows = problem.rows(problem.q, head, block);
      const at::Tensor grad_rows = problem.rows(grad, head, block);
      const at::Tensor weights = problem.scores(scratch.first, block);
      const at::Tensor grads = problem.scores(scratch.second, block);
      score(weights, block, q_rows, k);
      score(grads, block, grad_rows, v);
      float* weights_p = weights.mutable_data_ptr<float>();
      float* grads_p = grads.mutable_data_ptr<float>();
      problem.for_each_row(block, [&](int64_t row, int64_t count) {
        const int64_t first = row * block.width();
        kernels().softmax_backward_row(weights_p + first, grads_p + first, count, block.width(),
                                       scale);
      });
      add_to_keys(grad_v[chunk][head], block, weights, grad_rows);
      add_to_keys(grad_k[chunk][head], block, grads, q_rows);
      weigh(problem.rows(grad_q, head, block), block, grads, k);
    }
  });
  for (int64_t chunk = 1; chunk < num_chunks; ++chunk) {
    grad_k[0].add_(grad_k[chunk]);
    grad_v[0].add_(grad_v[chunk]);
  }
  return {unfold(grad_q, any_q.sizes()), unfold(grad_k[0], any_k.sizes()),
          unfold(grad_v[0], any_v.sizes())};
}

}  // namespace

TORCH_LIBRARY_IMPL(socpo, CPU, m) {
  m.impl("tree_attention", tree_attention);
  m.impl("tree_attention_backward", tree_attention_backward);
}

TORCH_LIBRARY_IMPL(socpo, Meta, m) {
  m.impl(
      "tree_attention",
      +[](const at::Tensor& q, const at::Tensor&, const at::Tensor&, const at::Tensor&, double) {
        return std::make_tuple(at::empty_symint(q.sym_sizes(), q.options()),
                               at::empty_symint({q.sym_size(0), q.sym_size(1)}, q.options()));
      });
  m.impl(
      "tree_attention_backward", +[](const at::Tensor&, const at::Tensor& q, const at::Tensor& k,
                                     const at::Tensor& v, const at::Tensor&, double) {
        return std::make_tuple(at::empty_like(q), at::empty_like(k), at::empty_like(v));
      });
}

}  // namespace socpo
