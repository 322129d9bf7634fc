"""From messages to token ids, and from guidance to the ids that lead into the next attempt.

Read Bridge: __init__ takes the pieces from the tokenizer's own chat template, bridge_ids puts them together, _check
holds them against the template's rendering. What was sampled is never decoded and encoded again: a row is
prompt_ids + attempt + bridge + attempt + .., and every seam lies at a special token, so nothing merges across it.

Departure from the template: it may rewrite earlier turns (Qwen3 drops their <think> blocks, others trim white space).
The row keeps what was sampled; `Bridge.notes` says where the two differ.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_QUESTION, _ANSWER, _GUIDANCE = "SocpoQuestion", "SocpoAnswer", "SocpoGuidance"
_PROBES = {
    "a plain answer": _ANSWER,
    "an answer with a <think> block": f"<think>\nSocpoThought\n</think>\n\n{_ANSWER}",
    "an answer with white space around it": f"\n {_ANSWER} \n",
}


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a Hugging Face folder; no code of the folder is run.

    Raises:
        ValueError: the folder or its tokenizer files are missing or unreadable.
    """
    from transformers import AutoTokenizer

    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise ValueError(f"tokenizer: must be a Hugging Face folder on this machine, got '{folder}'; download it first")
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"tokenizer: {folder} must hold a tokenizer.json that transformers reads ({error})") from error


class Bridge:
    """The chat template of one tokenizer, taken apart into token ids.

    Args:
        tokenizer:      a fast tokenizer with a chat template.
        guidance_limit: tokens of guidance at most, >= 1; the head is kept.

    Attributes:
        end_of_turn_id: what the template puts right behind an assistant's text.
        eos_ids:        the ids that end an attempt: end_of_turn_id, the tokenizer's eos and those of the
                        generation_config.json beside the tokenizer.
        notes:          one sentence for each kind of answer that the template would render differently once it is
                        history; empty when the template only ever appends.

    Raises:
        ValueError: no chat template, a template whose turns do not end with a special token, or pieces that are not
            the template's own rendering.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, guidance_limit: int):
        if guidance_limit < 1:
            raise ValueError(f"bridge: guidance_limit must be >= 1, got {guidance_limit}")
        if not tokenizer.is_fast:
            raise ValueError(f"bridge: tokenizer must be a fast one, got {type(tokenizer).__name__}")
        if not tokenizer.chat_template:
            raise ValueError(
                f"bridge: tokenizer must have a chat template, got none in '{tokenizer.name_or_path}'; "
                "use the instruct version of the model"
            )
        self.tokenizer = tokenizer
        self.guidance_limit = guidance_limit
        special = {token.content: idx for idx, token in tokenizer.added_tokens_decoder.items() if token.special}
        _, _, behind_answer = self._render(_dialogue(_ANSWER)).rpartition(_ANSWER)
        before, _, after = behind_answer.partition(_GUIDANCE)
        head_end = max((before.rfind(text) + len(text) for text in special if text in before), default=0)
        tail_start = min((after.find(text) for text in special if text in after), default=len(after))
        # Ordinary text of the template beside the guidance ("user\n") is encoded with it, as one span.
        self._head_ids, self._prefix = self._encode(before[:head_end]), before[head_end:]
        self._suffix, self._tail_ids = after[:tail_start], self._encode(after[tail_start:])
        if not self._head_ids or self._head_ids[0] not in special.values() or not self._tail_ids:
            raise ValueError(
                "bridge: the chat template must put a special token right behind an assistant's text and behind a "
                f"user's, got {before!r} and {after!r}"
            )
        self.end_of_turn_id = self._head_ids[0]
        self.eos_ids = tuple(dict.fromkeys([self.end_of_turn_id, *_configured_eos_ids(tokenizer)]))
        self.notes = self._check(special)

    def prompt_ids(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """The ids of a dialogue up to where the assistant's text begins; a BOS only where the template has one."""
        token_ids = self.tokenizer.apply_chat_template(
            list(messages), tokenize=True, add_generation_prompt=True, return_dict=False
        )
        return cast(list[int], token_ids)

    def bridge_ids(self, guidance_text: str, *, ended: bool) -> list[int]:
        """What stands between an attempt and the next one: end of turn, guidance as a user message, generation prompt.

        guidance_text is untrusted: a special token spelled out in it stays ordinary text. White space around it is
        dropped, which templates that trim would do as well. ended: the attempt's last kept token is end_of_turn_id
        itself; otherwise a synthetic one comes first.
        """
        return self._frame(self.fit(guidance_text.strip()))[1 if ended else 0 :]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text for the grader and the teacher, without special tokens."""
        text = self.tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return cast(str, text)

    def _render(self, messages: list[dict[str, str]]) -> str:
        return cast(str, self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def _encode(self, text: str, *, untrusted: bool = False) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=untrusted)

    def _frame(self, guidance: str) -> list[int]:
        """A bridge around guidance as it is."""
        span_ids = self._encode(self._prefix + guidance + self._suffix, untrusted=True)
        return self._head_ids + span_ids + self._tail_ids

    def fit(self, text: str) -> str:
        """The head of a text that is at most guidance_limit tokens long."""
        encoding = self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
        )
        if len(encoding["input_ids"]) <= self.guidance_limit:
            return text
        return text[: encoding["offset_mapping"][self.guidance_limit][0]].rstrip()

    def _check(self, special: dict[str, int]) -> tuple[str, ...]:
        """Compare the pieces with the template's own rendering, id by id; returns `notes`."""
        unknown_id = self.tokenizer.unk_token_id
        spelled_out = set(self._encode("".join(special), untrusted=True)) & set(special.values()) - {unknown_id}
        if spelled_out:
            raise ValueError(
                "bridge: special tokens spelled out in guidance must stay ordinary text, got ids "
                f"{sorted(spelled_out)}; this tokenizer does not honour split_special_tokens"
            )
        notes, bridge_ids = [], self._frame(_GUIDANCE)
        for what, answer in _PROBES.items():
            rendered_ids = self.prompt_ids(_dialogue(answer))
            if rendered_ids[-len(bridge_ids) :] != bridge_ids:
                raise ValueError(
                    f"bridge: the pieces must be the chat template's own rendering behind {what}, got {bridge_ids} "
                    f"where the template has {rendered_ids[-len(bridge_ids) :]}"
                )
            sampled_context = self._render(_dialogue(answer)[:1]) + answer
            if not self._render(_dialogue(answer)).startswith(sampled_context):
                notes.append(f"the chat template rewrites {what} once it is history; rows keep it as sampled")
        return tuple(notes)


def _dialogue(answer: str) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": _QUESTION},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": _GUIDANCE},
    ]


def _configured_eos_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokenizer's eos, then those of the generation_config.json in its folder, where there is one."""
    eos_ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    path = Path(tokenizer.name_or_path) / "generation_config.json"
    if path.is_file():
        configured = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        eos_ids += configured if isinstance(configured, list) else [] if configured is None else [configured]
    return eos_ids
