"""The fake CUDA walk: what it counts and notices; with a CUDA build of torch, the walk itself.

The walk runs the code paths of a GPU on fake tensors and records launches, bytes, FLOPs and every
read that makes the host wait for the device.
"""

from __future__ import annotations

import contextlib
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
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tools.gpu_check import walk
from tools.gpu_check.launches import Launch, Section
from tools.gpu_check.recorder import Recorder

ROOT = Path(__file__).parent.parent
CUDA = "cuda:0"
MARKS = walk.BEGIN, walk.END
aten = torch.ops.aten
AT_THIS_FILE = re.compile(r" at tests/test_gpu_walk\.py:\d+")
needs_cuda_build = pytest.mark.skipif(
    torch.version.cuda is None,
    reason="needs a CUDA build of torch; no card",
)


@contextlib.contextmanager
def recording(*, may_read: bool = False, may_upload: bool = False) -> Iterator[Section]:
    """Yields a section that records ops on fake tensors.

    Without a CUDA build of torch some tensor methods fail on fake CUDA tensors, slicing among them.
    The aten ops below those methods work, so the tests call them.
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
    """A read that is not allowed is a fault that ends the section.

    Where reads are allowed, the read is listed and returns zeros.
    """
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


def test_device_work_is_not_a_host_read() -> None:
    with recording() as section:
        x = torch.empty(4, device=CUDA)
        torch.ones(4).copy_(x, non_blocking=True)
        aten.index_put_(x, [x > 0], torch.zeros((), device=CUDA))  # a masked fill
        torch.where(x > 0, x, 1.0)
        x + torch.tensor(2.0)  # a scalar on the host is passed as an argument of the kernel
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
        x = torch.empty(4, 8, device=CUDA)
        w = torch.empty(16, 8, device=CUDA)
        torch.empty(0, 8, device=CUDA).zero_()
        (x @ w.T).view(-1).reshape(4, 16).add_(1.0)
    assert [launch.kernel for launch in section.launches] == ["aten.mm", "aten.add_"]
    product = section.launches[0]
    assert product.shapes == "f32[4, 8], f32[8, 16] -> f32[4, 16]"
    assert product.flops == 2 * 4 * 8 * 16 and product.num_bytes == 4 * (4 * 8 + 8 * 16 + 4 * 16)
    # The weight in its memory order, not transposed.
    assert dict(product.traffic)["f32[16, 8]"] == 4 * 16 * 8


def test_products_into_a_wider_dtype_have_a_shape() -> None:
    """FakeTensor mishandles these in PyTorch 2.11; a product of wrong shapes stays an error."""
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


def test_only_text_between_the_marks_changes(tmp_path: Path) -> None:
    page = tmp_path / "gpu.md"
    page.write_text(f"before\n{walk.BEGIN}\nold\n{walk.END}\nafter\n")
    walk.write_between_marks(page, "new", MARKS)
    assert page.read_text() == f"before\n{walk.BEGIN}\nnew\n{walk.END}\nafter\n"
    walk.write_between_marks(tmp_path / "other.md", "new", MARKS)
    assert (tmp_path / "other.md").read_text() == f"{walk.BEGIN}\nnew\n{walk.END}\n"
    page.write_text("no marks")
    with pytest.raises(ValueError, match="must have the lines"):
        walk.write_between_marks(page, "new", MARKS)


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs Python in a new process: in this one, kernels are the interpreter's."""
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
    page = tmp_path / "page.md"
    results = tmp_path / "walk.json"
    options = ["--markdown", str(page), "--json", str(results)]
    result = run_python("-m", "tools.gpu_check.walk", *options)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    report = json.loads(results.read_text())
    sections = {section["section"]: section for section in report["sections"]}
    captured = [section for name, section in sections.items() if name.startswith("decode round")]
    assert len(captured) == 4
    assert all(section["reads"] == section["uploads"] == [] for section in captured)
    assert sum("top-p" in section["section"] for section in captured) == 1
    for launch in (launch for section in captured for launch in section["launches"]):
        assert not re.search("sort|topk|cumsum", launch["kernel"]), launch
        # One number a row may be fp64, scores of the whole vocabulary must not be.
        assert not re.search(r"f64\[[^]]*151936", launch["shapes"]), launch
    policy_head = sections["policy head, 8192 rows"]
    num_of = Counter({x["kernel"]: 0 for x in policy_head["launches"]})
    for launch in policy_head["launches"]:
        num_of[launch["kernel"]] += launch["count"]
    assert num_of["aten.addmm"] == 3 * num_of["_policy_rows_kernel"]
    exact_flops = 3 * 2 * 8192 * 151936 * 1024
    assert (
        exact_flops
        <= sum(x["count"] * x["flops"] for x in policy_head["launches"])
        < 1.001 * exact_flops
    )
    layers = sections["update of one group, backward of the layers"]
    backward = {x["kernel"] for x in layers["launches"]}
    assert {"_rms_norm_backward_kernel", "_swiglu_backward_kernel"} <= backward
    assert {"_tree_grad_q_kernel", "_tree_grad_kv_kernel"} <= backward
    update = [section for name, section in sections.items() if name.startswith("update of")]
    assert all(section["reads"] == [] for section in update)
    assert len(sections["its step of AdamW"]["reads"]) == 1
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
    result = run_python("-c", code)
    assert result.returncode == 1
    lines = result.stderr.splitlines()
    assert len(lines) == 4
    read = r"host read: aten\._local_scalar_dense of f64\[\] at socpo_fast/engine/decode\.py:\d+"
    assert re.fullmatch(f"walk: decode round, batch 256: 1 x {read}", lines[0])
