// What `sample`, from logits, and `linear_sample`, from hidden states, share: the draws of tiles put together, and the
// second path of draws that top-k, top-p or min-p restrict.

#pragma once

#include <ATen/core/Tensor.h>

#include "cpu.h"

namespace socpo {

struct Drawn {
  int64_t token_id;
  float logprob, entropy, kept_mass;
};

// temperature, top_k, top_p, min_p and key of each draw.
struct DrawSettings {
  const int64_t *row_keys, *top_k;
  const float *temperature, *top_p, *min_p;

  DrawSettings(const at::Tensor& row_keys, const at::Tensor& temperature, const at::Tensor& top_k, const at::Tensor& top_p,
               const at::Tensor& min_p);
  SampleRow row(int64_t draw) const;
  bool is_filtered(int64_t draw) const { return top_k[draw] != 0 || top_p[draw] != 1 || min_p[draw] != 0; }
};

// The tiles of a row, in order.
Drawn merge_tiles(const SampleRow& row, const TileDraw* tiles, int64_t num_tiles);

// `drawn` with the token, log-prob and kept mass of a draw among the tokens that its filters keep.
Drawn draw_filtered(const DrawSettings& settings, int64_t draw, const float* logits, int64_t vocab, Drawn drawn);

}  // namespace socpo
