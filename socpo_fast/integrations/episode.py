"""Plays episodes with the generator of another trainer: TRL's, verl's servers, or any other.

Read play_episodes, then socratic_episode, which plays one. The rules of an episode are in
socratic/episode.py, as for the paged engine (socratic/rollout.py).
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait

import torch

from socpo_fast.engine import fresh_batch
from socpo_fast.ops._checks import check_rule
from socpo_fast.socratic.bridge import Bridge
from socpo_fast.socratic.episode import Episode, Limits, RolloutOptions
from socpo_fast.socratic.graders import Grader
from socpo_fast.socratic.rollout import tell
from socpo_fast.socratic.teachers import (
    Teacher,
    TeacherFunction,
    as_teacher,
    ask,
    result_of,
    wait_if_immediate,
)
from socpo_fast.types import (
    Attempt,
    Guidance,
    GuidanceFailed,
    GuidanceRequest,
    Question,
    Rollout,
    RolloutKey,
)

# Contexts -> the token ids that were sampled behind each, and their log-probs (nats; None or NaN
# where they are not known).
BatchGenerator = Callable[
    [list[list[int]]],
    tuple[Sequence[Sequence[int]], Sequence[Sequence[float | None]] | None],
]


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
    episode = Episode(
        question,
        bridge=bridge,
        grader=grader,
        options=options,
        limits=Limits(max_new_tokens, max_tokens),
        rollout_idx=rollout_idx,
    )
    play_episodes(
        [episode],
        generate=lambda contexts: ([generate(contexts[0])], None),
        teacher=teacher,
        batch_idx=fresh_batch(),
        where="socratic_episode",
    )
    return episode.rollout


def play_episodes(
    episodes: Sequence[Episode],
    *,
    generate: BatchGenerator,
    teacher: Teacher | TeacherFunction,
    batch_idx: int,
    goes_on: Callable[[int], bool] = bool,
    where: str = "play_episodes",
) -> None:
    """Plays episodes to their ends, one attempt of every unfinished episode at a time.

    Args:
        generate:  samples behind every context; at least one token and at most the episode's
                   max_new_tokens, the end of turn included.
        batch_idx: a local teacher derives its sampling noise from it and question_idx.
        goes_on:   number of unfinished episodes -> whether to call generate again. A trainer on
                   several ranks whose generator needs all of them goes on while any rank has one;
                   generate is then called without contexts.
        where:     who complains in an error.

    Raises:
        ValueError: the generator returned no token, or more than max_new_tokens.
    """
    guide = as_teacher(teacher)
    live = list(episodes)
    while goes_on(len(live)):
        contexts = [episode.rollout.context_ids(len(episode.rollout.turns)) for episode in live]
        token_ids, logprobs = generate(contexts)
        num_rows = len(token_ids)
        # One that was called without contexts may return what it likes.
        has_all = num_rows == len(live) or not live
        check_rule(where, "rows of generate", num_rows, has_all, f"one a context, {len(live)}")
        asked = []
        for i, episode in enumerate(live):
            attempt = _attempt(
                episode,
                list(token_ids[i]),
                None if logprobs is None else logprobs[i],
                RolloutKey(batch_idx, episode.question.question_idx),
                where,
            )
            request = episode.add_attempt(attempt)
            if request is not None:
                asked.append((episode, request))
        start_s = time.perf_counter()
        answers = _ask_all(guide, asked)
        wait_s = time.perf_counter() - start_s  # all of them wait until the last one is answered
        live = []
        for (episode, _), guidance in zip(asked, answers, strict=True):
            episode.rollout.teacher_wait_s += wait_s
            if episode.add_guidance(guidance) is not None:
                live.append(episode)
    for episode in episodes:
        tell(episode)


def _attempt(
    episode: Episode,
    token_ids: list[int],
    logprobs: Sequence[float | None] | None,
    key: RolloutKey,
    where: str,
) -> Attempt:
    """Returns the attempt of an episode that consists of these tokens."""
    max_new_tokens = episode.limits.max_new_tokens
    if not 1 <= len(token_ids) <= max_new_tokens:
        raise ValueError(
            f"{where}: generate must return 1 to {max_new_tokens} token ids, got {len(token_ids)}"
        )
    # An unknown log-prob is NaN, so that training on it cannot go unnoticed.
    logprobs = [None] * len(token_ids) if logprobs is None else logprobs
    check_rule(
        where,
        "number of log-probs",
        len(logprobs),
        len(logprobs) == len(token_ids),
        f"that of the token ids, {len(token_ids)}",
    )
    known = [torch.nan if x is None else x for x in logprobs]
    return Attempt(
        token_ids=token_ids,
        logprobs=torch.tensor(known, dtype=torch.float32),
        kept_mass=torch.full((len(token_ids),), torch.nan),
        finish_reason="stop" if token_ids[-1] in episode.bridge.eos_ids else "length",
        key=key,
        rollout_idx=episode.rollout.rollout_idx,
        attempt_idx=len(episode.rollout.turns),
        policy_version=0,
    )


def _ask_all(
    guide: Teacher, asked: Sequence[tuple[Episode, GuidanceRequest]]
) -> list[Guidance | GuidanceFailed]:
    """Returns the answer to each request; the calls run at the same time."""
    futures: list[Future[Guidance | None]] = []
    try:
        for episode, request in asked:
            futures.append(ask(guide, request, episode.options.guidance_timeout_s))
            wait_if_immediate(guide, futures)
        while not all(future.done() for future in futures):
            # A local teacher answers only while step() runs its engine.
            if not guide.step():
                wait(futures, timeout=0.02)
    finally:
        for future in futures:
            future.cancel()  # after Ctrl-C the calls would go on in the background
    return [result_of(future, guide) for future in futures]
