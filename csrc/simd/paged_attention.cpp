// Attention of a block of query rows over one split of the keys of one KV head, and the merging of
// splits.
//
// Scores: keys are packed in groups of 4 floats, LANES / 4 keys to a vector. A register tile of
// TILE_ROWS rows x LANES keys then needs no horizontal sum: four accumulators a row become LANES
// scores in six shuffles. Values: a tile of rows x head dim stays in registers over the keys of a
// tile. Either way a key or value is loaded once for all rows of a tile.
//
// Rows are batch-invariant: whichever rows share a tile, a row's sums run over the head dim and
// over the keys in the same order, end at the row's own last key, and start anew at each split.
// Hence a prompt and a single token, siblings together and siblings apart are bitwise equal.

#include <float.h>
#include <math.h>

#include "groups.h"
#include "kernels.h"
#include "prefetch.h"

namespace socpo::SOCPO_ISA {
namespace {

// Each row has 4 accumulators, of 32 or 16 registers in all.
constexpr int TILE_ROWS = LANES == 16 ? 6 : LANES == 8 ? 3 : 2;

// Writes [rows, head_dim / 4][LANES]: every four floats of a row, repeated for LANES / 4 keys.
inline void repeat_queries(const float* from, int64_t num_floats, float* to) {
  for (int64_t e = 0; e < num_floats; e += 4)
    for (int i = 0; i < LANES; i += 4) store(to + e * GROUPS + i, load<Vec4>(from + e));
}

// Packs keys into panels of LANES keys, [head_dim / 4][4][LANES]: key 4 m + j of a panel is group m
// of vector j.
template <typename T>
inline void pack_keys(const T* k_cache, const int64_t* offsets, int count, int64_t head_dim,
                      float* panel) {
  for (int first = 0; first < count; first += LANES, panel += LANES * head_dim)
    for (int j = 0; j < 4; ++j) {
      const T* k[GROUPS];
      for (int m = 0; m < GROUPS; ++m)
        k[m] = k_cache + offsets[smaller(first + 4 * m + j, count - 1)];
      float* const to = panel + j * LANES;
      int64_t e = 0;
      for (; e + LANES <= head_dim; e += LANES) {
        Vec x[GROUPS];
        for (int m = 0; m < GROUPS; ++m) x[m] = load_wide<Vec>(k[m] + e);
        transpose_groups(x);
        for (int m = 0; m < GROUPS; ++m) store(to + (e + 4 * m) * LANES, x[m]);
      }
      for (; e < head_dim; e += 4)
        for (int m = 0; m < GROUPS; ++m) store(to + e * LANES + 4 * m, load_wide<Vec4>(k[m] + e));
    }
}

// Writes scores[r][0 .. LANES - 1] = q[r] . the panel's keys, for ROWS rows of repeated queries.
template <int ROWS>
void score_panel(const float* q, const float* panel, int64_t head_dim, const char* piece,
                 float* scores) {
  Vec sums[ROWS][4] = {};
  for (int64_t e = 0; e < head_dim; e += 4) {
    prefetch_lines<2>(piece, e / 4);
    Vec x[ROWS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) x[r] = load<Vec>(q + (r * head_dim + e) * GROUPS);
#pragma GCC unroll 8
    for (int j = 0; j < 4; ++j) {
      const Vec k = load<Vec>(panel + (e + j) * LANES);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) sums[r][j] += k * x[r];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) store(scores + r * KEY_SPLIT, sum_groups(sums[r]));
}

// Replaces a row's scores by exp(score - max), and by 0 from `count` up to a whole vector.
inline void softmax_row(float* scores, int count, float scale, float& max_score, float& sum) {
  Vec largest = broadcast(-FLT_MAX);  // finite, so that a split of nothing but -inf weighs 0
  for (int j = 0; j < count; j += LANES) {
    const Vec x = keep_first(load<Vec>(scores + j) * scale, count - j, -INFINITY);
    store(scores + j, x);
    largest = max(largest, x);
  }
  max_score = max_lane(largest);
  Vec sums = {};
  for (int j = 0; j < count; j += LANES) {
    const Vec p = exp_nonpositive(load<Vec>(scores + j) - max_score);
    store(scores + j, p);
    sums += p;
  }
  sum = sum_lanes(sums);
}

// Adds p[r][j] v[j][0 ..] for j < counts[r], in the order of j, to out[r][0 ..], for ROWS rows and
// COUNT vectors of type V.
template <typename V, int ROWS, int COUNT>
inline void add_values(const float* const* v, const int* counts, const float* p, int64_t head_dim,
                       int64_t e, const char* piece, float* out) {
  constexpr int WIDTH = sizeof(V) / sizeof(float);
  V sums[ROWS][COUNT];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < COUNT; ++i) sums[r][i] = load<V>(out + r * head_dim + e + i * WIDTH);
  int64_t j = 0;
  for (; j < counts[0]; ++j) {
    V x[COUNT];
    prefetch_lines<1>(piece, j);
#pragma GCC unroll 8
    for (int i = 0; i < COUNT; ++i) x[i] = load<V>(v[j] + e + i * WIDTH);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
      for (int i = 0; i < COUNT; ++i) sums[r][i] += x[i] * p[r * KEY_SPLIT + j];
  }
  // The few keys that only later tokens see, so that no key is multiplied by a masked 0.
  for (; j < counts[ROWS - 1]; ++j)
#pragma GCC unroll 8
    for (int r = 1; r < ROWS; ++r)
      if (j < counts[r])
#pragma GCC unroll 8
        for (int i = 0; i < COUNT; ++i)
          sums[r][i] += load<V>(v[j] + e + i * WIDTH) * p[r * KEY_SPLIT + j];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < COUNT; ++i) store(out + r * head_dim + e + i * WIDTH, sums[r][i]);
}

template <int ROWS>
void add_tile(const float* const* v, const int* counts, const float* p, int64_t head_dim,
              PrefetchQueue& queue, float* out) {
  int64_t e = 0;
  for (; e + 4 * LANES <= head_dim; e += 4 * LANES)
    add_values<Vec, ROWS, 4>(v, counts, p, head_dim, e, take_piece(queue, p), out);
  for (; e + 2 * LANES <= head_dim; e += 2 * LANES)
    add_values<Vec, ROWS, 2>(v, counts, p, head_dim, e, take_piece(queue, p), out);
  for (; e + LANES <= head_dim; e += LANES)
    add_values<Vec, ROWS, 1>(v, counts, p, head_dim, e, take_piece(queue, p), out);
  for (; e < head_dim; e += 4)
    add_values<Vec4, ROWS, 1>(v, counts, p, head_dim, e, take_piece(queue, p), out);
}

template <int N>
struct Constant {
  static constexpr int value = N;
};

// Calls work(row, Constant<rows>) for tiles of rows of about the same size.
template <typename Work, int ROWS = TILE_ROWS>
inline void with_rows(int rows, const Work& work) {
  if constexpr (ROWS > 0) {
    if (rows == ROWS) return work(Constant<ROWS>{});
    with_rows<Work, ROWS - 1>(rows, work);
  }
}

template <typename Work>
inline void for_each_row_tile(int num_rows, const Work& work) {
  for (int row = 0; row < num_rows;) {
    const int left = num_rows - row;
    const int num_tiles = (left + TILE_ROWS - 1) / TILE_ROWS;
    const int rows = (left + num_tiles - 1) / num_tiles;
    with_rows(rows, [&](auto constant) { work(row, constant); });
    row += rows;
  }
}

// Writes the offset of each of the split's keys from the start of the cache, in elements.
inline void find_keys(const AttentionBlock& block, int num_keys, int64_t* offsets) {
  int64_t page = block.start / block.page_size, slot = block.start % block.page_size;
  for (int j = 0; j < num_keys; ++j) {
    offsets[j] = (block.block_table[page] * block.page_size + slot) * block.slot_stride;
    if (++slot == block.page_size) {
      slot = 0;
      ++page;
    }
  }
}

// Points v at a tile's values: fp32 ones in the cache itself, bf16 ones widened into `buffer`.
inline void find_values(const float* v_cache, const int64_t* offsets, int count, int64_t, float*,
                        const float** v) {
  for (int j = 0; j < count; ++j) v[j] = v_cache + offsets[j];
}

inline void find_values(const uint16_t* v_cache, const int64_t* offsets, int count,
                        int64_t head_dim, float* buffer, const float** v) {
  for (int j = 0; j < count; ++j) {
    int64_t e = 0;
    for (; e + LANES <= head_dim; e += LANES)
      store(buffer + j * head_dim + e, load_wide<Vec>(v_cache + offsets[j] + e));
    for (; e < head_dim; e += 4)
      store(buffer + j * head_dim + e, load_wide<Vec4>(v_cache + offsets[j] + e));
    v[j] = buffer + j * head_dim;
  }
}

template <typename T>
void attend(const AttentionBlock& block) {
  const int64_t head_dim = block.head_dim;
  const int num_rows = (int)(block.num_tokens * block.group);
  const int num_keys = smaller(KEY_SPLIT, block.visible + block.num_tokens - 1);
  float* const tile = (float*)block.scratch;  // packed keys, then values
  float* const scores = tile + KEY_TILE * head_dim;
  float* const q = scores + num_rows * KEY_SPLIT;
  int32_t* const counts = (int32_t*)(q + num_rows * head_dim * GROUPS);
  int64_t offsets[KEY_SPLIT];
  find_keys(block, num_keys, offsets);
  for (int64_t token = 0, row = 0; token < block.num_tokens; ++token) {
    repeat_queries(block.q + token * block.token_stride, block.group * head_dim,
                   q + row * head_dim * GROUPS);
    for (int64_t end = row + block.group; row < end; ++row)
      counts[row] = smaller(KEY_SPLIT, block.visible + token);
  }

  for (int start = 0; start < num_keys; start += KEY_TILE) {
    const int count = smaller(KEY_TILE, num_keys - start);
    pack_keys((const T*)block.k_cache, offsets + start, count, head_dim, tile);
    for_each_row_tile(num_rows, [&](int row, auto rows) {
      if (counts[row + rows.value - 1] <= start) return;
      for (int j = 0; j < count; j += LANES)
        score_panel<rows.value>(q + row * head_dim * GROUPS, tile + j * head_dim, head_dim,
                                take_piece(*block.prefetch, tile),
                                scores + row * KEY_SPLIT + start + j);
    });
  }
  const AttentionPartial& partial = block.partial;
  for (int row = 0; row < num_rows; ++row)
    softmax_row(scores + row * KEY_SPLIT, counts[row], block.scale, partial.max[row],
                partial.sum[row]);

  memset(partial.out, 0, num_rows * head_dim * sizeof(float));
  for (int start = 0; start < num_keys; start += KEY_TILE) {
    const int count = smaller(KEY_TILE, num_keys - start);
    const float* v[KEY_TILE];
    find_values((const T*)block.v_cache, offsets + start, count, head_dim, tile, v);
    for_each_row_tile(num_rows, [&](int row, auto rows) {
      int visible[rows.value];
      for (int r = 0; r < rows.value; ++r) visible[r] = smaller(count, counts[row + r] - start);
      if (visible[rows.value - 1] <= 0) return;
      add_tile<rows.value>(v, visible, scores + row * KEY_SPLIT + start, head_dim, *block.prefetch,
                           partial.out + row * head_dim);
    });
  }
}

}  // namespace

void attend_split(const AttentionBlock& block) {
  if (block.is_bf16) {
    attend<uint16_t>(block);
  } else {
    attend<float>(block);
  }
}

void merge_partials(const AttentionPartial& into, const AttentionPartial& from, int64_t num_rows,
                    int64_t head_dim) {
  for (int64_t row = 0; row < num_rows; ++row) {
    const float a = into.max[row], b = from.max[row], largest = a > b ? a : b;
    const Vec factors = exp_nonpositive(Vec{a, b} - largest);
    const float old_factor = factors[0], new_factor = factors[1];
    into.max[row] = largest;
    into.sum[row] = into.sum[row] * old_factor + from.sum[row] * new_factor;
    for (int64_t e = row * head_dim; e < (row + 1) * head_dim; ++e)
      into.out[e] = into.out[e] * old_factor + from.out[e] * new_factor;
  }
}

void finish_rows(const AttentionPartial& partial, int64_t num_rows, int64_t head_dim, float* o) {
  for (int64_t row = 0; row < num_rows; ++row)
    for (int64_t e = row * head_dim; e < (row + 1) * head_dim; ++e)
      o[e] = partial.out[e] / partial.sum[row];
}

}  // namespace socpo::SOCPO_ISA
