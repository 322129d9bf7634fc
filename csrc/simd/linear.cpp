// out = x weight^T (+ bias) in fp32, from weights as checkpoints store them: one row an output,
// fp32 or bf16.
//
// An output has LANES partial sums, each of every LANES-th product: fused multiply-adds over PART
// weights in order. They are folded by a fixed tree, and parts are added in order:
//
//   lane 0   w0 x0 + w16 x16 + ..  .
//   lane 1   w1 x1 + w17 x17 + ..  .  fold ->  part 0  +  part 1  +  ..  =  out
//   ..                             .
//
// So an output is batch-invariant: it depends on its row of x and its row of weights, neither on
// the number of rows nor on which of the two forms below runs. A token is bitwise the same in a
// prompt, in a batch and alone.
//
// Few rows: the partial sums of an output are the lanes of one register, folded at the end. Many
// rows: the lanes are rows of x, packed once into a panel; a tile computes one partial sum after
// another, broadcasting each weight from memory, and no lane is folded. Weights are never copied.
// Both forms prefetch the next tile's weights in even shares, so that memory and arithmetic
// overlap.

#include "groups.h"
#include "kernels.h"

namespace socpo::SOCPO_ISA {
namespace {

constexpr int PART = 768;  // weights of an output summed at once: a tile of them stays in L1
constexpr int SUMS = LANES == 16 ? 24 : 12;    // accumulators of a tile, of 32 or 16 registers
constexpr int MAX_VECS = LANES == 16 ? 4 : 2;  // vectors of a panel's rows in a tile
constexpr int TILE_OUTS = LANES == 16 ? 6 : 4, TILE_ROWS = SUMS / TILE_OUTS;  // where rows are few

template <int COUNT>
inline void fold_all(Vec* sums, float* out) {
  if constexpr (COUNT > LANES) {
    fold<LANES>(sums, out);
    fold_all<COUNT - LANES>(sums + LANES, out + LANES);
  } else {
    fold<COUNT>(sums, out);
  }
}

// Computes the sums of ROWS x OUTS outputs over `width` weights, and prefetches PREFETCHED rows of
// weights from `next_tile` on.
template <int ROWS, int OUTS, int PREFETCHED, typename Weight>
inline void tile_sums(const float* x, int64_t x_stride, const Weight* weight, int64_t weight_stride,
                      int64_t width, const Weight* next_tile, Vec* sums) {
  Vec acc[ROWS][OUTS] = {};
  int64_t k = 0;
  for (; k + LANES <= width; k += LANES) {
    Vec rows[ROWS];
    for (int i = 0; i < ROWS; ++i) rows[i] = load<Vec>(x + i * x_stride + k);
    for (int j = 0; j < PREFETCHED; ++j) __builtin_prefetch(next_tile + j * weight_stride + k);
    for (int j = 0; j < OUTS; ++j) {
      const Vec w = load_wide(weight + j * weight_stride + k);
      for (int i = 0; i < ROWS; ++i) acc[i][j] += rows[i] * w;
    }
  }
  if (k < width) {
    Vec rows[ROWS];
    for (int i = 0; i < ROWS; ++i)
      rows[i] = opaque(load_first(x + i * x_stride + k, (int)(width - k)));
    for (int j = 0; j < OUTS; ++j) {
      const Vec w = opaque(load_first(weight + j * weight_stride + k, (int)(width - k)));
      for (int i = 0; i < ROWS; ++i) acc[i][j] += rows[i] * w;
    }
  }
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < OUTS; ++j) sums[i * OUTS + j] = acc[i][j];
}

template <int ROWS, int OUTS, int PREFETCHED, typename Weight>
inline void tile(const LinearBlock& block, int64_t row, int64_t out, const Weight* weight,
                 int64_t weight_stride, int64_t start, int64_t width, const Weight* next_tile) {
  Vec sums[ROWS * OUTS];
  float outs[(ROWS * OUTS + LANES - 1) / LANES * LANES];
  const float* const x = block.x + row * block.x_stride + start;
  tile_sums<ROWS, OUTS, PREFETCHED>(x, block.x_stride, weight, weight_stride, width, next_tile,
                                    sums);
  fold_all<ROWS * OUTS>(sums, outs);
  float* const to = block.out + row * block.out_stride + out;
  if (start == 0 && block.bias == nullptr) {
    for (int i = 0; i < ROWS; ++i)
      memcpy(to + i * block.out_stride, outs + i * OUTS, OUTS * sizeof(float));
  } else {
    for (int i = 0; i < ROWS; ++i) {
      const float* before = start > 0 ? to + i * block.out_stride : block.bias + out;
      for (int j = 0; j < OUTS; ++j) to[i * block.out_stride + j] = before[j] + outs[i * OUTS + j];
    }
  }
}

// Computes all rows of the block for OUTS outputs from `out` on, over one part. Each tile of rows
// prefetches PREFETCHED of the next OUTS rows of weights.
template <int OUTS, int PREFETCHED, typename Weight>
inline void tile_column(const LinearBlock& block, int64_t out, const Weight* weight,
                        int64_t weight_stride, int64_t start, int64_t width) {
  int64_t row = 0;
  const Weight* next_tile = weight + OUTS * weight_stride;
  const Weight* const end = next_tile + (PREFETCHED > 0 ? OUTS * weight_stride : 0);
  for (; row + TILE_ROWS <= block.num_rows && next_tile < end;
       row += TILE_ROWS, next_tile += PREFETCHED * weight_stride)
    tile<TILE_ROWS, OUTS, PREFETCHED>(block, row, out, weight, weight_stride, start, width,
                                      next_tile);
  for (; row + TILE_ROWS <= block.num_rows; row += TILE_ROWS)
    tile<TILE_ROWS, OUTS, 0>(block, row, out, weight, weight_stride, start, width, next_tile);
  const int64_t left = block.num_rows - row;
  if (left == 3) tile<3, OUTS, 0>(block, row, out, weight, weight_stride, start, width, next_tile);
  if (left == 2) tile<2, OUTS, 0>(block, row, out, weight, weight_stride, start, width, next_tile);
  if (left == 1) tile<1, OUTS, 0>(block, row, out, weight, weight_stride, start, width, next_tile);
}

// One or two rows: many outputs at once keep many streams of weights in flight. With fp32 weights
// the processor's own prefetching keeps up with them (measured).
template <int ROWS, int OUTS, typename Weight>
inline int64_t one_or_two_rows(const LinearBlock& block, const Weight* weight, int64_t start,
                               int64_t width) {
  constexpr int PREFETCHED = sizeof(Weight) == sizeof(float) ? 0 : OUTS;
  int64_t out = 0;
  for (; out + OUTS <= block.num_outs; out += OUTS) {
    const Weight* from = weight + out * block.width + start;
    tile<ROWS, OUTS, PREFETCHED>(block, 0, out, from, block.width, start, width,
                                 from + OUTS * block.width);
  }
  return out;
}

// Returns a tile's weights in fp32: themselves, or widened into `wide` with rows PART apart.
inline const float* widened(const float* weight, int64_t, int64_t, int, float*) { return weight; }
inline const float* widened(const uint16_t* weight, int64_t stride, int64_t width, int num_outs,
                            float* wide) {
  for (int j = 0; j < num_outs; ++j) {
    int64_t k = 0;
    for (; k + LANES <= width; k += LANES)
      store(wide + j * PART + k, load_wide(weight + j * stride + k));
    for (; k < width; ++k) wide[j * PART + k] = widen(weight[j * stride + k]);
  }
  return wide;
}

template <typename Weight>
inline void few_rows(const LinearBlock& block, const Weight* weight, int64_t start, int64_t width) {
  const int64_t num_tiles = block.num_rows / TILE_ROWS, stride = block.width;
  int64_t out = 0;
  if (block.num_rows == 1) out = one_or_two_rows<1, LANES / 2>(block, weight, start, width);
  if (block.num_rows == 2) out = one_or_two_rows<2, LANES / 2>(block, weight, start, width);
  for (; out + TILE_OUTS <= block.num_outs; out += TILE_OUTS) {
    const Weight* from = weight + out * stride + start;
    if (num_tiles < 2) {
      tile_column<TILE_OUTS, TILE_OUTS>(block, out, from, stride, start, width);
    } else if constexpr (sizeof(Weight) < sizeof(float)) {  // widened once for all rows
      float wide[TILE_OUTS * PART];
      tile_column<TILE_OUTS, 0>(block, out, widened(from, stride, width, TILE_OUTS, wide), PART,
                                start, width);
    } else if (num_tiles == 2) {
      tile_column<TILE_OUTS, (TILE_OUTS + 1) / 2>(block, out, from, stride, start, width);
    } else if (num_tiles < TILE_OUTS) {
      tile_column<TILE_OUTS, (TILE_OUTS + 2) / 3>(block, out, from, stride, start, width);
    } else {
      tile_column<TILE_OUTS, 1>(block, out, from, stride, start, width);
    }
  }
  for (; out < block.num_outs; ++out)
    tile_column<1, 0>(block, out, weight + out * stride + start, stride, start, width);
}

// Returns the n-th lane of fold's tree, walked from left to right.
inline int lane_of(int n) {
  const auto middle_last = [](int i) { return i % 2 * 2 + i / 2; };  // 0, 2, 1, 3
  return 4 * (LANES == 16 ? middle_last(n / 4) : n / 4) + middle_last(n % 4);
}

// Returns how many numbers of a part of `width` a lane has at most.
inline int64_t lane_length(int64_t width) { return (width + LANES - 1) / LANES; }

// Computes sums[j] = VECS x LANES rows of a panel times row j of the weights (+ bias[j]), j < OUTS.
//
// The lanes' sums are added as a binary counter carries: the sum of 2^i lanes waits in pending[i]
// for another one of as many lanes. That is the tree of `fold`, so the form for few rows agrees
// bitwise.
template <int VECS, int OUTS, typename Weight>
inline void panel_tile(const float* panel, const Weight* weight, int64_t stride, const float* bias,
                       Vec (*sums)[VECS]) {
  constexpr bool IS_WIDE = sizeof(Weight) == sizeof(float);
  constexpr int LEVELS = LANES == 16 ? 4 : LANES == 8 ? 3 : 2;
  float wide[IS_WIDE ? 1 : OUTS * PART];
  for (int64_t start = 0; start < stride; start += PART, panel += PART * VECS * LANES) {
    const int64_t width = smaller(PART, stride - start), w_stride = IS_WIDE ? stride : PART;
    const float* const w = widened(weight + start, stride, width, OUTS, wide);
    const Weight* const next_tile = weight + start + OUTS * stride;
    Vec pending[LEVELS + 1][OUTS][VECS];
    int64_t step = 0;
    for (int n = 0; n < LANES; ++n) {
      const float* x = panel + n * lane_length(width) * VECS * LANES;
      Vec acc[OUTS][VECS] = {};
      for (int64_t k = lane_of(n); k < width; k += LANES, x += VECS * LANES, ++step) {
        Vec rows[VECS];
        for (int i = 0; i < VECS; ++i) rows[i] = load<Vec>(x + i * LANES);
        if (step % 16 < OUTS) __builtin_prefetch(next_tile + step % 16 * stride + step / 16 * 16);
#pragma GCC unroll 12
        for (int j = 0; j < OUTS; ++j)
          for (int i = 0; i < VECS; ++i) acc[j][i] += rows[i] * w[j * w_stride + k];
      }
      // The form for few rows adds the tail as a vector padded with zeros, which makes -0 a 0.
      if (lane_of(n) >= width % LANES && width % LANES > 0)
        for (int j = 0; j < OUTS; ++j)
          for (int i = 0; i < VECS; ++i) acc[j][i] += Vec{};
      const int full = __builtin_ctz(~n);  // the carries after n additions
#pragma GCC unroll 12
      for (int j = 0; j < OUTS; ++j)
#pragma GCC unroll 4
        for (int i = 0; i < VECS; ++i) {
          Vec sum = acc[j][i];
          for (int level = 0; level < full; ++level) sum = pending[level][j][i] + sum;
          pending[full][j][i] = sum;
        }
    }
    for (int j = 0; j < OUTS; ++j)
      for (int i = 0; i < VECS; ++i) {
        const Vec part = pending[LEVELS][j][i];
        if (start == 0 && bias == nullptr) {
          sums[j][i] = part;
        } else {
          sums[j][i] = (start > 0 ? sums[j][i] : broadcast(bias[j])) + part;
        }
      }
  }
}

// Computes VECS x LANES rows for the first `num_outs` of GROUP_OUTS outputs.
template <int VECS, typename Weight>
void panel_group(const float* panel, const Weight* weight, int64_t stride, int num_outs,
                 const float* bias, float* to, int64_t to_stride, int64_t num_rows) {
  constexpr int OUTS = VECS == 1 ? 8 : SUMS / VECS;
  Vec sums[GROUP_OUTS][VECS];
  int out = 0;
  const auto bias_of = [&] { return bias == nullptr ? nullptr : bias + out; };
  for (; out + OUTS <= num_outs; out += OUTS)
    panel_tile<VECS, OUTS>(panel, weight + out * stride, stride, bias_of(), sums + out);
  for (; out < num_outs; ++out)
    panel_tile<VECS, 1>(panel, weight + out * stride, stride, bias_of(), sums + out);
  for (int i = 0; i < VECS; ++i)
    for (out = 0; out < num_outs; out += LANES) {
      Vec x[LANES];
      for (int j = 0; j < LANES; ++j) x[j] = out + j < num_outs ? sums[out + j][i] : Vec{};
      transpose(x);
      for (int r = 0; r < LANES && i * LANES + r < num_rows; ++r)
        store_first(to + (i * LANES + r) * to_stride + out, x[r], smaller(LANES, num_outs - out));
    }
}

template <typename Weight>
void many_rows(const LinearBlock& block, const Weight* weight) {
  const int64_t padded_width = lane_length(block.width) * LANES;
  for (int64_t first = 0; first < block.num_outs; first += GROUP_OUTS)
    for (int64_t row = 0, vecs; row < block.num_rows; row += vecs * LANES) {
      vecs = smaller(MAX_VECS, (block.num_rows - row + LANES - 1) / LANES);
      constexpr void (*GROUP[])(const float*, const Weight*, int64_t, int, const float*, float*,
                                int64_t, int64_t) = {panel_group<1>, panel_group<2>, panel_group<3>,
                                                     panel_group<4>};
      GROUP[vecs - 1](block.x + row * padded_width, weight + first * block.width, block.width,
                      smaller(GROUP_OUTS, block.num_outs - first),
                      block.bias == nullptr ? nullptr : block.bias + first,
                      block.out + row * block.out_stride + first, block.out_stride,
                      block.num_rows - row);
    }
}

template <typename Weight>
inline void whole_block(const LinearBlock& block, const Weight* weight) {
  if (block.is_panel) return many_rows(block, weight);
  for (int64_t start = 0; start < block.width; start += PART)
    few_rows(block, weight, start, smaller(PART, block.width - start));
}

}  // namespace

// Packs rows tile by tile and part by part: one lane's numbers after another, in the order in which
// panel_tile reads them.
void pack_panel(const float* x, int64_t x_stride, int64_t num_rows, int64_t width, float* panel) {
  for (int64_t row = 0; row < num_rows; row += LANES) {
    const int64_t tile = row / (MAX_VECS * LANES) * (MAX_VECS * LANES);
    const int64_t vecs = smaller(MAX_VECS, (num_rows - tile + LANES - 1) / LANES);
    for (int64_t start = 0; start < width; start += PART) {
      const int64_t length = smaller(PART, width - start);
      float* const to =
          panel + tile * lane_length(width) * LANES + start * vecs * LANES + row - tile;
      for (int64_t k = 0; k < length; k += LANES) {
        const int count = smaller(LANES, length - k);
        Vec rows[LANES];
        for (int j = 0; j < LANES; ++j) {
          const float* from = x + (row + j) * x_stride + start + k;
          rows[j] = row + j >= num_rows ? Vec{}
                    : count == LANES    ? load<Vec>(from)
                                        : load_first(from, count);
        }
        transpose(rows);
        for (int lane = 0; lane < count; ++lane)
          store(to + (lane_of(lane) * lane_length(length) + k / LANES) * vecs * LANES, rows[lane]);
      }
    }
  }
}

void linear_block(const LinearBlock& block) {
  if (block.is_bf16) {
    whole_block(block, (const uint16_t*)block.weight);
  } else {
    whole_block(block, (const float*)block.weight);
  }
}

}  // namespace socpo::SOCPO_ISA
