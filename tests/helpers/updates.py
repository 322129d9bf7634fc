"""Runs the updates of an Updater without looking at its microbatches."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from socpo_fast.training.update import Updater
from socpo_fast.types import Rollout


def updates_of(
    updater: Updater,
    groups: list[list[Rollout]],
    order: list[list[int]],
    advantages_A: Tensor | None = None,
) -> Iterator[tuple[int, dict[str, float]]]:
    """Yields (number of groups, metrics) after each update."""
    progress = updater.microbatches(groups, order, advantages_A)
    metrics = (x.metrics for x in progress if x.metrics is not None)
    yield from zip(map(len, order), metrics, strict=True)
