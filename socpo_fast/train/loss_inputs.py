"""What loss tokens bring to the loss: weight, advantage, log-probs; and the checks of policy_gradients' options."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from socpo_fast.device import upload
from socpo_fast.ops._checks import check_rule, check_word
from socpo_fast.ops.policy_loss import PolicyLossOptions
from socpo_fast.train.packing import PackedMicrobatch
from socpo_fast.types import Rollout

LossAgg = Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum_norm"]
PerToken = Sequence[Sequence[Tensor]]  # [rollout][attempt] -> [L] one value a sampled token
OldLogprobs = PerToken | Literal["current"] | None  # None: the sampler's


def check_options(
    loss_agg: str,
    num_loss_tokens: int | None,
    num_attempts: int | None,
    max_new_tokens: int | None,
    tis_clip: float | None,
) -> None:
    where = "policy_gradients"
    check_word(where, "loss_agg", loss_agg, get_args(LossAgg))
    normalisers = {"num_loss_tokens": num_loss_tokens, "num_attempts": num_attempts, "max_new_tokens": max_new_tokens}
    for name, value in normalisers.items():
        check_rule(where, name, value, value is None or value >= 1, ">= 1")
    check_rule(
        where,
        "max_new_tokens",
        max_new_tokens,
        max_new_tokens is not None or loss_agg != "seq_mean_token_sum_norm",
        f"the sampler's for loss_agg={loss_agg!r}",
    )
    check_rule(where, "tis_clip", tis_clip, tis_clip is None or tis_clip > 0, "> 0 or None")


def drop_idle(rollouts: Sequence[Rollout], options: PolicyLossOptions) -> list[Rollout]:
    """The rollouts in their places, without turns where the loss skips every row of theirs."""
    reads_all = options.entropy_coef != 0 or options.kl_coef != 0
    return [
        rollout if reads_all or any(turn.advantage != 0 for turn in rollout.turns) else replace(rollout, turns=[])
        for rollout in rollouts
    ]


def attempt_weights(
    microbatch: PackedMicrobatch, loss_agg: LossAgg, num_loss_tokens: int, num_attempts: int, max_new_tokens: int | None
) -> Tensor:
    """[A] fp32: what each loss token of an attempt weighs."""
    lengths_A = microbatch.attempt_of_token_N.bincount()
    if loss_agg == "token_mean":
        return torch.full(lengths_A.shape, 1 / num_loss_tokens)
    if loss_agg == "seq_mean_token_mean":
        return 1 / (num_attempts * lengths_A)
    assert max_new_tokens is not None, "checked at the door"
    return torch.full(lengths_A.shape, 1 / (num_attempts * max_new_tokens))


def attempt_advantages(microbatch: PackedMicrobatch, rollouts: Sequence[Rollout]) -> Tensor:
    """[A] fp32."""
    advantages = [rollouts[r].turns[t].advantage for r, t in microbatch.attempts]
    if None in advantages:
        place, turn_idx = microbatch.attempts[advantages.index(None)]
        raise ValueError(
            f"policy_gradients: rollouts[{place}].turns[{turn_idx}].advantage must be a number, "
            "got None; fill it with ops.compute_advantages"
        )
    return torch.tensor(advantages)


def gather_tokens(
    values: PerToken, what: str, *, microbatch: PackedMicrobatch, rollouts: Sequence[Rollout], device: torch.device
) -> Tensor:
    """[N]: per-token values in the order of the microbatch's loss tokens."""
    if len(values) != len(rollouts):
        raise ValueError(
            f"policy_gradients: {what} must be a list for each of {len(rollouts)} rollouts, got {len(values)}"
        )
    parts = []
    for place, attempt_idx in microbatch.attempts:
        num_tokens = rollouts[place].attempts[attempt_idx].num_tokens
        num_given = values[place][attempt_idx].numel() if attempt_idx < len(values[place]) else 0
        if num_given != num_tokens:
            raise ValueError(
                f"policy_gradients: {what} of rollouts[{place}].turns[{attempt_idx}] must be [L={num_tokens}], "
                f"got {num_given} values"
            )
        parts.append(values[place][attempt_idx])
    return upload(torch.cat(parts), device)
