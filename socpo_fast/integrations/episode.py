"""Plays one episode with the generator of another trainer: TRL's, verl's servers, or any other.

The rules of an episode are in socratic/episode.py, as for the paged engine (socratic/rollout.py).
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import wait

import torch

from socpo_fast.engine import fresh_batch
from socpo_fast.socratic.bridge import Bridge
from socpo_fast.socratic.episode import Episode, Limits, RolloutOptions
from socpo_fast.socratic.graders import Grader
from socpo_fast.socratic.rollout import tell
from socpo_fast.socratic.teachers import Teacher, TeacherFunction, as_teacher, ask, result_of
from socpo_fast.types import Attempt, Question, Rollout, RolloutKey


def socratic_episode(
    question: Question,
    *,
    generate: Callable[[list[int]], Sequence[int]],
    teacher: Teacher | TeacherFunction,
    grader: Grader,
    bridge: Bridge,
    options: RolloutOptions,
    max_new_tokens: int,
    max_tokens: int,
    rollout_idx: int = 0,
) -> Rollout:
    """Plays one episode with any generator.

    Args:
        generate:       token ids of a context -> ids that were sampled behind it, the end of turn
                        included; at least one and at most max_new_tokens.
        bridge:         the student's chat template; its guidance_limit must be that of the options.
        max_new_tokens: most tokens of an attempt.
        max_tokens:     most tokens of a context and its attempt together.
        rollout_idx:    index of the rollout in its question's group. Rollouts that are credited
                        together need different ones.

    Returns:
        The rollout. Its attempts have no log-probs (NaN): recompute them before training.

    Raises:
        ValueError: the generator returned no token, or more than max_new_tokens; or the bridge
            has another guidance_limit.
    """
    limits = Limits(max_new_tokens, max_tokens)
    guide = as_teacher(teacher)
    episode = Episode(
        question,
        bridge=bridge,
        grader=grader,
        options=options,
        limits=limits,
        rollout_idx=rollout_idx,
    )
    rollout = episode.rollout
    key = RolloutKey(fresh_batch(), question.question_idx)
    while True:
        turn_idx = len(rollout.turns)
        token_ids = list(generate(rollout.context_ids(turn_idx)))
        if not 1 <= len(token_ids) <= max_new_tokens:
            raise ValueError(
                f"socratic_episode: generate must return 1 to {max_new_tokens} token ids, got "
                f"{len(token_ids)}"
            )
        # An unknown log-prob is NaN, so that training on it cannot go unnoticed.
        unknown_logprobs = torch.full((len(token_ids),), torch.nan)
        request = episode.add_attempt(
            Attempt(
                token_ids=token_ids,
                logprobs=unknown_logprobs,
                kept_mass=unknown_logprobs,
                finish_reason="stop" if token_ids[-1] in bridge.eos_ids else "length",
                key=key,  # a local teacher derives its sampling noise from this
                rollout_idx=rollout_idx,
                attempt_idx=turn_idx,
                policy_version=0,
            )
        )
        if request is None:
            break
        future = ask(guide, request, options.guidance_timeout_s)
        start_s = time.perf_counter()
        try:
            while not future.done():
                # A local teacher answers only while step() runs its engine.
                if not guide.step():
                    wait([future], timeout=0.02)
        finally:
            future.cancel()  # after Ctrl-C the call would go on in the background
        rollout.teacher_wait_s += time.perf_counter() - start_s
        if episode.add_guidance(result_of(future, guide)) is None:
            break
    tell(episode)
    return rollout
