// The compute of the CPU ops, compiled once per instruction set. Each set is one namespace with the same functions.
//
// Files in csrc/simd/ include nothing but this, simd.h and C headers: an inline function of the standard library or of
// ATen that was compiled here for AVX-512 could be the copy the linker keeps for everyone, and crash older machines.

#pragma once

#include <stdint.h>

namespace socpo {

constexpr int KEY_SPLIT = 128;  // keys of one attention partial; splits start at multiples of it in every sequence
constexpr int KEY_TILE = 32;    // keys packed at a time, so that they stay in the first-level cache

// Tokens of a row that a draw takes at once. Tiles start at multiples of it; a multiple of GROUP_OUTS.
constexpr int SAMPLE_TILE = 768;

// Over a tile, with x = (logit - max) / temperature: of exp(x), and of x exp(x).
struct TileSums {
  float sum, weighted;
};

// What one draw takes from a tile of its row.
struct TileDraw {
  float max;  // the tile's largest logit; -inf when there is no other
  TileSums sums;
  int32_t token_id;  // the best one
  float logit, score;  // its own, the latter being x + Gumbel noise; -inf when the tile has no token to draw
};

// What one pass over a row of logits leaves, with x = (logit - max) * inverse_temperature.
struct RowSums {
  double max;       // the largest logit; -inf when there is no other
  double sum;       // of exp(x)
  double weighted;  // of x exp(x), when asked for
};

// What the softmax of a row of scores leaves, with x = scale * score.
struct SoftmaxSums {
  float max;  // the largest x
  float sum;  // of exp(x - max)
};

// Attention of rows over the keys of one split: max of the scores, sum of exp(score - max), and
// out[head_dim] = sum of exp(score - max) value, for each row. Rows are contiguous.
struct AttentionPartial {
  float* max;
  float* sum;
  float* out;
};

// Memory that a thread reads next. A kernel asks for piece after piece while it computes, line by line: many prefetches at
// once had no effect (measured on Zen 5).
constexpr int PIECE_BYTES = 2048;  // at most
struct Piece {
  const char* from;
  int64_t num_bytes;
};
struct Ahead {
  const Piece* pieces;
  int64_t count;
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
  Ahead* ahead;   // loses what has been asked for
};

constexpr int FEW_ROWS = 24;    // up to them linear_block is faster on x as it lies, beyond on panels (measured)
constexpr int PANEL_ROWS = 64;  // of a panel at most
constexpr int GROUP_OUTS = 48;  // outputs of a linear layer taken together; ranges of them should start at multiples

// Rows of x times rows of weights, all contiguous in `width`; outputs beside each other.
struct LinearBlock {
  const float* x;  // rows, or a panel
  bool is_panel;
  int64_t x_stride, num_rows;
  const void* weight;  // [num_outs, width] fp32 or bf16
  bool is_bf16;
  int64_t num_outs, width;
  const float* bias;  // [num_outs] or null
  float* out;
  int64_t out_stride;
};

// A parameter, and the factors of StepFactors in socpo_fast/ops/adamw.py.
struct AdamWStep {
  void* param;        // fp32, or the high halves of it
  int16_t* low_bits;  // the low halves, or null
  float* exp_avg;
  float* exp_avg_sq;
  const float* grad;
  float scale, decay, beta1, new_in_avg, beta2, new_in_avg_sq, root_correction, eps, step_size;
};

inline int64_t attention_scratch_bytes(int64_t num_rows, int64_t head_dim) {
  return 4 * (KEY_TILE * head_dim + num_rows * (KEY_SPLIT + 4 * head_dim + 1));
}

// One set of these for each instruction set, e.g. socpo::avx2::tile_max.
#define SOCPO_DECLARE_KERNELS(isa)                                                                       \
  namespace isa {                                                                                        \
  float tile_max(const float* logits, int count);                                                        \
  /* weights[i] = exp(x_i) <= 1, filled up with 0 to a whole vector; `max` is at least the largest. */   \
  TileSums tile_weights(const float* logits, int count, float max, float inverse_temperature, float* weights); \
  /* The best token by x + noise into `draw`, which holds max and score -inf. */                         \
  void tile_draw(const float* logits, const float* weights, int count, int64_t first_id, float inverse_temperature, \
                 uint64_t row_key, TileDraw& draw);                                                      \
  void linear_block(const LinearBlock& block);                                                           \
  /* For linear_block; num_rows and width are rounded up to 16 in it. */                                 \
  void pack_panel(const float* x, int64_t x_stride, int64_t num_rows, int64_t width, float* panel);       \
  /* sum = x + residual and y = its norm; without a residual (null) y = the norm of x and sum is not written. */ \
  void rms_norm_row(const float* x, const float* residual, const float* weight, float eps, int64_t width, float* sum, float* y); \
  /* grad_x = grad_sum (null: 0) + the norm's gradient; grad_weight is added to. */                       \
  void rms_norm_backward_row(const float* x, const float* weight, const float* grad_y, const float* grad_sum, float eps, \
                             int64_t width, float* grad_x, float* grad_weight);                           \
  void swiglu_row(const float* gate, const float* up, int64_t width, float* out);                         \
  void swiglu_backward_row(const float* gate, const float* up, const float* grad, int64_t width, float* grad_gate, \
                           float* grad_up);                                                               \
  /* One head of 2 half numbers, cos and sin as many; out may not be x. */                                \
  void rotary_head(const float* x, const float* cos, const float* sin, int64_t half, float* out);         \
  void narrow_row(const float* x, int64_t width, uint16_t* out);                                          \
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
  /* scores[i] = exp(scale * scores[i] - max), with 0 from `count` on to `width`, a multiple of 16. */    \
  SoftmaxSums softmax_row(float* scores, int64_t count, int64_t width, float scale);                      \
  /* scores = p, their softmax, and grads = p (grads - sum of p grads) scale, with 0 likewise. */         \
  void softmax_backward_row(float* scores, float* grads, int64_t count, int64_t width, float scale);      \
  void adamw_range(const AdamWStep& step, int64_t begin, int64_t end);                                    \
  }

SOCPO_DECLARE_KERNELS(baseline)
#ifdef SOCPO_X86
SOCPO_DECLARE_KERNELS(avx2)
SOCPO_DECLARE_KERNELS(avx512)
#endif

}  // namespace socpo
