// torch.ops.socpo.linear: work items are (block of rows, range of outputs); see csrc/simd/linear.cpp for the sums.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>

#include "cpu.h"
#include "ops.h"

namespace socpo {
namespace {

constexpr int64_t OUTS_PER_ITEM = 48;            // a multiple of every tile's outputs
constexpr int64_t FLOATS_PER_BLOCK = 96 * 1024;  // of x, which stays in L2 while the weights go by

}  // namespace

at::Tensor linear(const at::Tensor& any_x, const at::Tensor& weight, const MaybeTensor& any_bias) {
  const at::Tensor x = any_x.stride(1) == 1 ? any_x : any_x.contiguous();
  const at::Tensor bias = any_bias ? any_bias->to(at::kFloat).contiguous() : at::Tensor();
  const int64_t num_rows = x.size(0), width = x.size(1), num_outs = weight.size(0);
  at::Tensor out = at::empty({num_rows, num_outs}, x.options());
  const bool is_bf16 = weight.scalar_type() == at::kBFloat16;
  const char* weight_p = static_cast<const char*>(weight.const_data_ptr());
  const float *x_p = x.const_data_ptr<float>(), *bias_p = bias.defined() ? bias.const_data_ptr<float>() : nullptr;
  float* out_p = out.mutable_data_ptr<float>();
  const int64_t rows_per_block = std::max<int64_t>(12, FLOATS_PER_BLOCK / width / 12 * 12);
  const int64_t num_ranges = (num_outs + OUTS_PER_ITEM - 1) / OUTS_PER_ITEM;
  const int64_t num_blocks = (num_rows + rows_per_block - 1) / rows_per_block;
  for_each_item(num_blocks * num_ranges, [&](int64_t item) {
    const int64_t row = item % num_blocks * rows_per_block, first = item / num_blocks * OUTS_PER_ITEM;
    LinearBlock block{};
    block.x = x_p + row * x.stride(0);
    block.x_stride = x.stride(0);
    block.num_rows = std::min(rows_per_block, num_rows - row);
    block.weight = weight_p + first * width * weight.element_size();
    block.is_bf16 = is_bf16;
    block.num_outs = std::min(OUTS_PER_ITEM, num_outs - first);
    block.width = width;
    block.bias = bias_p == nullptr ? nullptr : bias_p + first;
    block.out = out_p + row * num_outs + first;
    block.out_stride = num_outs;
    kernels().linear_block(block);
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
