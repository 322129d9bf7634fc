"""Builds socpo_fast._C from csrc/. Project metadata is in pyproject.toml.

SOCPO_BUILD = auto (default): the C++ of csrc/, and its CUDA sources where there are any and torch and the machine
have CUDA; cuda: the same, but an error without CUDA; none: pure Python, every op runs its plain torch reference.
"""

import os
import platform
import sys
from glob import glob

from setuptools import find_packages, setup

ISA_FLAGS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma"]
    avx512 = [f"-mavx512{part}" for part in ("f", "bw", "dq", "vl")]
    ISA_FLAGS["avx512"] = [*ISA_FLAGS["avx2"], *avx512, "-mprefer-vector-width=512"]
FLAGS = [
    "-O3",
    "-g0",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-fvisibility=hidden",
    *(["-DSOCPO_X86"] if len(ISA_FLAGS) > 1 else []),
]
OPENMP = ["-fopenmp"] if sys.platform == "linux" else []  # elsewhere at::parallel_for runs on the calling thread


def extension_options() -> dict:
    """setup()'s ext_modules and cmdclass; imports torch, so only when something is to be built."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

    class BuildPerIsa(BuildExtension):
        """Compiles csrc/simd once per instruction set; which copy runs is chosen at run time (csrc/cpu.cpp)."""

        def build_extension(self, ext):
            for isa, isa_flags in ISA_FLAGS.items():
                flags = ["-std=c++17", *FLAGS, *isa_flags, f"-DSOCPO_ISA={isa}"]
                ext.extra_objects += self.compiler.compile(
                    sorted(glob("csrc/simd/*.cpp")), output_dir=os.path.join(self.build_temp, isa), extra_postargs=flags
                )
            super().build_extension(ext)

    cuda_sources = sorted(glob("csrc/*.cu"))
    has_cuda = bool(cuda_sources) and CUDA_HOME is not None and torch.version.cuda is not None
    if BUILD == "cuda" and not has_cuda:
        raise RuntimeError(
            "setup.py: SOCPO_BUILD=cuda needs csrc/*.cu, a CUDA toolkit and a CUDA build of torch, "
            f"got {cuda_sources}, {CUDA_HOME} and {torch.__version__}; use SOCPO_BUILD=auto"
        )
    extension = (CUDAExtension if has_cuda else CppExtension)(
        "socpo_fast._C",
        sorted(glob("csrc/*.cpp")) + (cuda_sources if has_cuda else []),
        depends=sorted(glob("csrc/**/*.h", recursive=True) + glob("csrc/simd/*.cpp")),
        extra_compile_args={"cxx": [*FLAGS, *OPENMP], "nvcc": ["-O3"]},
        extra_link_args=OPENMP,
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildPerIsa}}


BUILD = os.environ.get("SOCPO_BUILD", "auto")
if BUILD not in ("auto", "cuda", "none"):
    raise ValueError(f"setup.py: SOCPO_BUILD must be auto, cuda or none, got {BUILD!r}")

setup(
    packages=[*find_packages(include=["socpo_fast", "socpo_fast.*"]), "socpo_fast.kernels"],
    package_data={"socpo_fast.socratic.tasks": ["*/*.json", "*/*.safetensors", "*/*.jinja"]},
    **(extension_options() if BUILD != "none" else {}),
)
