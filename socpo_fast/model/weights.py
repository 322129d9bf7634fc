"""Weights in and out: ordinary Hugging Face folders to and from a Decoder.

Read top-down: load_student -> its checks, save_student -> its shards, then the table of names that
both share. Tensors are streamed: loading copies each into its place in a fused parameter (q, k, v
stacked into qkv; gate, up into gate_up), saving writes slices of the fused ones. Only safetensors
are read, never pickle.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from socpo_fast.files import new_folder, read_json
from socpo_fast.model.config import ModelConfig
from socpo_fast.model.decoder import Decoder
from socpo_fast.ops._checks import check_rule, check_word

SHARD_BYTES = 5 * 10**9
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STORED_DTYPES = (
    "F64",
    "F32",
    "BF16",
    "F16",
)  # safetensors' names; anything else is a quantised or foreign format
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth")
TOKENIZER_FILES = (
    *(
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
    ),
    *(
        "vocab.json",
        "merges.txt",
        "chat_template.jinja",
        "chat_template.json",
        "generation_config.json",
    ),
)


def load_student(
    folder: str | Path, *, dtype: str = "float32", device: str | torch.device = "cpu"
) -> Decoder:
    """The decoder in a Hugging Face folder, ready for training or rollout.

    Args:
        folder: holds config.json and model.safetensors, or shards with
                model.safetensors.index.json.
        dtype:  "float32", "bfloat16" or "float16", of the parameters; the stored dtype may be
                another.
        device: where the parameters go.

    Raises:
        ValueError: folder, config or a tensor is missing, extra, misshapen or of a kind that this
            decoder does not have; one line naming file and tensor.

    Memory: the parameters, and one stored tensor at a time.
    """
    folder = Path(folder).expanduser()
    check_word("load_student", "dtype", dtype, tuple(DTYPES))
    check_rule(
        "load_student",
        "folder",
        str(folder),
        folder.is_dir(),
        "a local Hugging Face folder",
        "download it first",
    )
    config = ModelConfig.from_hf(
        read_json(folder / "config.json"), where=str(folder / "config.json")
    )
    with torch.device("meta"):  # shapes only: no storage, no random initialisation
        student = Decoder(config).to(DTYPES[dtype])
    with ExitStack() as stack:
        stored = _open_tensors(folder, stack)
        _check_tensors(folder, student, stored)
        student.to_empty(device=device)
        if config.tie_word_embeddings:  # to_empty made two of the one
            student.lm_head.weight = student.embed.weight
        for part, view in _views(student):
            view.copy_(stored[part].get_tensor(part))
            if not view.isfinite().all():
                raise ValueError(
                    f"{folder}: tensor {part} must be finite in {dtype}, got NaN or infinity",
                )
    return student


def save_student(
    student: Decoder, folder: str | Path, *, tokenizer_from: str | Path | None = None
) -> None:
    """Write a Hugging Face folder that transformers' `from_pretrained` and `load_student` read.

    Args:
        student:        its config must come from ModelConfig.from_hf; that config.json is written,
                        with this dtype.
        folder:         new, or empty; appears whole or not at all (written beside it, synced to
                        disk, renamed).
        tokenizer_from: a folder whose tokenizer, chat template and generation_config files are
                        copied along.

    Raises:
        ValueError: folder holds something, tokenizer_from holds no tokenizer, or the config is not
                    from_hf's.

    Memory: on a CPU none beyond the parameters, else one shard (SHARD_BYTES).
    """
    folder = Path(folder).expanduser().resolve()
    check_rule(
        "save_student",
        "folder",
        str(folder),
        not folder.exists() or (folder.is_dir() and not any(folder.iterdir())),
        "new or empty",
        "choose another or remove it",
    )
    raw, dtype = _raw_config(student)
    tokenizer_files = _tokenizer_files(tokenizer_from)
    with new_folder(folder) as partial:
        _write_json(partial / "config.json", raw | {"dtype": str(dtype).removeprefix("torch.")})
        _write_shards(student, partial)
        for file in tokenizer_files:
            shutil.copyfile(file, partial / file.name)


def _open_tensors(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """Tensor name -> the open file that holds it; the files themselves are the authority, not the
    index.
    """
    if (folder / SINGLE).exists():
        files = [folder / SINGLE]
    elif (folder / INDEX).exists():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            Path(str(file)).name == file for file in weight_map.values()
        ):
            raise ValueError(
                f"{folder / INDEX}: weight_map must map tensor names to file names of this folder"
            )
        files = [folder / file for file in sorted(set(weight_map.values()))]
    elif any(any(folder.glob(pattern)) for pattern in PICKLES):
        raise ValueError(
            f"{folder}: weights must be safetensors, got pickle files; convert them with "
            "save_pretrained"
        )
    else:
        raise ValueError(f"{folder}: {SINGLE} is missing, and so is {INDEX}")
    stored: dict[str, Any] = {}
    for file in files:
        if not file.exists():
            raise ValueError(f"{file}: is missing, but {INDEX} names it; download it again")
        try:
            handle = stack.enter_context(safe_open(file, framework="pt", device="cpu"))
        except SafetensorError as error:
            raise ValueError(
                f"{file}: must be a safetensors file, got {error}; download it again"
            ) from error
        for name in handle.keys():  # noqa: SIM118 - safe_open is no mapping, it cannot be iterated
            if name in stored:
                raise ValueError(f"{file}: {name} must be stored once, got it in a second file")
            # Old Llama files carry the rotary table; config.json says the same, and transformers
            # skips it as well.
            if not name.endswith(".rotary_emb.inv_freq"):
                stored[name] = handle
    return stored


def _check_tensors(folder: Path, student: Decoder, stored: dict[str, Any]) -> None:
    """Every tensor that the decoder has is stored, in its shape; nothing else is.

    A head stored beside tied embeddings must equal them; transformers would silently untie the two.
    """
    expected = {part: list(view.shape) for part, view in _views(student)}
    has_tied_head = student.config.tie_word_embeddings and "lm_head.weight" in stored
    if has_tied_head:
        expected["lm_head.weight"] = expected["model.embed_tokens.weight"]
    missing = sorted(expected.keys() - stored.keys())
    extra = sorted(stored.keys() - expected.keys())
    if missing:
        raise ValueError(
            f"{folder}: tensor {missing[0]} is missing ({len(missing)} in all); config.json asks "
            "for it"
        )
    if extra:
        raise ValueError(
            f"{folder}: tensor {extra[0]} is extra ({len(extra)} in all); config.json names no "
            "such one"
        )
    for name, shape in expected.items():
        header = stored[name].get_slice(name)
        if header.get_shape() != shape:
            raise ValueError(
                f"{folder}: tensor {name} must be {shape} by config.json, got {header.get_shape()}"
            )
        if header.get_dtype() not in STORED_DTYPES:
            raise ValueError(
                f"{folder}: tensor {name} must be of {'|'.join(STORED_DTYPES)}, got "
                f"{header.get_dtype()}"
            )
    if has_tied_head:
        embed_VD, head_VD = (
            stored[name].get_tensor(name)
            for name in ("model.embed_tokens.weight", "lm_head.weight")
        )
        if not torch.equal(head_VD.to(embed_VD.dtype), embed_VD):
            raise ValueError(
                f"{folder}: tensor lm_head.weight must equal model.embed_tokens.weight under "
                "tie_word_embeddings, got "
                "another matrix; set tie_word_embeddings to false in config.json"
            )


def _raw_config(student: Decoder) -> tuple[dict[str, Any], torch.dtype]:
    """The config.json to write back, without a dtype, and the parameters' dtype."""
    raw = dict(student.config.raw)
    if (
        not raw
        or ModelConfig.from_hf(raw, where="save_student: student.config.raw") != student.config
    ):
        raise ValueError(
            "save_student: student.config must agree with its .raw; build it with "
            "ModelConfig.from_hf"
        )
    dtypes = {parameter.dtype for parameter in student.parameters()}
    if len(dtypes) != 1:
        raise ValueError(
            f"save_student: parameters must share one dtype, got {sorted(map(str, dtypes))}"
        )
    raw.pop("torch_dtype", None)  # the older name of dtype
    return raw, dtypes.pop()


def _tokenizer_files(tokenizer_from: str | Path | None) -> list[Path]:
    if tokenizer_from is None:
        return []
    source = Path(tokenizer_from).expanduser()
    files = [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
    if not any(file.name.startswith("tokenizer") for file in files):
        raise ValueError(f"save_student: tokenizer_from must hold tokenizer files, got '{source}'")
    return files


def _write_shards(student: Decoder, folder: Path) -> None:
    """model.safetensors, or shards of at most SHARD_BYTES (a larger tensor gets its own) and their
    index.

    A tied head is left out, as transformers does.
    """
    views = dict(_views(student))
    plan = split_state_dict_into_shards_factory(
        views,
        get_storage_size=lambda view: view.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=SHARD_BYTES,
    )
    for file, parts in plan.filename_to_tensors.items():
        save_file(
            {part: views[part].cpu() for part in parts}, folder / file, metadata={"format": "pt"}
        )
    if plan.is_sharded:
        _write_json(
            folder / INDEX, {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        )


_MODULES = {  # ours, below a layer or at the top -> Hugging Face's, in stacking order
    "embed": ("model.embed_tokens",),
    "norm": ("model.norm",),
    "lm_head": ("lm_head",),
    "attention_norm": ("input_layernorm",),
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.o": ("self_attn.o_proj",),
    "attention.q_norm": ("self_attn.q_norm",),
    "attention.k_norm": ("self_attn.k_norm",),
    "mlp_norm": ("post_attention_layernorm",),
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down": ("mlp.down_proj",),
}


def _views(student: Decoder) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face tensor, the rows of our parameter that are it), for example of
    layers.3.attention.qkv.weight.
    """
    config = student.config
    for name, parameter in student.named_parameters():
        module, _, leaf = name.rpartition(".")
        prefix = ""
        if module.startswith("layers."):
            _, layer, module = module.split(".", maxsplit=2)
            prefix = f"model.layers.{layer}."
        shares = [1] * len(_MODULES[module])
        if module == "attention.qkv":
            shares = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
        unit = parameter.shape[0] // sum(shares)
        views = parameter.detach().split([share * unit for share in shares])
        for theirs, view in zip(_MODULES[module], views, strict=True):
            yield f"{prefix}{theirs}.{leaf}", view


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
