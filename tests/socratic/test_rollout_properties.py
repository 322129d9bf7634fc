"""For any samples and guidance: training sees the sampled tokens behind the context they had.

Rollouts come from the scripted engine and loss positions from the packer. Both are compared with a
walk over the packed tokens: the rows that predict an attempt must have exactly the ids before them
that the student had.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from socpo_fast.socratic.bridge import Bridge
from socpo_fast.training.packing import PackedMicrobatch, count_unique_tokens, pack_rollouts
from tests.helpers.episodes import Episode, answer_ids, cuts, play, rendering, text_of
from tests.helpers.tiny_tokenizers import (
    CHATML,
    FAMILIES,
    LLAMA3,
    THINKING,
    family,
    tiny_tokenizer,
)

BRIDGES = {name: Bridge(family(name), guidance_limit=12) for name in FAMILIES}
BRIDGES |= {
    "qwen3, thinking off": Bridge(family("qwen3"), guidance_limit=12, enable_thinking=False),
    "chatml": Bridge(tiny_tokenizer(CHATML), guidance_limit=12),
    "opens the thought": Bridge(tiny_tokenizer(THINKING), guidance_limit=12),
    "trims everything": Bridge(tiny_tokenizer(LLAMA3), guidance_limit=12),
}
APPENDS = ("smollm2", "qwen2_5", "chatml")  # these only append, whatever an answer looks like
SPELLED = [
    "<|im_end|>",
    "</s>",
    "[INST]",
    "<think>",
    "</think>",
    "\n\n",
    " ",
    "It is 3.",
    "né ☃",
    "\ufffd",
    "𝄞",
    "{{ x }}",
]
CHARACTERS = st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"])
TEXTS = st.lists(st.sampled_from(SPELLED) | st.text(CHARACTERS, max_size=4), max_size=6).map(
    "".join
)
ANSWERS = st.builds(str.__add__, st.sampled_from(SPELLED), TEXTS)  # never empty


def sampled_ids(bridge: Bridge) -> st.SearchStrategy[list[int]]:
    """Draws any ids, special tokens included; an eos only at the end."""
    ids = st.sampled_from(sorted(set(range(len(bridge.tokenizer))) - set(bridge.eos_ids)))
    return st.builds(
        lambda body, end: body + end, st.lists(ids, min_size=1, max_size=9), endings(bridge)
    )


def endings(bridge: Bridge) -> st.SearchStrategy[list[int]]:
    return st.sampled_from([[], *([eos_id] for eos_id in bridge.eos_ids)])


def visible_ids(microbatch: PackedMicrobatch, row: int) -> list[int]:
    """Returns the ids that a packed row sees, its own included."""
    visible = [row_idx for row_idx in range(row + 1) if row < microbatch.visible_until_T[row_idx]]
    assert microbatch.positions_T[row] == len(visible) - 1
    return [int(microbatch.token_ids_T[row_idx]) for row_idx in visible]


def assert_trained_on_samples(episode: Episode, answers: Sequence[Sequence[int]]) -> None:
    rollout = episode.rollout
    assert [attempt.token_ids for attempt in rollout.attempts] == [list(ids) for ids in answers]
    for packing in ("tree", "rows"):
        [microbatch] = pack_rollouts([rollout], packing=packing, token_budget=10**6)
        assert microbatch.targets_N.numel() == sum(len(ids) for ids in answers)
        assert microbatch.targets_N.tolist() == [token_id for ids in answers for token_id in ids]
        loss_tokens = iter(microbatch.rows_N.tolist())
        for context, ids in zip(episode.contexts, answers, strict=True):
            for num_sampled in range(len(ids)):
                assert visible_ids(microbatch, next(loss_tokens)) == context + list(
                    ids[:num_sampled]
                )
    assert microbatch.tokens_forwarded <= count_unique_tokens([rollout])


@pytest.mark.parametrize("name", BRIDGES)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_loss_tokens_are_exactly_the_sampled_ids(name: str, data: st.DataObject) -> None:
    bridge = BRIDGES[name]
    answers = data.draw(st.lists(sampled_ids(bridge), min_size=1, max_size=4))
    guidance = data.draw(st.lists(TEXTS, min_size=len(answers), max_size=len(answers)))
    limit = data.draw(st.integers(1, 11))
    episodes = {}
    for context in ("tokens", "template"):
        with warnings.catch_warnings():
            # Random ids may spell our own placeholders.
            warnings.filterwarnings("ignore", "chat template: cannot render")
            episodes[context] = play(
                bridge, answers, guidance, context=context, attempt_limit=limit
            )
        assert_trained_on_samples(episodes[context], answers)
    row = episodes["tokens"].rollout.prompt_ids
    for k, ids in enumerate(answers[:-1]):  # the rule of DESIGN.md section 3, spelled out
        kept_ids = ids[:limit]
        ended = len(ids) <= limit and ids[-1] == bridge.end_of_turn_id
        row = row + kept_ids + bridge.bridge_ids(guidance[k], ended=ended)
        assert episodes["tokens"].contexts[k + 1] == row
    if name in APPENDS:
        assert episodes["template"].contexts == episodes["tokens"].contexts
        assert cuts(episodes["template"].rollout) == cuts(episodes["tokens"].rollout)


@pytest.mark.parametrize("name", BRIDGES)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_contexts_equal_the_templates_rendering(name: str, data: st.DataObject) -> None:
    """This holds for context = template; for context = tokens if the template only appends."""
    bridge = BRIDGES[name]
    texts = data.draw(st.lists(ANSWERS, min_size=2, max_size=4))
    guidance = data.draw(st.lists(TEXTS, min_size=len(texts) - 1, max_size=len(texts) - 1))
    ended = data.draw(st.lists(st.booleans(), min_size=len(texts), max_size=len(texts)))
    answers = [answer_ids(bridge, text, ended=end) for text, end in zip(texts, ended, strict=True)]
    shown_guidance = [bridge.fit(text.strip()) for text in guidance]
    by_template = play(bridge, answers, guidance, context="template")
    assert_trained_on_samples(by_template, answers)
    by_tokens = play(bridge, answers, guidance)
    appends = True
    for k in range(1, len(texts)):
        expected = rendering(bridge, texts[:k], shown_guidance[:k])
        assert text_of(bridge, by_template.contexts[k]) == expected
        earlier = rendering(bridge, texts[: k - 1], shown_guidance[: k - 1])
        appends &= expected.startswith(
            earlier + bridge.exact_text(answer_ids(bridge, texts[k - 1], ended=True))
        )
        if appends:
            assert text_of(bridge, by_tokens.contexts[k]) == expected
            assert by_tokens.contexts[k] == by_template.contexts[k]
            assert by_tokens.rollout.next_context(k - 1) == by_template.rollout.next_context(k - 1)


@settings(max_examples=50, deadline=None)
@given(text=st.text(max_size=60), limit=st.integers(1, 20))
def test_fitting_guidance_is_idempotent(text: str, limit: int) -> None:
    """Fitted guidance is a start of the text within the limit, and fitting it again keeps it."""
    text = text.encode("utf-8", "replace").decode().strip()
    for tokenizer in (BRIDGES["qwen3"].tokenizer, BRIDGES["mistral_v3"].tokenizer):
        bridge = Bridge(tokenizer, guidance_limit=limit)
        fitted = bridge.fit(text)
        ids = tokenizer.encode(fitted, add_special_tokens=False, split_special_tokens=True)
        assert len(ids) <= limit
        assert text.startswith(fitted)
        assert bridge.fit(fitted.strip()) == fitted
