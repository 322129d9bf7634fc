"""Compares Triton's tree attention with a dense mask in fp64.

Also tests bitwise promises and refusals. On a CPU the kernels run in the interpreter.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from socpo_fast.kernels._tree_plan import MIN_CHUNK, ROWS_PER_BLOCK
from socpo_fast.ops import TreeMask, tree_attention
from socpo_fast.ops.tree_attention import tree_attention_ref
from tests.helpers.error_rule import assert_bitwise_equal, assert_error_rule
from tests.ops.test_tree_attention import (
    NAMES,
    TREE,
    dense,
    int32,
    make_qkv,
    random_tree,
)
from tools.tree_balance import visible_until_of_groups

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Under the interpreter tl.dot of bf16 gives garbage without an error.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
# (H, K, E): groups of two heads, which one program takes; of four; of three; of one.
HEADS = [(4, 2, 64), (4, 1, 32), (3, 1, 32), (2, 2, 128)]
# More blocks see the prompt than a chunk has, and answers end inside of blocks.
LONG_COLUMNS = visible_until_of_groups([(90, [130, 61, 120, 1, 160])])


def upstream_of(o_THE: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(o_THE.shape, generator=generator).bfloat16().to(o_THE)


def run(
    tree: Tensor | TreeMask,
    qkv: list[Tensor],
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """Returns the output of the kernels, and the gradients of q, k and v."""
    leaves = [x.to(DEVICE, dtype, copy=True).requires_grad_() for x in qkv]
    scale = qkv[0].shape[2] ** -0.5
    o_THE = tree_attention(*leaves, tree.to(torch.device(DEVICE)), scale=scale, impl="triton")
    grads = torch.autograd.grad(o_THE, leaves, upstream_of(o_THE))
    return [x.detach().cpu() for x in (o_THE, *grads)]


def run_dense(until_T: Tensor, qkv: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Returns the same by the formula with one [T, T] mask."""
    leaves = [x.to(dtype, copy=True).requires_grad_() for x in qkv]
    o_THE = dense(until_T)(*leaves)
    return [o_THE.detach(), *torch.autograd.grad(o_THE, leaves, upstream_of(o_THE))]


def assert_right(until_T: Tensor, qkv: list[Tensor], dtype: torch.dtype = torch.float32) -> None:
    """Asserts the error rule for the output and the gradients."""
    actual = run(until_T, qkv, dtype)
    plain, truth = (run_dense(until_T, qkv, t) for t in (dtype, torch.float64))
    for name, a, p, t in zip(NAMES, actual, plain, truth, strict=True):
        size = t.abs().max().clamp(min=1.0)
        assert_error_rule(a / size, p / size, t / size, name=name, dtype=dtype)


def assert_same(one: list[Tensor], other: list[Tensor], name: str) -> None:
    for result_name, a, b in zip(NAMES, one, other, strict=True):
        assert_bitwise_equal(a, b, name=f"{result_name}, {name}")


# One row; one block of rows; a block + 1; several blocks, with short and long paths.
@pytest.mark.parametrize("num_rows", [1, 64, 65, 200])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_as_right_as_a_dense_mask(
    dtype: torch.dtype,
    heads: tuple[int, int, int],
    num_rows: int,
) -> None:
    assert_right(random_tree(num_rows, seed=num_rows), make_qkv(num_rows, heads), dtype)


def test_long_columns_are_cut() -> None:
    """A block of keys that many rows see is cut into two programs.

    Every row sees the prompt, which is in the first block.
    """
    assert len(LONG_COLUMNS) > ROWS_PER_BLOCK * MIN_CHUNK
    assert int((TreeMask.of(LONG_COLUMNS).query_ranges_P7[:, 5] >= 0).sum()) == 2
    assert_right(LONG_COLUMNS, make_qkv(len(LONG_COLUMNS), (2, 1, 32)))


def test_same_inputs_same_bits() -> None:
    """A tree and the plan made of it once give the same bits, also where sums are of parts."""
    qkv = make_qkv(len(LONG_COLUMNS), (1, 1, 32))
    first, again = (run(tree, qkv) for tree in (LONG_COLUMNS, TreeMask.of(LONG_COLUMNS)))
    assert_same(again, first, "again")


def test_one_row_sees_all() -> None:
    """A causal sequence without branches, where most tiles need no mask, keeps the error rule."""
    assert_right(int32([300] * 300), make_qkv(300, (2, 1, 32)))


def test_small_trees_side_by_side() -> None:
    """Blocks that hold several groups, whose rows end at once, keep the error rule."""
    groups = [(20, [3, 9]), (1, [1]), (50, [30, 31, 7]), (63, [1, 1])]
    until_T = visible_until_of_groups(groups)
    assert_right(until_T, make_qkv(len(until_T), (2, 1, 32)))


def test_ranges_that_do_not_nest() -> None:
    until_T = int32([5, 3, 90, 20, *range(10, 176)]).clamp(max=90)[:90]
    assert_right(until_T, make_qkv(90, (2, 1, 32)))


@pytest.mark.parametrize("factor", [30.0, 0.0])
def test_large_and_equal_scores(factor: float) -> None:
    """Scores of some hundred keep the error rule, and so do equal ones.

    A softmax that does not subtract its maximum would overflow.
    """
    qkv = make_qkv(130, (2, 1, 32))
    qkv[0] *= factor
    assert_right(random_tree(130, seed=1), qkv)


def test_branches_do_not_see_each_other() -> None:
    qkv = make_qkv(len(TREE), (2, 1, 32))
    changed = [x.clone() for x in qkv]
    for x in changed:
        x[16:29] += 1
    o_THE, changed_o_THE = (run(int32(TREE), x)[0] for x in (qkv, changed))
    assert_bitwise_equal(changed_o_THE[:16], o_THE[:16], name="rows before the sibling")
    assert_bitwise_equal(changed_o_THE[29:], o_THE[29:], name="rows behind the sibling")


def test_strided_inputs() -> None:
    """Slices of one tensor, a transposed gradient and transposed heads equal their copies."""
    qkv_THE = make_qkv(90, (8, 1, 32))[0]
    until_T = random_tree(90, seed=3).to(DEVICE)
    slices = qkv_THE.split((4, 2, 2), dim=1)
    from_copies = run(until_T, [x.contiguous() for x in slices])
    leaf = qkv_THE.to(DEVICE, copy=True).requires_grad_()
    o_THE = tree_attention(*leaf.split((4, 2, 2), dim=1), until_T, scale=32**-0.5, impl="triton")
    grad = upstream_of(o_THE).transpose(0, 1).contiguous().transpose(0, 1)
    o_THE.backward(grad)
    grads = leaf.grad.split((4, 2, 2), dim=1)
    assert_same([x.detach().cpu() for x in (o_THE, *grads)], from_copies, "slices")
    transposed = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in slices]
    assert_same(run(until_T, transposed), from_copies, "heads apart")


def test_launches_align_what_they_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels get tensors aligned to 16 bytes, wherever the caller's start.

    Only for aligned tensors are the kernels known not to spill registers.
    """
    remainders: list[int] = []
    for stem in ("tree_attention", "tree_backward", "tree_grad_kv"):
        module = importlib.import_module(f"socpo_fast.kernels.{stem}")
        for name, kernel in list(vars(module).items()):
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, NotedKernel(kernel, remainders))
    from_aligned = run(LONG_COLUMNS, qkv := make_qkv(len(LONG_COLUMNS), (2, 1, 32)))
    until_T = torch.cat([LONG_COLUMNS[:1], LONG_COLUMNS])[1:]
    shifted = [torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape) for x in qkv]
    # One element from an aligned start: 4 bytes off.
    assert {x.data_ptr() % 16 for x in (until_T, *shifted)} == {4}
    leaves = [x.to(DEVICE).requires_grad_() for x in shifted]
    o_THE = tree_attention(*leaves, until_T.to(DEVICE), scale=32**-0.5, impl="triton")
    grad_o = upstream_of(o_THE)
    grad_o = torch.cat([grad_o.flatten()[:1], grad_o.flatten()])[1:].view(grad_o.shape)
    grads = torch.autograd.grad(o_THE, leaves, grad_o)
    assert_same([x.detach().cpu() for x in (o_THE, *grads)], from_aligned, "shifted")
    assert len(remainders) > 40
    assert set(remainders) == {0}


class NotedKernel:
    """A kernel that notes the address modulo 16 of each tensor of its launches."""

    def __init__(self, kernel: Any, remainders: list[int]):
        self.kernel = kernel
        self.remainders = remainders

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def launch(*args: Any, **options: Any) -> Any:
            self.remainders += [x.data_ptr() % 16 for x in args if isinstance(x, Tensor)]
            return self.kernel[grid](*args, **options)

        return launch


def test_checkpointing_changes_no_bit() -> None:
    """A forward that is computed again in the backward gives the same gradients."""
    until_T = random_tree(90, seed=5)
    qkv = make_qkv(90, (2, 1, 32))
    mask = TreeMask.of(until_T).to(torch.device(DEVICE))
    leaves = [x.to(DEVICE, copy=True).requires_grad_() for x in qkv]

    def attend(*leaves: Tensor) -> Tensor:
        return tree_attention(*leaves, mask, scale=32**-0.5, impl="triton")

    o_THE = checkpoint(attend, *leaves, use_reentrant=False)
    grads = torch.autograd.grad(o_THE, leaves, upstream_of(o_THE))
    assert_same([x.detach().cpu() for x in (o_THE, *grads)], run(mask, qkv), "recomputed")


def test_logsumexp() -> None:
    """The logsumexp is in nats and of scaled scores, as in the C++."""
    q, k, v = (x.to(DEVICE) for x in make_qkv(70, (2, 1, 32)))
    mask = TreeMask.of(int32([70] * 70).to(DEVICE))
    _, logsumexp_TH = torch.ops.socpo_fast.tree_attention(q, k, v, *mask, 0.3, "triton")
    scores = 0.3 * torch.einsum("the,ske->ths", q.double(), k.double())
    is_seen = torch.ones(70, 70, dtype=torch.bool, device=DEVICE).tril()[:, None]
    expected = scores.masked_fill(~is_seen, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(logsumexp_TH.double(), expected, atol=1e-5, rtol=0)


def test_no_rows() -> None:
    for x in run(int32([]), make_qkv(0, (2, 1, 32))):
        assert x.shape[0] == 0


def test_refuses_other_head_dims_and_dtypes() -> None:
    until_T = int32([4] * 4).to(DEVICE)
    q, k, v = (x.to(DEVICE) for x in make_qkv(4, (2, 1, 80)))
    rule = "E must be 32, 64 or 128 for impl='triton', got 80; use impl='ref'"
    with pytest.raises(ValueError, match=f"^tree_attention: {rule}$"):
        tree_attention(q, k, v, until_T, scale=0.3, impl="triton")
    wide = [x.double() for x in (q, k, v)]
    rule = "impl must be one of auto, ref for float64"
    with pytest.raises(ValueError, match=f"^tree_attention: {rule}"):
        tree_attention(*wide, until_T, scale=0.3, impl="triton")


def test_auto_takes_ref_at_other_head_dims(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["socpo_fast.ops.tree_attention"]  # the package names the function
    monkeypatch.setattr(module, "pick_impl", lambda *_: "triton")  # as on a card
    q, k, v = make_qkv(4, (2, 1, 80))
    auto = tree_attention(q, k, v, int32([4] * 4), scale=0.3)
    ref = tree_attention_ref(q, k, v, int32([4] * 4), scale=0.3)
    assert_bitwise_equal(auto, ref, name="o")
