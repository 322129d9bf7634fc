"""Keys name sampling noise. Here: a batch number that nobody else has, and which keys are in use.

Two attempts under one key would be drawn with the same noise, so an engine takes a key only once
at a time. Used again later it draws the same tokens, which is what evaluations want.
"""

from __future__ import annotations

from collections import Counter
from itertools import count

from socpo_fast.types import RolloutKey

_fresh_batches = count(2**40)  # far from any batch that a trainer numbers


def fresh_batch() -> int:
    """Returns a batch number for a key that no other call in this process gets.

    It is a count, not a random number: a program that is run twice gets the same ones.
    """
    return next(_fresh_batches)


class KeysInFlight:
    """How many rollouts of each key are queued, running, or finished with their pages kept."""

    def __init__(self) -> None:
        self._num_rollouts: Counter[RolloutKey] = Counter()

    def check(self, where: str, key: tuple[int, int]) -> RolloutKey:
        """Returns the key by its name.

        Raises:
            ValueError: it is beyond 64 bits, or in flight.
        """
        is_right = len(key) == 2 and all(isinstance(part, int) and -(2**63) <= part < 2**63 for part in key)
        if not is_right:
            raise ValueError(f"{where}: key must be two 64-bit integers, got {key}")
        num_rollouts = self._num_rollouts[RolloutKey(*key)]
        if num_rollouts:
            raise ValueError(
                f"{where}: key must have no rollout in flight, got {tuple(key)} with {num_rollouts}; "
                "release or cancel them first, or take another key"
            )
        return RolloutKey(*key)

    def add(self, key: RolloutKey, num_rollouts: int) -> None:
        self._num_rollouts[key] += num_rollouts

    def remove(self, key: RolloutKey, num_rollouts: int) -> None:
        self._num_rollouts[key] -= num_rollouts
        if self._num_rollouts[key] == 0:
            del self._num_rollouts[key]

    def clear(self) -> None:
        self._num_rollouts.clear()
