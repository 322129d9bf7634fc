// Attention of a block of query rows over the pages of one sequence and one KV head.
//
// Keys go by in tiles of KEY_TILE, the same tiles for every row; within a tile each row does the same operations in the
// same order whichever rows share its block, and a tile ends at the row's own position. So the bits of a row depend on
// its query, its keys and nothing else. Online softmax (Milakov and Gimelshein 2018): `max` and `sum` run along.

#include <math.h>

#include "kernels.h"
#include "simd.h"

namespace socpo::SOCPO_ISA {
namespace {

struct Tile {
  const float* k[KEY_TILE];
  const float* v[KEY_TILE];
};

// Addresses of `count` keys from position `start`; the rest repeat the last one, so that they can be read.
inline void gather_tile(const AttentionBlock& block, int64_t start, int count, Tile& tile) {
  int64_t page = start / block.page_size, slot = start % block.page_size;
  for (int j = 0; j < KEY_TILE; ++j) {
    const int64_t offset = (block.block_table[page] * block.page_size + slot) * block.slot_stride;
    tile.k[j] = block.k_cache + offset;
    tile.v[j] = block.v_cache + offset;
    if (j + 1 < count && ++slot == block.page_size) {
      slot = 0;
      ++page;
    }
  }
}

// scores[j] = q . k_j for four keys, so that q is loaded once for all.
inline void dot_4(const float* q, const float* const* k, int64_t head_dim, float* scores) {
  Vec sums[4] = {};
  Vec4 tails[4] = {};
  int64_t e = 0;
  for (; e + LANES <= head_dim; e += LANES) {
    const Vec x = load<Vec>(q + e);
    for (int j = 0; j < 4; ++j) sums[j] += x * load<Vec>(k[j] + e);
  }
  for (; e < head_dim; e += 4)
    for (int j = 0; j < 4; ++j) tails[j] += load<Vec4>(q + e) * load<Vec4>(k[j] + e);
  for (int j = 0; j < 4; ++j)
    scores[j] = sum_lanes(sums[j]) + ((tails[j][0] + tails[j][2]) + (tails[j][1] + tails[j][3]));
}

// out[e] = out[e] * rescale + sum_j p[j] v_j[e] for COUNT vectors of V from e on, j in order.
template <typename V, int COUNT>
inline void add_values(const float* const* v, const float* p, int count, float rescale, int64_t e, float* out) {
  constexpr int WIDTH = sizeof(V) / sizeof(float);
  V sums[COUNT];
  for (int i = 0; i < COUNT; ++i) sums[i] = load<V>(out + e + i * WIDTH) * rescale;
  for (int j = 0; j < count; ++j)
    for (int i = 0; i < COUNT; ++i) sums[i] += load<V>(v[j] + e + i * WIDTH) * p[j];
  for (int i = 0; i < COUNT; ++i) store(out + e + i * WIDTH, sums[i]);
}

// Adds the tile's first `count` keys to one row's state.
inline void attend_tile(const AttentionBlock& block, const Tile& tile, int count, const float* q, float* out, float& max_score,
                        float& sum) {
  float scores[KEY_TILE];
  for (int j = 0; j < KEY_TILE; ++j) scores[j] = -INFINITY;
  for (int j = 0; j < count; j += 4) dot_4(q, tile.k + j, block.head_dim, scores + j);
  float new_max = max_score;
  for (int j = 0; j < KEY_TILE; ++j) {
    scores[j] = j < count ? scores[j] * block.scale : -INFINITY;
    new_max = scores[j] > new_max ? scores[j] : new_max;
  }
  Vec tile_sum = {};
  for (int j = 0; j < KEY_TILE; j += LANES) {
    const Vec p = exp_nonpositive(load<Vec>(scores + j) - new_max);
    store(scores + j, p);
    tile_sum += p;
  }
  const float rescale = exp_nonpositive(broadcast(max_score - new_max))[0];
  max_score = new_max;
  sum = sum * rescale + sum_lanes(tile_sum);
  int64_t e = 0;
  for (; e + 4 * LANES <= block.head_dim; e += 4 * LANES) add_values<Vec, 4>(tile.v, scores, count, rescale, e, out);
  for (; e + LANES <= block.head_dim; e += LANES) add_values<Vec, 1>(tile.v, scores, count, rescale, e, out);
  for (; e < block.head_dim; e += 4) add_values<Vec4, 1>(tile.v, scores, count, rescale, e, out);
}

}  // namespace

void attend_block(const AttentionBlock& block) {
  const int64_t num_rows = block.num_tokens * block.group, last = block.first_position + block.num_tokens;
  float* const max_scores = block.scratch;
  float* const sums = max_scores + num_rows;
  float* const outs = sums + num_rows;  // [rows, head_dim], not yet divided by the sums
  for (int64_t row = 0; row < num_rows; ++row) max_scores[row] = -INFINITY;
  for (int64_t i = 0; i < num_rows * (block.head_dim + 1); ++i) sums[i] = 0;
  for (int64_t start = 0; start < last; start += KEY_TILE) {
    Tile tile;
    gather_tile(block, start, (int)(last - start < KEY_TILE ? last - start : KEY_TILE), tile);
    for (int64_t row = 0; row < num_rows; ++row) {
      const int64_t token = row / block.group, visible = block.first_position + token + 1 - start;
      if (visible <= 0) continue;
      const float* q = block.q + token * block.token_stride + row % block.group * block.head_dim;
      const int count = (int)(visible < KEY_TILE ? visible : KEY_TILE);
      attend_tile(block, tile, count, q, outs + row * block.head_dim, max_scores[row], sums[row]);
    }
  }
  for (int64_t row = 0; row < num_rows; ++row) {
    float* o = block.o + row / block.group * block.token_stride + row % block.group * block.head_dim;
    for (int64_t e = 0; e < block.head_dim; ++e) o[e] = outs[row * block.head_dim + e] / sums[row];
  }
}

}  // namespace socpo::SOCPO_ISA
