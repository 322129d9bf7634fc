"""One launch of the fake CUDA walk: its bytes, FLOPs and faults; and the backward of a graph."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton.language as tl
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from socpo_fast.ops import rms_norm, swiglu
from tools.gpu_check import graph, launches
from tools.gpu_check.launches import Launch
from tools.gpu_check.recorder import Recorder

CUDA = "cuda:0"
aten = torch.ops.aten


def test_products_of_matrices_by_hand() -> None:
    assert launches.product_flops("mm", [(2, 3), (3, 5)]) == 2 * 2 * 3 * 5
    assert launches.product_flops("addmm", [(2, 5), (2, 3), (3, 5)]) == 2 * 2 * 3 * 5
    assert launches.product_flops("bmm", [(4, 2, 3), (4, 3, 5)]) == 4 * 2 * 2 * 3 * 5
    shapes = [(1, 8, 7, 16), (1, 2, 9, 16), (1, 2, 9, 16)]
    attention_flops = launches.product_flops("_scaled_dot_product_flash_attention", shapes)
    assert attention_flops == 2 * (2 * 8 * 7 * 9 * 16)
    assert launches.product_flops("add", [(2, 3), (2, 3)]) == 0
    tensors = {"row_keys_ptr": torch.empty(6), "weight_ptr": torch.empty(100, 8)}
    assert launches.kernel_flops(tensors) == 2 * 6 * 100 * 8


def test_bytes_of_a_tensor_are_those_of_its_memory() -> None:
    x = torch.empty(3, 5, dtype=torch.bfloat16)
    assert launches.tensor_bytes(x) == 30
    assert launches.tensor_bytes(x[:, :1].expand(3, 100)) == 6
    assert launches.tensor_bytes(x[:0]) == 0
    assert launches.label(x.T) == "bf16[5, 3]" and launches.memory_label(x.T) == "bf16[3, 5]"
    dtypes = (torch.float32, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn)
    labels = [launches.label(torch.empty(1, dtype=dtype)) for dtype in dtypes]
    assert labels == ["f32[1]", "i64[1]", "u8[1]", "bool[1]", "f8_e4m3fn[1]"]


def test_bytes_of_an_op_are_read_and_written() -> None:
    # a and b have 96 bytes each
    a = torch.empty(4, 6)
    b = torch.empty(4, 6)
    index = torch.zeros(2, dtype=torch.int64)
    table = torch.empty(1000, 6)

    def num_bytes(func: Any, args: tuple[Any, ...], *outputs: Tensor, **kwargs: Any) -> int:
        return sum(size for _, size in launches.op_traffic(func, args, kwargs, outputs))

    assert num_bytes(aten.add.Tensor, (a, b), torch.empty(4, 6)) == 3 * 96
    assert num_bytes(aten.add_.Tensor, (a, b)) == 3 * 96  # a is read and written
    assert num_bytes(aten.copy_.default, (a, b)) == 2 * 96
    assert num_bytes(aten.fill_.Scalar, (a, 0.0)) == 96
    rows = table[index]
    assert num_bytes(aten.index_select.default, (table, 0, index), rows) == 2 * 48 + 16
    assert num_bytes(aten.embedding.default, (table, index), rows) == 2 * 48 + 16
    num_added = num_bytes(aten.index_put_.default, (table, [index], rows, True))
    assert num_added == 2 * 48 + 16 + 48
    # x has 48 bytes, y has 72
    x = torch.empty(4, 3)
    y = torch.empty(3, 6)
    product = (aten.addmm.out, (a, x, y))
    assert num_bytes(*product, beta=0.0, out=a) == 48 + 72 + 96
    assert num_bytes(*product, beta=1.0, out=a) == 48 + 72 + 2 * 96


def test_page_pool_counts_only_addressed_tokens() -> None:
    pool = torch.empty(1000, 16, 2, 8)  # 64 bytes a token
    table = torch.empty(3, 5, dtype=torch.int32)
    slots = torch.empty(7, dtype=torch.int64)
    traffic = dict(launches.kernel_traffic({"k_ptr": pool, "block_table_ptr": table}))
    assert traffic == {"f32[1000, 16, 2, 8]": 3 * 5 * 16 * 64, "i32[3, 5]": 60}
    traffic = dict(launches.kernel_traffic({"k_cache_ptr": pool, "slots_ptr": slots}))
    assert traffic == {"f32[1000, 16, 2, 8]": 7 * 64, "i64[7]": 56}
    assert dict(launches.kernel_traffic({"x_ptr": pool})) == {"f32[1000, 16, 2, 8]": 1000 * 16 * 64}


def plain_kernel(x_ptr, out_ptr, width, scale: tl.float32, BLOCK_D: tl.constexpr):
    """Declares arguments as a Triton kernel does; its body is not used."""


def strided_kernel(x_ptr, stride_xt):
    """Declares a row stride, so that x may be rows of a larger tensor."""


GOOD = {"width": 8, "scale": 0.5, "BLOCK_D": 8, "num_warps": 4}
LAUNCHES: dict[str, tuple[dict[str, Any], Any, str]] = {
    "an unknown keyword": ({"num_wraps": 4}, (1,), "unknown keyword num_wraps"),
    "a missing argument": ({"width": None}, (1,), "missing a required argument: 'width'"),
    "no number": ({"width": "8"}, (1,), "width must be a number, got str"),
    "a number beyond 64 bits": ({"width": 2**63}, (1,), "width must fit into 64 bits"),
    "no power of two": ({"BLOCK_D": 12}, (1,), "BLOCK_D must be a power of two, got 12"),
    "an empty grid": ({}, (0,), "grid x must be in [1, 2147483647], got 0"),
    "a grid that is too high": ({}, (1, 65536), "grid y must be in [1, 65535], got 65536"),
    "a grid of four": ({}, (1, 1, 1, 1), "grid must have 1 to 3 sizes"),
    "a fraction of a grid": ({}, lambda bound: (bound["width"] / 2,), "got 4.0"),
}


def faults_of(changes: dict[str, Any], grid: Any, *tensors: Any) -> list[str]:
    kwargs = {name: value for name, value in (GOOD | changes).items() if value is not None}
    signature = inspect.signature(plain_kernel)
    return launches.check_launch(signature, grid, tensors, kwargs, ("num_warps",))[2]


@pytest.mark.parametrize("name", LAUNCHES)
def test_a_launch_with_wrong_arguments_is_a_fault(name: str) -> None:
    changes, grid, expected = LAUNCHES[name]
    with FakeTensorMode():
        x = torch.empty(4, 8, device=CUDA)
        assert faults_of({}, (4, 65535, 65535), x, None) == []
        assert faults_of({}, lambda bound: (bound["width"],), x, x) == []
        faults = faults_of(changes, grid, x, x)
    assert len(faults) == 1 and expected in faults[0]


def test_a_pointer_is_a_dense_tensor_of_the_card() -> None:
    with FakeTensorMode():
        x = torch.empty(4, 8, device=CUDA)
        on_host = torch.empty(4, 8)
        rows = torch.empty_strided((4, 8), (16, 1), device=CUDA)
        columns = torch.empty_strided((4, 8), (1, 4), device=CUDA)
        assert faults_of({}, (1,), x, 5) == ["out_ptr must be a tensor or None, got int"]
        [fault] = faults_of({}, (1,), x, on_host)
        assert fault == "out_ptr must be on cuda, got f32[4, 8] on cpu"
        [fault] = faults_of({}, (1,), rows, x)
        assert fault == "x_ptr must be contiguous, got f32[4, 8] with strides [16, 1]"
        [fault] = faults_of({"BLOCK_D": x}, (1,), x, x)
        assert fault.startswith("BLOCK_D is a constant and must be no tensor")
        signature = inspect.signature(strided_kernel)
        check = launches.check_launch
        assert check(signature, (1,), (rows, 16), {}, ())[2] == []
        assert "must be contiguous" in check(signature, (1,), (columns, 1), {}, ())[2][0]


def test_a_launch_is_recorded_with_its_faults() -> None:
    with FakeTensorMode():
        x = torch.empty(4, 8, dtype=torch.bfloat16, device=CUDA)
    recorder = Recorder()
    with recorder.section("test", may_read=False) as section:
        recorder.launch("k", inspect.signature(strided_kernel), (2, 3), (x,), {"stride_xt": 8})
        recorder.launch("k", inspect.signature(strided_kernel), (2, 3), (x,), {})
    assert section.launches[0] == Launch("k", "x_ptr bf16[4, 8]", (2, 3), (("bf16[4, 8]", 64),), 0)
    [fault] = section.faults
    assert fault.startswith("k at tests/test_gpu_launches.py:") and "stride_xt" in fault


def test_backward_is_that_of_autograd() -> None:
    """The graph has our own ops, an unused leaf, a leaf used twice and one that has a gradient."""

    def run(backward: Callable[[list[Tensor], list[Tensor]], None]) -> list[Tensor | None]:
        generator = torch.Generator().manual_seed(0)
        leaves = [torch.randn(shape, generator=generator) for shape in ((5, 8), (8,), (8, 16))]
        x, norm_weight, weight = (leaf.requires_grad_() for leaf in leaves)
        unused = torch.zeros(3, requires_grad=True)
        weight.grad = torch.ones_like(weight)
        y, total = rms_norm(x, norm_weight, eps=1e-5, residual_TD=x)
        gated = swiglu(y @ weight)
        halves = torch.cat([gated, total]).split((2, 8))
        backward([halves[0].sum() + halves[1].square().mean()], [torch.tensor(2.0)])
        return [leaf.grad for leaf in (x, norm_weight, weight, unused)]

    gradients = run(graph.backward)
    expected_gradients = run(torch.autograd.backward)
    for gradient, expected in zip(gradients[:3], expected_gradients[:3], strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-6)
    assert gradients[3] is expected_gradients[3] is None
