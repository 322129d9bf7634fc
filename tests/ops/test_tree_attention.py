"""Compares tree attention with a dense mask in fp64 and with separate rows.

Also tests thread-invariance and what the op refuses.

Row t is seen by itself and the rows behind it, up to until[t] - 1.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from socpo_fast.ops import TreeMask, tree_attention, visible_until_of_sequences
from socpo_fast.ops.tree_attention import num_pairs
from tests.helpers.elementwise import needs_cpp, thread_counts
from tests.helpers.error_rule import assert_bitwise_equal, assert_error_rule

CPP = pytest.param("cpp", torch.float32, marks=needs_cpp)
KERNELS = [("ref", torch.float64), ("ref", torch.float32), ("ref", torch.bfloat16), CPP]
NAMES = ("o", "q.grad", "k.grad", "v.grad")

# The tree of these rows, of which PATHS are the sequences:
#
#     0..3 --- 4..6 --- 7..9 --- 10..11         an attempt
#      |        |         `----- 12..15         guidance and an attempt, which see 7..9 only
#      |         `------ 16..28                 a sibling
#       `------ 29..31                          a rollout that keeps four tokens of the prompt
TREE = [32] * 4 + [29] * 3 + [16] * 3 + [12] * 2 + [16] * 4 + [29] * 13 + [32] * 3
PATHS = [
    torch.arange(12),
    torch.tensor([*range(10), *range(12, 16)]),
    torch.tensor([*range(7), *range(16, 29)]),
    torch.tensor([*range(4), *range(29, 32)]),
]
# (H, K, E): SmolLM2's groups; one head; groups of one head; one group, of less than a vector.
HEADS = [(6, 2, 64), (1, 1, 8), (3, 3, 16), (5, 1, 7)]


def int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def random_tree(num_rows: int, seed: int) -> Tensor:
    """Returns any tree in depth-first order.

    Each row hangs below one of the rows on the path to the row before it.
    """
    rng = random.Random(seed)
    until = [num_rows] * num_rows
    path = []
    for row in range(num_rows):
        if path and rng.random() < 0.1:
            num_kept = rng.randrange(len(path) + 1)
            for ended_row in path[num_kept:]:
                until[ended_row] = row
            path = path[:num_kept]
        path.append(row)
    return int32(until)


def make_qkv(num_rows: int, heads: tuple[int, int, int] = (6, 2, 64)) -> list[Tensor]:
    """Returns fp32 numbers that bf16 holds exactly."""
    rng = torch.Generator().manual_seed(0)
    (num_heads, num_kv_heads, head_dim) = heads
    shapes = [(num_rows, n, head_dim) for n in (num_heads, num_kv_heads, num_kv_heads)]
    return [torch.randn(shape, generator=rng).bfloat16().float() for shape in shapes]


def run(attention: Callable[..., Tensor], qkv: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Returns the output, and the gradients of q, k and v for a fixed upstream gradient."""
    leaves = [x.to(dtype, copy=True).requires_grad_() for x in qkv]
    out = attention(*leaves)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    out.backward(upstream.to(dtype))
    return [out.detach(), *(x.grad for x in leaves)]


def dense(until_T: Tensor) -> Callable[..., Tensor]:
    """Returns attention by the formula, with one [T, T] mask."""
    rows = torch.arange(len(until_T))
    is_seen = (rows <= rows[:, None]) & (rows[:, None] < until_T)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        scores = q.shape[-1] ** -0.5 * torch.einsum("qhe,khe->hqk", q, keys)
        weights = scores.masked_fill(~is_seen, -torch.inf).softmax(-1)
        return torch.einsum("hqk,khe->qhe", weights, values)

    return attention


def separate(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Computes each path as a sequence of its own.

    A row of the tree is taken from the first path that it is on.
    """
    out = torch.zeros_like(q)
    is_done = torch.zeros(q.shape[0], dtype=torch.bool)
    for path in PATHS:
        out_of_path = dense(int32([len(path)] * len(path)))(q[path], k[path], v[path])
        out = out.index_copy(0, path[~is_done[path]], out_of_path[~is_done[path]])
        is_done[path] = True
    return out


def tree(until_T: Tensor | TreeMask, impl: str) -> Callable[..., Tensor]:
    """Returns tree attention as a function of q, k and v."""
    return lambda q, k, v: tree_attention(q, k, v, until_T, scale=q.shape[-1] ** -0.5, impl=impl)


@pytest.mark.parametrize(("impl", "dtype"), KERNELS)
def test_tree_equals_separate_rows(impl: str, dtype: torch.dtype) -> None:
    qkv = make_qkv(len(TREE))
    actual = run(tree(int32(TREE), impl), qkv, dtype)
    plain = run(separate, qkv, dtype)
    truth = run(separate, qkv, torch.float64)
    for name, a, p, t in zip(NAMES, actual, plain, truth, strict=True):
        assert_error_rule(a, p, t, name=name)


# One row; less and more than a block of rows, with short and long paths; and so many that the
# reference needs a second chunk.
@pytest.mark.parametrize("num_rows", [1, 2, 61, 200, 301])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(("impl", "dtype"), KERNELS[:2] + KERNELS[3:])
def test_as_right_as_a_dense_mask(
    impl: str,
    dtype: torch.dtype,
    heads: tuple[int, int, int],
    num_rows: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = sys.modules["socpo_fast.ops.tree_attention"]  # the package names the function
    monkeypatch.setattr(module, "REF_SCORES", 1 << 16)
    qkv = make_qkv(num_rows, heads)
    until_T = random_tree(num_rows, seed=num_rows)
    actual = run(tree(until_T, impl), qkv, dtype)
    plain = run(dense(until_T), qkv, dtype)
    truth = run(dense(until_T), qkv, torch.float64)
    for name, a, p, t in zip(NAMES, actual, plain, truth, strict=True):
        assert_error_rule(a, p, t, name=name)


@pytest.mark.parametrize(("impl", "dtype"), KERNELS[1:2] + KERNELS[3:])
def test_ranges_that_do_not_nest(impl: str, dtype: torch.dtype) -> None:
    """Ranges that are no tree still get what the formula says."""
    until_T = int32([5, 3, 40, 20, *range(10, 46)]).clamp(max=40)
    qkv = make_qkv(40)
    actual, plain = (run(f, qkv, dtype) for f in (tree(until_T, impl), dense(until_T)))
    truth = run(dense(until_T), qkv, torch.float64)
    for name, a, p, t in zip(NAMES, actual, plain, truth, strict=True):
        assert_error_rule(a, p, t, name=name)


def test_gradcheck() -> None:
    qkv = [x.double().requires_grad_() for x in make_qkv(6, (2, 1, 3))]
    assert torch.autograd.gradcheck(tree(int32([6, 6, 4, 4, 6, 6]), "ref"), qkv)


@needs_cpp
def test_large_and_small_scores() -> None:
    """Scores of some hundred keep the error rule, and so do equal ones.

    A softmax that does not subtract its maximum would overflow.
    """
    for factor in (30.0, 0.0):
        qkv = make_qkv(70)
        until_T = random_tree(70, seed=1)
        qkv[0] *= factor
        actual = run(tree(until_T, "cpp"), qkv, torch.float32)
        plain, truth = (run(dense(until_T), qkv, t) for t in (torch.float32, torch.float64))
        for name, a, p, t in zip(NAMES, actual, plain, truth, strict=True):
            size = t.abs().max().clamp(min=1.0)
            assert_error_rule(a / size, p / size, t / size, name=name)


@pytest.mark.parametrize("impl", ["ref", pytest.param("cpp", marks=needs_cpp)])
def test_branches_do_not_see_each_other(impl: str) -> None:
    qkv = make_qkv(len(TREE))
    changed = [x.clone() for x in qkv]
    for x in changed:
        x[16:29] += 1
    o_THE, changed_o_THE = (tree(int32(TREE), impl)(*x) for x in (qkv, changed))
    assert_bitwise_equal(changed_o_THE[:16], o_THE[:16], name="rows before the sibling")
    assert_bitwise_equal(changed_o_THE[29:], o_THE[29:], name="rows behind the sibling")


@needs_cpp
@pytest.mark.parametrize("heads", HEADS)
def test_thread_invariant(heads: tuple[int, int, int]) -> None:
    until_T = random_tree(300, seed=2)
    qkv = make_qkv(300, heads)
    first = run(tree(until_T, "cpp"), qkv, torch.float32)
    for num_threads in (None, *thread_counts()):
        again = run(tree(until_T, "cpp"), qkv, torch.float32)
        for name, a, b in zip(NAMES, again, first, strict=True):
            assert_bitwise_equal(a, b, name=f"{name}, {num_threads} threads")


@needs_cpp
def test_strided_inputs() -> None:
    """Slices of one tensor, whose rows have gaps, equal their copies.

    The upstream gradient is strided too.
    """
    qkv_THE = make_qkv(50, (10, 1, 64))[0]
    until_T = random_tree(50, seed=3)
    slices = qkv_THE.split((6, 2, 2), dim=1)
    from_copies = run(tree(until_T, "cpp"), [x.contiguous() for x in slices], torch.float32)
    leaf = qkv_THE.clone().requires_grad_()
    o_THE = tree(until_T, "cpp")(*leaf.split((6, 2, 2), dim=1))
    assert_bitwise_equal(o_THE, from_copies[0], name="o")
    upstream = torch.randn(o_THE.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    strided = upstream.float().transpose(0, 1).contiguous().transpose(0, 1)
    o_THE.backward(strided)
    assert_bitwise_equal(leaf.grad, torch.cat(from_copies[1:], dim=1), name="gradient")


@pytest.mark.parametrize("impl", ["ref", pytest.param("cpp", marks=needs_cpp)])
def test_no_rows(impl: str) -> None:
    for grad in run(tree(int32([]), impl), make_qkv(0), torch.float32):
        assert grad.shape[0] == 0


@needs_cpp
def test_opcheck() -> None:
    mask = TreeMask.of(random_tree(9, seed=0))
    q, k, v = (x.requires_grad_() for x in make_qkv(9, (4, 2, 8)))
    torch.library.opcheck(torch.ops.socpo_fast.tree_attention, (q, k, v, *mask, 0.3, "cpp"))
    flat = [x.detach() for x in (q, q, k, v)]
    o, logsumexp = torch.ops.socpo_fast.tree_attention(*flat[1:], *mask, 0.3, "cpp")
    backward = torch.ops.socpo_fast.tree_attention_backward
    torch.library.opcheck(backward, (*flat, *mask, o, logsumexp, 0.3, "cpp"))
    until_T = mask.visible_until_T
    torch.library.opcheck(torch.ops.socpo.tree_attention, (*flat[1:], until_T, 0.3))
    torch.library.opcheck(torch.ops.socpo.tree_attention_backward, (*flat, until_T, 0.3))


@needs_cpp
def test_logsumexp() -> None:
    q, k, v = make_qkv(20, (2, 1, 8))
    mask = TreeMask.of(int32([20] * 20))
    _, logsumexp_TH = torch.ops.socpo_fast.tree_attention(q, k, v, *mask, 0.3, "cpp")
    scores = 0.3 * torch.einsum("the,ske->ths", q.double(), k.double())
    is_seen = torch.ones(20, 20, dtype=torch.bool).tril()[:, None]
    expected = scores.masked_fill(~is_seen, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(logsumexp_TH.double(), expected, atol=1e-5, rtol=0)


def test_mask_once_for_many_layers() -> None:
    until_T = random_tree(131, seed=4)
    mask = TreeMask.of(until_T)
    assert all(x.dtype == torch.int32 for x in mask)
    qkv = make_qkv(len(until_T))
    assert_bitwise_equal(tree(mask, "auto")(*qkv), tree(until_T, "auto")(*qkv), name="o")


def test_num_pairs_by_hand() -> None:
    """A prompt of two rows with branches of two and one: 1 + 2, then 3 + 4, then 3 pairs."""
    assert num_pairs(int32([5, 5, 4, 4, 5])) == 13
    assert visible_until_of_sequences([2, 1, 3]).tolist() == [2, 2, 3, 6, 6, 6]
    assert num_pairs(visible_until_of_sequences([2, 1, 3])) == 3 + 1 + 6


@pytest.mark.parametrize(
    ("until", "message"),
    [
        ([4, 4, 2, 4], r"must be in \(its row, T=4\], got 2 at 2"),
        ([4, 5, 4, 4], r"must be in \(its row, T=4\], got 5 at 1"),
        ([0, 4, 4, 4], r"must be in \(its row, T=4\], got 0 at 0"),
        ([4, 4, 4], r"must be int32 \[T=4\], got int32 \[3\]"),
        (torch.tensor([4, 4, 4, 4]), r"must be int32 \[T=4\], got int64 \[4\]"),
    ],
)
def test_refuses_what_is_no_tree(until: list[int] | Tensor, message: str) -> None:
    until_T = until if isinstance(until, Tensor) else int32(until)
    with pytest.raises(ValueError, match=f"^tree_attention: visible_until_T {message}"):
        tree(until_T, "auto")(*make_qkv(4))


def test_refuses() -> None:
    q, k, v = make_qkv(4, (6, 2, 8))
    for args, options, message in (
        ((q, k[:3], v), {}, r"k_TKE must be float32 \[T=4, K, E=8\], got float32 \[3, 2, 8\]"),
        ((q, k, v.half()), {}, r"v_TKE must be float32 \[T=4, K=2, E=8\], got float16 \[4, 2, 8\]"),
        ((q[:, :5], k, v), {}, "H must be a multiple of K=2, got 5"),
        ((q[:, :0], k, v), {}, "H must be a multiple of K=2, got 0"),
        ((q, k, v), {"scale": 0.0}, "scale must be > 1e-37 and < 1e37, got 0.0"),
        ((q, k, v), {"impl": "triton"}, "E must be 32, 64 or 128 for impl='triton', got 8; use"),
        ((q.double(), k.double(), v.double()), {"impl": "cpp"}, "impl must be one of auto, ref"),
    ):
        with pytest.raises(ValueError, match=f"^tree_attention: {message}"):
            tree_attention(*args, int32([4] * 4), **({"scale": 0.3} | options))
    with pytest.raises(ValueError, match=r"^TreeMask.of: visible_until_T must be in .* got 0 at 1"):
        TreeMask.of(int32([2, 0]))
