"""Whatever students sample and teachers say: what is trained is what was sampled, behind what was
seen.

Rollouts come from the scripted engine, loss positions from the packer, and both are held against a
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
from socpo_fast.train.packing import PackedMicrobatch, count_unique_tokens, pack_rollouts
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
APPENDS = ("smollm2", "qwen2_5", "chatml")  # whatever an answer looks like
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
    """Any ids at all, special tokens among them; an eos only at the end."""
    ids = st.sampled_from(sorted(set(range(len(bridge.tokenizer))) - set(bridge.eos_ids)))
    return st.builds(
        lambda body, end: body + end, st.lists(ids, min_size=1, max_size=9), endings(bridge)
    )


def endings(bridge: Bridge) -> st.SearchStrategy[list[int]]:
    return st.sampled_from([[], *([eos_id] for eos_id in bridge.eos_ids)])


def seen_before(microbatch: PackedMicrobatch, row: int) -> list[int]:
    """The ids on the path of a packed row, the row's own included."""
    places = [place for place in range(row + 1) if row < microbatch.visible_until_T[place]]
    assert microbatch.positions_T[row] == len(places) - 1
    return [int(microbatch.token_ids_T[place]) for place in places]


def check_what_is_trained(episode: Episode, answers: Sequence[Sequence[int]]) -> None:
    rollout = episode.rollout
    assert [attempt.token_ids for attempt in rollout.attempts] == [list(ids) for ids in answers]
    for packing in ("tree", "rows"):
        [microbatch] = pack_rollouts([rollout], packing=packing, token_budget=10**6)
        assert microbatch.targets_N.numel() == sum(len(ids) for ids in answers)
        assert microbatch.targets_N.tolist() == [token_id for ids in answers for token_id in ids]
        loss_tokens = iter(microbatch.rows_N.tolist())
        for context, ids in zip(episode.contexts, answers, strict=True):
            for done in range(len(ids)):
                assert seen_before(microbatch, next(loss_tokens)) == context + list(ids[:done])
    assert microbatch.tokens_forwarded <= count_unique_tokens([rollout])


@pytest.mark.parametrize("name", BRIDGES)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_loss_falls_on_the_sampled_ids_and_nothing_else(name: str, data: st.DataObject) -> None:
    bridge = BRIDGES[name]
    answers = data.draw(st.lists(sampled_ids(bridge), min_size=1, max_size=4))
    guidance = data.draw(st.lists(TEXTS, min_size=len(answers), max_size=len(answers)))
    limit = data.draw(st.integers(1, 11))
    episodes = {}
    for context in ("tokens", "template"):
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "chat template: cannot render"
            )  # ids may spell our own placeholders
            episodes[context] = play(
                bridge, answers, guidance, context=context, attempt_limit=limit
            )
        check_what_is_trained(episodes[context], answers)
    row = episodes["tokens"].rollout.prompt_ids
    for k, ids in enumerate(answers[:-1]):  # the rule of DESIGN.md section 3, spelled out
        kept = ids[:limit]
        ended = len(ids) <= limit and ids[-1] == bridge.end_of_turn_id
        row = row + kept + bridge.bridge_ids(guidance[k], ended=ended)
        assert episodes["tokens"].contexts[k + 1] == row
    if name in APPENDS:
        assert episodes["template"].contexts == episodes["tokens"].contexts
        assert cuts(episodes["template"].rollout) == cuts(episodes["tokens"].rollout)


@pytest.mark.parametrize("name", BRIDGES)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_person_reads_the_templates_own_rendering(name: str, data: st.DataObject) -> None:
    """With context = template always; with context = tokens where the template only appends."""
    bridge = BRIDGES[name]
    texts = data.draw(st.lists(ANSWERS, min_size=2, max_size=4))
    guidance = data.draw(st.lists(TEXTS, min_size=len(texts) - 1, max_size=len(texts) - 1))
    ended = data.draw(st.lists(st.booleans(), min_size=len(texts), max_size=len(texts)))
    answers = [answer_ids(bridge, text, ended=end) for text, end in zip(texts, ended, strict=True)]
    shown = [bridge.fit(text.strip()) for text in guidance]
    rendered = play(bridge, answers, guidance, context="template")
    check_what_is_trained(rendered, answers)
    kept = play(bridge, answers, guidance)
    appends = True
    for k in range(1, len(texts)):
        want = rendering(bridge, texts[:k], shown[:k])
        assert text_of(bridge, rendered.contexts[k]) == want
        before = rendering(bridge, texts[: k - 1], shown[: k - 1])
        appends &= want.startswith(
            before + bridge.exact_text(answer_ids(bridge, texts[k - 1], ended=True))
        )
        if appends:
            assert text_of(bridge, kept.contexts[k]) == want
            assert kept.contexts[k] == rendered.contexts[k]
            assert kept.rollout.seam(k - 1) == rendered.rollout.seam(k - 1)


@settings(max_examples=50, deadline=None)
@given(text=st.text(max_size=60), limit=st.integers(1, 20))
def test_guidance_fits_and_fits_again(text: str, limit: int) -> None:
    """At most the limit, a head of the text, and the same when it is measured once more."""
    text = text.encode("utf-8", "replace").decode().strip()
    for tokenizer in (BRIDGES["qwen3"].tokenizer, BRIDGES["mistral_v3"].tokenizer):
        bridge = Bridge(tokenizer, guidance_limit=limit)
        shown = bridge.fit(text)
        ids = tokenizer.encode(shown, add_special_tokens=False, split_special_tokens=True)
        assert len(ids) <= limit
        assert text.startswith(shown)
        assert bridge.fit(shown.strip()) == shown
