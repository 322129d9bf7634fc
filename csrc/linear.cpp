// torch.ops.socpo.linear: see csrc/simd/linear.cpp for the sums.

#include "linear.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "ops.h"

namespace socpo {
namespace {

struct alignas(64) CacheLine {
  float numbers[16];
};

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

RowBlocks::RowBlocks(const float* x, int64_t x_stride, int64_t num_rows, int64_t width)
    : x_(x),
      x_stride_(x_stride),
      num_rows_(num_rows),
      width_(width),
      rows_per_block_(FEW_ROWS) {
  if (num_rows > FEW_ROWS)
    rows_per_block_ = divide_up(divide_up(num_rows, 16), divide_up(num_rows, PANEL_ROWS)) * 16;
}

LinearBlock RowBlocks::block(int64_t index) {
  LinearBlock block{};
  block.x = x_ + first_row(index) * x_stride_;
  block.x_stride = x_stride_;
  block.num_rows = std::min(rows_per_block_, num_rows_ - first_row(index));
  block.width = width_;
  block.is_panel = num_rows_ > FEW_ROWS;
  if (block.is_panel) {
    thread_local std::vector<CacheLine> panel;  // kept: fresh memory would cost more than packing
    const size_t size = rows_per_block_ * divide_up(width_, 16);
    if (panel.size() < size) panel.resize(size);
    if (packed_ != index)
      kernels().pack_panel(block.x, x_stride_, block.num_rows, width_, panel.front().numbers);
    packed_ = index;
    block.x = panel.front().numbers;
  }
  return block;
}

at::Tensor linear(const at::Tensor& any_x, const at::Tensor& weight, const MaybeTensor& any_bias) {
  const at::Tensor x = any_x.stride(1) == 1 ? any_x : any_x.contiguous();
  const at::Tensor bias = any_bias ? any_bias->to(at::kFloat).contiguous() : at::Tensor();
  const int64_t num_rows = x.size(0), width = x.size(1), num_outs = weight.size(0);
  at::Tensor out = at::empty({num_rows, num_outs}, x.options());
  if (num_rows == 0) return out;
  const char* weight_p = static_cast<const char*>(weight.const_data_ptr());
  const float* bias_p = bias.defined() ? bias.const_data_ptr<float>() : nullptr;
  float* out_p = out.mutable_data_ptr<float>();
  const RowBlocks blocks(x.const_data_ptr<float>(), x.stride(0), num_rows, width);
  const int64_t num_groups = divide_up(num_outs, GROUP_OUTS);
  const int64_t num_items = blocks.num_blocks() * num_groups;
  for_each_range(
      num_items, num_items, [&] { return blocks; },
      [&](int64_t begin, int64_t end, RowBlocks& own) {
        for (int64_t item = begin, next; item < end;
             item = next) {  // items are groups of outputs, block by block
          const int64_t index = item / num_groups, first = item % num_groups * GROUP_OUTS;
          next = std::min(end, (index + 1) * num_groups);
          LinearBlock block = own.block(index);
          block.weight = weight_p + first * width * weight.element_size();
          block.is_bf16 = weight.scalar_type() == at::kBFloat16;
          block.num_outs = std::min((next - item) * GROUP_OUTS, num_outs - first);
          block.bias = bias_p == nullptr ? nullptr : bias_p + first;
          block.out = out_p + own.first_row(index) * num_outs + first;
          block.out_stride = num_outs;
          kernels().linear_block(block);
        }
      });
  return out;
}

namespace {

at::Tensor linear_meta(const at::Tensor& x, const at::Tensor& weight, const MaybeTensor&) {
  return at::empty_symint({x.sym_size(0), weight.sym_size(0)}, x.options());
}

}  // namespace

TORCH_LIBRARY_IMPL(socpo, CPU, m) { m.impl("linear", linear); }
TORCH_LIBRARY_IMPL(socpo, Meta, m) { m.impl("linear", linear_meta); }

}  // namespace socpo
