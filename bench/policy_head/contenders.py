"""The contenders that need torch only: ours, torch's own ways, and functions of the user's.

All are of one form, Loss. Most make per-token log-probs in their own way and then take
`policy_loss` of them, a few operations on [N] numbers: by_logprobs.
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

LogProbs = Callable[
    [Tensor, Tensor, Tensor], Tensor
]  # hidden [N, D], weight [V, D], targets -> [N]


class Loss(Protocol):
    """The policy loss of N tokens from their hidden states. --peer takes any function of this form.

        logprob = log_softmax(hidden @ weight.T / temperature)[targets]
        ratio   = exp(logprob - old_logprobs)
        loss    = sum of weights * max(-advantages * ratio, -advantages * clip(ratio, 0.8, 1.2))

    Args:
        hidden_ND, weight_VD: fp32 or bf16 (--dtype), on --device; both need a gradient.
        targets_N: int64, each in [0, V).
        old_logprobs_N, advantages_N, weights_N: fp32. Weights are 0 outside the loss rows. No ratio
            here is near a clip.
        temperature: of the sampler.

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
    # rows of [rows, V] logits alive at once, about; None: all that are projected
    logit_rows: int | None
    only_loss_rows: bool = False  # project just these, or all
    is_ours: bool = False  # given all rows, it leaves out those of weight 0 by itself

    def loss(self, problem: Problem) -> Tensor:
        p = problem
        hidden = p.hidden_TD
        per_token = p.targets_T, p.old_logprobs_T, p.advantages_T, p.weights_T
        if self.only_loss_rows and not self.is_ours:
            hidden = hidden.index_select(0, p.rows_N)
            per_token = tuple(x.index_select(0, p.rows_N) for x in per_token)
        elif not self.is_ours:  # whoever changes them in place changes nobody else's
            per_token = tuple(x.clone() for x in per_token)
        *given, weights = per_token
        options = {"weights_N": weights, "temperature": TEMPERATURE}
        loss = self.loss_of(hidden, p.weight_VD, *given, **options)
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            kind = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(f"{self.name} must return a tensor without dimensions, got {kind}")
        return loss

    def gradients(self, problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, dX, dW: what is timed.

        By autograd.grad, as nobody's gradient is to be copied into an old one.
        """
        loss = self.loss(problem)
        inputs = problem.hidden_TD, problem.weight_VD
        grad_hidden, grad_weight = torch.autograd.grad(loss, inputs)
        return loss.detach(), grad_hidden, grad_weight

    def peak_gib(self, num_rows: int, vocab_size: int, hidden_size: int) -> float:
        """Rough need beyond the inputs.

        Logits, log-softmax and gradient of the rows alive, dW and a spare of it, in fp32.
        """
        rows = num_rows if self.logit_rows is None else min(num_rows, self.logit_rows)
        return 4 * vocab_size * (3 * rows + 2 * hidden_size) / 2**30


def by_logprobs(logprobs_of: LogProbs) -> Loss:
    """Log-probs made by someone else, at temperature 1, then our loss of them."""

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
        assert temperature == 1.0
        logprobs = logprobs_of(hidden, weight, targets).float()
        return policy_loss(logprobs, old_logprobs, advantages, weights_N=weights_N).loss

    return loss


def ours(impl: str) -> Contender:
    def loss(*inputs: Tensor, weights_N: Tensor, temperature: float) -> Tensor:
        options = {"weights_N": weights_N, "temperature": temperature, "impl": impl}
        return linear_policy_loss(*inputs, **options).loss

    return Contender("ours", impl, loss, 256, only_loss_rows=True, is_ours=True)


def user_contender(spec: str) -> Contender:
    """The function "module:function", a Loss; its logits are not counted in the memory it needs.

    Raises:
        ValueError: there is no such module or function.
    """
    return Contender(spec, "", load_function("bench: --peer", spec), 0)


def torch_has_native_head() -> bool:
    """Whether this torch has a cross entropy that projects by itself, which 2.11 has not."""
    return hasattr(torch.nn, "LinearCrossEntropyOptions")


def torch_contenders(device: torch.device = CPU) -> list[list[Contender]]:
    """For each of this torch's own ways, its settings to choose from."""
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
    """In fp32 behind the product: a log-prob rounded to bf16 is off by up to 0.03 nats."""
    logits = (hidden @ weight.T).float()
    return torch.log_softmax(logits, dim=-1).gather(1, targets[:, None])[:, 0]


def _native(hidden: Tensor, weight: Tensor, targets: Tensor, *, options: object) -> Tensor:
    settings = {"reduction": "none", "options": options}
    return -functional.linear_cross_entropy(hidden, weight, targets, **settings)
