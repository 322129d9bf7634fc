"""Makes Triton kernels run on the CPU, in Triton's interpreter.

The variable must be set before anything imports triton. On a machine with a GPU, TRITON_INTERPRET=0
in the environment tests the compiled kernels instead.
"""

from __future__ import annotations

import os
from importlib import metadata

import pytest

from tests.helpers.interpreter import incompatible_pair, make_dot_batch_invariant

os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure() -> None:
    """Stops with one line if Triton and numpy do not work together, before tests are collected."""
    if os.environ["TRITON_INTERPRET"] != "1":
        return
    refusal = incompatible_pair(_installed("triton"), metadata.version("numpy"))
    if refusal is not None:
        raise pytest.UsageError(refusal)
    if _installed("triton") is not None:
        make_dot_batch_invariant()


def _installed(package: str) -> str | None:
    """Returns the version of a package, or None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
