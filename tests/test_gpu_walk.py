"""The fake CUDA walk: what it counts, what it notices and, with a CUDA build of torch, the walk."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton.language as tl
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from socpo_fast.ops import rms_norm, swiglu
from tools.gpu_check import graph, launches, walk
from tools.gpu_check.fake_cuda import Recorder
from tools.gpu_check.launches import Launch, Section

ROOT = Path(__file__).parent.parent
CUDA = "cuda:0"
aten = torch.ops.aten
AT_THIS_FILE = re.compile(r" at tests/test_gpu_walk\.py:\d+")
needs_cuda_build = pytest.mark.skipif(
    torch.version.cuda is None,
    reason="needs a CUDA build of torch; no card",
)


@contextlib.contextmanager
def recording(*, may_read: bool = False, may_upload: bool = False) -> Iterator[Section]:
    """A section on fake tensors. Without a CUDA build of torch some of their methods do not work,
    slices among them; the ops below those do.
    """
    recorder = Recorder(("num_warps",))
    section = recorder.section("test", may_read=may_read, may_upload=may_upload)
    with FakeTensorMode(allow_non_fake_inputs=True), recorder, section as recorded:
        yield recorded


def test_without_cuda_it_says_so_and_exits_2(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert walk.main([]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert "a CUDA build of torch is needed" in printed.err and "make gpu-walk" in printed.err


def test_products_of_matrices_by_hand() -> None:
    assert launches.product_flops("mm", [(2, 3), (3, 5)]) == 2 * 2 * 3 * 5
    assert launches.product_flops("addmm", [(2, 5), (2, 3), (3, 5)]) == 2 * 2 * 3 * 5
    assert launches.product_flops("bmm", [(4, 2, 3), (4, 3, 5)]) == 4 * 2 * 2 * 3 * 5
    shapes = [(1, 8, 7, 16), (1, 2, 9, 16), (1, 2, 9, 16)]
    fused = launches.product_flops("_scaled_dot_product_flash_attention", shapes)
    assert fused == 2 * (2 * 8 * 7 * 9 * 16)
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
    a, b = torch.empty(4, 6), torch.empty(4, 6)  # 96 bytes each
    index, table = torch.zeros(2, dtype=torch.int64), torch.empty(1000, 6)

    def moved(func: Any, args: tuple[Any, ...], *new: Tensor, **kwargs: Any) -> int:
        return sum(size for _, size in launches.op_traffic(func, args, kwargs, new))

    assert moved(aten.add.Tensor, (a, b), torch.empty(4, 6)) == 3 * 96
    assert moved(aten.add_.Tensor, (a, b)) == 3 * 96  # a is read and written
    assert moved(aten.copy_.default, (a, b)) == 2 * 96
    assert moved(aten.fill_.Scalar, (a, 0.0)) == 96
    picked = table[index]
    assert moved(aten.index_select.default, (table, 0, index), picked) == 2 * 48 + 16
    assert moved(aten.embedding.default, (table, index), picked) == 2 * 48 + 16
    added = moved(aten.index_put_.default, (table, [index], picked, True))
    assert added == 2 * 48 + 16 + 48
    x, y = torch.empty(4, 3), torch.empty(3, 6)  # 48 and 72 bytes
    product = (aten.addmm.out, (a, x, y))
    assert moved(*product, beta=0.0, out=a) == 48 + 72 + 96
    assert moved(*product, beta=1.0, out=a) == 48 + 72 + 2 * 96


def test_of_a_page_pool_only_what_is_named_counts() -> None:
    pool = torch.empty(1000, 16, 2, 8)  # 64 bytes a token
    table, slots = torch.empty(3, 5, dtype=torch.int32), torch.empty(7, dtype=torch.int64)
    traffic = dict(launches.kernel_traffic({"k_ptr": pool, "block_table_ptr": table}))
    assert traffic == {"f32[1000, 16, 2, 8]": 3 * 5 * 16 * 64, "i32[3, 5]": 60}
    traffic = dict(launches.kernel_traffic({"k_cache_ptr": pool, "slots_ptr": slots}))
    assert traffic == {"f32[1000, 16, 2, 8]": 7 * 64, "i64[7]": 56}
    assert dict(launches.kernel_traffic({"x_ptr": pool})) == {"f32[1000, 16, 2, 8]": 1000 * 16 * 64}


def plain_kernel(x_ptr, out_ptr, width, scale: tl.float32, BLOCK_D: tl.constexpr):
    """Arguments as a Triton kernel declares them."""


def strided_kernel(x_ptr, stride_xt):
    """One that may be given rows of a larger tensor."""


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
        x, on_host = torch.empty(4, 8, device=CUDA), torch.empty(4, 8)
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
    assert fault.startswith("k at tests/test_gpu_walk.py:") and "stride_xt" in fault


READS: dict[str, tuple[Callable[[Tensor], Any], Any]] = {
    "item": (lambda x: x.sum().item(), 0.0),
    "bool": (lambda x: bool((x > 0).any()), False),
    "cpu": (lambda x: x.cpu().tolist(), [0.0] * 4),
    "copy to the host": (lambda x: torch.ones(4).copy_(x).shape[0], 4),
    "equal": (lambda x: torch.equal(x, x), True),
    "nonzero": (lambda x: aten.nonzero.default(x).shape, (4, 1)),
    "mask": (lambda x: aten.index.Tensor(x, [x > 0]).shape, (4,)),
    "put by a mask": (lambda x: aten.index_put_(x, [x > 0], x).shape, (4,)),
}


@pytest.mark.parametrize("name", READS)
def test_a_host_read_is_noticed(name: str) -> None:
    """Where it must not be it ends the section as a fault; elsewhere it is listed, and reads 0."""
    read, expected = READS[name]
    reached = []
    with recording() as section:
        read(torch.empty(4, device=CUDA))
        reached.append(name)
    [fault] = section.faults
    assert fault.startswith("host read: ") and AT_THIS_FILE.search(fault) and not reached
    with recording(may_read=True) as section:
        assert read(torch.empty(4, device=CUDA)) == expected
    assert section.faults == [] and len(section.reads) == 1
    assert AT_THIS_FILE.search(section.reads[0])


def test_what_is_no_read_is_let_through() -> None:
    with recording() as section:
        x = torch.empty(4, device=CUDA)
        torch.ones(4).copy_(x, non_blocking=True)
        aten.index_put_(x, [x > 0], torch.zeros((), device=CUDA))  # a masked fill
        torch.where(x > 0, x, 1.0)
        x + torch.tensor(2.0)  # a number that lies on the host is an argument of the kernel
        assert torch.arange(4).sum().item() == 6  # the host's own work is done
    assert section.faults == section.reads == section.uploads == []


def test_a_tensor_of_the_host_is_noticed() -> None:
    with recording() as section:
        torch.ones(4).to(CUDA)
        x = torch.empty(4, device=CUDA)
        aten.copy_.default(x, torch.ones(4))
        aten.index.Tensor(x, [torch.zeros(2, dtype=torch.int64)])
    assert len(section.faults) == 3 and section.reads == []
    assert all(fault.startswith("host tensor: aten.") for fault in section.faults)
    assert all(AT_THIS_FILE.search(fault) for fault in section.faults)
    with recording(may_upload=True) as section:
        torch.ones(4).to(CUDA)
    assert section.faults == [] and len(section.uploads) == 1


def test_launches_are_ops_that_compute() -> None:
    with recording() as section:
        x, w = torch.empty(4, 8, device=CUDA), torch.empty(16, 8, device=CUDA)
        torch.empty(0, 8, device=CUDA).zero_()
        (x @ w.T).view(-1).reshape(4, 16).add_(1.0)
    assert [launch.kernel for launch in section.launches] == ["aten.mm", "aten.add_"]
    product = section.launches[0]
    assert product.shapes == "f32[4, 8], f32[8, 16] -> f32[4, 16]"
    assert product.flops == 2 * 4 * 8 * 16 and product.num_bytes == 4 * (4 * 8 + 8 * 16 + 4 * 16)
    assert dict(product.traffic)["f32[16, 8]"] == 4 * 16 * 8  # the weight, as it lies in memory


def test_products_into_a_wider_dtype_have_a_shape() -> None:
    """FakeTensor gets them wrong in PyTorch 2.11; a wrong one stays an error."""
    product = aten.addmm.dtype_out
    with recording() as section:
        a = torch.empty(4, 8, dtype=torch.bfloat16, device=CUDA)
        b = torch.empty(8, 6, dtype=torch.bfloat16, device=CUDA)
        out = torch.empty(4, 6, device=CUDA)
        assert product(out, a, b, torch.float32, beta=0.0, out=out) is out
    assert section.faults == []
    [launch] = section.launches
    assert launch.flops == 2 * 4 * 8 * 6 and launch.num_bytes == 2 * 4 * 8 + 2 * 8 * 6 + 4 * 4 * 6
    with recording() as section:
        product(out, b, a, torch.float32, beta=0.0, out=out)
    assert "shapes and dtypes must agree" in section.faults[0]


def test_an_error_is_a_fault_of_its_section() -> None:
    with recording() as section:
        torch.empty(4, device=CUDA) + torch.empty(3, device=CUDA)
    [fault] = section.faults
    assert fault.startswith("stopped by RuntimeError at tests/test_gpu_walk.py:")


def test_backward_is_that_of_autograd() -> None:
    """Functions of ours, one gradient missing, a leaf used twice, one that has a gradient."""

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

    ours, theirs = run(graph.backward), run(torch.autograd.backward)
    for gradient, expected in zip(ours[:3], theirs[:3], strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-6)
    assert ours[3] is theirs[3] is None


def test_the_summary_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    section = Section("decode", may_read=False, may_upload=False, reads=["a", "b"], faults=["bad"])
    product = Launch("aten.mm", "s", (), (("f32[9]", 2 * 10**9),), 3 * 10**12)
    section.launches += [product, product, Launch("_k", "s", (1,), (("f32[9]", 10**9),), 0)]
    assert walk.summary([section])[2] == "| decode | 3 | 1 | 2 | 2 | 6 | 5 | 2 | 0 |"
    text = "\n".join(walk.details([section]))
    assert "2 x s\n" in text and "most GB: f32[9] 5\n" in text and "faults: 1 x bad" in text
    report = walk.report_of(section)
    assert [launch["count"] for launch in report["launches"]] == [2, 1]
    assert json.loads(json.dumps(report))["traffic"] == [["f32[9]", 5 * 10**9]]


def test_only_what_stands_between_the_marks_changes(tmp_path: Path) -> None:
    page = tmp_path / "gpu.md"
    page.write_text(f"before\n{walk.BEGIN}\nold\n{walk.END}\nafter\n")
    walk.write_between_marks(page, "new")
    assert page.read_text() == f"before\n{walk.BEGIN}\nnew\n{walk.END}\nafter\n"
    walk.write_between_marks(tmp_path / "other.md", "new")
    assert (tmp_path / "other.md").read_text() == f"{walk.BEGIN}\nnew\n{walk.END}\n"
    page.write_text("no marks")
    with pytest.raises(ValueError, match="must have the lines"):
        walk.write_between_marks(page, "new")


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: in this one, kernels are the interpreter's."""
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@needs_cuda_build
def test_the_walk_finds_no_fault(tmp_path: Path) -> None:
    page, results = tmp_path / "page.md", tmp_path / "walk.json"
    options = ["--markdown", str(page), "--json", str(results)]
    done = run_python("-m", "tools.gpu_check.walk", *options)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    report = json.loads(results.read_text())
    sections = {section["section"]: section for section in report["sections"]}
    captured = [section for name, section in sections.items() if name.startswith("decode round")]
    assert len(captured) == 3
    assert all(section["reads"] == section["uploads"] == [] for section in captured)
    head = sections["policy head, 8192 rows"]
    num_of = Counter({x["kernel"]: 0 for x in head["launches"]})
    for launch in head["launches"]:
        num_of[launch["kernel"]] += launch["count"]
    assert num_of["aten.addmm"] == 3 * num_of["_policy_rows_kernel"]
    exact = 3 * 2 * 8192 * 151936 * 1024
    assert exact <= sum(x["count"] * x["flops"] for x in head["launches"]) < 1.001 * exact
    backward = {x["kernel"] for x in sections["update of one group, backward"]["launches"]}
    assert {"_rms_norm_backward_kernel", "_swiglu_backward_kernel"} <= backward
    assert "| decode round, batch 256 |" in page.read_text()


@needs_cuda_build
def test_a_read_in_a_decode_round_is_a_fault() -> None:
    code = """
import sys
from socpo_fast.engine import decode
from tools.gpu_check import code_paths, walk
draw = decode.draw
def draw_and_read(*args):
    drawn_3R = draw(*args)
    drawn_3R.sum().item()
    return drawn_3R
def walk_decode(config):
    with code_paths.fake_cuda() as recorder:
        code_paths.decode_rounds(recorder, code_paths.fake_model(config))
    return recorder.sections
decode.draw, walk.walk = draw_and_read, walk_decode
sys.exit(walk.main(["--model", "SmolLM2-135M"]))
"""
    done = run_python("-c", code)
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert len(lines) == 3
    read = r"host read: aten\._local_scalar_dense of f64\[\] at socpo_fast/engine/decode\.py:\d+"
    assert re.fullmatch(f"walk: decode round, batch 256: 1 x {read}", lines[0])
