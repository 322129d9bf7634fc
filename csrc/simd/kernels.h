// The compute of the CPU ops, compiled once per instruction set. Each set is one namespace with the same functions.
//
// Files in csrc/simd/ include nothing but this, simd.h and C headers: an inline function of the standard library or of
// ATen that was compiled here for AVX-512 could be the copy the linker keeps for everyone, and crash older machines.

#pragma once

#include <stdint.h>

namespace socpo {

constexpr int KEY_SPLIT = 128;  // keys of one attention partial; splits start at multiples of it in every sequence
constexpr int KEY_TILE = 32;    // keys packed at a time, so that they stay in the first-level cache

// One row of logits, one draw. Noise of a token depends on row_key and its id only.
struct SampleRow {
  const float* logits;
  int64_t vocab;
  float inverse_temperature;
  uint64_t row_key;
  bool is_greedy;
};

struct Draw {
  int64_t token_id;
  float logit;         // of token_id: (logit - the row's largest) / temperature, <= 0
  double sum_weights;  // sum of the weights drawn from, the exp of that
};

// What one pass over a row of logits leaves, with x = (logit - max) * inverse_temperature.
struct RowSums {
  double max;       // the largest logit; -inf when there is no other
  double sum;       // of exp(x)
  double weighted;  // of x exp(x), when asked for
};

// Attention of rows over the keys of one split: max of the scores, sum of exp(score - max), and
// out[head_dim] = sum of exp(score - max) value, for each row. Rows are contiguous.
struct AttentionPartial {
  float* max;
  float* sum;
  float* out;
};

// Query rows that see the same split of keys: `num_tokens` tokens of `group` heads each. They are one sequence's
// tokens, or one token each of siblings whose pages are the same here.
struct AttentionBlock {
  const float* q;  // first token's first head of the group
  int64_t token_stride;  // floats between tokens of q
  const void* k_cache;   // first slot's key of this KV head, fp32 or bf16
  const void* v_cache;
  bool is_bf16;
  int64_t slot_stride;  // elements between tokens of the cache (K * E)
  const int32_t* block_table;
  int64_t page_size;
  int64_t start;    // position of the split's first key
  int64_t visible;  // keys from there on that the first token sees, >= 1; each further token sees one more
  int64_t num_tokens, group, head_dim;
  float scale;
  AttentionPartial partial;
  void* scratch;  // attention_scratch_bytes, aligned to 64
};

inline int64_t attention_scratch_bytes(int64_t num_rows, int64_t head_dim) {
  return 4 * (KEY_TILE * head_dim + num_rows * (KEY_SPLIT + 4 * head_dim + 1));
}

// One set of these for each instruction set, e.g. socpo::avx2::sample_row.
#define SOCPO_DECLARE_KERNELS(isa)                                                                       \
  namespace isa {                                                                                        \
  /* The draw over all tokens, or over those with weights[i] > 0 when `weights` is given. */             \
  Draw sample_row(const SampleRow& row, const float* weights);                                           \
  /* weights[i] = exp((logit_i - largest) / temperature), <= 1; returns their sum. */                    \
  double softmax_weights(const SampleRow& row, float* weights);                                          \
  /* Fills block.partial. */                                                                             \
  void attend_split(const AttentionBlock& block);                                                        \
  /* into = into and from together; the rows of a sequence meet their splits in ascending order. */      \
  void merge_partials(const AttentionPartial& into, const AttentionPartial& from, int64_t num_rows, int64_t head_dim); \
  /* o[row] = out[row] / sum[row] */                                                                     \
  void finish_rows(const AttentionPartial& partial, int64_t num_rows, int64_t head_dim, float* o);       \
  /* Online max and sums (Milakov and Gimelshein 2018): the row is read from memory once. */             \
  RowSums row_sums(const float* logits, int64_t vocab, float inverse_temperature, bool need_weighted);   \
  /* grad[i] = exp(x_i) (scale + slope x_i), with 0 for x_i = -inf; may be done in place. */              \
  void row_gradient(const float* logits, float* grad, int64_t vocab, float inverse_temperature, float max, float scale, \
                    float slope);                                                                         \
  }

SOCPO_DECLARE_KERNELS(baseline)
#ifdef SOCPO_X86
SOCPO_DECLARE_KERNELS(avx2)
SOCPO_DECLARE_KERNELS(avx512)
#endif

}  // namespace socpo
