// What `linear` and `linear_sample` share: rows in the form their kernel takes them.

#pragma once

#include "cpu.h"

namespace socpo {

// Blocks of the rows of x [num_rows, width]: one as it lies where they are few, otherwise panels, which each thread packs
// for itself as it comes to them (a panel is packed in the time of a few outputs).
class RowBlocks {
 public:
  RowBlocks(const float* x, int64_t x_stride, int64_t num_rows, int64_t width);
  int64_t num_blocks() const { return (num_rows_ + rows_per_block_ - 1) / rows_per_block_; }
  int64_t first_row(int64_t block) const { return block * rows_per_block_; }
  // The block without weights and outputs; its panel is good until the thread asks for another one.
  LinearBlock block(int64_t index);

 private:
  const float* x_;
  int64_t x_stride_, num_rows_, width_, rows_per_block_, packed_ = -1;
};

}  // namespace socpo
