"""Knows which versions of Triton and numpy can run kernels in the interpreter together."""

from __future__ import annotations

import re


def incompatible_pair(triton: str | None, numpy: str) -> str | None:
    """Returns why two versions cannot run the interpreter together, None if they can.

    Before Triton 3.7 the interpreter converts arrays of size 1 with int(), which numpy refuses from
    2.4 on. Every kernel would then fail with the same TypeError from within Triton.
    """
    if triton is None or _release(triton) >= (3, 7) or _release(numpy) < (2, 4):
        return None
    minor = ".".join(map(str, _release(triton)))
    rule = f"numpy must be < 2.4 beside triton {minor}, got {numpy}"
    return f"tests: {rule}; pip install 'numpy<2.4'"


def _release(version: str) -> tuple[int, int]:
    """Returns (major, minor); what follows them, as in 2.4.0rc1 or 3.7.1+git, is ignored."""
    major, minor = re.findall(r"\d+", version)[:2]
    return int(major), int(minor)
