// Shared by `sample` and `linear_sample`: a draw goes over its row in tiles of SAMPLE_TILE tokens,
// whose results are merged in order. So a draw does not depend on where the logits come from, nor
// on which thread computed which tile.

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

// Reads the settings of all draws, in the order of the draws.
std::vector<DrawSettings> read_settings(const at::Tensor& row_keys, const at::Tensor& temperature,
                                        const at::Tensor& top_k, const at::Tensor& top_p,
                                        const at::Tensor& min_p);

struct Drawn {
  int64_t token_id;
  float logprob, entropy;  // nats, of the softmax under the temperature over the whole vocabulary
  float kept_mass;
};

inline int64_t num_tiles_of(int64_t vocab) { return (vocab + SAMPLE_TILE - 1) / SAMPLE_TILE; }

// Returns max and sums of a tile of `count` logits; `weights` has room for SAMPLE_TILE.
TileDraw sum_tile(const float* logits, int count, float inverse_temperature, float* weights);

// Writes the tile's best token to `tile`; the other arguments are those of sum_tile.
void pick_token(const float* logits, const float* weights, int64_t first_id, int count,
                const DrawSettings& settings, TileDraw& tile);

// Merges the tiles of a whole row into its draw. The settings have no filter.
Drawn merge_tiles(const TileDraw* tiles, int64_t num_tiles, const DrawSettings& settings);

// Draws from a row of logits, filtered or not.
Drawn draw_row(const float* logits, int64_t vocab, const DrawSettings& settings);

}  // namespace socpo
