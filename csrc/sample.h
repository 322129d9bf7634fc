// What `sample` and `linear_sample` share: a draw goes over its row in tiles of SAMPLE_TILE tokens, whose results are
// merged in their order. So where the logits come from, and which thread saw which tile, changes no bit.

#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "cpu.h"

namespace socpo {

struct DrawSettings {
  float inverse_temperature;
  uint64_t row_key;
  bool is_greedy;
  int64_t top_k;
  float top_p, min_p;

  bool is_filtered() const { return top_k > 0 || top_p < 1 || min_p > 0; }
};

// The settings of all draws, in the order of the draws.
std::vector<DrawSettings> read_settings(const at::Tensor& row_keys, const at::Tensor& temperature, const at::Tensor& top_k,
                                        const at::Tensor& top_p, const at::Tensor& min_p);

struct Drawn {
  int64_t token_id;
  float logprob, entropy;  // nats, of the softmax under the temperature over the whole vocabulary
  float kept_mass;
};

inline int64_t num_tiles_of(int64_t vocab) { return (vocab + SAMPLE_TILE - 1) / SAMPLE_TILE; }

// Max and sums of a tile of `count` logits; `weights` has room for SAMPLE_TILE.
TileDraw sum_tile(const float* logits, int count, float inverse_temperature, float* weights);

// The tile's best token into `tile`; `logits`, `weights` and `tile` as sum_tile had and left them.
void pick_token(const float* logits, const float* weights, int64_t first_id, int count, const DrawSettings& settings,
                TileDraw& tile);

// The draw from the tiles of a whole row. The settings have no filter.
Drawn merge_tiles(const TileDraw* tiles, int64_t num_tiles, const DrawSettings& settings);

// One draw from a row of logits, filtered or not.
Drawn draw_row(const float* logits, int64_t vocab, const DrawSettings& settings);

}  // namespace socpo
