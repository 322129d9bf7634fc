"""Builds socpo_fast._C from csrc/. Project metadata is in pyproject.toml.

SOCPO_BUILD=auto (the default) compiles csrc/. SOCPO_BUILD=none builds pure Python: every op then
runs its plain torch reference on a CPU. GPU kernels need no build: Triton compiles them at first
use.
"""

import os
import platform
import re
import shlex
import subprocess
import sys
from glob import glob

from setuptools import find_packages, setup

# Instruction set -> compiler flags. Never -march=native: a wheel may run on another CPU.
ISA_FLAGS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma"]
    avx512 = [f"-mavx512{subset}" for subset in ("f", "bw", "dq", "vl")]
    ISA_FLAGS["avx512"] = [*ISA_FLAGS["avx2"], *avx512, "-mprefer-vector-width=512"]
FLAGS = [
    "-O3",
    "-g0",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-fvisibility=hidden",
    *(["-DSOCPO_X86"] if len(ISA_FLAGS) > 1 else []),
]
# For adamw.cpp, which promises bitwise equal results with every instruction set: a product and a
# sum are rounded separately, not fused. Without errno and traps, square roots and comparisons are
# vectorised; that does not change their results.
EXACT = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
# On other systems at::parallel_for runs on the calling thread.
OPENMP = ["-fopenmp"] if sys.platform == "linux" else []
OLDEST_GCC = 12  # for __builtin_shufflevector


def check_compiler() -> None:
    """Ends the build with one line, unless the C++ compiler is gcc 12 or newer, or clang."""
    command = os.environ.get("CXX", "c++")
    list_macros = [*shlex.split(command), "-dM", "-E", "-x", "c++", os.devnull]
    try:
        macros = subprocess.run(list_macros, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        compiler = f"none ({command} does not run)"
    else:
        gcc = re.search(r"#define __GNUC__ (\d+)", macros)
        if "__clang__" in macros or (gcc and int(gcc[1]) >= OLDEST_GCC):
            return
        compiler = f"gcc {gcc[1]}" if gcc else f"another one ({command})"
    sys.exit(
        f"setup.py: the C++ compiler must be gcc {OLDEST_GCC} or newer, or clang, got {compiler}; "
        "install one, name it in CXX, or set SOCPO_BUILD=none to run without compiled code"
    )


def extension_options() -> dict:
    """Returns ext_modules and cmdclass for setup(). Imports torch: call it only for a build."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class BuildPerIsa(BuildExtension):
        """Compiles csrc/simd once per instruction set; csrc/cpu.cpp chooses at run time."""

        def run(self):
            """Checks the compiler before anything is compiled."""
            check_compiler()
            super().run()

        def build_extension(self, ext):
            """Adds the objects of csrc/simd, then builds the extension as usual."""
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

# socpo_fast/kernels and socpo_fast/configs are symbolic links to the folders of the root. kernels/
# holds no __init__.py, so find_packages does not list it. Data files are those of package_data:
# MANIFEST.in says what the sdist holds.
setup(
    packages=[*find_packages(include=["socpo_fast", "socpo_fast.*"]), "socpo_fast.kernels"],
    include_package_data=False,
    package_data={
        "socpo_fast": ["py.typed", "configs/*.toml", "starter/*"],
        "socpo_fast.socratic.tasks": ["*/*.json", "*/*.safetensors", "*/*.jinja"],
        "socpo_fast.report": ["*.json", "*.html", "*.svg"],
    },
    **(extension_options() if BUILD != "none" else {}),
)
