"""Stage `attention`: compares training's attention over trees with what else PyTorch offers.

The limit is the rate of SDPA's flash kernel over one long causal row, measured in the same process.
Only useful work counts, for the limit as for the contenders: for each head and each pair of a query
and a visible key, 4 E FLOPs in the forward and 10 E in the backward (scores again, dV, dP, dQ, dK).
A pair counts once, however often it is computed: copies of a prompt, padding, and the second
computation of scores in our backward do not count. A contender is timed only if its outputs and
gradients are right.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from socpo_fast.ops import TreeMask, tree_attention
from tests.helpers.error_rule import assert_bitwise_equal
from tools.gpu_check.check import Check, Part, Skipped
from tools.gpu_check.contenders import (
    Contender,
    flex,
    ours,
    over_copied_rows,
    skip_on_peer_error,
    time_limit,
    varlen,
)
from tools.gpu_check.models import MODELS
from tools.gpu_check.results import read_results
from tools.gpu_check.stages import NAMES
from tools.gpu_check.timing import Run, median_ms
from tools.gpu_check.trees import SHAPES, TINY_SHAPES, TreeShape, visible_until_of
from tools.tree_balance import tile_shares

LONG_ROW = 8192
TINY_LONG_ROW = 64
FLOPS = {"forward": 4, "training": 14}  # times E, for each head and pair; training: both passes
# Largest error of a row of o, dQ, dK or dV: the norm of its error over its own norm, or over the
# median norm for rows that are smaller.
MAX_ERROR = {torch.bfloat16: 2e-2, torch.float32: 1e-3}
PEER_S = 15.0  # for one shape
FLEX_S = 30.0  # for all shapes: it compiles for each, forward and backward


@dataclass(frozen=True)
class Problem:
    """A tree, q, k and v with the heads of Qwen3-0.6B and 1.7B, and the right results."""

    shape: TreeShape
    tree: TreeMask
    tensors: tuple[Tensor, Tensor, Tensor]  # q_THE, k_TKE, v_TKE
    grad_THE: Tensor
    truth: tuple[Tensor, ...]  # o, dQ, dK, dV in fp32
    scale: float

    def flops(self, way: str) -> float:
        """Returns the useful FLOPs of a forward or of training."""
        _, heads, head_dim = self.grad_THE.shape
        return float(FLOPS[way] * self.shape.num_pairs * heads * head_dim)


@functools.cache
def make_problem(check: Check, shape: TreeShape) -> Problem:
    """Makes random rows, and the reference's results in fp32, group by group to save memory."""
    config = MODELS["tiny" if check.tiny else "Qwen3-0.6B"]
    heads = config.num_heads
    kv_heads = config.num_kv_heads
    head_dim = config.head_dim
    num_rows = shape.num_rows
    scale = head_dim**-0.5
    q, k, v, grad = (
        check.randn(num_rows, n, head_dim, seed=seed)
        for seed, n in enumerate((heads, kv_heads, kv_heads, heads))
    )
    group_shape = TreeShape("one of them", shape.prompt, shape.answers)
    group_tree = TreeMask.of(visible_until_of(group_shape).to(check.device))
    parts = []
    # Groups do not see each other, so the reference can take them one at a time. Its scores of all
    # rows at once would need far more memory.
    for rows in torch.arange(num_rows, device=check.device).split(shape.rows_of_a_group):
        leaves = [x[rows].float().requires_grad_() for x in (q, k, v)]
        o = tree_attention(*leaves, group_tree, scale=scale, impl="ref")
        parts.append((o.detach(), *torch.autograd.grad(o, leaves, grad[rows].float())))
    truth = tuple(torch.cat(pieces) for pieces in zip(*parts, strict=True))
    tree = TreeMask.of(visible_until_of(shape).to(check.device))
    return Problem(shape, tree, (q, k, v), grad, truth, scale)


def row_error(actual: Tensor, truth: Tensor) -> float:
    """Returns the worst row's error; rows smaller than the median are measured by the median."""
    # A row whose own norm is almost zero would make any rounding look like a large relative error.
    sizes = truth.flatten(1).norm(dim=1)
    errors = (actual.float() - truth).flatten(1).norm(dim=1) / sizes.clamp(min=sizes.median())
    return float(errors.nan_to_num(nan=torch.inf).max())


def leaves_of(problem: Problem, contender: Contender) -> list[Tensor]:
    """Returns q, k and v in the contender's layout, as leaves that get gradients."""
    return [contender.take(x).detach().requires_grad_() for x in problem.tensors]


def answer_of(problem: Problem, contender: Contender) -> tuple[Tensor, ...]:
    """Returns (o, dQ, dK, dV) in the tree's rows; only o where there is no backward."""
    leaves = leaves_of(problem, contender)
    if not contender.has_backward:
        with torch.no_grad():
            o = contender.forward(*(x.detach() for x in leaves))
        return (contender.give(o * contender.once),)
    o = contender.forward(*leaves)
    # A row with several copies gets its gradient at the first copy only; else it would count twice.
    grad = (contender.take(problem.grad_THE) * contender.once).to(o.dtype)
    gradients = torch.autograd.grad(o, leaves, grad)
    return tuple(map(contender.give, (o.detach() * contender.once, *gradients)))


def hold_to_truth(problem: Problem, contender: Contender, bound: float) -> float:
    """Asserts that every row is right, and returns the worst row's error of all results."""
    worst = 0.0
    results = answer_of(problem, contender)
    for tensor_name, actual, truth in zip(
        ("o", "dQ", "dK", "dV"), results, problem.truth, strict=False
    ):
        error = row_error(actual, truth)
        name = f"{contender.name}, {problem.shape.name}: {tensor_name}"
        assert error <= bound, f"{name}: a row's error must be <= {bound:g}, got {error:.3g}"
        worst = max(worst, error)
    return worst


def runs_of(problem: Problem, contender: Contender) -> dict[str, Run]:
    """Returns the calls to time: the forward, and forward with backward, in the own layout."""
    leaves = leaves_of(problem, contender)
    if not contender.has_backward:
        plain = [x.detach() for x in leaves]
        return {"forward": lambda: contender.forward(*plain)}
    grad = contender.take(problem.grad_THE)
    # With leaves that need gradients, the forward also saves what a backward needs, as in training.
    return {
        "forward": lambda: contender.forward(*leaves),
        "training": lambda: torch.autograd.grad(contender.forward(*leaves), leaves, grad),
    }


def device_ms(check: Check, run: Run) -> float:
    """Times a call in a CUDA graph: otherwise short kernels would wait for Python."""
    try:
        return median_ms(run, check.device, in_graph=True)
    except RuntimeError as error:
        ms = median_ms(run, check.device)
        # Some peers synchronise or allocate in a way that a capture refuses. Their times include
        # launches.
        check.note(f"timed without a graph, since it could not be captured: {error}")
        return ms


def value_of(check: Check, key: str, of: str) -> float | None:
    """Returns a figure of an earlier part, which may have run in another process."""
    return read_results(check.results, NAMES).value_of(key, of)


def limit_of(check: Check, way: str) -> float | None:
    """Returns the TFLOP/s of one long row, if it was measured."""
    return value_of(check, "attention.limit_tflop_s", way)


def ms_at_limit(check: Check, problem: Problem, way: str) -> float | None:
    """Returns the time of the useful work at that rate."""
    limit = limit_of(check, way)
    return 1e-9 * problem.flops(way) / limit if limit else None


def long_row(check: Check) -> None:
    """Measures the limit: SDPA over one long causal row, with grouped and with full key heads."""
    config = MODELS["tiny" if check.tiny else "Qwen3-0.6B"]
    heads = config.num_heads
    head_dim = config.head_dim
    length = TINY_LONG_ROW if check.tiny else LONG_ROW
    best = dict.fromkeys(FLOPS, 0.0)
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        # Which of the two is faster depends on the version of PyTorch. The limit is the better one.
        for kv_heads in (config.num_kv_heads, heads):
            name = f"{backend.name.split('_')[0].lower()}, {heads} heads on {kv_heads}"
            with check.case(f"long row, {name}"), skip_on_peer_error():
                if backend is SDPBackend.CUDNN_ATTENTION and not check.is_cuda:
                    raise Skipped("cuDNN is a card's")
                for way, run in long_row_runs(check, backend, kv_heads, length).items():
                    flops = FLOPS[way] * heads * head_dim * length * (length + 1) / 2
                    rate = 1e-9 * flops / device_ms(check, run)
                    limit = check.ceilings.bf16_tflop_s
                    of = f"{way}, {name}"
                    check.figure("attention.long_row_tflop_s", rate, of=of, limit=limit)
                    if backend is SDPBackend.FLASH_ATTENTION:
                        best[way] = max(best[way], rate)
    for way, rate in best.items():
        if rate > 0:
            check.figure("attention.limit_tflop_s", rate, of=way)


def long_row_runs(
    check: Check, backend: SDPBackend, kv_heads: int, length: int
) -> dict[str, Callable[[], object]]:
    """Returns the calls to time over one long row."""
    config = MODELS["tiny" if check.tiny else "Qwen3-0.6B"]
    heads = config.num_heads
    head_dim = config.head_dim
    leaves = [
        check.randn(1, n, length, head_dim, seed=seed).requires_grad_()
        for seed, n in enumerate((heads, kv_heads, kv_heads))
    ]
    grad = check.randn(1, heads, length, head_dim, seed=3)

    def attend() -> Tensor:
        with sdpa_kernel(backend):
            is_grouped = kv_heads < heads
            return F.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=is_grouped)

    return {
        "forward": torch.no_grad()(attend),
        "training": lambda: torch.autograd.grad(attend(), leaves, grad),
    }


def measure_ours(check: Check) -> None:
    """Checks that ours is right and bitwise repeatable, then times it."""
    for shape in TINY_SHAPES if check.tiny else SHAPES:
        with check.case(shape.name):
            problem = make_problem(check, shape)
            contender = ours(problem.tree, problem.scale)
            shares = tile_shares(problem.tree)
            tiles = (
                f"{shares['masked']:.0%} of tiles masked, {shares['pairs_seen']:.0%} of pairs seen"
            )
            check.note(f"{shape.name}: {tiles}")
            error = hold_to_truth(problem, contender, MAX_ERROR[check.dtype])
            check.figure("attention.row_error", error, of=shape.name)
            answers = [answer_of(problem, contender) for _ in range(2)]
            for tensor_name, a, b in zip(("o", "dQ", "dK", "dV"), *answers, strict=True):
                assert_bitwise_equal(a, b, name=f"{shape.name}: {tensor_name} of two runs")
            for way, run in runs_of(problem, contender).items():
                ms = device_ms(check, run)
                limit_ms = ms_at_limit(check, problem, way)
                check.figure(f"attention.{way}_ms", ms, of=shape.name, limit=limit_ms)
                rate = 1e-9 * problem.flops(way) / ms
                limit = limit_of(check, way)
                check.figure(f"attention.{way}_tflop_s", rate, of=shape.name, limit=limit)


def measure_peer(
    check: Check,
    shape: TreeShape,
    key: str,
    make: Callable[[Problem], Contender],
    limit_s: float = PEER_S,
) -> None:
    """Times a peer if its results are right, and compares ours; skips what it cannot do."""
    with check.case(f"{key}, {shape.name}"):
        problem = make_problem(check, shape)
        with skip_on_peer_error(), time_limit(limit_s, key):
            contender = make(problem)
            hold_to_truth(problem, contender, MAX_ERROR[check.dtype])
            for way, run in runs_of(problem, contender).items():
                ms = device_ms(check, run)
                of = f"{way}, {contender.name}, {shape.name}"
                limit_ms = ms_at_limit(check, problem, way)
                check.figure(f"attention.{key}_ms", ms, of=of, limit=limit_ms)
                # Missing if the part "ours" has failed or was not run.
                our_ms = value_of(check, f"attention.{way}_ms", shape.name)
                if our_ms:
                    check.figure(f"attention.times_{key}", ms / our_ms, of=of)


def beside_copied_rows(check: Check) -> None:
    """Measures SDPA over [rollouts, longest]."""
    for shape in TINY_SHAPES if check.tiny else SHAPES:
        measure_peer(
            check, shape, "copied_rows", lambda p: over_copied_rows(check, p.shape, p.scale)
        )


def beside_varlen(check: Check) -> None:
    """Measures torch's varlen_attn over gathered ancestors, with grouped and repeated heads."""
    for shape in TINY_SHAPES[:1] if check.tiny else SHAPES:
        for is_grouped in (True, False):

            def make(problem: Problem, is_grouped: bool = is_grouped) -> Contender:
                return varlen(check, problem.shape, problem.scale, is_grouped=is_grouped)

            measure_peer(check, shape, "varlen", make)


def beside_flex(check: Check) -> None:
    """Measures FlexAttention. Must come last: it compiles for each shape, maybe for too long."""
    deadline = time.monotonic() + FLEX_S
    for shape in TINY_SHAPES if check.tiny else SHAPES:
        left_s = max(0.1, deadline - time.monotonic())
        measure_peer(
            check,
            shape,
            "flex",
            lambda p: flex(check, p.shape, p.tree.visible_until_T, p.scale),
            left_s,
        )


PARTS: dict[str, Part] = {
    "long row": long_row,
    "ours": measure_ours,
    "copied rows": beside_copied_rows,
    "varlen": beside_varlen,
    "flex": beside_flex,
}
