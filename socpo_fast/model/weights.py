"""Loads a Decoder from an ordinary Hugging Face folder, and saves it as one.

Read top-down: load_student -> its checks, save_student -> its shards. hf_views.py has the names.
Hugging Face has separate tensors where the decoder has a fused parameter:

    q_proj, k_proj, v_proj    -> attention.qkv     rows of q, then of k, then of v
    gate_proj, up_proj        -> mlp.gate_up       rows of gate, then of up

Tensors are streamed. Loading copies each stored tensor into a slice of its fused parameter; saving
writes such slices. Only safetensors are read, never pickle.
"""

import json
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from socpo_fast.files import new_folder, read_json, sync
from socpo_fast.model.config import ModelConfig
from socpo_fast.model.decoder import Decoder
from socpo_fast.model.hf_views import hf_views
from socpo_fast.ops._checks import check_rule, check_word

SHARD_BYTES = 5 * 10**9
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# As safetensors names them. Any other dtype is of a quantised or foreign format.
STORED_DTYPES = ("F64", "F32", "BF16", "F16")
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth")
_IS_ADAPTER = (
    "{folder}: must hold a whole model, got an adapter; merge it into its base model first (peft: "
    "merge_and_unload, then save_pretrained)"
)
# What trainers save beside weights: optimizer, random state, arguments, shards of many processes.
TRAINER_STATE = (
    "optimizer*",
    "scheduler.pt",
    "scaler.pt",
    "rng_state*",
    "trainer_state.json",
    "training_args.bin",
    "extra_state_*",
    "global_step*",
    "*_world_size_*",
    "pytorch_model_fsdp*",
    "*_states.pt",
)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
)


def load_student(
    folder: str | Path, *, dtype: str = "float32", device: str | torch.device = "cpu"
) -> Decoder:
    """Returns the decoder of a Hugging Face folder, ready for training or rollout.

    Args:
        folder: holds config.json and model.safetensors, or shards with
                model.safetensors.index.json.
        dtype:  "float32", "bfloat16" or "float16", of the parameters; the stored dtype may differ.
        device: where the parameters go.

    Raises:
        ValueError: folder, config or a tensor is missing, extra, misshapen or of a kind that this
            decoder does not have; or the folder holds an adapter, or a trainer's files without a
            model. One line naming file and tensor.

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
    check_is_model(folder)
    config = ModelConfig.from_hf(
        read_json(folder / "config.json"), where=str(folder / "config.json")
    )
    # On the meta device parameters have a shape only: no memory, no random initialisation.
    with torch.device("meta"):
        student = Decoder(config).to(DTYPES[dtype])
    with ExitStack() as stack:
        stored = _open_tensors(folder, stack)
        # Before any memory is allocated for the parameters.
        _check_tensors(folder, student, stored)
        student.to_empty(device=device)
        # to_empty makes two tensors of a tied weight, so it is tied again.
        if config.tie_word_embeddings:
            student.lm_head.weight = student.embed.weight
        for hf_name, view in hf_views(student):
            view.copy_(stored[hf_name].get_tensor(hf_name))
            # After the cast: a finite fp32 value may overflow in float16.
            if not view.isfinite().all():
                raise ValueError(
                    f"{folder}: tensor {hf_name} must be finite in {dtype}, got NaN or infinity",
                )
    return student


def save_student(
    student: Decoder, folder: str | Path, *, tokenizer_from: str | Path | None = None
) -> None:
    """Writes a Hugging Face folder that transformers' `from_pretrained` and `load_student` read.

    Args:
        student:        its config must come from ModelConfig.from_hf. That config.json is written
                        back, with the parameters' dtype.
        folder:         new or empty. It appears complete or not at all: the files are written to
                        a folder beside it, synced to disk, then renamed.
        tokenizer_from: a folder whose tokenizer, chat template and generation_config files are
                        copied along.

    Raises:
        ValueError: folder is not empty, tokenizer_from has no tokenizer, or the config is not from
                    from_hf.

    Memory: on a CPU none beyond the parameters, on a GPU a CPU copy of one shard (SHARD_BYTES).
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
        for name, file in tokenizer_files.items():
            (partial / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, partial / name)
            sync(partial / name)


def check_is_model(folder: Path) -> None:
    """Refuses a folder that training tools write beside or instead of a model, by its kind."""
    # transformers, too, takes a folder with this file for an adapter, whatever else is in it.
    if (folder / "adapter_config.json").exists() or any(folder.glob("adapter_model.*")):
        raise ValueError(_IS_ADAPTER.format(folder=folder))
    if (folder / "config.json").exists() and _has_weights(folder):
        return
    inner = [
        path.parent
        for pattern in ("*/config.json", "*/*/config.json")
        for path in folder.glob(pattern)
        if _has_weights(path.parent)
    ]
    if inner:
        # checkpoint-1000 is newer than checkpoint-500.
        newest = max(inner, key=lambda path: (len(path.name), path.name))
        raise ValueError(
            f"{folder}: must hold a model itself, got {len(inner)} folders with one inside; "
            f"give one of them, such as {newest}"
        )
    if not _has_weights(folder) and any(any(folder.glob(pattern)) for pattern in TRAINER_STATE):
        raise ValueError(
            f"{folder}: must hold a model, got only the state of a trainer; save the model with "
            "save_pretrained, or merge its shards with the trainer's own tool (verl: "
            "model_merger, DeepSpeed: zero_to_fp32.py)"
        )


def _has_weights(folder: Path) -> bool:
    """Whether a folder has the weights of a model, in safetensors or not."""
    files = [folder / SINGLE, folder / INDEX, *folder.glob("pytorch_model*.bin")]
    return any(file.is_file() for file in files)


def _open_tensors(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """Returns {tensor name: the open file that holds it}.

    The names come from the files themselves. The index only says which files there are.
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
            # Old Llama files store the rotary frequencies. They follow from config.json, and
            # transformers skips them as well.
            if not name.endswith(".rotary_emb.inv_freq"):
                stored[name] = handle
    return stored


def _check_tensors(folder: Path, student: Decoder, stored: dict[str, Any]) -> None:
    """Checks that the stored tensors are exactly those of the decoder, each in its shape.

    An LM head that is stored although embeddings are tied must equal them. transformers would
    silently untie the two.
    """
    expected = {hf_name: list(view.shape) for hf_name, view in hf_views(student)}
    has_tied_head = student.config.tie_word_embeddings and "lm_head.weight" in stored
    if has_tied_head:
        expected["lm_head.weight"] = expected["model.embed_tokens.weight"]
    missing = sorted(expected.keys() - stored.keys())
    extra = sorted(stored.keys() - expected.keys())
    if any(".lora_" in name for name in extra):
        raise ValueError(_IS_ADAPTER.format(folder=folder))
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
        header = stored[name].get_slice(name)  # shape and dtype, without reading the values
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
        embed_VD, lm_head_VD = (
            stored[name].get_tensor(name)
            for name in ("model.embed_tokens.weight", "lm_head.weight")
        )
        if not torch.equal(lm_head_VD.to(embed_VD.dtype), embed_VD):
            raise ValueError(
                f"{folder}: tensor lm_head.weight must equal model.embed_tokens.weight under "
                "tie_word_embeddings, got "
                "another matrix; set tie_word_embeddings to false in config.json"
            )


def _raw_config(student: Decoder) -> tuple[dict[str, Any], torch.dtype]:
    """Returns the config.json to write back, without a dtype, and the parameters' dtype."""
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
    raw.pop("torch_dtype", None)  # the older name of dtype, which would contradict the new one
    return raw, dtypes.pop()


def _tokenizer_files(tokenizer_from: str | Path | None) -> dict[str, Path]:
    """Returns the tokenizer's files that the folder has, by their names in the folder."""
    if tokenizer_from is None:
        return {}
    source = Path(tokenizer_from).expanduser()
    files = {
        str(file.relative_to(source)): file
        for pattern in TOKENIZER_FILES
        for file in sorted(source.glob(pattern))
        if file.is_file()
    }
    if not any(name.startswith("tokenizer") for name in files):
        raise ValueError(f"save_student: tokenizer_from must hold tokenizer files, got '{source}'")
    return files


def _write_shards(student: Decoder, folder: Path) -> None:
    """Writes model.safetensors, or shards of at most SHARD_BYTES and their index.

    A larger tensor gets a shard for itself. A tied LM head is left out, as in transformers.
    """
    views = dict(hf_views(student))
    plan = split_state_dict_into_shards_factory(
        views,
        get_storage_size=lambda view: view.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=SHARD_BYTES,
    )
    # One shard at a time: on a GPU only that one has a copy on the CPU.
    for file, hf_names in plan.filename_to_tensors.items():
        save_file(
            {name: views[name].cpu() for name in hf_names}, folder / file, metadata={"format": "pt"}
        )
    if plan.is_sharded:
        _write_json(
            folder / INDEX, {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes JSON with sorted keys, so that equal contents give equal files."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
