"""Makes small students and rollouts by hand; their token ids are random."""

from __future__ import annotations

import random

import torch

from socpo_fast.model.config import ModelConfig
from socpo_fast.model.decoder import Decoder
from socpo_fast.types import Attempt, Rollout, RolloutKey, ShownGuidance, Turn

VOCAB = 53


def make_student(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: object) -> Decoder:
    """Returns a tiny Llama with random weights; `changes` are keys of its config.json."""
    raw = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
    }
    torch.manual_seed(seed)
    student = Decoder(ModelConfig.from_hf(raw | changes, where="test"))
    for param in student.parameters():
        torch.nn.init.normal_(param, std=0.3 if param.ndim > 1 else 1.0)
    return student.to(dtype)


def make_rollout(
    question_idx: int,
    rollout_idx: int,
    prompt_ids: list[int],
    lengths: list[int],
    bridge_lengths: list[int] | None = None,
    cuts: list[int | None] | None = None,
) -> Rollout:
    """Returns a rollout of random tokens, which depend on the two indices only.

    `lengths` and `bridge_lengths` are numbers of tokens; `cuts` are those of turns_of.
    """
    rng = random.Random(1000 * question_idx + rollout_idx)
    generator = torch.Generator().manual_seed(1000 * question_idx + rollout_idx)
    attempts = [
        Attempt(
            token_ids=[rng.randrange(VOCAB) for _ in range(length)],
            logprobs=-4.0 + torch.rand(length, generator=generator),
            kept_mass=torch.ones(length),
            finish_reason="stop",
            key=RolloutKey(0, question_idx),
            rollout_idx=rollout_idx,
            attempt_idx=attempt_idx,
            policy_version=0,
        )
        for attempt_idx, length in enumerate(lengths)
    ]
    num_bridges = max(0, len(lengths) - 1)
    bridges = [
        [rng.randrange(VOCAB) for _ in range(length)]
        for length in bridge_lengths or [3] * num_bridges
    ]
    turns = turns_of(prompt_ids, attempts, bridges, cuts)
    for turn in turns:
        turn.advantage = rng.uniform(-2.0, 2.0)
    return Rollout(
        question_idx=question_idx, rollout_idx=rollout_idx, prompt_ids=prompt_ids, turns=turns
    )


def turns_of(
    prompt_ids: list[int],
    attempts: list[Attempt],
    bridges: list[list[int]],
    cuts: list[int | None] | None = None,
) -> list[Turn]:
    """Returns the turns of some attempts, with a bridge between each two.

    A cut says how much of an attempt the next one sees. None: all of it. -m: nothing, and the last
    m tokens before the attempt are dropped as well.
    """
    turns = [Turn(attempt=attempt) for attempt in attempts]
    num_context_tokens = len(prompt_ids)
    for turn, bridge_ids, cut in zip(turns, bridges, cuts or [None] * len(bridges), strict=False):
        kept_tokens = num_context_tokens + (turn.attempt.num_tokens if cut is None else cut)
        turn.guidance = ShownGuidance(
            raw_text="", text="", kept_tokens=kept_tokens, bridge_ids=bridge_ids
        )
        num_context_tokens = kept_tokens + len(bridge_ids)
    return turns


def contexts(rollout: Rollout) -> list[list[int]]:
    """Returns, for each attempt, the token ids that it was sampled behind.

    The code under test has its own way to this; here it is written out again, to compare.
    """
    contexts_so_far = [list(rollout.prompt_ids)]
    for turn in rollout.turns[:-1]:
        token_ids = contexts_so_far[-1] + turn.attempt.token_ids
        contexts_so_far.append(token_ids[: turn.guidance.kept_tokens] + turn.guidance.bridge_ids)
    return contexts_so_far


def count_nodes(rollouts: list[Rollout]) -> tuple[int, int]:
    """Counts the tokens of the groups' prefix trees and their leaves, from the rollouts alone.

    A token that several rollouts or attempts share counts once. A leaf is the last token of a
    rollout, or of a tail that a cut drops.
    """
    trained = [rollout for rollout in rollouts if rollout.attempts]
    prompts = {(rollout.question_idx, tuple(rollout.prompt_ids)) for rollout in trained}
    nodes = sum(len(prompt) for _, prompt in prompts)
    leaves = len(trained)
    for rollout in trained:
        nodes += sum(len(attempt.token_ids) for attempt in rollout.attempts)
        for turn, context in zip(rollout.turns[:-1], contexts(rollout), strict=False):
            nodes += len(turn.guidance.bridge_ids)
            leaves += turn.guidance.kept_tokens < len(context + turn.attempt.token_ids)
    return nodes, leaves


def make_rollouts() -> list[Rollout]:
    """Returns rollouts of every shape that exists, out of order.

    Two groups of several rollouts, a group of one, and one question with two prompts.
    """
    first = [1, 2, 3, 4, 5]
    second = [7]
    third = [9, 8]
    return [
        make_rollout(0, 0, first, [4]),
        make_rollout(1, 0, second, [5, 6], [2]),
        make_rollout(0, 1, first, [6, 3], [4], [2]),  # cut
        make_rollout(0, 2, first, []),  # no attempt
        make_rollout(0, 3, first, [1, 1, 1], [1, 2]),  # single tokens, K = 3
        make_rollout(2, 0, third, [3]),  # a group of one
        make_rollout(1, 1, second, [7, 5, 4], [3, 3], [3, None]),
        make_rollout(0, 4, first, [5, 4, 6], [2, 2], [1, 2]),  # cut twice
        make_rollout(
            1, 2, second, [4, 4], [2], [3]
        ),  # the cut drops one token; no forward needs it
        make_rollout(1, 3, second, [4, 4], [2], [4]),  # a cut that cuts nothing
        make_rollout(0, 5, first, [3, 3], [2], [0]),  # nothing of the first attempt is kept
        make_rollout(0, 6, [1, 2, 3, 4, 6], [4]),  # same question, another prompt
        # cut back into the prompt, then into the first bridge
        make_rollout(0, 7, first, [4, 3, 2], [2, 1], [-3, -1]),
        # one token of the prompt stays; then one again, and no bridge
        make_rollout(0, 8, first, [1, 3, 4], [2, 0], [-4, -2]),
        # cut past a bridge into the first attempt
        make_rollout(1, 4, second, [6, 1, 3], [3, 2], [None, -5]),
        # behind a cut and an empty bridge, cut again into what was kept
        make_rollout(2, 1, third, [5, 4, 3], [0, 2], [2, -1]),
        # a fork in the prompt, behind which two attempts follow each other
        make_rollout(2, 2, third, [2, 3, 3], [1, 1], [-1, None]),
    ]
