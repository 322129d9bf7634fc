#include "cpu.h"

#include <ATen/Version.h>

namespace socpo {

static const Kernels& choose_kernels() {
#ifdef SOCPO_X86
  const std::string capability = at::get_cpu_capability();
  if (capability == "AVX512") return avx512::KERNELS;
  if (capability == "AVX2") return avx2::KERNELS;
#endif
  return baseline::KERNELS;
}

const Kernels& kernels() {
  static const Kernels& chosen = choose_kernels();
  return chosen;
}

}  // namespace socpo
