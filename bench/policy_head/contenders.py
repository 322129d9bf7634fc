"""Defines the contenders that need torch only: ours, torch's own ways, and the user's functions.

All contenders have one interface, Loss. Most of them differ only in how they compute per-token
log-probs; by_logprobs then adds our `policy_loss`, a few operations on [N] numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from bench.measure import CPU
from bench.policy_head.problem import TEMPERATURE, Problem
from socpo_fast.ops import linear_policy_loss, policy_loss
from socpo_fast.socratic.plugin import load_function

# (hidden [N, D], weight [V, D], targets [N]) -> log-probs [N]
LogProbs = Callable[[Tensor, Tensor, Tensor], Tensor]


class Loss(Protocol):
    """Computes the policy loss of N tokens; --peer takes any function with this signature.

        logprob = log_softmax(hidden @ weight.T / temperature)[targets]
        ratio   = exp(logprob - old_logprobs)
        loss    = sum of weights * max(-advantages * ratio, -advantages * clip(ratio, 0.8, 1.2))

    Args:
        hidden_ND, weight_VD: fp32 or bf16 (--dtype), on --device; both need a gradient.
        targets_N: int64, each in [0, V).
        old_logprobs_N, advantages_N, weights_N: fp32. Weights are 0 outside the loss rows. No ratio
            in this bench is near a clip.
        temperature: the sampler's.

    Returns: the loss, a tensor without dimensions. Its gradients with respect to hidden and weight
    come from autograd; both they and the loss are compared with fp64.
    """

    def __call__(
        self,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        old_logprobs_N: Tensor,
        advantages_N: Tensor,
        /,
        *,
        weights_N: Tensor,
        temperature: float,
    ) -> Tensor: ...


@dataclass(frozen=True)
class Contender:
    """One implementation at one setting."""

    name: str
    setting: str
    loss_of: Loss
    # About how many rows of [rows, V] logits are alive at once; None: all that are projected.
    logit_rows: int | None
    only_loss_rows: bool = False  # gets the loss rows only, or all rows
    is_ours: bool = False  # gets all rows and skips those of weight 0 by itself

    def loss(self, problem: Problem) -> Tensor:
        """Runs the contender's forward."""
        p = problem
        hidden = p.hidden_TD
        per_token = p.targets_T, p.old_logprobs_T, p.advantages_T, p.weights_T
        if self.only_loss_rows and not self.is_ours:
            hidden = hidden.index_select(0, p.rows_N)
            per_token = tuple(x.index_select(0, p.rows_N) for x in per_token)
        elif not self.is_ours:  # copies, as a contender may change its inputs in place
            per_token = tuple(x.clone() for x in per_token)
        *inputs, weights = per_token
        options = {"weights_N": weights, "temperature": TEMPERATURE}
        loss = self.loss_of(hidden, p.weight_VD, *inputs, **options)
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            kind = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(f"{self.name} must return a tensor without dimensions, got {kind}")
        return loss

    def gradients(self, problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
        """Returns loss, dX and dW; this is what the bench times."""
        loss = self.loss(problem)
        # Not backward(), which would add the gradients to those of the last run.
        inputs = problem.hidden_TD, problem.weight_VD
        grad_hidden, grad_weight = torch.autograd.grad(loss, inputs)
        return loss.detach(), grad_hidden, grad_weight

    def peak_gib(self, num_rows: int, vocab_size: int, hidden_size: int) -> float:
        """Estimates the memory needed beyond the inputs.

        That is logits, log-softmax and their gradient for the rows alive at once, and dW twice, all
        in fp32.
        """
        rows = num_rows if self.logit_rows is None else min(num_rows, self.logit_rows)
        return 4 * vocab_size * (3 * rows + 2 * hidden_size) / 2**30


def by_logprobs(logprobs_of: LogProbs) -> Loss:
    """Returns a Loss that takes log-probs from `logprobs_of` and adds our policy loss."""

    def loss(
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        *,
        weights_N: Tensor,
        temperature: float,
    ) -> Tensor:
        assert temperature == 1.0  # `logprobs_of` has no argument for it
        logprobs = logprobs_of(hidden, weight, targets).float()
        return policy_loss(logprobs, old_logprobs, advantages, weights_N=weights_N).loss

    return loss


def ours(impl: str) -> Contender:
    """Returns our linear_policy_loss in one implementation."""

    def loss(*inputs: Tensor, weights_N: Tensor, temperature: float) -> Tensor:
        options = {"weights_N": weights_N, "temperature": temperature, "impl": impl}
        return linear_policy_loss(*inputs, **options).loss

    return Contender("ours", impl, loss, 256, only_loss_rows=True, is_ours=True)


def user_contender(spec: str) -> Contender:
    """Returns the user's function "module:function", a Loss.

    Its logits are not counted in peak_gib, since nobody knows its chunks.

    Raises:
        ValueError: there is no such module or function.
    """
    return Contender(spec, "", load_function("bench: --peer", spec), 0)


def torch_has_native_head() -> bool:
    """Whether this torch has a cross entropy that includes the projection; 2.11 has none."""
    return hasattr(torch.nn, "LinearCrossEntropyOptions")


def torch_contenders(device: torch.device = CPU) -> list[list[Contender]]:
    """Returns torch's own ways, each as a list of settings to choose from."""
    naive = Contender("torch naive", "", by_logprobs(_naive), None)
    if not torch_has_native_head():
        return [[naive]]
    options = torch.nn.LinearCrossEntropyOptions
    chunks = (512, 2048, 4096) if device.type == "cuda" else (128, 256, 512)
    choices = [("unchunked", None, None)] + [
        (f"chunk {rows}", rows, options(batch_chunk_size=rows, acc_policy="compact"))
        for rows in chunks
    ]
    native = [
        Contender("torch native", text, by_logprobs(partial(_native, options=option)), rows)
        for text, rows, option in choices
    ]
    return [[naive], native]


def _naive(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Returns log-probs by log_softmax over all logits."""
    # fp32 after the product: a log-prob rounded to bf16 is off by up to 0.03 nats.
    logits = (hidden @ weight.T).float()
    return torch.log_softmax(logits, dim=-1).gather(1, targets[:, None])[:, 0]


def _native(hidden: Tensor, weight: Tensor, targets: Tensor, *, options: object) -> Tensor:
    settings = {"reduction": "none", "options": options}
    return -functional.linear_cross_entropy(hidden, weight, targets, **settings)
