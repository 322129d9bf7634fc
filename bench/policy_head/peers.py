"""The contenders of bench_linear_policy_loss from other projects, with the settings each chooses from.

Only the module that holds the function is loaded: verl's package would import Ray, Liger's its whole kernel list. How
to make their environment stands in peers.txt. Two of their tile heights are module constants; they are tuned as well.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType

from torch import Tensor

from bench._policy_heads import Contender, LogProbs

PEERS = ("trl", "liger-kernel", "verl")


def peer_contenders() -> list[list[Contender]]:
    """For each peer, its settings to choose from; the first is its own default."""
    return [
        [
            Contender("TRL", f"tile {rows} x {columns}", _trl(rows, columns), _rows_alive(rows, columns))
            for rows, columns in ((4096, 32768), (4096, 2048), (512, 2048), (512, 8192))
        ],
        [
            Contender("Liger", f"tile {rows} x {columns}", _liger(rows, columns), _rows_alive(rows, columns))
            for rows, columns in ((2048, 4096), (2048, 1024), (512, 1024), (512, 4096))
        ],
        [Contender("verl", f"chunk {rows}", _verl(rows), 2 * rows) for rows in (512, 2048, 128)],
    ]


# Per-token log-probs of each peer at its own defaults; calling one imports the peer.
PEER_LOGPROBS: dict[str, Callable[[], LogProbs]] = {
    "TRL": lambda: _trl(4096, 32768),
    "Liger": lambda: _liger(2048, 4096),
    "verl": lambda: _verl(512),
    "cut-cross-entropy": lambda: _cut_cross_entropy(),
}


def peer_versions() -> dict[str, str]:
    return {name: _distribution(name).version for name in PEERS}


def _trl(rows: int, columns: int) -> LogProbs:
    _distribution("trl")
    module = importlib.import_module("trl.kernels.chunked_logprob")

    def logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        module.TOKEN_CHUNK_SIZE = rows
        # bias, targets, temperature, columns a tile, softcap, logit scale, optional outputs (entropy among them): none
        return module.ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, columns, None, 1.0, ())[0]

    return logprobs


def _liger(rows: int, columns: int) -> LogProbs:
    module = _load("liger-kernel", "liger_kernel/chunked_loss/fused_linear_ppo.py")

    def logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        module._SELECTIVE_LOGPROB_SEQ_CHUNK_SIZE = rows
        return module._ChunkedSelectiveLogProbFunction.apply(hidden, weight, targets, None, 1.0, columns)

    return logprobs


def _verl(rows: int) -> LogProbs:
    head = _load("verl", "verl/utils/experimental/torch_functional.py").FusedLinearForPPO(chunk_size=rows)

    def logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return head(hidden, weight, targets, temperature=1.0)[0]  # its entropy is not optional

    return logprobs


def _cut_cross_entropy() -> LogProbs:
    """A GPU's only: its kernels are Triton's."""
    module = importlib.import_module("cut_cross_entropy")

    def logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return -module.linear_cross_entropy(hidden, weight, targets, reduction="none")

    return logprobs


def _rows_alive(rows: int, columns: int, vocab_size: int = 49152) -> int:
    """Rows of full width that a tile's logits amount to, for the memory estimate; on the high side for wider heads."""
    return max(1, rows * columns // vocab_size)


def _load(distribution: str, path: str) -> ModuleType:
    """One file of an installed distribution, as a module of its own."""
    name = f"_peer_{distribution.replace('-', '_')}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, str(_distribution(distribution).locate_file(path)))
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def _distribution(name: str) -> importlib.metadata.Distribution:
    try:
        return importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError as error:
        raise RuntimeError(
            f"bench: {name} must be installed for --peers, got {sys.executable} without it; "
            "make the environment that bench/peers.txt describes and run the bench with its python"
        ) from error
