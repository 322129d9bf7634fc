"""Builds the built-in student's tokenizer: one token a character, one for each phrase of the task.

Phrases are the fixed texts that occur in every question and answer. With them a question has about
20 tokens and an attempt about 55, which keeps runs short. Text outside ASCII becomes <unk>.
"""

from __future__ import annotations

import re
import string

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from socpo_fast.socratic.tasks import molar_mass
from socpo_fast.socratic.teachers.calls import RETRY_TEXT

PAD = "<|endoftext|>"
UNKNOWN = "<unk>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
MAX_LENGTH = 512
LEAK_TEXTS = ("The answer is ", ".")  # around the answer, in guidance that gives it away
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_PHRASES = (
    *("system\n", "user\n", "assistant\n"),
    *(molar_mass.SYSTEM_TEXT, *molar_mass.USER_TEXTS),
    *("<reasoning>\n", "</reasoning>\n<answer>\n", "\n</answer>", ": ", " x ", " = ", ", sum "),
    *(
        *molar_mass.LINE_TEXTS,
        *molar_mass.TERM_TEXTS.values(),
        molar_mass.MISSING_TEXTS[0],
        molar_mass.EXTRA_TEXTS[0],
    ),
    *(molar_mass.ANSWER_TEXT, molar_mass.FORMAT_TEXT, RETRY_TEXT, LEAK_TEXTS[0]),
    *(symbol for symbol in molar_mass.ATOMIC_MASSES if len(symbol) > 1),
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Builds a ChatML tokenizer. Special tokens come first, so pad is 0 and end-of-turn 3."""
    tokens = [PAD, UNKNOWN, TURN_START, TURN_END, "\n", *string.printable[:95], *_PHRASES]
    tokenizer = Tokenizer(
        models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=UNKNOWN)
    )
    # Where two phrases begin alike, the longer one must win: the pattern tries them in this order.
    longest_first = sorted(_PHRASES, key=len, reverse=True)
    pieces = "|".join([*(re.escape(phrase) for phrase in longest_first), r"[\s\S]"])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pieces), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=TURN_END,
        additional_special_tokens=[TURN_START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )
