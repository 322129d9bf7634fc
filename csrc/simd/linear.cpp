// out = x weight^T (+ bias) in fp32, from weights as checkpoints store them: one row an output, fp32 or bf16.
//
// An output has one accumulator of LANES partial sums, which runs over PART weights in order and is then folded by a
// fixed tree; parts are added in order. So its bits depend on its row of x and its row of weights, and neither on the
// number of rows nor on the tile it falls into: a token gets the same bits in a prompt, in a batch and alone.
// No transposed or packed copy of the weights is made: they are read once from memory for up to a block of rows.

#include "kernels.h"
#include "simd.h"

namespace socpo::SOCPO_ISA {
namespace {

constexpr int PART = 768;  // weights of an output summed at once: a tile of rows and one of weights stay in L1
constexpr int TILE_ROWS = LANES == 16 ? 4 : 3, TILE_OUTS = LANES == 16 ? 6 : 4;  // 24 accumulators of 32 registers, 12 of 16

template <int COUNT>
inline void fold_all(Vec* sums, float* out) {
  if constexpr (COUNT > LANES) {
    fold<LANES>(sums, out);
    fold_all<COUNT - LANES>(sums + LANES, out + LANES);
  } else {
    fold<COUNT>(sums, out);
  }
}

// `sums` of ROWS x OUTS outputs over `width` weights. Meanwhile AHEAD rows of weights from `ahead` on are asked for.
template <int ROWS, int OUTS, int AHEAD, typename Weight>
inline void tile_sums(const float* x, int64_t x_stride, const Weight* weight, int64_t weight_stride, int64_t width,
                      const Weight* ahead, Vec* sums) {
  Vec acc[ROWS][OUTS] = {};
  int64_t k = 0;
  for (; k + LANES <= width; k += LANES) {
    Vec rows[ROWS];
    for (int i = 0; i < ROWS; ++i) rows[i] = load<Vec>(x + i * x_stride + k);
    for (int j = 0; j < AHEAD; ++j) __builtin_prefetch(ahead + j * weight_stride + k);
    for (int j = 0; j < OUTS; ++j) {
      const Vec w = load_wide(weight + j * weight_stride + k);
      for (int i = 0; i < ROWS; ++i) acc[i][j] += rows[i] * w;
    }
  }
  if (k < width) {
    for (int j = 0; j < OUTS; ++j) {
      const Vec w = load_first(weight + j * weight_stride + k, (int)(width - k));
      for (int i = 0; i < ROWS; ++i) acc[i][j] += unfused(load_first(x + i * x_stride + k, (int)(width - k)) * w);
    }
  }
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < OUTS; ++j) sums[i * OUTS + j] = acc[i][j];
}

template <int ROWS, int OUTS, int AHEAD, typename Weight>
inline void tile(const LinearBlock& block, int64_t row, int64_t out, const Weight* weight, int64_t weight_stride, int64_t start,
                 int64_t width, const Weight* ahead) {
  Vec sums[ROWS * OUTS];
  float outs[(ROWS * OUTS + LANES - 1) / LANES * LANES];
  const float* const x = block.x + row * block.x_stride + start;
  tile_sums<ROWS, OUTS, AHEAD>(x, block.x_stride, weight, weight_stride, width, ahead, sums);
  fold_all<ROWS * OUTS>(sums, outs);
  float* const to = block.out + row * block.out_stride + out;
  if (start == 0 && block.bias == nullptr) {
    for (int i = 0; i < ROWS; ++i) memcpy(to + i * block.out_stride, outs + i * OUTS, OUTS * sizeof(float));
  } else {
    for (int i = 0; i < ROWS; ++i) {
      const float* before = start > 0 ? to + i * block.out_stride : block.bias + out;
      for (int j = 0; j < OUTS; ++j) to[i * block.out_stride + j] = before[j] + outs[i * OUTS + j];
    }
  }
}

// All rows of the block for OUTS outputs from `out` on, over one part. The next OUTS rows of weights are asked for
// meanwhile, AHEAD with each tile of rows, so that memory and arithmetic go on together.
template <int OUTS, int AHEAD, typename Weight>
inline void all_rows(const LinearBlock& block, int64_t out, const Weight* weight, int64_t weight_stride, int64_t start,
                     int64_t width) {
  int64_t row = 0;
  const Weight *ahead = weight + OUTS * weight_stride, *const end = ahead + (AHEAD > 0 ? OUTS * weight_stride : 0);
  for (; row + TILE_ROWS <= block.num_rows && ahead < end; row += TILE_ROWS, ahead += AHEAD * weight_stride)
    tile<TILE_ROWS, OUTS, AHEAD>(block, row, out, weight, weight_stride, start, width, ahead);
  for (; row + TILE_ROWS <= block.num_rows; row += TILE_ROWS)
    tile<TILE_ROWS, OUTS, 0>(block, row, out, weight, weight_stride, start, width, ahead);
  const int64_t left = block.num_rows - row;
  if (left == 3) tile<3, OUTS, 0>(block, row, out, weight, weight_stride, start, width, ahead);
  if (left == 2) tile<2, OUTS, 0>(block, row, out, weight, weight_stride, start, width, ahead);
  if (left == 1) tile<1, OUTS, 0>(block, row, out, weight, weight_stride, start, width, ahead);
}

// Few rows: memory is the limit. Many outputs at once keep many streams of weights under way; with fp32 weights the
// processor's own prefetching keeps up with them (measured).
template <int ROWS, int OUTS, typename Weight>
inline int64_t few_rows(const LinearBlock& block, const Weight* weight, int64_t start, int64_t width) {
  constexpr int AHEAD = sizeof(Weight) == sizeof(float) ? 0 : OUTS;
  int64_t out = 0;
  for (; out + OUTS <= block.num_outs; out += OUTS) {
    const Weight* from = weight + out * block.width + start;
    tile<ROWS, OUTS, AHEAD>(block, 0, out, from, block.width, start, width, from + OUTS * block.width);
  }
  return out;
}

template <typename Weight>
inline void one_part(const LinearBlock& block, const Weight* weight, int64_t start, int64_t width) {
  int64_t out = 0;
  if (block.num_rows == 1) out = few_rows<1, LANES / 2>(block, weight, start, width);
  if (block.num_rows == 2) out = few_rows<2, LANES / 2>(block, weight, start, width);
  for (; out + TILE_OUTS <= block.num_outs; out += TILE_OUTS) {
    const Weight* from = weight + out * block.width + start;
    if (sizeof(Weight) == sizeof(float) || block.num_rows <= TILE_ROWS) {
      if (block.num_rows < 2 * TILE_ROWS) {
        all_rows<TILE_OUTS, TILE_OUTS>(block, out, from, block.width, start, width);
      } else if (block.num_rows < TILE_OUTS * TILE_ROWS) {
        all_rows<TILE_OUTS, TILE_OUTS / 2>(block, out, from, block.width, start, width);
      } else {
        all_rows<TILE_OUTS, 1>(block, out, from, block.width, start, width);
      }
    } else {  // converted once for all rows
      float wide[TILE_OUTS * PART];
      for (int j = 0; j < TILE_OUTS; ++j) {
        int64_t k = 0;
        for (; k + LANES <= width; k += LANES) store(wide + j * PART + k, load_wide(from + j * block.width + k));
        for (; k < width; ++k) wide[j * PART + k] = widen(from[j * block.width + k]);
      }
      all_rows<TILE_OUTS, 0>(block, out, wide, PART, start, width);
    }
  }
  for (; out < block.num_outs; ++out) all_rows<1, 0>(block, out, weight + out * block.width + start, block.width, start, width);
}

template <typename Weight>
inline void all_parts(const LinearBlock& block, const Weight* weight) {
  for (int64_t start = 0; start < block.width; start += PART)
    one_part(block, weight, start, block.width - start < PART ? block.width - start : PART);
}

}  // namespace

void linear_block(const LinearBlock& block) {
  if (block.is_bf16) {
    all_parts(block, (const uint16_t*)block.weight);
  } else {
    all_parts(block, (const float*)block.weight);
  }
}

}  // namespace socpo::SOCPO_ISA
