"""The optimizer steps of one batch. Read Updater.updates, then one_update."""

import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from socpo_fast.config import Config
from socpo_fast.files import RunFailed
from socpo_fast.model.decoder import Decoder
from socpo_fast.ops import PolicyLossOptions
from socpo_fast.train.loss_inputs import OldLogprobs, PerToken, drop_idle
from socpo_fast.train.optimizer import Optimizer
from socpo_fast.train.step import Figures, compute_logprobs, policy_gradients
from socpo_fast.types import Rollout

MISMATCH = ("policy/sampler_mismatch_nats", "policy/sampler_mismatch_mean_nats")
LogprobsByGroup = dict[int, list[list[Tensor]]]  # [group][rollout][attempt] -> [L]
MAX_MISMATCH_NATS = 1e-3  # above it the sampler's log-probs do not serve as old_logprobs


class Updater:
    """Updates a student with its optimizer and, for loss.kl_coef > 0, a frozen reference."""

    def __init__(self, student: Decoder, config: Config, *, reference: Decoder | None):
        config = config.settled()  # a session has done it, an updater used alone has not
        options = config.train
        self.student = student
        self.config = config
        self.reference = reference
        self.loss_options = PolicyLossOptions(
            **config.loss.model_dump(exclude={"agg", "old_logprobs", "tis_clip"}),
        )
        self.optimizer = Optimizer(
            student,
            lr=options.lr,
            betas=(options.beta1, options.beta2),
            weight_decay=options.weight_decay,
            warmup_updates=options.warmup_updates,
            lr_schedule=options.lr_schedule,
            min_lr_ratio=options.min_lr_ratio,
            total_updates=config.num_updates,
            max_grad_norm=options.max_grad_norm,
        )
        self._forward: dict[str, Any] = {
            "packing": options.packing,
            "token_budget": options.token_budget,
            "temperature": config.rollout.temperature,
        }

    def updates(
        self,
        groups: list[list[Rollout]],
        order: list[list[int]],
        advantages_A: Tensor | None = None,
    ) -> Iterator[tuple[int, dict[str, float]]]:
        """One update for each entry of `order`, the groups it is made of.

        advantages_A is of all attempts, group by group; None: those of the turns.
        Yields (number of groups, metrics). The mismatch with the sampler is measured before the
        weights change: on what is computed for old log-probs, else in the first update that
        forwards something, where tokens of advantage 0 have none.
        """
        sizes = [sum(len(rollout.turns) for rollout in group) for group in groups]
        advantages = None if advantages_A is None else advantages_A.split(sizes)
        old_logprobs, mismatch = self._old_logprobs(groups, order)
        ref_logprobs = (
            None
            if self.reference is None
            else [self._logprobs(self.reference, group) for group in groups]
        )
        for update_idx, chosen in enumerate(order):
            old: OldLogprobs = None
            if old_logprobs is not None:
                is_first = update_idx == 0 and self.config.loss.old_logprobs == "auto"
                old = "current" if is_first else [x for g in chosen for x in old_logprobs[g]]
            metrics = self.one_update(
                [rollout for g in chosen for rollout in groups[g]],
                old,
                None if ref_logprobs is None else [x for g in chosen for x in ref_logprobs[g]],
                None if advantages is None else torch.cat([advantages[g] for g in chosen]),
            )
            if math.isnan(mismatch.get(MISMATCH[0], math.nan)):
                mismatch = {name: metrics[name] for name in MISMATCH}
            yield len(chosen), metrics | mismatch

    def one_update(
        self,
        rollouts: list[Rollout],
        old_logprobs: OldLogprobs,
        ref_logprobs: PerToken | None,
        advantages_A: Tensor | None = None,
    ) -> dict[str, float]:
        """Gradients of these rollouts and one optimizer step.

        Raises:
            RunFailed: train.max_bad_updates in a row were not finite.
        """
        loss = self.config.loss
        started = time.perf_counter()
        stats = policy_gradients(
            self.student,
            rollouts,
            **self._forward,
            max_new_tokens=self.config.rollout.max_new_tokens,
            advantages_A=advantages_A,
            old_logprobs=old_logprobs,
            ref_logprobs=ref_logprobs,
            loss_agg=loss.agg,
            options=self.loss_options,
            tis_clip=loss.tis_clip,
            checkpointing=bool(self.config.train.checkpointing),
        )
        result = self.optimizer.step(stats.figures_6[0], also_read=stats.figures_6)
        figures = Figures(*result.also_read)
        if self.optimizer.num_skipped_in_a_row >= self.config.train.max_bad_updates:
            raise RunFailed(
                "train: loss and gradient must be finite, got "
                f"{self.optimizer.num_skipped_in_a_row} updates in a row "
                "that were not; lower train.lr and start again, which goes on from the last "
                "checkpoint"
            )
        return {
            "policy/loss": figures.loss,
            "policy/entropy": figures.entropy,
            "policy/ratio_mean": figures.ratio_mean,
            "policy/clip_fraction": figures.clip_fraction,
            "policy/sampler_mismatch_nats": figures.sampler_mismatch_max_nats,
            "policy/sampler_mismatch_mean_nats": figures.sampler_mismatch_mean_nats,
            "policy/grad_norm": result.grad_norm,
            "policy/lr": result.lr,
            "policy/bad_updates": float(self.optimizer.num_skipped),
            "perf/tokens_forwarded": float(stats.tokens_forwarded),
            "perf/unique_tokens": float(stats.unique_tokens),
            "perf/microbatches": float(stats.num_microbatches),
            "perf/idle_rollouts": float(stats.idle_rollouts),
            "perf/train_tok_s": stats.tokens_forwarded / (time.perf_counter() - started),
        }

    def _old_logprobs(
        self, groups: list[list[Rollout]], order: list[list[int]]
    ) -> tuple[LogprobsByGroup | None, dict[str, float]]:
        """Computes old log-probs under the weights as they are, and how far the sampler's are off.

        None: the sampler's own serve. Under "auto" the first update needs none: its own log-probs
        are the old ones. No update needs those of idle rollouts. Where there are no others, one
        group is forwarded all the same, to measure it: of the last update, which any choice reads.
        """
        choice = self.config.loss.old_logprobs
        known = LogprobsByGroup()
        whole, groups = groups, [drop_idle(group, self.loss_options) for group in groups]
        busy = [g for g, group in enumerate(groups) if any(rollout.turns for rollout in group)]
        first = busy[0] if busy else order[-1][0]
        groups[first] = groups[first] if busy else whole[first]
        if choice == "auto" and self.student.lm_head.weight.dtype == torch.float32:
            known[first] = self._logprobs(self.student, groups[first])
        mismatch = _mismatch(groups, known)
        if (
            choice == "sampler" or mismatch.get(MISMATCH[0], math.nan) <= MAX_MISMATCH_NATS
        ):  # nan is not
            return None, mismatch
        needed = order[1:] if choice == "auto" else order
        for g in sorted({g for chosen in needed for g in chosen} - known.keys()):
            known[g] = self._logprobs(self.student, groups[g])
        return known, _mismatch(groups, known)

    def _logprobs(self, student: Decoder, group: list[Rollout]) -> list[list[Tensor]]:
        return compute_logprobs(student, group, **self._forward)


def _mismatch(groups: list[list[Rollout]], known: LogprobsByGroup) -> dict[str, float]:
    """Returns the largest and the mean |logprob - the sampler's|; nothing where none is known."""
    differences = [
        ours - attempt.logprobs
        for g, logprobs in known.items()
        for rollout, by_attempt in zip(groups[g], logprobs, strict=True)
        for attempt, ours in zip(rollout.attempts, by_attempt, strict=True)
    ]
    if not differences:
        return {}
    sizes = torch.cat(differences).abs()
    return dict(zip(MISMATCH, (float(sizes.max()), float(sizes.mean())), strict=True))
