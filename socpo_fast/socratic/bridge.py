"""Turns messages into token ids, and guidance into the ids that lead to the next attempt.

Read Bridge: __init__ takes the pieces from the tokenizer's own chat template, bridge_ids puts them
together, and _check compares them with the template's rendering. Sampled tokens are not decoded
and encoded again (rollout.context = "template" is the exception, history.py). A row is a
concatenation, and every seam lies at a special token, so the tokenizer merges nothing across it:

    prompt_ids | attempt 0 | bridge | attempt 1 | bridge | ..
                             '----'
                 end of turn, user header, guidance, end of turn, assistant header

Departure from the template: it may rewrite earlier turns (Qwen3 drops their <think> blocks, others
trim white space). The row keeps what was sampled. `Bridge.notes` says where the two differ, and
history.py follows the template instead.
"""

import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from socpo_fast.files import read_json
from socpo_fast.ops._checks import check_rule
from socpo_fast.socratic.vocabulary import (
    chat_template_of,
    check_vocabulary,
    configured_eos_ids,
    find_special,
    with_special_ids,
)

# Words that stand for texts while a template renders.
ANSWER = "SocpoAnswer"
GUIDANCE = "SocpoGuidance"
_PROMPT = [{"role": "user", "content": "SocpoQuestion"}]
_WITH_SYSTEM = [{"role": "system", "content": "SocpoSystem"}, *_PROMPT]
# A template may add this many characters to a dialogue, and repeat each of its texts 16 times.
_TEMPLATE_CHARACTERS = 100_000
_NOTE = "the chat template rewrites {} once it is history; rollout.context tokens does not"
# A fast tokenizer has a state that says whether special tokens are split, and a call sets it first.
# Threads that share a tokenizer would encode under each other's state: guidance with real special
# tokens. One lock for all, since bridges share tokenizers; encoding a text takes microseconds.
_encoding = threading.Lock()
# Answers that some templates change once they are history; _check renders each of them.
_PROBES = {
    "a plain answer": ANSWER,
    "an answer with a <think> block": f"<think>\nSocpoThought\n</think>\n\n{ANSWER}",
    "an answer with white space around it": f"\n {ANSWER} \n",
}


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a Hugging Face folder; no code of the folder is run.

    Raises:
        ValueError: the folder or its tokenizer files are missing or unreadable, or the tokenizer
            has ids that the model of the folder has not.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise ValueError(
            f"tokenizer: must be a Hugging Face folder on this machine, got '{folder}'; download "
            "it first"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    # The tokenizers library raises bare Exception for files that it cannot read.
    except Exception as error:
        raise ValueError(
            f"tokenizer: {folder} must hold a tokenizer.json that transformers reads ({error})"
        ) from error
    config = folder / "config.json"
    vocab_size = read_json(config).get("vocab_size") if config.is_file() else None
    if type(vocab_size) is int:
        check_vocabulary(tokenizer, vocab_size)
    return tokenizer


class TemplateRefuses(ValueError):
    """The chat template does not take messages of these roles."""


class Bridge:
    """The chat template of one tokenizer, taken apart into token ids.

    Args:
        tokenizer:       a fast tokenizer with a chat template.
        guidance_limit:  most tokens of guidance, >= 1; of longer guidance the beginning is kept.
        enable_thinking: passed to the chat template (Qwen3: False = no thinking); None = the
                         template's default.
        single_turn:     for a teacher, which answers once: the template may refuse dialogues.

    Turns begin and end with special tokens, or with added tokens that are not special but look like
    marks (<|User|> of DeepSeek-R1-Distill). Both are called special here: no text can forge them.

    Attributes:
        end_of_turn_id: the special token right behind an assistant's text; end_of_turn is its text.
        eos_ids:        the ids that end an attempt: end_of_turn_id, the tokenizer's eos and those
                        of the generation_config.json beside the tokenizer.
        before, after:  the template's text from an answer's end to the guidance, and from the
                        guidance to the next answer.
        takes_system:   whether the template renders system messages; others refuse or drop them.
        notes:          one sentence for each kind of dialogue that the template renders differently
                        once it is history, or on another day. Empty if the template only appends.

    Raises:
        ValueError: the tokenizer has no chat template; or the template refuses a dialogue, has no
            enable_thinking, ignores add_generation_prompt, or has turns that do not end with a
            special token (Llama 2, Mistral v1 and v2: there guidance could forge turns); or the
            pieces do not add up to the template's rendering.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        guidance_limit: int,
        enable_thinking: bool | None = None,
        single_turn: bool = False,
    ):
        check_rule("bridge", "guidance_limit", guidance_limit, guidance_limit >= 1, ">= 1")
        template = chat_template_of(tokenizer)
        check_rule(
            "bridge",
            "enable_thinking",
            enable_thinking,
            enable_thinking is None or "enable_thinking" in template,
            "none for a chat template without it",
            "leave it out",
        )
        self.tokenizer = tokenizer
        self.guidance_limit = guidance_limit
        self._template_kwargs: dict[str, Any] = (
            {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        )
        self._find_special()
        # The rendering is question, ANSWER, GUIDANCE, generation prompt. What stands behind ANSWER,
        # without GUIDANCE itself, is the bridge.
        _, answer, behind_answer = self._render_dialogue(dialogue(_PROMPT, ANSWER)).rpartition(
            ANSWER
        )
        self.before, guidance, self.after = behind_answer.partition(GUIDANCE)
        has_dialogues = bool(answer and guidance)
        if single_turn and not has_dialogues:
            self.before = tokenizer.eos_token or ""
            self.after = self.render(_PROMPT).rpartition("SocpoQuestion")[2]
        elif not has_dialogues:
            # If the template refuses the dialogue, this raises its own reason.
            rendered = self.render(dialogue(_PROMPT, ANSWER))
            raise ValueError(
                "bridge: the chat template must render an answer and the user's message behind it, "
                f"got {rendered[:200]!r}; use a template for several turns"
            )
        head_ids = self.trusted_ids(self._split(self.before)[0])
        tail_ids = self.trusted_ids(self._split(self.after, first=True)[1])
        if not head_ids or head_ids[0] not in self._special.values() or not tail_ids:
            raise ValueError(
                "bridge: the chat template must put a special token right behind an assistant's "
                "text and behind a "
                f"user's, got {self.before!r} and {self.after!r}; guidance could forge turns, use "
                "a newer model"
            )
        self._check_generation_prompt()
        self.end_of_turn_id = head_ids[0]
        self.end_of_turn = str(tokenizer.convert_ids_to_tokens(head_ids[0]))
        self.eos_ids = tuple(dict.fromkeys([self.end_of_turn_id, *configured_eos_ids(tokenizer)]))
        # Sentencepiece puts a space before the first word of a text. Inside a row no text is the
        # first, so untrusted_ids encodes it behind an anchor and drops the anchor's ids.
        is_same_anywhere = self.trusted_ids(f"{self.end_of_turn}x")[1:] == self.trusted_ids("x")
        self._anchor = "" if is_same_anywhere else "\n"
        self._check_special()
        self.notes = self._check_rendering() if has_dialogues else ()
        if "strftime_now" in template:
            self.notes += (
                "the chat template writes today's date into prompts; resumed on another day they "
                "differ",
            )

    def prompt_ids(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Returns the ids of a dialogue up to where the assistant's text begins.

        There is a BOS only if the template writes one.

        Raises:
            ValueError: the template refuses these roles.
        """
        return self.trusted_ids(self.render(messages))

    def untrusted_prompt_ids(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Returns prompt_ids of messages with untrusted texts.

        A special token that a text spells out stays ordinary text, so no text can forge a turn. If
        there is any, the template renders stand-ins, and the texts replace them between the special
        tokens of the rendering.
        """
        texts = {f"SocpoText{i}.": message["content"] for i, message in enumerate(messages)}
        if not any(special in text for special in self._special for text in texts.values()):
            return self.prompt_ids(messages)
        stand_ins = [{**m, "content": name} for m, name in zip(messages, texts, strict=True)]
        names, specials = ("|".join(map(re.escape, words)) for words in (texts, self._special))
        ids: list[int] = []
        # The group keeps the separators, so the parts are special tokens and the text between them.
        for part in re.split(f"({specials})", self.render(stand_ins)):
            if part in self._special:
                ids.append(self._special[part])
            else:
                ids += self.untrusted_ids(re.sub(names, lambda match: texts[match[0]], part))
        return ids

    def bridge_ids(self, guidance_text: str, *, ended: bool) -> list[int]:
        """Returns the ids between an attempt and the next one.

        They are the end of turn, the guidance as a user message, and the generation prompt.

        Args:
            guidance_text: untrusted; a special token spelled out in it stays ordinary text. White
                           space around it is dropped, as templates that trim would do.
            ended:         whether the last token kept of the attempt is end_of_turn_id; if not,
                           the bridge begins with a synthetic one.
        """
        return self.frame(self.before, self.fit(guidance_text.strip()), self.after)[
            1 if ended else 0 :
        ]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Returns the text for the grader and the teacher, without special tokens."""
        # skip_special_tokens does not skip turn marks that the tokenizer does not call special.
        ids = [token_id for token_id in token_ids if token_id not in self._mark_ids]
        return str(
            self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )

    def exact_text(self, token_ids: Sequence[int]) -> str:
        """Returns the text of these ids in the middle of a row, special tokens included.

        They are decoded behind an end of turn, since a decoder drops the space before the first
        word of a text.
        """
        text = self.tokenizer.decode(
            [self.end_of_turn_id, *token_ids], clean_up_tokenization_spaces=False
        )
        return str(text).removeprefix(self.end_of_turn)

    def render(
        self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool = True
    ) -> str:
        """Returns the template's text of a dialogue, up to where the assistant's text begins."""
        from jinja2 import TemplateError

        try:
            text = str(
                self.tokenizer.apply_chat_template(
                    list(messages),
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    **self._template_kwargs,
                )
            )
        # TemplateError: the template refuses the messages. The others: a fault in the template.
        except (TemplateError, TypeError, LookupError) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise TemplateRefuses(
                f"chat template: must take messages of the roles {roles}, got '{error}'; "
                "change the roles in the data, or the template"
            ) from error
        most = _TEMPLATE_CHARACTERS + 16 * sum(len(message["content"]) for message in messages)
        check_rule(
            "chat template",
            "the rendering",
            f"{len(text)} characters",
            len(text) <= most,
            f"at most {most} characters for these messages",
            "use the template of the model's publisher",
        )
        return text

    def frame(self, before: str, guidance: str, after: str) -> list[int]:
        """Returns the ids of unchanged guidance between two texts of the template."""
        (head, prefix), (suffix, tail) = self._split(before), self._split(after, first=True)
        # before = head + prefix, after = suffix + tail. Ordinary text of the template beside the
        # guidance ("user\n") is encoded with it as one span, as in the template's own rendering.
        return (
            self.trusted_ids(head)
            + self.untrusted_ids(prefix + guidance + suffix)
            + self.trusted_ids(tail)
        )

    def trusted_ids(self, text: str) -> list[int]:
        """Returns the ids of a text of the template, whose special tokens become special ids."""
        with _encoding:
            return self.tokenizer.encode(text, add_special_tokens=False)

    def untrusted_ids(self, text: str) -> list[int]:
        """Returns the ids of a text inside a row; a special token spelled out stays ordinary."""
        with _encoding:
            ids = self._untrusted.encode(
                self._anchor + text, add_special_tokens=False, split_special_tokens=True
            )
        return ids[len(self.trusted_ids(self._anchor)) :] if text else []

    def _split(self, text: str, *, first: bool = False) -> tuple[str, str]:
        """Splits a template's text behind its last special token, or before its first one."""
        if first:
            position = min(
                (text.find(special) for special in self._special if special in text),
                default=len(text),
            )
        else:
            position = max(
                (
                    text.rfind(special) + len(special)
                    for special in self._special
                    if special in text
                ),
                default=0,
            )
        return text[:position], text[position:]

    def fit(self, text: str) -> str:
        """Returns the beginning of a text, at most guidance_limit tokens long."""
        # A megabyte takes long to encode, so cut by characters first: few tokens have 32 or more.
        text = text[: 32 * self.guidance_limit].rstrip()
        options = {
            "add_special_tokens": False,
            "split_special_tokens": True,
            "return_offsets_mapping": True,
        }
        # A loop, since the beginning of a text may take more tokens by itself than within the text.
        while True:
            with _encoding:
                offsets = self._untrusted(text, verbose=False, **options)["offset_mapping"]
            if len(offsets) <= self.guidance_limit:
                return text
            text = text[: offsets[self.guidance_limit][0]].rstrip()

    def _find_special(self) -> None:
        """Sets the special tokens, and the tokenizer to which all of them are special."""
        with_answers = (
            self._render_dialogue(dialogue(prompt, ANSWER, ANSWER))
            for prompt in (_PROMPT, _WITH_SYSTEM)
        )
        # Without the last generation prompt, which may open thoughts: they are no turns.
        turns = "".join(text.rpartition(ANSWER)[0] or text for text in with_answers)
        turns += self.render(_PROMPT, add_generation_prompt=False)
        self._special, self._mark_ids = find_special(self.tokenizer, turns)
        # split_special_tokens splits only what a tokenizer calls special.
        self._untrusted = (
            with_special_ids(self.tokenizer, self._mark_ids) if self._mark_ids else self.tokenizer
        )

    def _render_dialogue(self, messages: Sequence[dict[str, str]]) -> str:
        """Returns render(messages), or nothing if the template refuses them."""
        try:
            return self.render(messages)
        except TemplateRefuses:
            return ""

    def _check_generation_prompt(self) -> None:
        """Refuses a template with which a student would have to write the assistant's header."""
        for messages in (_PROMPT, dialogue(_PROMPT, ANSWER)):
            prompt = self._render_dialogue(messages)
            rendered = self._render_dialogue(dialogue(messages, ANSWER))
            header = rendered.removeprefix(prompt).partition(ANSWER)[0].strip()
            if (
                rendered.startswith(prompt)
                and header
                and self.render(messages, add_generation_prompt=False) == prompt
            ):
                raise ValueError(
                    "bridge: the chat template must write the assistant's header when "
                    f"add_generation_prompt is true, got prompts without {header!r}; add it to the "
                    "template"
                )

    def _check_special(self) -> None:
        """Refuses a tokenizer to which a special token in guidance is one."""
        ids = set(self._special.values()) - {self.tokenizer.unk_token_id}
        spelled_out = set(self.untrusted_ids("".join(self._special))) & ids
        if spelled_out:
            raise ValueError(
                "bridge: special tokens spelled out in guidance must stay ordinary text, got ids "
                f"{sorted(spelled_out)}; this tokenizer does not honour split_special_tokens"
            )
        # Questions with system messages are refused when they are rendered.
        prompt = self._render_dialogue(_WITH_SYSTEM)
        self.takes_system = all(m["content"] in prompt for m in _WITH_SYSTEM)

    def _check_rendering(self) -> tuple[str, ...]:
        """Compares the pieces with the template's rendering, id by id; returns `notes`."""
        notes = []
        bridge_ids = self.frame(self.before, GUIDANCE, self.after)
        for kind, answer in _PROBES.items():
            rendered_ids = self.prompt_ids(dialogue(_PROMPT, answer))
            if rendered_ids[-len(bridge_ids) :] != bridge_ids:
                raise ValueError(
                    f"bridge: the pieces must be the chat template's own rendering behind {kind}, "
                    f"got {bridge_ids} "
                    f"where the template has {rendered_ids[-len(bridge_ids) :]}"
                )
            prompt = self.render(_PROMPT)
            rendered = self.render(dialogue(_PROMPT, answer))
            # With sentencepiece the space after the prompt is sampled, as a part of the answer.
            if not rendered.startswith((prompt + answer, f"{prompt} {answer}")):
                notes.append(_NOTE.format(kind))
        # Mistral puts the system message into the last user message, wherever that is.
        rendered = self._render_dialogue(dialogue(_WITH_SYSTEM, ANSWER))
        if rendered and not rendered.startswith(self.render(_WITH_SYSTEM)):
            notes.append(_NOTE.format("a prompt with a system message"))
        return tuple(notes)


def dialogue(messages: Sequence[dict[str, str]], *answers: str) -> list[dict[str, str]]:
    """Returns the messages, then each answer with a user message GUIDANCE behind it."""
    turns = [
        ({"role": "assistant", "content": answer}, {"role": "user", "content": GUIDANCE})
        for answer in answers
    ]
    return [*messages, *(message for messages_of_turn in turns for message in messages_of_turn)]
