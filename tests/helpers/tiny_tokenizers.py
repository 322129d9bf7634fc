"""Builds small tokenizers with the chat templates of the supported families, in memory.

family() has the special tokens and the real layout of a family (templates/README.md).
tiny_tokenizer() takes a template of its own, short enough to read beside a test.
"""

from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEMPLATES = Path(__file__).parent / "templates"
CORPUS = [
    "the student adds two numbers and checks every step of the sum",
    "user system assistant SocpoGuidance think",
]

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN3 = (  # history loses its <think> block
    "{% for message in messages %}{% set content = message['content'] %}"
    "{% if message['role'] == 'assistant' and '</think>' in content %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THINKING = QWEN3.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")
LLAMA3 = (  # trims; BOS is the template's
    "{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | "
    "trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ "
    "'<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
R1_DISTILL = (  # its turn marks are added tokens that are not special
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ '<|Assistant|>' + message['content'].split('</think>')[-1] + '<|eos|>' }}"
    "{% else %}{{ '<|User|>' if message['role'] == 'user' }}{{ message['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
SINGLE_TURN = (
    "{% if messages | length > 1 %}{{ raise_exception('one message only') }}{% endif %}"
    "{{ '<|im_start|>user\n' + messages[0]['content'] + '<|im_end|>\n' }}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WITHOUT_SPECIAL = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + "
    "'\n' }}{% endfor %}"
)

_SPECIAL = {
    CHATML: ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    LLAMA3: [
        "<|begin_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "<|end_of_text|>",
    ],
}
_MISTRAL = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
# The special tokens of each family, and the roles of some of them.
FAMILIES: dict[str, tuple[list[str], dict[str, str]]] = {
    "smollm2": (
        _SPECIAL[CHATML],
        {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"},
    ),
    "qwen2_5": (_SPECIAL[CHATML], {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}),
    "qwen3": (_SPECIAL[CHATML], {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}),
    "llama3": (
        _SPECIAL[LLAMA3],
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
    ),
    "mistral_nemo": (_MISTRAL, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
    "mistral_v3": (_MISTRAL, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
}


def family(name: str) -> PreTrainedTokenizerFast:
    """Returns the tokenizer of a family in small, with its template and special tokens.

    mistral_v3 is a sentencepiece tokenizer, the others are byte-level.
    """
    special, roles = FAMILIES[name]
    tokenizer = _sentencepiece(special) if name == "mistral_v3" else _byte_level(special)
    template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **roles)


def tiny_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """Returns a byte-level tokenizer with the bos and eos of the template's family."""
    special = _SPECIAL.get(template or "", _SPECIAL[CHATML])
    return PreTrainedTokenizerFast(
        tokenizer_object=_byte_level(special),
        bos_token=special[0] if template == LLAMA3 else None,
        eos_token=special[0] if template != LLAMA3 else special[-1],
        chat_template=template,
    )


def marked_tokenizer(
    template: str, special: list[str], marks: list[str], **roles: str
) -> PreTrainedTokenizerFast:
    """Returns a byte-level tokenizer whose `marks` are added tokens that are not special."""
    tokenizer = _byte_level(special)
    tokenizer.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in marks])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **roles)


def r1_distill() -> PreTrainedTokenizerFast:
    """Returns a tokenizer in the way of DeepSeek-R1-Distill."""
    special = ["<|bos|>", "<|eos|>"]
    return marked_tokenizer(
        R1_DISTILL,
        special,
        ["<|User|>", "<|Assistant|>"],
        bos_token=special[0],
        eos_token=special[1],
    )


def _byte_level(special: list[str]) -> Tokenizer:
    """Returns a byte-level BPE that splits words as GPT-2 does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|\s*[\r\n]+|\s+(?!\S)|\s+|."), "isolated"
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        special_tokens=special,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(
        [AddedToken("<think>", special=False), AddedToken("</think>", special=False)]
    )
    return tokenizer


def _sentencepiece(special: list[str]) -> Tokenizer:
    """Returns a tokenizer with the habits of sentencepiece.

    A space before the first word, byte fallback, and merges that build words from the left.
    """
    pieces = [
        *special,
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "\u2581",
        *map(chr, range(33, 127)),
    ]
    merges = []
    for word in " ".join(CORPUS).split():
        for end in range(len(word)):
            left = "\u2581" + word[:end]
            right = word[end]
            if left + right not in pieces:
                merges.append((left, right))
                pieces.append(left + right)
    vocab = {piece: idx for idx, piece in enumerate(pieces)}
    model = models.BPE(
        vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement="\u2581", prepend_scheme="first", split=False
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in special]
    )
    return tokenizer
