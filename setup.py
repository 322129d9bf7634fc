"""Builds socpo_fast._C from csrc/. Project metadata is in pyproject.toml.

SOCPO_BUILD = auto (default): the C++ of csrc/; none: pure Python, where every op runs its plain
torch reference on a CPU. The kernels of a GPU are Triton's, which compiles them when they are first
used.
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
# Of adamw.cpp, whose bits are promised: a product and a sum stay two roundings. Without errno and
# traps square roots and comparisons run in vectors, and give the same.
EXACT = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
OPENMP = (
    ["-fopenmp"] if sys.platform == "linux" else []
)  # elsewhere at::parallel_for runs on the calling thread


def extension_options() -> dict:
    """setup()'s ext_modules and cmdclass; imports torch, so only when something is to be built."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class BuildPerIsa(BuildExtension):
        """Compiles csrc/simd once per instruction set; which copy runs is chosen at run time
        (csrc/cpu.cpp).
        """

        def build_extension(self, ext):
            for isa, isa_flags in ISA_FLAGS.items():
                flags = ["-std=c++17", *FLAGS, *isa_flags, f"-DSOCPO_ISA={isa}"]
                for source in sorted(glob("csrc/simd/*.cpp")):
                    ext.extra_objects += self.compiler.compile(
                        [source],
                        output_dir=os.path.join(self.build_temp, isa),
                        extra_postargs=[*flags, *(EXACT if source.endswith("adamw.cpp") else [])],
                    )
            super().build_extension(ext)

    extension = CppExtension(
        "socpo_fast._C",
        sorted(glob("csrc/*.cpp")),
        depends=sorted(glob("csrc/**/*.h", recursive=True) + glob("csrc/simd/*.cpp")),
        extra_compile_args={"cxx": [*FLAGS, *OPENMP]},
        extra_link_args=OPENMP,
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildPerIsa}}


BUILD = os.environ.get("SOCPO_BUILD", "auto")
if BUILD not in ("auto", "none"):
    raise ValueError(f"setup.py: SOCPO_BUILD must be auto or none, got {BUILD!r}")

setup(
    packages=[*find_packages(include=["socpo_fast", "socpo_fast.*"]), "socpo_fast.kernels"],
    package_data={
        "socpo_fast.socratic.tasks": ["*/*.json", "*/*.safetensors", "*/*.jinja"],
        "socpo_fast.report": ["*.json", "*.html"],
    },
    **(extension_options() if BUILD != "none" else {}),
)
