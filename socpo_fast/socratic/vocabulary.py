"""Says which tokens are special, which end an attempt, and whether all fit the model.

And which chat template a tokenizer has.
"""

import json
import re
from collections.abc import Set
from functools import lru_cache
from pathlib import Path

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from socpo_fast.files import read_json
from socpo_fast.ops._checks import check_rule

# A longer template is not compiled: 300 MB would take a minute. Those in use have at most 50,000.
MAX_TEMPLATE_CHARS = 1_000_000


def chat_template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns a tokenizer's chat template; refuses a slow tokenizer, and one without a template."""
    if not tokenizer.is_fast:
        raise ValueError(f"bridge: tokenizer must be a fast one, got {type(tokenizer).__name__}")
    if not tokenizer.chat_template:
        raise ValueError(
            f"bridge: tokenizer must have a chat template, got none in '{tokenizer.name_or_path}'; "
            "use the instruct version of the model"
        )
    named = tokenizer.chat_template
    check_rule(
        "bridge",
        "the chat templates",
        ", ".join(named) if isinstance(named, dict) else "one",
        not isinstance(named, dict) or "default" in named,
        "one, or several with one named default",
        "save the one to be used as chat_template.jinja",
    )
    template = tokenizer.get_chat_template()
    check_rule(
        "bridge",
        "the chat template",
        f"{len(template)} characters",
        len(template) <= MAX_TEMPLATE_CHARS,
        f"at most {MAX_TEMPLATE_CHARS} characters long",
        "use the template of the model's publisher",
    )
    return template


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Refuses a tokenizer with ids beyond a model's embedding.

    All of its ids, since any text may contain any token: a question, a template, guidance.
    """
    last_token, last_id = _last_token(tokenizer, len(tokenizer))
    check_rule(
        f"tokenizer: '{tokenizer.name_or_path}'",
        f"the id of {last_token!r}",
        last_id,
        last_id < vocab_size,
        f"below the {vocab_size} rows of the model's embedding (vocab_size)",
        "take the tokenizer that the model was trained with, or enlarge the model with "
        "resize_token_embeddings",
    )


@lru_cache(maxsize=4)
def _last_token(tokenizer: PreTrainedTokenizerBase, _num_tokens: int) -> tuple[str, int]:
    """Returns the token with the largest id, and that id.

    Every call of socratic_rollouts asks, and 150,000 tokens take 0.3 s. The number of tokens is
    part of the key because tokens may be added.
    """
    return max(tokenizer.get_vocab().items(), key=lambda pair: pair[1])


def find_special(
    tokenizer: PreTrainedTokenizerBase, turns: str
) -> tuple[dict[str, int], frozenset[int]]:
    """Returns (text -> id of each special token, the ids of those that are marks).

    A mark is an added token that the tokenizer does not call special, but that stands in `turns`, a
    template's text around turns, and is a word between signs. Tokens for white space or words are
    ordinary text.
    """
    tokens = tokenizer.added_tokens_decoder
    mark_ids = frozenset(
        idx
        for idx, token in tokens.items()
        if not token.special
        and token.content in turns
        and re.fullmatch(r"\W.*\w.*\W", token.content)
    )
    special = [
        (token.content, idx) for idx, token in tokens.items() if token.special or idx in mark_ids
    ]
    # Longest first, so that the search for one never stops at a shorter one it begins with.
    return dict(sorted(special, key=lambda pair: -len(pair[0]))), mark_ids


def with_special_ids(tokenizer: PreTrainedTokenizerBase, ids: Set[int]) -> PreTrainedTokenizerFast:
    """Returns a copy of a fast tokenizer that calls the added tokens of these ids special."""
    fields = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in fields["added_tokens"]:
        token["special"] |= token["id"] in ids
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(fields)))


def configured_eos_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the tokenizer's eos id, then those of the generation_config.json in its folder."""
    path = Path(tokenizer.name_or_path) / "generation_config.json"
    configured = read_json(path).get("eos_token_id") if path.is_file() else None
    token_ids = configured if isinstance(configured, list) else [configured]
    check_rule(
        str(path),
        "eos_token_id",
        configured,
        configured is None or all(type(token_id) is int for token_id in token_ids),
        "an id, a list of ids or null",
    )
    return [token_id for token_id in (tokenizer.eos_token_id, *token_ids) if token_id is not None]
