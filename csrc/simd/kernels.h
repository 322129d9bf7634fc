// The compute of the CPU ops, compiled once per instruction set. Each set is one namespace with the
// same functions, listed in SOCPO_SIMD_FUNCTIONS.
//
// Files in csrc/simd/ include only headers of this folder and C headers. An inline function of the
// standard library or of ATen that is compiled here for AVX-512 could be the copy that the linker
// keeps for the whole extension, and crash older machines.

#pragma once

#include <stdint.h>

namespace socpo {

// Keys of one attention partial; splits start at multiples of it in every sequence.
constexpr int KEY_SPLIT = 128;
// Keys packed at a time, so that they stay in the first-level cache.
constexpr int KEY_TILE = 32;

// Tokens of a row in one tile of a draw. Tiles start at multiples of it; a multiple of GROUP_OUTS.
constexpr int SAMPLE_TILE = 768;

// Sums over a tile, with x = (logit - max) / temperature: of exp(x), and of x exp(x).
struct TileSums {
  float sum, weighted;
};

// What one draw keeps of a tile of its row.
struct TileDraw {
  float max;  // the tile's largest logit; -inf when there is no other
  TileSums sums;
  int32_t token_id;  // the best one
  float logit;       // of token_id
  float score;       // of token_id: x + Gumbel noise; -inf when the tile has no token to draw
};

// The result of one pass over a row of logits, with x = (logit - max) * inverse_temperature.
struct RowSums {
  double max;       // the largest logit; -inf when there is no other
  double sum;       // of exp(x)
  double weighted;  // of x exp(x), when asked for
};

// The result of the softmax of a row of scores, with x = scale * score.
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

// Memory that a thread reads next, prefetched in pieces while it computes on what it has. Spreading
// the prefetches over the computation matters: many at once had no effect (measured on Zen 5).
//
//   item n     |==== compute =====|==== compute =====|
//   item n+1   |p  p  p  p  p  p  |==== compute =====|     p: a piece's lines, one step at a time
//   item n+2                      |p  p  p  p  p  p  |
constexpr int PIECE_BYTES = 2048;  // at most
struct Piece {
  const char* from;
  int64_t num_bytes;
};
struct PrefetchQueue {
  const Piece* pieces;
  int64_t count;
};

// Query rows that see the same split of keys: `num_tokens` tokens of `group` heads each. They are
// tokens of one sequence, or one token each of siblings that share the pages of this split.
struct AttentionBlock {
  const float* q;        // first token's first head of the group
  int64_t token_stride;  // floats between tokens of q
  const void* k_cache;   // first slot's key of this KV head, fp32 or bf16
  const void* v_cache;
  bool is_bf16;
  int64_t slot_stride;  // elements between tokens of the cache (K * E)
  const int32_t* block_table;
  int64_t page_size;
  int64_t start;    // position of the split's first key
  int64_t visible;  // keys from there on that the first token sees, >= 1; each further token sees
                    // one more
  int64_t num_tokens, group, head_dim;
  float scale;
  AttentionPartial partial;
  void* scratch;            // attention_scratch_bytes, aligned to 64
  PrefetchQueue* prefetch;  // loses the pieces that were prefetched
};

// Up to so many rows linear_block is faster on unpacked x, beyond them on panels (measured).
constexpr int FEW_ROWS = 24;
constexpr int PANEL_ROWS = 64;  // rows of a panel at most
// Outputs of a linear layer computed together; ranges of outputs should start at multiples of it.
constexpr int GROUP_OUTS = 48;

// A product of rows of x and rows of weights, all contiguous in `width`; outputs are contiguous.
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

// Every function of csrc/simd, once: F(result, name, parameters). A new one is a line here and its
// definition; declarations, the table below and its filling for each instruction set follow from
// it.
// clang-format off
#define SOCPO_SIMD_FUNCTIONS(F)                                                                    \
  /* Returns the largest of the logits; -inf when there is no other. */                            \
  F(float, tile_max, (const float* logits, int count))                                             \
  /* Writes weights[i] = exp(x_i) <= 1, padded with 0 to a whole vector; `max` is at least the     \
     largest logit. Returns their sums. */                                                         \
  F(TileSums, tile_weights,                                                                        \
    (const float* logits, int count, float max, float inverse_temperature, float* weights))        \
  /* Writes the best token by x + noise to `draw`, which on entry holds max and score -inf. */     \
  F(void, tile_draw,                                                                               \
    (const float* logits, const float* weights, int count, int64_t first_id,                       \
     float inverse_temperature, uint64_t row_key, TileDraw& draw))                                 \
  F(void, linear_block, (const LinearBlock& block))                                                \
  /* Packs rows for linear_block; num_rows and width are rounded up to 16 in the panel. */         \
  F(void, pack_panel,                                                                              \
    (const float* x, int64_t x_stride, int64_t num_rows, int64_t width, float* panel))             \
  /* Writes sum = x + residual and y = its norm; without a residual (null) y = the norm of x, and  \
     no sum. */                                                                                    \
  F(void, rms_norm_row,                                                                            \
    (const float* x, const float* residual, const float* weight, float eps, int64_t width,         \
     float* sum, float* y))                                                                        \
  /* Writes grad_x = grad_sum (null: 0) + the norm's gradient, and adds to grad_weight. */         \
  F(void, rms_norm_backward_row,                                                                   \
    (const float* x, const float* weight, const float* grad_y, const float* grad_sum, float eps,   \
     int64_t width, float* grad_x, float* grad_weight))                                            \
  F(void, swiglu_row, (const float* gate, const float* up, int64_t width, float* out))             \
  F(void, swiglu_backward_row,                                                                     \
    (const float* gate, const float* up, const float* grad, int64_t width, float* grad_gate,       \
     float* grad_up))                                                                              \
  /* Rotates a head of 2 * half numbers; cos and sin have as many; out is not x. */                \
  F(void, rotary_head,                                                                             \
    (const float* x, const float* cos, const float* sin, int64_t half, float* out))                \
  /* Rounds a row to bf16. */                                                                      \
  F(void, narrow_row, (const float* x, int64_t width, uint16_t* out))                              \
  /* Fills block.partial. */                                                                       \
  F(void, attend_split, (const AttentionBlock& block))                                             \
  /* Merges `from` into `into`; the splits of a row are merged in ascending order. */              \
  F(void, merge_partials,                                                                          \
    (const AttentionPartial& into, const AttentionPartial& from, int64_t num_rows,                 \
     int64_t head_dim))                                                                            \
  /* Writes o[row] = out[row] / sum[row]. */                                                       \
  F(void, finish_rows,                                                                             \
    (const AttentionPartial& partial, int64_t num_rows, int64_t head_dim, float* o))               \
  /* Returns online max and sums (Milakov and Gimelshein 2018) in one pass over the row. */        \
  F(RowSums, row_sums,                                                                             \
    (const float* logits, int64_t vocab, float inverse_temperature, bool need_weighted))           \
  /* Writes grad[i] = exp(x_i) (scale + slope x_i), 0 for x_i = -inf; may be done in place. */     \
  F(void, row_gradient,                                                                            \
    (const float* logits, float* grad, int64_t vocab, float inverse_temperature, float max,        \
     float scale, float slope))                                                                    \
  /* Replaces scores by exp(scale * score - max), and by 0 from `count` up to `width`, a multiple  \
     of 16. */                                                                                     \
  F(SoftmaxSums, softmax_row, (float* scores, int64_t count, int64_t width, float scale))          \
  /* Replaces scores by p, their softmax, and grads by p (grads - sum of p grads) scale; padded    \
     with 0 likewise. */                                                                           \
  F(void, softmax_backward_row,                                                                    \
    (float* scores, float* grads, int64_t count, int64_t width, float scale))                      \
  F(void, adamw_range, (const AdamWStep& step, int64_t begin, int64_t end))
// clang-format on

// The functions of one instruction set.
struct Kernels {
#define SOCPO_MEMBER(result, name, parameters) result(*name) parameters;
  SOCPO_SIMD_FUNCTIONS(SOCPO_MEMBER)
#undef SOCPO_MEMBER
};

// A namespace for each instruction set: its functions, e.g. avx2::tile_max, and the table of them.
#define SOCPO_DECLARE(result, name, parameters) result name parameters;
#define SOCPO_ENTRY(result, name, parameters) name,
#define SOCPO_DECLARE_ISA(isa)                                  \
  namespace isa {                                               \
  SOCPO_SIMD_FUNCTIONS(SOCPO_DECLARE)                           \
  constexpr Kernels KERNELS{SOCPO_SIMD_FUNCTIONS(SOCPO_ENTRY)}; \
  }

SOCPO_DECLARE_ISA(baseline)
#ifdef SOCPO_X86
SOCPO_DECLARE_ISA(avx2)
SOCPO_DECLARE_ISA(avx512)
#endif

}  // namespace socpo
