"""docs/kernels.md has every kernel, and its numbers are those that our functions compute."""

from __future__ import annotations

import pytest

from tests.test_aot import jit_functions
from tools import kernels_doc
from tools.aot import Resources, ctas_of_sm
from tools.kernel_work import CARDS, Card, Work, works
from tools.kernels_doc import FILE, buffers_of, by_architecture

TTGIR = """
%0 = ttg.local_alloc {offset = 0 : i32} : () -> !ttg.memdesc<3x64x128xbf16, #shared, mutable>
%1 = ttg.local_alloc : () -> !ttg.memdesc<3x64x128xbf16, #shared, mutable>
%2 = ttg.local_alloc : () -> !ttg.memdesc<2x64xi32, #shared, mutable>
%3 = ttg.local_alloc %q : (tensor<128x128xbf16, #blocked>) -> !ttg.memdesc<128x128xbf16, #shared>
"""


def kernels_of_project() -> set[str]:
    return {name for name in jit_functions() if name.endswith("_kernel")}


def test_every_kernel_has_its_work() -> None:
    assert works().keys() == kernels_of_project()


def test_document_has_every_kernel_twice() -> None:
    text = FILE.read_text(encoding="utf-8")
    for name in kernels_of_project():
        assert text.count(f"| `{name.strip('_')}` |") >= 2, f"{name}: run `make kernels-doc`"


def test_document_work_table_is_current() -> None:
    text = FILE.read_text(encoding="utf-8")
    for line in kernels_doc.work_table():
        assert line in text, f"docs/kernels.md lacks {line!r}; run `make kernels-doc`"


@pytest.mark.parametrize(
    ("registers", "shared", "num_warps", "architecture", "expected"),
    [
        (32, 0, 4, 90, 16),  # warps: 64 / 4; registers would hold 16 as well
        (255, 0, 8, 90, 1),  # a warp takes 8192 of 65536 registers
        (157, 0, 4, 90, 3),  # 5120 a warp
        (64, 100 * 1024, 4, 80, 1),  # shared memory: 164 KiB, and 1 KiB goes to each block
        (64, 100 * 1024, 4, 90, 2),
        (16, 0, 1, 90, 32),  # blocks
    ],
)
def test_ctas_of_a_multiprocessor(
    registers: int, shared: int, num_warps: int, architecture: int, expected: int
) -> None:
    assert ctas_of_sm(Resources(registers, 0, shared), num_warps, architecture) == expected


def test_buffers_are_those_that_loads_fill() -> None:
    assert buffers_of(TTGIR) == "3 of 64x128 bf16, 2 of 64 i32"
    assert buffers_of("%0 = tt.load %1 : tensor<64x!tt.ptr<f32>>") == ""


def test_one_number_where_architectures_agree() -> None:
    assert by_architecture({80: "4", 90: "4"}) == "4"
    assert by_architecture({80: "4", 90: "8"}) == "4 / 8"


def test_time_is_the_larger_of_two() -> None:
    card = Card("a card", 2.0, 100.0)
    assert card.us(Work("copies", 4e6)) == 2.0
    assert card.us(Work("products", 4e6, 1e9)) == 10.0
    assert [card.name for card in CARDS] == ["A100", "H100"]


def test_work_counted_by_hand() -> None:
    """Qwen3-1.7B: D 2048, I 6144, 16 heads on 8 of 128, vocabulary 151936."""
    work = works()
    assert work["_rms_norm_kernel"].num_bytes == 4 * 2 * 8192 * 2048
    assert work["_swiglu_backward_kernel"].num_bytes == 5 * 2 * 8192 * 6144
    assert work["_policy_rows_kernel"].num_bytes == 2048 * 151936 * (4 + 2)
    # Parameter and low half twice, two fp32 moments twice, an fp32 gradient once: 28 bytes.
    assert work["_adamw_kernel"].num_bytes == 28 * 2 * 6144 * 2048
    pairs = 1000 * 1001 // 2 + 8 * (300 * 301 // 2 + 300 * 1000)
    assert work["_tree_attention_kernel"].num_flops == 2 * 2 * 128 * 16 * pairs
    assert work["_tree_grad_kv_kernel"].num_flops == 4 * 2 * 128 * 16 * pairs
