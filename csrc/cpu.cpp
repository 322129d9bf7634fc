#include "cpu.h"

#include <ATen/Version.h>

namespace socpo {

#define SOCPO_KERNELS(isa) \
  Kernels{isa::tile_max, isa::tile_weights, isa::tile_draw, isa::linear_block, isa::pack_panel, isa::rms_norm_row, \
          isa::rms_norm_backward_row, isa::swiglu_row, isa::swiglu_backward_row, isa::rotary_head, isa::narrow_row, \
          isa::attend_split, isa::merge_partials, isa::finish_rows, isa::row_sums, isa::row_gradient, \
          isa::softmax_row, isa::softmax_backward_row, isa::adamw_range}

static Kernels choose_kernels() {
#ifdef SOCPO_X86
  const std::string capability = at::get_cpu_capability();
  if (capability == "AVX512") return SOCPO_KERNELS(avx512);
  if (capability == "AVX2") return SOCPO_KERNELS(avx2);
#endif
  return SOCPO_KERNELS(baseline);
}

const Kernels& kernels() {
  static const Kernels chosen = choose_kernels();
  return chosen;
}

}  // namespace socpo
