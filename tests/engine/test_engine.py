"""Checks the engine against transformers, against itself in other settings, and the trainer.

Greedy tokens must be those of transformers. Sampled tokens must not depend on scheduling. Log-probs
must be those that the trainer's packed forward computes for the same tokens.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from socpo_fast.engine import Engine
from socpo_fast.model import Decoder, load_student, packed_forward
from socpo_fast.ops import visible_until_of_sequences
from socpo_fast.types import Attempt, SamplingParams
from tests.helpers.tiny import generate_same, kept, make_engine, make_student

# Pages hold 16 tokens: shorter than a page, two pages and a half, exactly two, exactly six.
PROMPTS = [
    [3, 5, 7],
    list(range(1, 41)),
    [9] * 32,
    list(range(50, 2, -1)) * 2,
]
SAMPLED = SamplingParams(n=3, temperature=1.0, max_new_tokens=24, eos_ids=(2,), seed=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=101,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
    )
    path = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def student(folder: str) -> Decoder:
    return load_student(folder)


def engine_of(student: Decoder, *, num_pages: int = 64, **options: int) -> Engine:
    """Returns an engine with exactly num_pages pages of 16 tokens."""
    page_gib = 16 * 2 * 3 * 2 * 8 * 4 / 2**30
    return Engine(student, kv_cache_gib=num_pages * page_gib * 1.0001, page_size=16, **options)


def exact(groups: list[list[Attempt]]) -> list[list[tuple]]:
    """Returns tokens, log-probs and end reason of every attempt, to be compared bitwise."""
    return [
        [(a.token_ids, a.logprobs.tolist(), a.finish_reason) for a in group] for group in groups
    ]


def trainer_logprobs(student: Decoder, token_ids: list[int]) -> torch.Tensor:
    """Returns [L - 1] log-probs of every token but the first, by one packed forward."""
    ids = torch.tensor(token_ids)
    until = visible_until_of_sequences([len(token_ids)])
    with torch.no_grad():
        hidden = packed_forward(student, ids, torch.arange(len(ids)), until)
        logprobs = student.lm_head(hidden).log_softmax(-1)
    return logprobs[:-1].gather(1, ids[1:, None])[:, 0]


def test_greedy_equals_transformers(folder: str, student: Decoder) -> None:
    params = SamplingParams(temperature=0.0, max_new_tokens=40, eos_ids=(2,))
    groups = generate_same(engine_of(student), PROMPTS, params)
    reference = LlamaForCausalLM.from_pretrained(folder)
    for prompt, (attempt,) in zip(PROMPTS, groups, strict=True):
        expected = reference.generate(
            torch.tensor([prompt]),
            max_new_tokens=40,
            do_sample=False,
            eos_token_id=2,
            pad_token_id=0,
        )
        assert attempt.token_ids == expected[0, len(prompt) :].tolist()


def test_logprobs_are_the_trainers(student: Decoder) -> None:
    for prompt, group in zip(
        PROMPTS, generate_same(engine_of(student), PROMPTS, SAMPLED), strict=True
    ):
        for attempt in group:
            expected = trainer_logprobs(student, prompt + attempt.token_ids)[len(prompt) - 1 :]
            assert (attempt.logprobs - expected).abs().max() < 1e-4
            assert attempt.kept_mass.eq(1).all()


@pytest.mark.parametrize(
    "options",
    [
        {"token_budget": 7},  # every prompt in chunks
        {"max_running": 2},  # forks wait for a free row
        {"num_pages": 9},  # the longest sequence needs 8, so all others are preempted
        {"num_pages": 16, "token_budget": 5, "max_running": 3},
    ],
)
def test_tokens_do_not_depend_on_scheduling(student: Decoder, options: dict[str, int]) -> None:
    roomy = engine_of(student)
    tight = engine_of(student, **options)
    assert exact(generate_same(tight, PROMPTS, SAMPLED)) == exact(
        generate_same(roomy, PROMPTS, SAMPLED)
    )
    assert tight.stats.pages_free == tight.stats.pages_total
    if options.get("num_pages") == 9:
        assert tight.stats.preemptions > 0


def test_group_equals_separate_runs(student: Decoder) -> None:
    together = generate_same(engine_of(student), PROMPTS, SAMPLED)
    for q, prompt in enumerate(PROMPTS):
        assert exact(engine_of(student).generate([prompt], SAMPLED, keys=[(0, q)])) == exact(
            together[q : q + 1]
        )
    assert len({tuple(a.token_ids) for group in together for a in group}) == 3 * len(PROMPTS), (
        "siblings draw their own noise"
    )


@pytest.mark.parametrize("cut", [None, 0, 5, 24])
@pytest.mark.parametrize("pages", ["pages kept", "pages taken", "weights changed"])
def test_resume_equals_full_prefill(student: Decoder, cut: int | None, pages: str) -> None:
    """A second attempt has the same log-probs on kept pages and after a full prefill."""
    engine = engine_of(student, num_pages=12 if pages == "pages taken" else 64)
    suffix = [7, 8, 9]
    params = SamplingParams(temperature=1.0, max_new_tokens=24, eos_ids=(), seed=1, ignore_eos=True)
    prompt = PROMPTS[1]
    (first,) = generate_same(engine, [prompt], params, keep=True)[0]
    if pages == "weights changed":
        engine.bump_policy_version()
    if pages == "pages taken":
        engine.generate([PROMPTS[3]] * 2, params, keys=[(1, 1), (1, 2)])
    old_prefill_tokens = engine.stats.prefill_tokens
    engine.resume(first, suffix, params, kept_tokens=kept(prompt, first, cut))
    done: list[Attempt] = []
    while not done:
        done = engine.step()
    second = done[0]
    context = prompt + first.token_ids[:cut] + suffix
    if pages == "pages kept":
        # The last sampled token has no KV yet; it is prefilled where the cut keeps it.
        assert engine.stats.prefill_tokens - old_prefill_tokens == len(suffix) + (cut in (None, 24))
    else:
        assert engine.stats.prefill_tokens - old_prefill_tokens == len(context)
    expected = trainer_logprobs(student, context + second.token_ids)[len(context) - 1 :]
    assert (second.logprobs - expected).abs().max() < 1e-5
    assert (second.attempt_idx, second.rollout_idx, second.key) == (1, 0, first.key)
    assert second.policy_version == engine.policy_version
    engine.release([first, second])
    assert engine.stats.pages_free == engine.stats.pages_total


def test_a_prompt_is_prefilled_once(student: Decoder) -> None:
    rows: list[int] = []
    hook = student.layers[0].register_forward_hook(
        lambda _module, args, _out: rows.append(args[1].shape[0])
    )
    engine = engine_of(student)
    params = SamplingParams(n=8, temperature=1.0, max_new_tokens=4, eos_ids=(), ignore_eos=True)
    generate_same(engine, PROMPTS, params)
    hook.remove()
    assert engine.stats.prefill_tokens == sum(map(len, PROMPTS))
    # Four tokens are sampled, and the last one is never forwarded.
    assert engine.stats.decode_tokens == 8 * len(PROMPTS) * 3
    # No row is padding: with 16 rows or more a step, none needs to be.
    assert sum(rows) == engine.stats.prefill_tokens + engine.stats.decode_tokens


def test_weights_are_read_in_place(folder: str) -> None:
    """The engine samples from parameters that were updated in place, and moves none of them."""
    student = load_student(folder)
    engine = engine_of(student)
    pointers = {n: p.data_ptr() for n, p in student.named_parameters()}
    old_attempts = exact(generate_same(engine, PROMPTS, SAMPLED))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.1)
    engine.bump_policy_version()
    assert exact(generate_same(engine, PROMPTS, SAMPLED)) != old_attempts
    assert {n: p.data_ptr() for n, p in student.named_parameters()} == pointers


def test_stop_and_length(student: Decoder) -> None:
    groups = generate_same(
        engine_of(student),
        PROMPTS,
        SamplingParams(n=8, temperature=1.5, max_new_tokens=60, eos_ids=(2, 11)),
    )
    attempts = [attempt for group in groups for attempt in group]
    assert {attempt.finish_reason for attempt in attempts} == {"stop", "length"}
    for attempt in attempts:
        assert not {2, 11} & set(attempt.token_ids[:-1])
        assert (attempt.token_ids[-1] in (2, 11)) == (attempt.finish_reason == "stop")
        assert attempt.num_tokens == attempt.logprobs.numel() == attempt.kept_mass.numel() <= 60


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: e.submit([], SAMPLED, key=(0, 0)), "token ids must be non-empty"),
        (lambda e: e.submit([101], SAMPLED, key=(0, 0)), r"in \[0, 101\), got \[101\]"),
        (lambda e: e.submit([1] * 240, SAMPLED, key=(0, 0)), "256 positions"),
        (
            lambda e: e.submit([1] * 200, SAMPLED, key=(0, 0)),
            "need 14 pages .* has 12; raise engine.kv_cache_gib",
        ),
        (lambda e: e.generate([[1], [2]], SAMPLED, keys=[(0, 0), (0, 0)]), "different pairs"),
    ],
)
def test_invalid_requests_are_refused(student: Decoder, call, message: str) -> None:
    engine = engine_of(student, num_pages=12)
    with pytest.raises(ValueError, match=message):
        call(engine)
    assert not engine.has_work
    assert engine.stats.pages_free == 12


def test_calls_beside_a_driver_are_refused(student: Decoder) -> None:
    """They change nothing: what runs gets the tokens that it gets alone."""
    engine = engine_of(student)
    params = replace(SAMPLED, n=1)
    key = (5, 5)
    [[finished]] = engine.generate(PROMPTS[:1], params, keep=True)
    engine.submit(PROMPTS[0], params, key=key)
    attempts = engine.step()
    engine.driven_by = -1  # the id of no thread
    for call in (
        engine.step,
        lambda: engine.submit(PROMPTS[1], params, key=(6, 6)),
        lambda: engine.resume(finished, [5], params, kept_tokens=3),
        lambda: engine.generate(PROMPTS, params),
    ):
        with pytest.raises(ValueError, match="calling thread must be that of the arollouts or"):
            call()
    engine.driven_by = None
    while engine.has_work:
        attempts += engine.step()
    assert exact([attempts]) == exact(engine_of(student).generate(PROMPTS[:1], params, keys=[key]))


def test_resume_twice_is_refused(student: Decoder) -> None:
    engine = engine_of(student)
    group = generate_same(engine, [PROMPTS[0]], SAMPLED, keep=True)[0]
    attempt = group[0]
    engine.resume(attempt, [4], SAMPLED, kept_tokens=1)
    with pytest.raises(ValueError, match="neither released nor resumed"):
        engine.resume(attempt, [4], SAMPLED, kept_tokens=1)
    engine.cancel((0, 0))
    engine.release(group)
    assert engine.stats.pages_free == engine.stats.pages_total
    assert not engine.has_work


@pytest.mark.smollm2
def test_smollm2_greedy_equals_transformers() -> None:
    """SmolLM2 samples transformers' greedy tokens, in a group and in a resumed second attempt."""
    folder = Path(
        os.environ.get("SOCPO_SMOLLM2", "~/.cache/socpo/smollm2-135m-instruct")
    ).expanduser()
    if not (folder / "model.safetensors").exists():
        pytest.skip(f"no SmolLM2-135M-Instruct in {folder}; set SOCPO_SMOLLM2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    reference = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def expected(ids: list[int]) -> list[int]:
        out = reference.generate(
            torch.tensor([ids]), max_new_tokens=24, do_sample=False, eos_token_id=2, pad_token_id=2
        )
        return out[0, len(ids) :].tolist()

    texts = ("What is DNA?", "List three amino acids and what each is for.")
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        for text in texts
    ]
    engine = Engine(load_student(folder), kv_cache_gib=0.2)
    params = SamplingParams(n=2, temperature=0.0, max_new_tokens=24, eos_ids=(2,))
    groups = generate_same(engine, prompts, params, keep=True)
    suffix = tokenizer("<|im_end|>\n<|im_start|>user\nShorter.<|im_end|>\n<|im_start|>assistant\n")[
        "input_ids"
    ]
    for prompt, group in zip(prompts, groups, strict=True):
        first = expected(prompt)
        assert [attempt.token_ids for attempt in group] == [first, first]
        engine.resume(group[0], suffix, params, kept_tokens=len(prompt) + 10)
        done: list[Attempt] = []
        while not done:
            done = engine.step()
        assert done[0].token_ids == expected(prompt + first[:10] + suffix)


@pytest.mark.parametrize("head_dim", [2, 6, 260])
def test_head_widths_that_kernels_lack(head_dim: int) -> None:
    """The kernels would read them wrongly, without a word; training can compute them."""
    student = Decoder(replace(make_student().config, head_dim=head_dim))
    match = rf"Engine: head_dim E must be a multiple of 4 in \[4, 256\], got {head_dim}"
    with pytest.raises(ValueError, match=match):
        make_engine(student)
