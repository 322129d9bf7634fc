"""Defines the contenders from other projects, with the settings that each chooses from.

Only the module with the function is loaded, since verl's package would import Ray and Liger's all
of its kernels. peers.txt says how to make the environment. TRL and Liger keep the height of a tile
in a module constant; the bench sets it, so that it is tuned as well.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from bench.policy_head.contenders import Contender, LogProbs, by_logprobs

DISTRIBUTIONS = {
    "TRL": "trl",
    "Liger": "liger-kernel",
    "verl": "verl",
    "cut-cross-entropy": "cut-cross-entropy",
}
NEED_A_CARD = ("cut-cross-entropy",)  # its kernels are Triton's
# (rows, columns) of a tile of logits, or its rows; the peer's own default comes first.
TRL_TILES = ((4096, 32768), (4096, 2048), (512, 2048), (512, 8192))
LIGER_TILES = ((2048, 4096), (2048, 1024), (512, 1024), (512, 4096))
VERL_ROWS = (512, 2048, 128)
# Larger ones, for cards only.
CARD_TILES = ((8192, 32768),)
CARD_VERL_ROWS = (8192,)


def peer_contenders(device: torch.device) -> tuple[list[list[Contender]], dict[str, str]]:
    """Returns the settings of each peer that can run here, and the reason for each that cannot.

    The first setting is the peer's own default.
    """
    choices = []
    skipped = {}
    for name in DISTRIBUTIONS:
        if name in NEED_A_CARD and device.type != "cuda":
            skipped[name] = "it runs on a card only"
            continue
        try:
            choices.append(_settings(name, is_card=device.type == "cuda"))
        except Exception as error:  # noqa: BLE001 - of any kind: the import is another project's
            skipped[name] = " ".join(f"{type(error).__name__}: {error}".split())
    return choices, skipped


def peer_versions() -> dict[str, str]:
    """Returns the versions of the installed peers."""
    versions = {}
    for name, distribution in DISTRIBUTIONS.items():
        if any(importlib.metadata.distributions(name=distribution)):
            versions[name] = importlib.metadata.version(distribution)
    return versions


# Makers of each peer's log-probs at its own defaults. Lambdas, as the call imports the peer.
PEER_LOGPROBS: dict[str, Callable[[], LogProbs]] = {
    "TRL": lambda: _trl(*TRL_TILES[0]),
    "Liger": lambda: _liger(*LIGER_TILES[0]),
    "verl": lambda: _verl(VERL_ROWS[0]),
    "cut-cross-entropy": lambda: _cut_cross_entropy(),
}


def _settings(name: str, *, is_card: bool) -> list[Contender]:
    if name == "cut-cross-entropy":
        return [Contender(name, "", by_logprobs(_cut_cross_entropy()), 0)]
    if name == "verl":
        return [
            Contender(name, f"chunk {rows}", by_logprobs(_verl(rows)), 2 * rows)
            for rows in VERL_ROWS + CARD_VERL_ROWS * is_card
        ]
    make_logprobs, tiles = (_trl, TRL_TILES) if name == "TRL" else (_liger, LIGER_TILES)
    return [
        Contender(
            name,
            f"tile {rows} x {columns}",
            by_logprobs(make_logprobs(rows, columns)),
            _rows_alive(rows, columns),
        )
        for rows, columns in tiles + CARD_TILES * is_card
    ]


def _trl(rows: int, columns: int) -> LogProbs:
    _distribution("trl")
    module = importlib.import_module("trl.kernels.chunked_logprob")
    # The arguments behind bias and targets: temperature, columns of a tile, softcap, logit scale,
    # and optional outputs (such as the entropy), of which we want none.
    options = 1.0, columns, None, 1.0, ()

    def logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        module.TOKEN_CHUNK_SIZE = rows
        return module.ChunkedLogProbFunction.apply(hidden, weight, None, targets, *options)[0]

    return logprobs


def _liger(rows: int, columns: int) -> LogProbs:
    module = _load("liger-kernel", "liger_kernel/chunked_loss/fused_linear_ppo.py")
    function = module._ChunkedSelectiveLogProbFunction

    def logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        module._SELECTIVE_LOGPROB_SEQ_CHUNK_SIZE = rows
        return function.apply(hidden, weight, targets, None, 1.0, columns)

    return logprobs


def _verl(rows: int) -> LogProbs:
    module = _load("verl", "verl/utils/experimental/torch_functional.py")
    head = module.FusedLinearForPPO(chunk_size=rows)

    def logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return head(hidden, weight, targets, temperature=1.0)[0]  # its entropy is not optional

    return logprobs


def _cut_cross_entropy() -> LogProbs:
    _distribution("cut-cross-entropy")
    module = importlib.import_module("cut_cross_entropy")

    def logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return -module.linear_cross_entropy(hidden, weight, targets, reduction="none")

    return logprobs


def _rows_alive(rows: int, columns: int, vocab_size: int = 49152) -> int:
    """Converts a tile's logits into rows of full width, for the memory estimate.

    The default is the narrowest head of the bench, so wider ones are overestimated.
    """
    return max(1, rows * columns // vocab_size)


def _load(distribution: str, path: str) -> ModuleType:
    """Loads one file of an installed distribution as a module, without its package."""
    name = f"_peer_{distribution.replace('-', '_')}"
    if name not in sys.modules:
        file = str(_distribution(distribution).locate_file(path))
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def _distribution(name: str) -> importlib.metadata.Distribution:
    try:
        return importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError as error:
        raise RuntimeError(
            f"{name} must be installed, got {sys.executable} without it; "
            "make the environment that bench/peers.txt describes and run the bench with its python"
        ) from error
