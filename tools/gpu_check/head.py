"""Stage `head`: times the policy head, forward and backward, beside three bare GEMMs and peers.

Gradients are compared with fp64 first: a contender with wrong ones is not timed. Peers take part if
they are installed (`--peers`). Each computes per-token log-probs in its own way; the loss is ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bench.policy_head.peers import PEER_LOGPROBS
from socpo_fast.ops import linear_policy_loss, policy_loss
from socpo_fast.ops._head import GPU_WORKSPACE_MIB, matmul_
from tools.gpu_check.check import Check, Part, Skipped, check_close
from tools.gpu_check.rooflines import head_flops
from tools.gpu_check.timing import median_ms, peak_gib

SHAPES = ((8192, 151936, 1024), (8192, 151936, 2048))  # Qwen3-0.6B and 1.7B
TINY_SHAPES = ((20, 211, 16),)
WORKSPACES_MIB = (GPU_WORKSPACE_MIB, 208.0, 1024.0, 4096.0)  # the shipped one first
GEMM_ROWS = (1024, 2048, 4096, 8192)  # rows of a chunk: the fastest of these is the limit
TRUTH_ROWS = 512  # rows of fp64 logits that exist at once
MAX_ERROR = 1e-2  # relative to a gradient's norm; factors are bf16

LogProbs = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden [T, D], weight [V, D], targets [T]
Gradients = tuple[Tensor, Tensor]  # dX [T, D], dW [V, D]


@dataclass(frozen=True)
class Problem:
    """The loss rows of a microbatch. No row is clipped, so each needs all three products."""

    hidden_TD: Tensor
    weight_VD: Tensor
    targets_T: Tensor
    old_logprobs_T: Tensor
    advantages_T: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.targets_T), *self.weight_VD.shape


def make_problem(check: Check, shape: tuple[int, int, int]) -> tuple[Problem, Gradients]:
    """Makes random rows with ratios near 1, and their gradients in fp64."""
    num_rows, vocab, width = shape
    hidden = check.randn(num_rows, width, seed=1)
    weight = (2 * width**-0.5 * check.randn(vocab, width, seed=2)).to(check.dtype)
    targets = torch.arange(num_rows, device=check.device) * 7 % vocab
    advantages = check.randn(num_rows, seed=3, dtype=torch.float32)
    old_logprobs = torch.empty(num_rows, device=check.device)
    weight_fp64 = weight.double()
    dx = torch.empty(num_rows, width, dtype=torch.float64, device=old_logprobs.device)
    dw = torch.zeros_like(weight_fp64)
    for rows in torch.arange(num_rows, device=check.device).split(TRUTH_ROWS):
        x = hidden[rows].double()
        logits = x @ weight_fp64.T
        logsumexp = logits.logsumexp(1, keepdim=True)
        logprobs = (logits.gather(1, targets[rows, None]) - logsumexp)[:, 0]
        old_logprobs[rows] = (logprobs - 0.05).float()
        ratio = (logprobs - old_logprobs[rows].double()).exp()
        coefficients = -advantages[rows].double() * ratio / num_rows
        # d loss / d logits = coefficient * (one-hot of the target - softmax), built in place.
        dz = logits.sub_(logsumexp).exp_().mul_(-coefficients[:, None])
        dz[torch.arange(len(rows), device=dz.device), targets[rows]] += coefficients
        dx[rows] = dz @ weight_fp64
        dw += dz.T @ x
    return Problem(hidden, weight, targets, old_logprobs, advantages), (dx, dw)


def ours(problem: Problem, workspace_mib: float) -> Gradients:
    """Returns the gradients of our op."""
    hidden, weight = (x.detach().requires_grad_() for x in (problem.hidden_TD, problem.weight_VD))
    loss = linear_policy_loss(
        hidden,
        weight,
        problem.targets_T,
        problem.old_logprobs_T,
        problem.advantages_T,
        temperature=1.0,
        num_loss_tokens=len(problem.targets_T),
        workspace_mib=workspace_mib,
    ).loss
    return torch.autograd.grad(loss, (hidden, weight))


def by_logprobs(problem: Problem, logprobs_of: LogProbs) -> Gradients:
    """Returns the gradients of a peer: its per-token log-probs, then our loss of them."""
    hidden, weight = (x.detach().requires_grad_() for x in (problem.hidden_TD, problem.weight_VD))
    logprobs = logprobs_of(hidden, weight, problem.targets_T)
    tensors = logprobs.float(), problem.old_logprobs_T, problem.advantages_T
    loss = policy_loss(*tensors, num_loss_tokens=len(problem.targets_T)).loss
    return torch.autograd.grad(loss, (hidden, weight))


def naive(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Returns log-probs by plain torch, with all logits in memory."""
    return (hidden @ weight.T).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]


def bare_gemms_ms(check: Check, problem: Problem) -> float:
    """Times the products of logits, dX and dW by chunks of rows; returns the fastest chunking."""
    num_rows, vocab, width = problem.shape
    dw = torch.zeros(vocab, width, device=check.device)
    times = []
    # A chunk larger than the problem would time nothing.
    for chunk in sorted({min(rows, num_rows) for rows in GEMM_ROWS}):
        logits = torch.empty(chunk, vocab, dtype=check.dtype, device=check.device)
        dx = torch.empty(chunk, width, dtype=check.dtype, device=check.device)

        def run(chunk: int = chunk, logits: Tensor = logits, dx: Tensor = dx) -> None:
            for start in range(0, num_rows - chunk + 1, chunk):
                x = problem.hidden_TD[start : start + chunk]
                torch.mm(x, problem.weight_VD.T, out=logits)
                torch.mm(logits, problem.weight_VD, out=dx)
                matmul_(dw, logits.T, x, accumulate=start > 0)

        times.append(median_ms(run, check.device))
    return min(times)


def their_runs(problem: Problem) -> dict[str, Callable[[], Gradients]]:
    """Returns plain torch, and each peer at its own defaults."""
    runs: dict[str, Callable[[], Gradients]] = {"torch naive": lambda: by_logprobs(problem, naive)}
    for peer, make_logprobs in PEER_LOGPROBS.items():
        runs[peer] = lambda make=make_logprobs: by_logprobs(problem, make())
    return runs


def measure(
    check: Check, key: str, of: str, run: Callable[[], Gradients], truth: Gradients, limit: float
) -> None:
    """Checks gradients against fp64, then records time and memory beyond the inputs."""
    for gradient_name, gradient, expected in zip(("dX", "dW"), run(), truth, strict=True):
        check_close(f"{of}: {gradient_name}", gradient, expected, bound=MAX_ERROR)
    check.figure(key, median_ms(run, check.device), of=of, limit=limit)
    check.figure("head.extra_gib", peak_gib(run, check.device), of=of)


def problem_of(check: Check, shape_idx: int) -> tuple[Problem, Gradients, str]:
    """Returns (problem, its gradients in fp64, its name)."""
    shapes = TINY_SHAPES if check.tiny else SHAPES
    if shape_idx >= len(shapes):
        raise Skipped("one tiny shape is enough")
    problem, truth = make_problem(check, shapes[shape_idx])
    return problem, truth, f"D {problem.weight_VD.shape[1]}"


def ours_beside_gemms(shape_idx: int) -> Part:
    """Returns a part for one shape: three bare GEMMs, then ours at several workspaces."""

    def part(check: Check) -> None:
        problem, truth, name = problem_of(check, shape_idx)
        # Bare GEMMs are held to the card's rate, the contenders to the bare GEMMs.
        limit = check.ceilings.bf16_ms(head_flops(*problem.shape))
        gemms_ms = bare_gemms_ms(check, problem)
        check.figure("head.bare_gemms_ms", gemms_ms, of=name, limit=limit)
        for mib in WORKSPACES_MIB:
            of = f"ours, {mib:.0f} MiB, {name}"
            key = "head.ours_ms" if mib == GPU_WORKSPACE_MIB else "head.workspace_ms"
            with check.case(of):
                measure(check, key, of, partial(ours, problem, mib), truth, gemms_ms)

    return part


def peers(shape_idx: int) -> Part:
    """Returns a part for the peers at one shape; a missing or wrong peer is only skipped."""

    def part(check: Check) -> None:
        problem, truth, name = problem_of(check, shape_idx)
        gemms_ms = bare_gemms_ms(check, problem)
        for peer, run in their_runs(problem).items():
            of = f"{peer}, {name}"
            with check.case(of):
                try:
                    measure(check, "head.peer_ms", of, run, truth, gemms_ms)
                except Exception as error:
                    # A peer that is not installed, or whose gradients are wrong, must not fail our
                    # check.
                    raise Skipped(f"{type(error).__name__}: {error}") from error

    return part


PARTS: dict[str, Part] = {
    "ours, Qwen3-0.6B": ours_beside_gemms(0),
    "ours, Qwen3-1.7B": ours_beside_gemms(1),
    "peers, Qwen3-0.6B": peers(0),
    "peers, Qwen3-1.7B": peers(1),
}
