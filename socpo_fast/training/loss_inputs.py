"""Prepares the inputs of the loss: weight, advantage and log-probs of each loss token.

Read in the order in which training/step.py calls them: check_options, drop_idle, attempt_weights,
attempt_advantages, upload_tokens. Suffixes: A counts attempts, T packed tokens, N loss tokens.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from socpo_fast.device import upload, upload_together
from socpo_fast.ops._checks import check_rule, check_word
from socpo_fast.ops.policy_loss import PolicyLossOptions
from socpo_fast.training.packing import PackedMicrobatch
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
    """Refuses options of policy_gradients that are out of range or contradict each other."""
    where = "policy_gradients"
    check_word(where, "loss_agg", loss_agg, get_args(LossAgg))
    for name, value in (
        ("num_loss_tokens", num_loss_tokens),
        ("num_attempts", num_attempts),
        ("max_new_tokens", max_new_tokens),
    ):
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
    """Returns the rollouts in the same order, without turns where the loss is 0 on every token."""
    # The list keeps its length, so that an index into it also names the same rollout in
    # old_logprobs and ref_logprobs. An entropy bonus or KL gives every token a loss:
    # needs_advantage is then False.
    return [
        replace(rollout, turns=[])
        if options.needs_advantage and all(turn.advantage == 0 for turn in rollout.turns)
        else rollout
        for rollout in rollouts
    ]


def attempt_weights(
    microbatch: PackedMicrobatch,
    loss_agg: LossAgg,
    num_loss_tokens: int,
    num_attempts: int,
    max_new_tokens: int | None,
) -> Tensor:
    """Returns [A] fp32: the weight of each loss token of an attempt."""
    attempt_lens_A = microbatch.attempt_of_token_N.bincount()
    if loss_agg == "token_mean":
        return torch.full(attempt_lens_A.shape, 1 / num_loss_tokens)
    if loss_agg == "seq_mean_token_mean":
        return 1 / (num_attempts * attempt_lens_A)
    assert max_new_tokens is not None, "checked at the door"
    return torch.full(attempt_lens_A.shape, 1 / (num_attempts * max_new_tokens))


def attempt_indices(rollouts: Sequence[Rollout]) -> list[tuple[int, int]]:
    """Returns (rollout_idx, attempt_idx) of all attempts, in the order of advantages_A."""
    return [(r, t) for r, rollout in enumerate(rollouts) for t in range(len(rollout.turns))]


def attempt_advantages(
    rollouts: Sequence[Rollout], advantages_A: Tensor | None, device: torch.device
) -> Tensor:
    """Returns [A]: advantages_A if given, else the advantages of the turns, fp32."""
    indices = attempt_indices(rollouts)
    if advantages_A is not None:
        check_rule(
            "policy_gradients",
            "shape of advantages_A",
            list(advantages_A.shape),
            advantages_A.shape == (len(indices),),
            f"[A={len(indices)}]",
        )
        return advantages_A
    advantages = [rollouts[r].turns[t].advantage for r, t in indices]
    if None in advantages:
        rollout_idx, turn_idx = indices[advantages.index(None)]
        raise ValueError(
            f"policy_gradients: rollouts[{rollout_idx}].turns[{turn_idx}].advantage must be a "
            "number, got None; fill it with ops.compute_advantages"
        )
    return upload(torch.tensor(advantages, dtype=torch.float32), device)


def upload_tokens(
    microbatch: PackedMicrobatch,
    rollouts: Sequence[Rollout],
    weights_A: Tensor,
    old_logprobs: OldLogprobs,
    ref_logprobs: PerToken | None,
    device: torch.device,
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Uploads a microbatch; returns token ids, positions and the inputs of the loss by name."""
    sampler: PerToken = [[attempt.logprobs for attempt in rollout.attempts] for rollout in rollouts]
    logprobs_by_name = {
        "sampler_logprobs": sampler,
        "old_logprobs": old_logprobs,
        "ref_logprobs": ref_logprobs,
    }
    values = {"weights_N": weights_A[microbatch.attempt_of_token_N]} | {
        f"{name}_N": gather_tokens(by_attempt, name, microbatch=microbatch, rollouts=rollouts)
        for name, by_attempt in logprobs_by_name.items()
        if by_attempt is not None and by_attempt != "current"
    }
    # A microbatch counts its own attempts; advantages_A counts those of all rollouts.
    flat_index = {pair: idx for idx, pair in enumerate(attempt_indices(rollouts))}
    attempts = torch.tensor([flat_index[pair] for pair in microbatch.attempts])
    indices = {
        "token_ids_T": microbatch.token_ids_T,
        "positions_T": microbatch.positions_T,
        "targets_N": microbatch.targets_N,
        "rows_N": microbatch.rows_N,
        "attempt_of_token_N": attempts[microbatch.attempt_of_token_N],
    }
    # Small copies to a card are bound by latency. So all tensors of one dtype are joined, sent as
    # one copy and split again on the device.
    uploaded = (
        *upload_together([*indices.values()], device),
        *upload_together([*values.values()], device),
    )
    tokens: dict[str, Any] = dict(zip([*indices, *values], uploaded, strict=True))
    # The sampler's log-probs are sent once, also where they serve as the old ones. For "current"
    # there are none: the loss then takes its own log-probs, so that the ratio is 1.
    tokens.setdefault(
        "old_logprobs_N", tokens["sampler_logprobs_N"] if old_logprobs is None else None
    )
    return tokens.pop("token_ids_T"), tokens.pop("positions_T"), tokens


def gather_tokens(
    values: PerToken, what: str, *, microbatch: PackedMicrobatch, rollouts: Sequence[Rollout]
) -> Tensor:
    """Returns [N]: per-token values in the order of the microbatch's loss tokens."""
    if len(values) != len(rollouts):
        raise ValueError(
            f"policy_gradients: {what} must be a list for each of {len(rollouts)} rollouts, got "
            f"{len(values)}"
        )
    parts = []
    for r, t in microbatch.attempts:
        num_tokens = rollouts[r].attempts[t].num_tokens
        num_values = values[r][t].numel() if t < len(values[r]) else 0
        if num_values != num_tokens:
            raise ValueError(
                f"policy_gradients: {what} of rollouts[{r}].turns[{t}] must be "
                f"[L={num_tokens}], "
                f"got {num_values} values"
            )
        parts.append(values[r][t])
    return torch.cat(parts).cpu()
