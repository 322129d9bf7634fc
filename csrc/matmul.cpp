// torch.ops.socpo.matmul_: a matrix product by the faster of torch's two libraries.
//
// On AMD processors MKL runs AVX2 code only, where oneDNN, in the same libtorch, runs AVX-512: 1.5
// to 2 times as fast. The choice depends on the processor and the dtype, never on the sizes, since
// otherwise rows could not be batch-invariant.

#include <ATen/Config.h>
#include <ATen/Context.h>
#include <ATen/Version.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include "ops.h"

#if defined(SOCPO_X86) && defined(__linux__) && AT_MKLDNN_ENABLED()
#define SOCPO_ONEDNN
namespace at::native {
// result = alpha mat1 mat2 + beta result, of contiguous or transposed fp32 matrices. In torch's
// library but in none of its headers, hence weak: null where a torch does not have it.
__attribute__((weak, visibility("default"))) void mkldnn_matmul(const Tensor& mat1,
                                                                const Tensor& mat2,
                                                                const Tensor& result, float beta,
                                                                float alpha);
}  // namespace at::native
#endif

namespace socpo {
namespace {

bool onednn_is_faster() {
#ifdef SOCPO_ONEDNN
  static const bool is_faster = at::native::mkldnn_matmul != nullptr && __builtin_cpu_is("amd") &&
                                at::get_cpu_capability() == "AVX512";
  return is_faster && at::globalContext().userEnabledMkldnn();
#else
  return false;
#endif
}

}  // namespace

void matmul_(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b, bool accumulate) {
#ifdef SOCPO_ONEDNN
  if (out.scalar_type() == at::kFloat && a.numel() > 0 && b.numel() > 0 && onednn_is_faster()) {
    at::native::mkldnn_matmul(a, b, out, accumulate ? 1.0f : 0.0f, 1.0f);
    return;
  }
#endif
  at::Tensor result = out;
  if (accumulate) {
    result.addmm_(a, b);
  } else {
    at::mm_out(result, a, b);
  }
}

TORCH_LIBRARY_IMPL(socpo, CPU, m) { m.impl("matmul_", matmul_); }
TORCH_LIBRARY_IMPL(socpo, Meta, m) {
  m.impl("matmul_", +[](const at::Tensor&, const at::Tensor&, const at::Tensor&, bool) {});
}

}  // namespace socpo
