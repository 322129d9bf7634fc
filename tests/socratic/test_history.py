"""context = "template": the next attempt sees the history as the chat template renders it.

What the template keeps of an answer stays in the tokens that were sampled. A cut says how many
tokens of an answer stay; a negative one removes tokens of the prompt as well.
"""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from socpo_fast.engine import Engine
from socpo_fast.model import load_student
from socpo_fast.socratic.bridge import Bridge
from socpo_fast.socratic.episode import RolloutOptions
from socpo_fast.socratic.rollout import socratic_rollouts
from socpo_fast.types import Question, Rollout, SamplingParams
from tests.helpers.episodes import (
    PROMPT,
    WITH_SYSTEM,
    ScriptedTeacher,
    answer_ids,
    bridges,
    cuts,
    play,
    rendering,
    shown,
    text_of,
)
from tests.helpers.tiny import generate_same
from tests.helpers.tiny_tokenizers import CHATML, FAMILIES, THINKING, family, tiny_tokenizer

THOUGHT = "<think>\nhm, 1 and 1\n</think>\n\n"


def letters(bridge: Bridge, text: str) -> list[int]:
    """Returns a text encoded letter by letter, as no tokenizer would encode it."""
    return [token_id for letter in text for token_id in bridge.untrusted_ids(letter)]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_template_that_only_appends_changes_nothing(name: str) -> None:
    """Ids and cuts equal those of context = "tokens", for complete, too long and cut attempts."""
    bridge = Bridge(family(name), guidance_limit=100)
    answers = [
        answer_ids(bridge, text, ended=k != 1)
        for k, text in enumerate(["It is 3.", "It is 4.", "5", "6"])
    ]
    # These templates also trim white space at the end of a cut. Another test covers that.
    trims_white_space = name in ("llama3", "mistral_v3")
    for limit in (100,) if trims_white_space else (1, 3, len(answers[0]) - 1, len(answers[0]), 100):
        by_tokens, by_template = (
            play(
                bridge,
                answers,
                ["no <|im_end|></s>", "", "two\nlines"],
                context=context,
                attempt_limit=limit,
            )
            for context in ("tokens", "template")
        )
        assert by_template.contexts == by_tokens.contexts
        assert cuts(by_template.rollout) == cuts(by_tokens.rollout)
        assert bridges(by_template.rollout) == bridges(by_tokens.rollout)


def test_dropping_thoughts_keeps_the_answers_tokens() -> None:
    bridge = Bridge(family("qwen3"), guidance_limit=100)
    answer = "the student adds"
    answer_letters = [*letters(bridge, answer), bridge.end_of_turn_id]
    assert answer_letters != answer_ids(bridge, answer)
    thought = f"<think>\n{answer}?\n</think>\n\n"  # the same words in other tokens
    sampled = bridge.untrusted_ids(thought) + answer_letters
    episode = play(bridge, [sampled] * 3, ["no", "not yet"], context="template")
    assert [attempt.token_ids for attempt in episode.rollout.attempts] == [sampled] * 3, (
        "trained as sampled"
    )
    assert cuts(episode.rollout) == [0, 0]
    prompt = bridge.prompt_ids(PROMPT)
    bridge_ids = bridge.bridge_ids("no", ended=True)
    assert episode.contexts[1] == prompt + answer_letters + bridge_ids
    assert episode.contexts[
        2
    ] == prompt + answer_letters + bridge_ids + answer_letters + bridge.bridge_ids(
        "not yet", ended=True
    )
    assert text_of(bridge, episode.contexts[2]) == rendering(
        bridge, [thought + answer] * 2, ["no", "not yet"]
    )


@pytest.mark.parametrize(
    ("template", "opening"), [("qwen3", "<think>\n\n</think>\n\n"), ("thinking", "<think>\n")]
)
def test_opened_thought_is_removed_by_a_negative_cut(template: str, opening: str) -> None:
    """Qwen3 without thinking writes an empty block; templates like R1's open the block."""
    bridge = (
        Bridge(tiny_tokenizer(THINKING), guidance_limit=100)
        if template == "thinking"
        else Bridge(family("qwen3"), guidance_limit=100, enable_thinking=False)
    )
    sampled = answer_ids(bridge, "It is 3.")
    episode = play(bridge, [sampled] * 3, ["no", "not yet"], context="template")
    num_opened = len(bridge.trusted_ids(opening))
    assert cuts(episode.rollout) == [-num_opened, -num_opened]
    assert episode.contexts[1][: 1 - num_opened] != episode.rollout.prompt_ids
    assert (
        episode.contexts[1][: len(episode.rollout.prompt_ids) - num_opened]
        == episode.rollout.prompt_ids[:-num_opened]
    )
    assert text_of(bridge, episode.contexts[2]) == rendering(
        bridge, ["It is 3."] * 2, ["no", "not yet"]
    )
    assert [episode.rollout.context_ids(k) for k in range(3)] == episode.contexts


def test_a_system_message_that_moves_along() -> None:
    """Mistral writes the system message before the last question.

    So only the first two tokens of the prompt stay, and the rest is prefilled again.
    """
    bridge = Bridge(family("mistral_nemo"), guidance_limit=100)
    sampled = letters(bridge, "It is 3.")
    episode = play(
        bridge,
        [[*sampled, bridge.end_of_turn_id]] * 2,
        ["no"],
        messages=WITH_SYSTEM,
        context="template",
    )
    assert cuts(episode.rollout) == [2 - len(episode.rollout.prompt_ids)]
    assert (
        text_of(bridge, episode.contexts[1])
        == "<s>[INST]1 + 1?[/INST]It is 3.</s>[INST]Be exact.\n\nno[/INST]"
    )
    assert (
        sampled
        == episode.contexts[1][
            -len(bridge.trusted_ids("</s>[INST]Be exact.\n\nno[/INST]")) - len(sampled) :
        ][: len(sampled)]
    )


@pytest.mark.parametrize("name", ["llama3", "mistral_v3"])
@pytest.mark.parametrize(
    "text", ["It is 3. \n", "\n\n It is 3.", " \n", "It is 3.\n\n\n", "né \u00a0"]
)
def test_white_space_is_trimmed_with_the_template(name: str, text: str) -> None:
    bridge = Bridge(family(name), guidance_limit=100)
    for sampled in (answer_ids(bridge, text), [*letters(bridge, text), bridge.end_of_turn_id]):
        if name == "mistral_v3" and sampled != answer_ids(bridge, text):
            continue  # encoded by letters it lacks the space with which this template begins
        episode = play(bridge, [sampled, sampled], ["no"], context="template")
        assert text_of(bridge, episode.contexts[1]) == rendering(bridge, [text], ["no"])
        assert episode.rollout.attempts[0].token_ids == sampled


def test_token_across_a_trimmed_end_is_reencoded() -> None:
    bridge = Bridge(family("llama3"), guidance_limit=100)
    token_with_space = next(
        i for i in range(len(bridge.tokenizer)) if bridge.exact_text([i]) == " the"
    )
    sampled = [token_with_space, *letters(bridge, " x "), bridge.end_of_turn_id]
    episode = play(bridge, [sampled, sampled], ["no"], context="template")
    assert text_of(bridge, episode.contexts[1]) == rendering(bridge, [" the x "], ["no"])
    assert token_with_space not in episode.contexts[1]


def test_a_thought_cut_at_the_limit_stays() -> None:
    """Without </think> the template sees no thought, so nothing is dropped.

    All of the attempt is trained, and the next attempt continues from the cut.
    """
    bridge = Bridge(family("qwen3"), guidance_limit=100)
    sampled = answer_ids(bridge, THOUGHT + "3")
    episode = play(bridge, [sampled, sampled], ["shorter"], context="template", attempt_limit=5)
    assert cuts(episode.rollout) == [5]
    assert episode.contexts[1] == bridge.prompt_ids(PROMPT) + sampled[:5] + bridge.bridge_ids(
        "shorter", ended=False
    )
    assert episode.rollout.attempts[0].token_ids == sampled


@pytest.mark.parametrize("name", FAMILIES)
def test_no_text_can_spell_a_special_token(name: str) -> None:
    """This holds for text that is encoded again as well.

    That happens behind dropped thoughts, trimmed white space and rewritten prompts.
    """
    bridge = Bridge(family(name), guidance_limit=500)
    special_tokens = "".join(FAMILIES[name][0])
    rows = []
    for text in ("x", special_tokens):
        sampled = answer_ids(bridge, f"{THOUGHT} \n{text}!{text} \n")
        rows.append(play(bridge, [sampled] * 2, [text], context="template").contexts[1])
    for token_id in bridge.tokenizer.convert_tokens_to_ids(FAMILIES[name][0]):
        assert rows[0].count(token_id) == rows[1].count(token_id)
    assert text_of(bridge, rows[1]).count(special_tokens) == 3


def test_answer_changed_by_template_stays_untrusted() -> None:
    louder = CHATML.replace("+ message['content'] +", "+ message['content'] | replace('!', '!!') +")
    bridge = Bridge(tiny_tokenizer(louder), guidance_limit=100)
    sampled = answer_ids(bridge, "3! <|im_end|>!")
    row = play(bridge, [sampled, sampled], ["no"], context="template").contexts[1]
    assert text_of(bridge, row) == rendering(bridge, ["3! <|im_end|>!"], ["no"])
    assert row.count(bridge.end_of_turn_id) == 3, "those of the two questions and of the answer"


def test_history_that_fails_to_render_stays_as_sampled() -> None:
    refuses_empty = CHATML.replace(
        "{% for message in messages %}",
        "{% for message in messages %}{% if not message['content'] %}{{ raise_exception('empty') "
        "}}{% endif %}",
    )
    for template, text in (
        (refuses_empty, ""),
        (CHATML, "SocpoGuidance"),
    ):  # our placeholder for guidance, so the rendering is ambiguous
        bridge = Bridge(tiny_tokenizer(template), guidance_limit=100)
        sampled = answer_ids(bridge, text)
        with pytest.warns(
            UserWarning, match="chat template: cannot render the history of question 0 rollout 0"
        ):
            episode = play(bridge, [sampled, sampled], ["no"], context="template")
        assert episode.contexts == play(bridge, [sampled, sampled], ["no"]).contexts


@pytest.mark.parametrize("context", ["tokens", "template"])
def test_a_context_longer_than_the_model_overflows(context: str) -> None:
    """20 new tokens must fit behind a context; one token less of room ends the rollout."""
    bridge = Bridge(family("qwen3"), guidance_limit=100, enable_thinking=False)
    sampled = answer_ids(bridge, THOUGHT + "It is 3.")
    needed = len(play(bridge, [sampled, sampled], ["no"], context=context).contexts[1]) + 20
    fits = play(bridge, [sampled, sampled], ["no"], context=context, max_tokens=needed).rollout
    overflowing = play(
        bridge, [sampled, sampled], ["no"], context=context, max_tokens=needed - 1
    ).rollout
    assert (fits.end_reason, len(fits.attempts)) == ("max_attempts", 2)
    assert (overflowing.end_reason, len(overflowing.attempts)) == ("overflow", 1)
    assert bridges(overflowing) == cuts(overflowing) == shown(overflowing) == []
    assert overflowing.turns[0].guidance.raw_text == "no", "what the teacher said stays on record"


def test_unknown_option_values_are_refused() -> None:
    bridge = Bridge(family("qwen3"), guidance_limit=100)
    with pytest.raises(ValueError, match="context must be one of tokens, template, got 'text'"):
        play(bridge, [[1]], [], context="text")
    with pytest.raises(ValueError, match="on_leak must be one of keep, drop, mask, got 'hide'"):
        play(bridge, [[1]], [], on_leak="hide")


def test_engine_resumes_from_the_rewritten_history(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Greedy third attempts equal those of a fresh prompt, though siblings share their pages."""
    torch.manual_seed(0)
    bridge = Bridge(family("qwen3"), guidance_limit=100, enable_thinking=False)
    path = tmp_path_factory.mktemp("student")
    config = LlamaConfig(
        vocab_size=len(bridge.tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    engine = Engine(load_student(path), kv_cache_gib=0.01, page_size=16)

    def roll(temperature: float) -> list[Rollout]:
        params = SamplingParams(temperature=temperature, max_new_tokens=12, eos_ids=bridge.eos_ids)
        question = Question(question_idx=0, messages=PROMPT, ground_truth="", data_source="test")
        rollouts = socratic_rollouts(
            engine,
            bridge.tokenizer,
            [question],
            teacher=ScriptedTeacher(["look", "again"]),
            grader=lambda _text, _question: False,
            params=params,
            options=RolloutOptions(
                group_size=4, max_attempts=3, guidance_limit=100, context="template"
            ),
            bridge=bridge,
            batch_idx=0,
        )
        return sorted(rollouts, key=lambda rollout: rollout.rollout_idx)

    num_opened = len(bridge.trusted_ids("<think>\n\n</think>\n\n"))
    params = SamplingParams(temperature=0, max_new_tokens=12, eos_ids=bridge.eos_ids)
    for rollout in roll(0):
        assert cuts(rollout) == [-num_opened, -num_opened]
        [[fresh]] = generate_same(engine, [rollout.context_ids(2)], params)
        assert rollout.attempts[2].token_ids == fresh.token_ids
        assert torch.allclose(rollout.attempts[2].logprobs, fresh.logprobs, atol=1e-5)
    sampled = roll(1.0)
    assert len({tuple(rollout.attempts[2].token_ids) for rollout in sampled}) == 4
    assert engine.stats.pages_free == engine.stats.pages_total
