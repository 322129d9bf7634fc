"""A packed tree against separate rows, and against a softmax written out."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from socpo_fast.ops import Segment, packed_attention
from tests.error_rule import assert_bitwise_equal, assert_error_rule

# prompt 0:7; attempt 7:12, guidance 12:15 behind 3 of its 5 tokens (cut), second attempt 15:16; a sibling attempt 16:29
TREE = [
    Segment(0, 7),
    Segment(7, 12, ((0, 7),)),
    Segment(12, 15, ((0, 7), (7, 10))),
    Segment(15, 16, ((0, 10), (12, 15))),
    Segment(16, 29, ((0, 7),)),
]
# the same tree as the rows a model would see; the first is the cut attempt's whole self
PATHS = [
    torch.arange(12),
    torch.tensor([*range(10), *range(12, 16)]),
    torch.tensor([*range(7), *range(16, 29)]),
]
HEADS, KV_HEADS, HEAD_DIM = 6, 2, 8
SCALE = HEAD_DIM**-0.5


def make_qkv(dtype: torch.dtype, num_rows: int = 29) -> list[Tensor]:
    """The same numbers in every dtype: all fit into bf16."""
    rng = torch.Generator().manual_seed(0)
    shapes = [(num_rows, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return [torch.randn(shape, generator=rng).bfloat16().to(dtype, copy=True).requires_grad_() for shape in shapes]


def separate_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each path as a row of its own, softmax written out; every packed row is read off the first path it is on."""
    out = torch.zeros_like(q)
    seen = torch.zeros(q.shape[0], dtype=torch.bool)
    for path in PATHS:
        keys, values = (x[path].repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k, v))
        scores = SCALE * torch.einsum("qhe,khe->hqk", q[path], keys)
        hidden = torch.ones(len(path), len(path), dtype=torch.bool).triu(1)
        row = torch.einsum("hqk,khe->qhe", scores.masked_fill(hidden, -torch.inf).softmax(-1), values)
        new = ~seen[path]
        out = out.index_copy(0, path[new], row[new])
        seen[path] = True
    return out


def run(attention: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Output and the gradients of q, k and v for a fixed upstream gradient."""
    qkv = make_qkv(dtype)
    out = attention(*qkv)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    out.backward(upstream.to(dtype))
    return [out.detach(), *(x.grad for x in qkv)]


def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return packed_attention(q, k, v, TREE, scale=SCALE)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_tree_equals_separate_rows(dtype: torch.dtype) -> None:
    actual, plain, truth = run(packed, dtype), run(separate_rows, dtype), run(separate_rows, torch.float64)
    for name, a, p, t in zip(("o", "q.grad", "k.grad", "v.grad"), actual, plain, truth, strict=True):
        assert_error_rule(a, p, t, name=name)


def test_gradcheck() -> None:
    segments = [Segment(0, 2), Segment(2, 4, ((0, 2),)), Segment(4, 5, ((0, 1), (2, 3)))]
    qkv = make_qkv(torch.float64, num_rows=5)
    assert torch.autograd.gradcheck(lambda q, k, v: packed_attention(q, k, v, segments, scale=SCALE), qkv)


def test_branches_do_not_see_each_other() -> None:
    qkv = make_qkv(torch.float32)
    changed = [x.detach().clone() for x in qkv]
    for x in changed:
        x[16:] += 1
    assert_bitwise_equal(packed(*changed)[:16], packed(*qkv)[:16], name="rows before the sibling")


def test_same_inputs_same_bits() -> None:
    for name, a, b in zip("oqkv", run(packed, torch.float32), run(packed, torch.float32), strict=True):
        assert_bitwise_equal(a, b, name=name)


def test_no_rows() -> None:
    q, k, v = make_qkv(torch.float32, num_rows=0)
    assert packed_attention(q, k, v, [], scale=SCALE).shape == (0, HEADS, HEAD_DIM)


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([Segment(0, 2), Segment(3, 4)], r"segments\[1\] must be non-empty from 2 on, got \[3, 4\)"),
        ([Segment(0, 2), Segment(2, 2), Segment(2, 4)], r"segments\[1\] must be non-empty from 2 on, got \[2, 2\)"),
        ([Segment(0, 3)], "segments must end at T=4, got 3"),
        ([Segment(0, 5)], "segments must end at T=4, got 5"),
        ([Segment(0, 2), Segment(2, 4, ((0, 3),))], r"segments\[1\].context must be ascending ranges inside \[0, 2\)"),
        ([Segment(0, 2), Segment(2, 4, ((1, 2), (0, 1)))], r"segments\[1\].context must be ascending ranges"),
        ([Segment(0, 2), Segment(2, 4, ((1, 1),))], r"segments\[1\].context must be ascending ranges"),
    ],
)
def test_bad_segments(segments: list[Segment], message: str) -> None:
    with pytest.raises(ValueError, match=f"^packed_attention: {message}"):
        packed_attention(*make_qkv(torch.float32, num_rows=4), segments, scale=SCALE)


def test_bad_inputs() -> None:
    q, k, v = (x.detach() for x in make_qkv(torch.float32, num_rows=4))
    for args, scale, message in (
        ((q, k[:3], v), SCALE, r"k_TKE must be float32 \[T=4, K, E=8\], got float32 \[3, 2, 8\]"),
        ((q, k, v.half()), SCALE, r"v_TKE must be float32 \[T=4, K=2, E=8\], got float16 \[4, 2, 8\]"),
        ((q[:, :5], k, v), SCALE, "H must be a multiple of K=2, got 5"),
        ((q, k, v), 0.0, "scale must be finite and > 0, got 0.0"),
    ):
        with pytest.raises(ValueError, match=f"^packed_attention: {message}"):
            packed_attention(*args, [Segment(0, 4)], scale=scale)
