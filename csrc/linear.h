// Shared by `linear` and `linear_sample`: rows of x in the form that linear_block takes.

#pragma once

#include "cpu.h"

namespace socpo {

// Blocks of the rows of x [num_rows, width]: one block of unpacked rows where they are few,
// otherwise panels. A thread packs a panel when it comes to it, in the time of computing a few
// outputs.
class RowBlocks {
 public:
  RowBlocks(const float* x, int64_t x_stride, int64_t num_rows, int64_t width);
  int64_t num_blocks() const { return (num_rows_ + rows_per_block_ - 1) / rows_per_block_; }
  int64_t first_row(int64_t block) const { return block * rows_per_block_; }
  // Returns a block without weights and outputs; its panel is valid until the thread packs another.
  LinearBlock block(int64_t index);

 private:
  const float* x_;
  int64_t x_stride_, num_rows_, width_, rows_per_block_, packed_ = -1;
};

}  // namespace socpo
