"""Checks that a sampled token depends on the model's distribution and its key, and nothing else.

Other requests in the batch, the way the engine is called and the row of a sequence do not matter.
"""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch

from socpo_fast.engine import Engine
from socpo_fast.model import Decoder, packed_forward
from socpo_fast.ops import row_key, sample, visible_until_of_sequences
from socpo_fast.types import SamplingParams
from tests.helpers.tiny import (
    bits,
    drain,
    expected_attempt,
    generate_same,
    kept,
    make_engine,
    make_student,
)

PROMPTS = [[3, 5, 7], list(range(1, 30)), [9] * 8, [4]]
PARAMS = SamplingParams(n=3, temperature=1.0, max_new_tokens=12, eos_ids=(2, 17), seed=5)


@pytest.fixture(scope="module")
def student() -> Decoder:
    return make_student()


def chi_square_tail(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns the probability of a fit at least this bad if `expected` were true."""
    statistic = ((counts - expected).double() ** 2 / expected).sum()
    return float(
        torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2.0).double(), statistic / 2)
    )


def next_token_logits(student: Decoder, token_ids: list[int]) -> torch.Tensor:
    """Returns [V] fp64 logits, by plain attention in fp64 and without the engine."""
    wide = make_student().double()
    wide.load_state_dict({name: value.double() for name, value in student.state_dict().items()})

    positions = torch.arange(len(token_ids))
    until = visible_until_of_sequences([len(token_ids)])
    with torch.no_grad():
        hidden = packed_forward(wide, torch.tensor(token_ids), positions, until, impl="ref")
        return wide.lm_head(hidden)[-1]


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("n", [1, 2, 7])
def test_a_fork_of_n_equals_n_separate_runs(student: Decoder, prompt: list[int], n: int) -> None:
    (group,) = make_engine(student).generate([prompt], replace(PARAMS, n=n), keys=[(4, 6)])
    assert [attempt.rollout_idx for attempt in group] == list(range(n))
    for rollout_idx, attempt in enumerate(group):
        assert bits(attempt) == expected_attempt(
            student, prompt, PARAMS, key=(4, 6), rollout_idx=rollout_idx
        )


def test_batch_invariant(student: Decoder) -> None:
    """A request draws the same by itself as among requests with other sampling parameters."""
    params_by_question = [
        replace(PARAMS, temperature=0.0, n=1),
        replace(PARAMS, temperature=0.3, top_p=0.7, seed=9),
        replace(PARAMS, top_k=3, min_p=0.05, n=5, max_new_tokens=3),
        replace(PARAMS, ignore_eos=True),
    ]
    engine = make_engine(student)
    for q, (prompt, params) in enumerate(zip(PROMPTS, params_by_question, strict=True)):
        engine.submit(prompt, params, key=(0, q))
    for attempt in drain(engine):
        q = attempt.key.question
        expected = expected_attempt(
            student,
            PROMPTS[q],
            params_by_question[q],
            key=attempt.key,
            rollout_idx=attempt.rollout_idx,
        )
        assert bits(attempt) == expected


def test_call_pattern_does_not_matter(student: Decoder) -> None:
    """The same attempts come from one generate, one per prompt, and submits between steps.

    The submits also come in another order than the prompts.
    """
    keys = [(0, q) for q in range(len(PROMPTS))]
    expected = [
        bits(a) for group in generate_same(make_engine(student), PROMPTS, PARAMS) for a in group
    ]
    engine = make_engine(student)
    one_by_one = [
        bits(a)
        for p, key in zip(PROMPTS, keys, strict=True)
        for a in engine.generate([p], PARAMS, keys=[key])[0]
    ]
    assert one_by_one == expected
    stepwise = make_engine(student, token_budget=9)
    done = []
    for q in (2, 0, 3, 1):
        stepwise.submit(PROMPTS[q], PARAMS, key=(0, q))
        for _ in range(3):
            done += stepwise.step()
    done = sorted([*done, *drain(stepwise)], key=lambda a: (a.key, a.rollout_idx))
    assert [bits(attempt) for attempt in done] == expected


def test_noise_is_keyed_as_documented(student: Decoder) -> None:
    """Each token is that of ops.sample from fp64 logits, under the documented key.

    The key is (seed, batch, question, rollout, attempt, position).
    """
    params = replace(PARAMS, temperature=0.8, top_p=0.9, ignore_eos=True, n=2)
    engine = make_engine(student)
    group = engine.generate([PROMPTS[0]], params, keys=[(11, 22)], keep=True)[0]
    engine.resume(group[1], [8], params, kept_tokens=kept(PROMPTS[0], group[1], 5))
    first = group[1]
    second = drain(engine)[0]
    for attempt, context in ((first, PROMPTS[0]), (second, [*PROMPTS[0], *first.token_ids[:5], 8])):
        for position, token_id in enumerate(attempt.token_ids):
            logits = next_token_logits(student, context + attempt.token_ids[:position]).float()[
                None
            ]
            key = torch.tensor([row_key(5, 11, 22, 1, attempt.attempt_idx, position)])
            filters = {"temperature_B": torch.tensor([0.8]), "top_k_B": torch.tensor([0])}
            filters |= {"top_p_B": torch.tensor([0.9]), "min_p_B": torch.tensor([0.0])}
            expected, logprob, mass = sample(logits, key, **filters)
            assert token_id == expected.item(), (
                f"attempt {attempt.attempt_idx}, position {position}"
            )
            assert abs(attempt.logprobs[position] - logprob.item()) < 1e-4
            assert abs(attempt.kept_mass[position] - mass.item()) < 1e-5


def test_siblings_are_independent_softmax_draws(student: Decoder) -> None:
    """First tokens follow the softmax, and neighbouring rollouts draw independently of each other.

    100,000 tokens of 250 groups of 400: their counts, and the counts of pairs, by chi-square.
    """
    params = SamplingParams(
        n=400, temperature=0.8, max_new_tokens=1, eos_ids=(), ignore_eos=True, seed=1
    )
    prompt = [3, 5, 7, 9]  # exactly one page, so that 400 forks copy nothing
    groups = generate_same(
        make_engine(student, num_pages=1000, max_running=1000), [prompt] * 250, params
    )
    draws = torch.tensor([[attempt.token_ids[0] for attempt in group] for group in groups])
    probs = (next_token_logits(student, prompt) / 0.8).softmax(-1)
    assert probs.min() * draws.numel() > 5, "every cell must be filled"
    assert (
        chi_square_tail(draws.flatten().bincount(minlength=len(probs)), probs * draws.numel())
        > 1e-4
    )

    # Three classes with about a third of the probability each, so that no cell of pairs is small.
    bins = torch.cumsum(probs, 0).mul(3).long().clamp(max=2)[draws]
    shares = torch.stack(
        [probs[torch.cumsum(probs, 0).mul(3).long().clamp(max=2) == i].sum() for i in range(3)]
    )
    for a, b, pair_kind in (
        (bins[:, ::2], bins[:, 1::2], "siblings"),
        (bins[::2], bins[1::2], "questions"),
    ):
        pairs = (a * 3 + b).flatten().bincount(minlength=9)
        assert chi_square_tail(pairs, torch.outer(shares, shares).flatten() * pairs.sum()) > 1e-4, (
            pair_kind
        )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda e: e.generate([[1], [1] * 100], PARAMS),
            "generate: need 28 pages of 4 tokens, the pool has 12",
        ),
        (lambda e: e.generate([[1], []], PARAMS), "generate: token ids must be non-empty"),
        (lambda e: e.generate([[1], [1]], PARAMS, keys=[(0, 0)]), "keys must be 2 different pairs"),
        (lambda e: e.submit([1] * 128, PARAMS, key=(0, 0)), "128 positions, got 128 [+] 12"),
        (lambda e: e.submit([1, -1], PARAMS, key=(0, 0)), r"in \[0, 37\), got \[1, -1\]"),
        (lambda e: e.submit([1], PARAMS, key=(0, 2**63)), "key must be two 64-bit integers"),
        (lambda e: e.submit([1] * 37, PARAMS, key=(0, 0)), "need 13 pages"),
    ],
)
def test_impossible_request_leaves_nothing_behind(student: Decoder, call, message: str) -> None:
    """A request that can never run is refused; the engine is as before and works on."""
    engine = make_engine(student, num_pages=12)
    old_stats = engine.stats
    with pytest.raises(ValueError, match=message):
        call(engine)
    assert engine.stats == old_stats and not engine.has_work
    with engine.lend_memory():  # refused while any sequence is queued, running or pinned
        pass
    assert bits(generate_same(engine, [[1] * 36], PARAMS)[0][2]) == expected_attempt(
        student, [1] * 36, PARAMS, rollout_idx=2
    )


def test_request_that_just_fits_runs(student: Decoder) -> None:
    """All pages of the pool and the model's last position are usable, as max_tokens says."""
    params = replace(PARAMS, ignore_eos=True)
    for engine, total in ((make_engine(student, num_pages=12), 48), (make_engine(student), 128)):
        assert engine.max_tokens == total
        (group,) = generate_same(engine, [[1] * (total - 12)], params)
        assert [attempt.num_tokens for attempt in group] == [12] * 3


def test_generate_needs_an_idle_engine(student: Decoder) -> None:
    engine = make_engine(student)
    engine.submit([1], PARAMS, key=(9, 9))
    with pytest.raises(ValueError, match="generate: the engine must be idle"):
        generate_same(engine, [[1]], PARAMS)
    assert {attempt.key for attempt in drain(engine)} == {(9, 9)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"page_size": 3}, "page_size must be a power of two, got 3"),
        (
            {"max_running": 0},
            r"max_running, token_budget and tokens_per_sync must be >= 1, got \(0, 2048, 1\)",
        ),
        (
            {"token_budget": 0},
            r"max_running, token_budget and tokens_per_sync must be >= 1, got \(256, 0, 1\)",
        ),
        ({"kv_cache_gib": 1e-9}, "kv_cache_gib must hold at least one page, got 1e-09"),
    ],
)
def test_an_engine_that_could_never_run_is_refused(
    student: Decoder, options: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=f"Engine: {message}"):
        Engine(student, **options)


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 1e39},  # infinite in fp32
        {"temperature": float("nan")},
        {"top_p": 1e-50},  # 0 in fp32
        {"min_p": 1 - 1e-12},  # 1 in fp32
        {"top_k": 2**31},
        {"seed": 2**63},
        {"n": 0},
        {"max_new_tokens": 0},
        {"eos_ids": ()},
    ],
)
def test_invalid_sampling_params_are_refused(change: dict) -> None:
    """Values that the sampler would refuse in the middle of a step are refused when they are set.

    It computes in fp32, where some valid doubles become infinite, 0 or 1.
    """
    with pytest.raises(ValueError, match=f"SamplingParams: {next(iter(change))} must be"):
        replace(PARAMS, **change)


def test_pool_larger_than_memory_is_refused(
    student: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is one line in the user's terms, not the allocator's message of several lines."""
    monkeypatch.setattr(
        torch, "zeros", Mock(side_effect=RuntimeError("[enforce fail at alloc_cpu.cpp:127]\n.."))
    )
    with pytest.raises(
        ValueError, match=r"^Engine: kv_cache_gib must fit into memory, got 0\.0\d*; lower it$"
    ):
        Engine(student, kv_cache_gib=0.05)
    refused = r"^Engine: GiB of min_memory_bytes must fit into memory, got 1; lower it$"
    with pytest.raises(ValueError, match=refused):
        Engine(student, kv_cache_gib=0.05, min_memory_bytes=2**30)
