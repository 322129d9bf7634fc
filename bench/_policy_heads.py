"""The contenders of bench_linear_policy_loss that need torch only: ours, and the one or two ways plain torch offers.

A contender maps a problem to its scalar loss. All but ours make per-token log-probs in their own way and then take
`policy_loss` of them, a few operations on [T] numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from bench._card import first_seconds, matmuls
from bench._head_problem import Problem
from socpo_fast.ops import linear_policy_loss, policy_loss

LogProbs = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden [N, D], weight [V, D], targets [N] -> [N]


@dataclass(frozen=True)
class Contender:
    """One implementation at one setting."""

    name: str
    setting: str  # ours: impl
    logprobs: LogProbs | None  # None: ours
    logit_rows: int | None  # rows of [rows, V] logits alive at once, about; None: all that are projected
    only_loss_rows: bool = False  # project just these, or all

    def loss(self, problem: Problem) -> Tensor:
        p = problem
        if self.logprobs is None:
            inputs = (p.hidden_TD, p.weight_VD, p.targets_T, p.old_logprobs_T, p.advantages_T)
            return linear_policy_loss(*inputs, weights_N=p.weights_T, temperature=1.0, impl=self.setting).loss
        hidden, per_token = p.hidden_TD, (p.targets_T, p.old_logprobs_T, p.advantages_T, p.weights_T)
        if self.only_loss_rows:
            hidden, per_token = hidden.index_select(0, p.rows_N), tuple(x.index_select(0, p.rows_N) for x in per_token)
        targets, old_logprobs, advantages, weights = per_token
        return policy_loss(
            self.logprobs(hidden, p.weight_VD, targets), old_logprobs, advantages, weights_N=weights
        ).loss

    def gradients(self, problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, dX, dW: what is timed. autograd.grad, as nobody's gradient is to be copied into an old one."""
        loss = self.loss(problem)
        grad_hidden, grad_weight = torch.autograd.grad(loss, (problem.hidden_TD, problem.weight_VD))
        return loss.detach(), grad_hidden, grad_weight

    def peak_gib(self, num_rows: int, vocab_size: int, hidden_size: int) -> float:
        """Rough need beyond the inputs: logits, log-softmax and gradient of the rows alive, dW and a spare of it."""
        rows = num_rows if self.logit_rows is None else min(num_rows, self.logit_rows)
        return 4 * vocab_size * (3 * rows + 2 * hidden_size) / 2**30


def ours(impl: str) -> Contender:
    """linear_policy_loss, which leaves out rows of weight 0 by itself."""
    return Contender("ours", impl, None, 256, only_loss_rows=True)


def torch_has_native_head() -> bool:
    """Whether this torch has a cross entropy that projects by itself, which 2.11 has not."""
    return hasattr(torch.nn, "LinearCrossEntropyOptions")


def torch_contenders() -> list[list[Contender]]:
    """For each of this torch's own ways, its settings to choose from."""
    naive = Contender("torch naive", "", _naive, None)
    if not torch_has_native_head():
        return [[naive]]
    options = torch.nn.LinearCrossEntropyOptions
    choices = [("unchunked", None, None)] + [
        (f"chunk {rows}", rows, options(batch_chunk_size=rows, acc_policy="compact")) for rows in (128, 256, 512)
    ]
    native = [Contender("torch native", text, _native(option), rows) for text, rows, option in choices]
    return [[naive], native]


def _naive(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return torch.log_softmax(hidden @ weight.T, dim=-1).gather(1, targets[:, None])[:, 0]


def _native(options: object) -> LogProbs:
    def logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return -functional.linear_cross_entropy(hidden, weight, targets, reduction="none", options=options)

    return logprobs


Gemms = tuple[str, int, int]  # library, rows and columns of a tile of logits


def gemm_choices(num_rows: int, vocab_size: int) -> list[Gemms]:
    """Libraries and chunkings among which the fastest for bare GEMMs is looked for."""
    by_rows = [(rows, vocab_size) for rows in (128, 256, 512) if rows < num_rows]
    by_columns = [(num_rows, columns) for columns in (2048, 8192) if columns < vocab_size]
    return [(lib, *tile) for lib in matmuls() for tile in (*by_rows, *by_columns, (num_rows, vocab_size))]


def fastest_gemms(hidden_ND: Tensor, weight_VD: Tensor) -> list[Gemms]:
    """Of each library the fastest chunking."""
    choices = gemm_choices(hidden_ND.shape[0], weight_VD.shape[0])
    seconds = {choice: first_seconds(run) for choice, run in bare_gemms(hidden_ND, weight_VD, choices).items()}
    return [min((c for c in choices if c[0] == lib), key=seconds.__getitem__) for lib in matmuls()]


def bare_gemms(
    hidden_ND: Tensor, weight_VD: Tensor, choices: Sequence[Gemms]
) -> dict[Gemms, Callable[[], tuple[Tensor, Tensor]]]:
    """For each choice, the three GEMMs of forward and backward alone, into buffers that exist already: the limit."""
    grad_hidden, grad_weight = torch.zeros_like(hidden_ND), torch.zeros_like(weight_VD)
    buffer = torch.zeros(max(min(rows, hidden_ND.shape[0]) * columns for _, rows, columns in choices))

    @torch.no_grad()
    def run(library: str, num_rows: int, num_columns: int) -> tuple[Tensor, Tensor]:
        matmul_ = matmuls()[library]
        for row in range(0, hidden_ND.shape[0], num_rows):
            hidden, grad_h = (x[row : row + num_rows] for x in (hidden_ND, grad_hidden))
            for column in range(0, weight_VD.shape[0], num_columns):
                weight, grad_w = (x[column : column + num_columns] for x in (weight_VD, grad_weight))
                logits = buffer[: len(hidden) * len(weight)].view(len(hidden), len(weight))
                matmul_(logits, hidden, weight.T, False)
                matmul_(grad_h, logits, weight, column > 0)
                matmul_(grad_w, logits.T, hidden, row > 0)
        return grad_hidden, grad_weight

    return {choice: partial(run, *choice) for choice in choices}
