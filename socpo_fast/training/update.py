"""Makes the optimizer steps of one batch. Read Updater.microbatches, then one_update.

There are three sets of log-probs: the sampler's (recorded by the engine while it sampled), the old
ones (the denominators of the ratios) and the reference's (for the KL). The sampler's serve as old
ones if they agree with the trainer's; _old_logprobs decides that.
"""

import math
import time
from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor

from socpo_fast.config import Config
from socpo_fast.files import RunFailed
from socpo_fast.model.decoder import Decoder
from socpo_fast.ops import PolicyLossOptions
from socpo_fast.training.loss_inputs import OldLogprobs, PerToken, drop_idle
from socpo_fast.training.optimizer import Optimizer
from socpo_fast.training.step import (
    LossStats,
    UpdateProgress,
    compute_logprobs,
    gradient_microbatches,
)
from socpo_fast.types import Rollout

MISMATCH = ("policy/sampler_mismatch_nats", "policy/sampler_mismatch_mean_nats")
LogprobsByGroup = dict[int, list[list[Tensor]]]  # [group][rollout][attempt] -> [L]
MAX_MISMATCH_NATS = 1e-3  # above it the sampler's log-probs are not used as old_logprobs


class Updater:
    """Updates a student with its optimizer and, for loss.kl_coef > 0, a frozen reference."""

    def __init__(self, student: Decoder, config: Config, *, reference: Decoder | None):
        # A session has settled its config already. An updater may also be used without a session.
        config = config.settled()
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

    def microbatches(
        self,
        groups: list[list[Rollout]],
        order: list[list[int]],
        advantages_A: Tensor | None = None,
    ) -> Generator[UpdateProgress, None, None]:
        """Makes one update per entry of `order`, which lists the groups of the update.

        Yields whenever a group of old or reference log-probs, a microbatch or an update is done.
        Between two of these gradients may be open, so a caller that ends early closes it.
        advantages_A holds the advantages of all attempts, group by group; None: those of the turns.
        The mismatch with the sampler is measured before the weights change. It is measured on the
        log-probs computed as old ones, if there are any.
        Otherwise it is that of the first update that forwards something, without the tokens of
        advantage 0.
        """
        sizes = [sum(len(rollout.turns) for rollout in group) for group in groups]
        advantages = None if advantages_A is None else advantages_A.split(sizes)
        old_logprobs, mismatch = yield from self._old_logprobs(groups, order)
        ref_logprobs = None
        if self.reference is not None:
            computed = yield from self._logprobs(self.reference, groups, list(range(len(groups))))
            ref_logprobs = list(computed.values())
        for update_idx, chosen in enumerate(order):
            # In the first update under "auto" the weights are still those of the old log-probs: its
            # own log-probs are the old ones, the ratio is 1, and a forward is saved.
            old: OldLogprobs = None
            if old_logprobs is not None:
                is_first = update_idx == 0 and self.config.loss.old_logprobs == "auto"
                old = "current" if is_first else [x for g in chosen for x in old_logprobs[g]]
            metrics = yield from self.one_update(
                [rollout for g in chosen for rollout in groups[g]],
                old,
                None if ref_logprobs is None else [x for g in chosen for x in ref_logprobs[g]],
                None if advantages is None else torch.cat([advantages[g] for g in chosen]),
            )
            # Still unknown, or nan because that update had no active token: take this update's.
            if math.isnan(mismatch.get(MISMATCH[0], math.nan)):
                mismatch = {name: metrics[name] for name in MISMATCH}
            num_microbatches = int(metrics["perf/microbatches"])
            yield UpdateProgress(
                "microbatch", num_microbatches, num_microbatches, metrics | mismatch
            )

    def one_update(
        self,
        rollouts: list[Rollout],
        old_logprobs: OldLogprobs,
        ref_logprobs: PerToken | None,
        advantages_A: Tensor | None = None,
    ) -> Generator[UpdateProgress, None, dict[str, float]]:
        """Computes the gradient of these rollouts and makes one optimizer step.

        Yields after each microbatch and returns the metrics.

        Raises:
            RunFailed: train.max_bad_updates in a row were not finite.
        """
        loss = self.config.loss
        started = time.perf_counter()
        stats = yield from gradient_microbatches(
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
        # loss_stats_7 stays on the device until the step reads it back with its own numbers: one
        # wait.
        result = self.optimizer.step(stats.loss_stats_7[0], also_read=stats.loss_stats_7)
        figures = LossStats(*result.also_read)
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
            "policy/approx_kl": figures.approx_kl,
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
    ) -> Generator[UpdateProgress, None, tuple[LogprobsByGroup | None, dict[str, float]]]:
        """Computes old log-probs under the current weights, and their mismatch with the sampler.

        Returns (old log-probs, metrics of the mismatch). None means that the sampler's log-probs
        are used. Under "auto" the first update needs none, because its own log-probs are the old
        ones. No update needs those of idle rollouts. If all rollouts are idle, one group is
        forwarded nevertheless, to measure the mismatch.
        """
        choice = self.config.loss.old_logprobs
        computed = LogprobsByGroup()
        all_groups, groups = groups, [drop_idle(group, self.loss_options) for group in groups]
        active = [g for g, group in enumerate(groups) if any(rollout.turns for rollout in group)]
        # Without an active group, one of the last update is measured: "auto" and "recompute" both
        # read old log-probs for the last update.
        measured = active[0] if active else order[-1][0]
        groups[measured] = groups[measured] if active else all_groups[measured]
        # bf16 rounds more coarsely than MAX_MISMATCH_NATS, so only fp32 is tried.
        if choice == "auto" and self.student.lm_head.weight.dtype == torch.float32:
            computed = yield from self._logprobs(self.student, groups, [measured])
        mismatch = _mismatch(groups, computed)
        # A mismatch that is nan or was not measured compares as False, and is not accepted.
        if choice == "sampler" or mismatch.get(MISMATCH[0], math.nan) <= MAX_MISMATCH_NATS:
            return None, mismatch
        needed = order[1:] if choice == "auto" else order
        missing = sorted({g for chosen in needed for g in chosen} - computed.keys())
        computed |= yield from self._logprobs(self.student, groups, missing)
        return computed, _mismatch(groups, computed)

    def _logprobs(
        self, student: Decoder, groups: list[list[Rollout]], chosen: list[int]
    ) -> Generator[UpdateProgress, None, LogprobsByGroup]:
        """Returns log-probs of the chosen groups under a student, packed as in the update."""
        computed = LogprobsByGroup()
        for g in chosen:
            computed[g] = compute_logprobs(student, groups[g], **self._forward)
            yield UpdateProgress("log-probs", len(computed), len(chosen))
        return computed


def _mismatch(groups: list[list[Rollout]], computed: LogprobsByGroup) -> dict[str, float]:
    """Returns the largest and the mean |logprob - sampler_logprob|; {} if nothing was computed."""
    differences = [
        logprobs_L - attempt.logprobs
        for g, logprobs in computed.items()
        for rollout, by_attempt in zip(groups[g], logprobs, strict=True)
        for attempt, logprobs_L in zip(rollout.attempts, by_attempt, strict=True)
    ]
    if not differences:
        return {}
    magnitudes = torch.cat(differences).abs()
    return dict(zip(MISMATCH, (float(magnitudes.max()), float(magnitudes.mean())), strict=True))
