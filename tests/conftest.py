"""Triton kernels run on the CPU here: the interpreter has to be asked for before anything imports triton.

On a machine with a GPU, TRITON_INTERPRET=0 in the environment tests the compiled kernels instead.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
