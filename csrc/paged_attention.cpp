// torch.ops.socpo.paged_attention: plans work items for sequences, and merges their partial
// results.
//
// A row's keys fall into splits of KEY_SPLIT, attended one by one (csrc/simd/paged_attention.cpp)
// and merged in order. A block of several tokens attends its splits one after another in one item.
// The splits of a single token are items of their own, so that two long sequences still use every
// core, and siblings that share the pages of a split share its item (cascade):
//
//   sequence 0   | split 0 | split 1 | split 2 |        shared prompt: one item for three siblings
//   sequence 1   | split 0 | split 1 | split 2'|        split 2: one item each
//   sequence 2   | split 0 | split 1 | split 2"|
//
// The arithmetic of a row is the same everywhere, so results are batch-invariant and
// thread-invariant. Cascade needs no threshold: with 3 heads a group and 256 of 350 keys in common,
// two siblings gain 1.1 to 1.2 times, four 1.2 to 1.4, eight 1.3 to 1.5.

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

constexpr int64_t ROWS_PER_BLOCK =
    48;  // query rows (tokens x heads of a group) that share an item: its scratch stays cached
constexpr int64_t MERGES_PER_THREAD = 32;  // fewer are not worth waking a thread

struct Sequences {
  const int32_t* block_table;
  const int32_t* seq_lens;
  const int32_t* cu_seqlens_q;
  int64_t num_seqs, max_pages, page_size;

  bool is_decode(int64_t b) const { return cu_seqlens_q[b + 1] - cu_seqlens_q[b] == 1; }

  // Whether both sequences see the whole split, in the same pages.
  bool share_split(int64_t a, int64_t b, int64_t split) const {
    const int64_t begin = split * KEY_SPLIT;
    const int64_t end = begin + KEY_SPLIT;
    const int64_t first_page = begin / page_size;
    return seq_lens[a] >= end && seq_lens[b] >= end &&
           std::memcmp(block_table + a * max_pages + first_page,
                       block_table + b * max_pages + first_page,
                       ((end - 1) / page_size - first_page + 1) * sizeof(int32_t)) == 0;
  }
};

// Rows of `num_tokens` consecutive tokens: of one sequence over all of its splits, or of as many
// sequences over one split.
struct Item {
  int64_t seq, token, num_tokens;
  int64_t split;  // -1: all
  int64_t slot;   // of the first token's partial
};

struct DecodeToken {
  int64_t token, num_splits;
  int64_t first;  // index in Plan::slots
};

struct Plan {
  std::vector<Item> items;
  std::vector<DecodeToken> decode_tokens;
  std::vector<int64_t> slots;  // the partial of each split of each decode token, in order
  int64_t num_slots = 0;
};

// Plans a sequence's tokens in blocks that end where a split ends, so that each row sees some of
// every split; the longest come first.
void plan_prefill(const Sequences& seqs, int64_t b, int64_t tokens_per_block, Plan& plan) {
  const int64_t begin = seqs.cu_seqlens_q[b];
  const int64_t first = seqs.seq_lens[b] - (seqs.cu_seqlens_q[b + 1] - begin);
  for (int64_t end = seqs.seq_lens[b]; end > first;) {
    const int64_t split_start = (end - 1) / KEY_SPLIT * KEY_SPLIT;
    const int64_t start = std::max({first, split_start, end - tokens_per_block});
    plan.items.push_back({b, begin + start - first, end - start, -1, 0});
    end = start;
  }
}

// Plans sequences begin .. end - 1, which have one token each.
void plan_decode(const Sequences& seqs, int64_t begin, int64_t end, int64_t tokens_per_block,
                 bool cascade, Plan& plan) {
  const int64_t first_decode = plan.decode_tokens.size();
  int64_t max_splits = 0;
  for (int64_t b = begin; b < end; ++b) {
    const int64_t num_splits = (seqs.seq_lens[b] + KEY_SPLIT - 1) / KEY_SPLIT;
    plan.decode_tokens.push_back(
        {seqs.cu_seqlens_q[b], num_splits, static_cast<int64_t>(plan.slots.size())});
    plan.slots.resize(plan.slots.size() + num_splits);
    max_splits = std::max(max_splits, num_splits);
  }
  for (int64_t split = 0; split < max_splits; ++split) {
    for (int64_t b = begin; b < end;) {
      const DecodeToken* tokens = &plan.decode_tokens[first_decode + b - begin];
      int64_t run = 1;
      if (split < tokens->num_splits) {
        while (cascade && run < tokens_per_block && b + run < end &&
               seqs.share_split(b + run - 1, b + run, split))
          ++run;
        plan.items.push_back({b, tokens->token, run, split, plan.num_slots});
        for (int64_t i = 0; i < run; ++i) plan.slots[tokens[i].first + split] = plan.num_slots++;
      }
      b += run;
    }
  }
}

Plan make_plan(const Sequences& seqs, int64_t tokens_per_block, bool cascade) {
  Plan plan;
  for (int64_t b = 0; b < seqs.num_seqs;) {
    int64_t end = b;
    while (end < seqs.num_seqs && seqs.is_decode(end)) ++end;
    if (end > b) {
      plan_decode(seqs, b, end, tokens_per_block, cascade, plan);
      b = end;
    } else {
      plan_prefill(seqs, b++, tokens_per_block, plan);
    }
  }
  return plan;
}

Sequences make_sequences(const at::Tensor& block_table, const at::Tensor& seq_lens,
                         const at::Tensor& cu_seqlens_q, int64_t page_size) {
  return {block_table.const_data_ptr<int32_t>(),
          seq_lens.const_data_ptr<int32_t>(),
          cu_seqlens_q.const_data_ptr<int32_t>(),
          seq_lens.size(0),
          block_table.size(1),
          page_size};
}

int64_t tokens_per_block(int64_t group) { return std::max<int64_t>(1, ROWS_PER_BLOCK / group); }

// Returns at least `bytes` that belong to this thread, aligned to 64.
char* thread_scratch(int64_t bytes) {
  thread_local std::vector<char> buffer;
  if (static_cast<int64_t>(buffer.size()) < bytes + 64) buffer.resize(bytes + 64);
  return buffer.data() + (64 - reinterpret_cast<uintptr_t>(buffer.data()) % 64);
}

// Lists the memory of a decode item's keys and values, all heads, in the order of addresses, which
// the hardware prefetches best. The keys of one head are strided; they are cached when it reads
// them.
void find_pieces(const Sequences& seqs, const Item& item, std::initializer_list<const char*> caches,
                 int64_t token_bytes, std::vector<Piece>& pieces) {
  if (item.split < 0) return;
  const int64_t begin = item.split * KEY_SPLIT;
  const int64_t end = std::min<int64_t>(begin + KEY_SPLIT, seqs.seq_lens[item.seq]);
  for (const char* cache : caches)
    for (int64_t key = begin, page_end; key < end; key = page_end) {
      const int64_t page = key / seqs.page_size;
      const int64_t page_id = seqs.block_table[item.seq * seqs.max_pages + page];
      page_end = std::min(end, (page + 1) * seqs.page_size);
      const char* from = cache + (page_id * seqs.page_size + key % seqs.page_size) * token_bytes;
      for (const char* to = from + (page_end - key) * token_bytes; from < to; from += PIECE_BYTES)
        pieces.push_back({from, std::min<int64_t>(PIECE_BYTES, to - from)});
    }
}

// Calls attend(item, kv_head, queue) for all items and heads. Each thread claims its next work item
// before computing the current one, and prefetches that item's keys and values (`find`) meanwhile;
// what has not arrived by then is read first. Where items are few a thread claims single heads,
// which read only their own.
template <typename Find, typename Attend>
void attend_items(const std::vector<Item>& items, int64_t num_kv_heads, const Find& find,
                  const Attend& attend) {
  const int64_t num_items = items.size(), num_threads = at::get_num_threads();
  const int64_t task_heads = num_items < 3 * num_threads ? 1 : num_kv_heads;
  const int64_t num_tasks = num_items * num_kv_heads / task_heads;
  std::atomic<int64_t> next_task{0};
  at::parallel_for(0, std::min(num_tasks, num_threads), 1, [&](int64_t, int64_t) {
    std::vector<Piece> pieces;
    const auto take = [&] {
      const int64_t task = next_task++;
      pieces.clear();
      if (task < num_tasks && task_heads == num_kv_heads) find(items[task], pieces);
      return task;
    };
    for (int64_t task = take(), next; task < num_tasks; task = next) {
      for (const Piece& piece : pieces)
        for (int64_t byte = 0; byte < piece.num_bytes; byte += 64)
          static_cast<const volatile char*>(piece.from)[byte];
      next = take();
      PrefetchQueue queue{pieces.data(), static_cast<int64_t>(pieces.size())};
      for (int64_t i = task * task_heads; i < (task + 1) * task_heads; ++i)
        attend(items[i / num_kv_heads], i % num_kv_heads, queue);
    }
  });
}

AttentionPartial partial_rows(float* base, int64_t num_rows, int64_t row, int64_t head_dim) {
  return {base + num_rows * head_dim + row, base + num_rows * (head_dim + 1) + row,
          base + row * head_dim};
}

}  // namespace

at::Tensor paged_attention(const at::Tensor& q, const at::Tensor& k_cache,
                           const at::Tensor& v_cache, const at::Tensor& block_table,
                           const at::Tensor& seq_lens, const at::Tensor& cu_seqlens_q, double scale,
                           bool cascade) {
  const int64_t num_heads = q.size(1), head_dim = q.size(2), num_kv_heads = k_cache.size(2);
  const int64_t group = num_heads / num_kv_heads;
  const int64_t max_rows = std::max(group, tokens_per_block(group) * group);
  const Sequences seqs = make_sequences(block_table, seq_lens, cu_seqlens_q, k_cache.size(1));
  const Plan plan = make_plan(seqs, tokens_per_block(group), cascade);
  at::Tensor o = at::empty_like(q);
  float* o_p = o.mutable_data_ptr<float>();
  const int64_t num_partials = plan.num_slots * num_heads;
  at::Tensor partials = at::empty({num_partials * (head_dim + 2)}, q.options());
  float* partials_p = partials.mutable_data_ptr<float>();
  const auto partial_of = [&](int64_t slot, int64_t kv_head) {
    return partial_rows(partials_p, num_partials, (kv_head * plan.num_slots + slot) * group,
                        head_dim);
  };

  AttentionBlock shared{};
  shared.is_bf16 = k_cache.scalar_type() == at::kBFloat16;
  shared.token_stride = num_heads * head_dim;
  shared.slot_stride = num_kv_heads * head_dim;
  shared.page_size = seqs.page_size;
  shared.group = group;
  shared.head_dim = head_dim;
  shared.scale = static_cast<float>(scale);
  const float* q_p = q.const_data_ptr<float>();
  const char* k_p = static_cast<const char*>(k_cache.const_data_ptr());
  const char* v_p = static_cast<const char*>(v_cache.const_data_ptr());
  const int64_t head_bytes = head_dim * k_cache.element_size();

  const auto attend = [&](const Item& item, int64_t kv_head, PrefetchQueue& queue) {
    const int64_t num_rows = item.num_tokens * group;
    const int64_t head_offset = item.token * shared.token_stride + kv_head * group * head_dim;
    const int64_t partial_floats = max_rows * (head_dim + 2);
    const int64_t scratch_floats = (2 * partial_floats + 15) / 16 * 16;
    float* scratch = reinterpret_cast<float*>(
        thread_scratch(4 * scratch_floats + attention_scratch_bytes(max_rows, head_dim)));
    AttentionBlock block = shared;
    block.q = q_p + head_offset;
    block.k_cache = k_p + kv_head * head_bytes;
    block.v_cache = v_p + kv_head * head_bytes;
    block.block_table = seqs.block_table + item.seq * seqs.max_pages;
    block.num_tokens = item.num_tokens;
    block.scratch = scratch + scratch_floats;
    block.prefetch = &queue;
    if (item.split >= 0) {
      block.start = item.split * KEY_SPLIT;
      block.visible = seqs.seq_lens[item.seq] - block.start;
      block.partial = partial_of(item.slot, kv_head);
      kernels().attend_split(block);
      return;
    }
    const AttentionPartial state = partial_rows(scratch, max_rows, 0, head_dim);
    const AttentionPartial next = partial_rows(scratch + partial_floats, max_rows, 0, head_dim);
    const int64_t first_visible =
        seqs.seq_lens[item.seq] - (seqs.cu_seqlens_q[item.seq + 1] - item.token) + 1;
    for (block.start = 0; block.start < first_visible; block.start += KEY_SPLIT) {
      block.visible = first_visible - block.start;
      block.partial = block.start == 0 ? state : next;
      kernels().attend_split(block);
      if (block.start > 0) kernels().merge_partials(state, next, num_rows, head_dim);
    }
    for (int64_t token = 0; token < item.num_tokens; ++token)
      kernels().finish_rows(partial_rows(scratch, max_rows, token * group, head_dim), group,
                            head_dim, o_p + head_offset + token * shared.token_stride);
  };
  const auto find = [&](const Item& item, std::vector<Piece>& pieces) {
    find_pieces(seqs, item, {k_p, v_p}, num_kv_heads * head_bytes, pieces);
  };
  attend_items(plan.items, num_kv_heads, find, attend);

  const int64_t num_merges = static_cast<int64_t>(plan.decode_tokens.size()) * num_kv_heads;
  at::parallel_for(0, num_merges, MERGES_PER_THREAD, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const DecodeToken& token = plan.decode_tokens[i / num_kv_heads];
      const int64_t kv_head = i % num_kv_heads;
      const AttentionPartial state = partial_of(plan.slots[token.first], kv_head);
      for (int64_t split = 1; split < token.num_splits; ++split)
        kernels().merge_partials(state, partial_of(plan.slots[token.first + split], kv_head), group,
                                 head_dim);
      kernels().finish_rows(state, group, head_dim,
                            o_p + token.token * shared.token_stride + kv_head * group * head_dim);
    }
  });
  return o;
}

namespace {

at::Tensor paged_attention_meta(const at::Tensor& q, const at::Tensor&, const at::Tensor&,
                                const at::Tensor&, const at::Tensor&, const at::Tensor&, double,
                                bool) {
  return at::empty_like(q);
}

int64_t paged_attention_items(const at::Tensor& block_table, const at::Tensor& seq_lens,
                              const at::Tensor& cu_seqlens_q, int64_t page_size, int64_t group,
                              bool cascade) {
  const Sequences seqs = make_sequences(block_table, seq_lens, cu_seqlens_q, page_size);
  return make_plan(seqs, tokens_per_block(group), cascade).items.size();
}

}  // namespace

TORCH_LIBRARY_IMPL(socpo, CPU, m) {
  m.impl("paged_attention", paged_attention);
  m.impl("paged_attention_items", paged_attention_items);
}
TORCH_LIBRARY_IMPL(socpo, Meta, m) { m.impl("paged_attention", paged_attention_meta); }

}  // namespace socpo
