"""Checks that the C++ ops read nothing outside of their inputs.

Each input ends where readable memory ends, so a read beyond it kills the process. The ops run in a
child process, which must survive.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from socpo_fast.ops import available_impls

pytestmark = [
    pytest.mark.skipif("cpp" not in available_impls().values(), reason="extension not built"),
    pytest.mark.skipif(sys.platform != "linux", reason="protects pages as Linux does"),
]

CHILD = """
import ctypes, mmap
import torch
from socpo_fast.ops import linear
from socpo_fast.ops._impl import extension_is_built
from socpo_fast.ops.paged_attention import paged_attention_op

libc = ctypes.CDLL(None, use_errno=True)
assert extension_is_built()

def at_the_end(tensor):  # a copy, behind which nothing may be read
    size = tensor.numel() * tensor.element_size()
    room = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, room + mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(ctypes.c_void_p(address + room), mmap.PAGESIZE, 0) == 0
    span = {"count": tensor.numel(), "offset": room - size}
    copy = torch.frombuffer(memory, dtype=tensor.dtype, **span).view(tensor.shape)
    return copy.copy_(tensor)

torch.manual_seed(0)
for heads, kv_heads, head_dim, dtype in CASES:
    k, v = (at_the_end(torch.randn(4, 16, kv_heads, head_dim).to(dtype)) for _ in range(2))
    table, lens, cu = (torch.tensor(x, dtype=torch.int32) for x in ([[0, 1, 2, 3]], [64], [0, 1]))
    q = at_the_end(torch.randn(1, heads, head_dim))
    paged_attention_op(q, k, v, table, lens, cu, 1, 64, None, 0.3, True, "cpp")
    # Many sequences: a thread prefetches the pages of the next one, which end here too.
    for page_size in (1, 16, 256):
        shape = (256 // page_size, page_size, kv_heads, head_dim)
        k, v = (at_the_end(torch.randn(shape).to(dtype)) for _ in range(2))
        table = torch.arange(256 // page_size, dtype=torch.int32).expand(17, -1).contiguous()
        lens = torch.tensor([256, 200, 130, 16, 1] * 3 + [256, 256], dtype=torch.int32)
        q, cu = at_the_end(torch.randn(17, heads, head_dim)), torch.arange(18, dtype=torch.int32)
        paged_attention_op(q, k, v, table, lens, cu, 1, 256, None, 0.3, False, "cpp")
for rows in (1, 2, 5, 24, 25, 66):
    for outs, width in ((1, 1), (49, 17), (97, 785)):
        shapes = ((rows, width), (outs, width), (outs,))
        x, weight, bias = (at_the_end(torch.randn(shape)) for shape in shapes)
        linear(x, weight, bias, impl="cpp")
        linear(x, at_the_end(weight.bfloat16()), at_the_end(bias.bfloat16()), impl="cpp")
print("done")
"""

# (heads, KV heads, head dim, dtype): three whose tokens are no multiple of a cache line, and
# SmolLM2's.
CASES = (
    "[(2, 1, 4, torch.float32), (4, 1, 80, torch.bfloat16), (6, 3, 40, torch.float32), (9, 3, "
    "64, torch.float32)]"
)


def test_ops_read_nothing_behind_their_inputs() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHILD.replace("CASES", CASES)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0 and done.stdout == "done\n", (
        f"exit {done.returncode}\n{done.stdout}{done.stderr}"
    )
