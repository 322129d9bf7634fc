"""The optimizer steps of one batch. Read Updater.updates, then one_update."""

import time
from collections.abc import Iterator
from typing import Any

import torch

from socpo_fast.config import Config
from socpo_fast.files import RunFailed
from socpo_fast.model.decoder import Decoder
from socpo_fast.ops import PolicyLossOptions
from socpo_fast.train.loss_inputs import PerToken
from socpo_fast.train.optimizer import Optimizer
from socpo_fast.train.step import compute_logprobs, policy_gradients
from socpo_fast.types import Rollout

MAX_MISMATCH_NATS = 1e-3  # above it the sampler's log-probs do not serve as old_logprobs


class Updater:
    """A student, its optimizer, and with loss.kl_coef > 0 the frozen reference that it is held to."""

    def __init__(self, student: Decoder, config: Config, *, reference: Decoder | None):
        options = config.train
        self.student, self.config, self.reference = student, config, reference
        self.loss_options = PolicyLossOptions(
            **config.loss.model_dump(exclude={"agg", "old_logprobs", "tis_clip"}),
        )
        self.optimizer = Optimizer(
            student,
            lr=options.lr,
            betas=(options.beta1, options.beta2),
            weight_decay=options.weight_decay,
            warmup_updates=options.warmup_updates,
            max_grad_norm=options.max_grad_norm,
        )
        self._forward: dict[str, Any] = {
            "packing": options.packing,
            "token_budget": options.token_budget,
            "temperature": config.rollout.temperature,
        }

    def updates(self, groups: list[list[Rollout]], order: list[list[int]]) -> Iterator[tuple[int, dict[str, float]]]:
        """One update for each entry of `order`, the groups it is made of; yields (number of groups, metrics).

        policy/sampler_mismatch_nats is measured once, before the weights change, and decides under "auto" whether the
        sampler's log-probs serve as the old ones.
        """
        old_logprobs, mismatch = self._old_logprobs(groups)
        ref_logprobs = (
            None
            if self.reference is None
            else [compute_logprobs(self.reference, group, **self._forward) for group in groups]
        )
        for chosen in order:
            rollouts = [rollout for g in chosen for rollout in groups[g]]
            old = None if old_logprobs is None else [by_attempt for g in chosen for by_attempt in old_logprobs[g]]
            ref = None if ref_logprobs is None else [by_attempt for g in chosen for by_attempt in ref_logprobs[g]]
            yield (
                len(chosen),
                self.one_update(rollouts, old, ref) | {"policy/sampler_mismatch_nats": mismatch},
            )

    def one_update(
        self, rollouts: list[Rollout], old_logprobs: PerToken | None, ref_logprobs: PerToken | None
    ) -> dict[str, float]:
        """Gradients of these rollouts and one optimizer step.

        Raises:
            RunFailed: train.max_bad_updates in a row were not finite.
        """
        loss, started = self.config.loss, time.perf_counter()
        stats = policy_gradients(
            self.student,
            rollouts,
            **self._forward,
            max_new_tokens=self.config.rollout.max_new_tokens,
            old_logprobs=old_logprobs,
            ref_logprobs=ref_logprobs,
            loss_agg=loss.agg,
            options=self.loss_options,
            tis_clip=loss.tis_clip,
            checkpointing=self.config.train.checkpointing,
        )
        result = self.optimizer.step(stats.loss)
        if self.optimizer.num_skipped_in_a_row >= self.config.train.max_bad_updates:
            raise RunFailed(
                f"train: loss and gradient must be finite, got {self.optimizer.num_skipped_in_a_row} updates in a row "
                "that were not; lower train.lr and start again, which goes on from the last checkpoint"
            )
        return {
            "policy/loss": stats.loss,
            "policy/entropy": stats.entropy,
            "policy/ratio_mean": stats.ratio_mean,
            "policy/clip_fraction": stats.clip_fraction,
            "policy/grad_norm": result.grad_norm,
            "policy/lr": result.lr,
            "policy/bad_updates": float(self.optimizer.num_skipped),
            "perf/tokens_forwarded": float(stats.tokens_forwarded),
            "perf/unique_tokens": float(stats.unique_tokens),
            "perf/microbatches": float(stats.num_microbatches),
            "perf/train_tok_s": stats.tokens_forwarded / (time.perf_counter() - started),
        }

    def _old_logprobs(self, groups: list[list[Rollout]]) -> tuple[list[list[list[Any]]] | None, float]:
        """(None for the sampler's own or [group][rollout][attempt] recomputed; the largest mismatch in nats).

        With "auto" and "sampler" the mismatch is measured on the first group.
        """
        choice = self.config.loss.old_logprobs
        probed = groups if choice == "recompute" else groups[:1]
        logprobs = [compute_logprobs(self.student, group, **self._forward) for group in probed]
        differences = [
            ours - attempt.logprobs
            for group, by_rollout in zip(probed, logprobs, strict=True)
            for rollout, by_attempt in zip(group, by_rollout, strict=True)
            for attempt, ours in zip(rollout.attempts, by_attempt, strict=True)
        ]
        mismatch = float(torch.cat(differences).abs().max())  # nan stays nan, and does not fit
        fits = self.config.student.dtype == "float32" and mismatch <= MAX_MISMATCH_NATS
        if choice == "sampler" or (choice == "auto" and fits):
            return None, mismatch
        logprobs += [compute_logprobs(self.student, group, **self._forward) for group in groups[len(probed) :]]
        return logprobs, mismatch
