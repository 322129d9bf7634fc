"""A card that cannot be used is refused in one line, before anything is written."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from socpo_fast.cli import main
from socpo_fast.device import TRITON, select_device
from tests.helpers.bad_input import assert_refused, words_of

CUDA_HINT = (
    "\nCUDA kernel errors might be asynchronously reported at some other API call, so the "
    "stacktrace below might "
    "be incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1"
)
NO_CUDA = "Torch not compiled with CUDA enabled"
OLD_DRIVER = (
    "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU "
    "driver by downloading "
    "and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx "
    "Alternatively, go to: "
    "https://pytorch.org to install a PyTorch version that has been compiled with your version of "
    "the CUDA driver."
)
NO_DRIVER = (
    "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and "
    "installed a driver from "
    "http://www.nvidia.com/Download/index.aspx"
)
BUSY = f"CUDA error: CUDA-capable device(s) is/are busy or unavailable{CUDA_HINT}"
FULL = f"CUDA error: out of memory{CUDA_HINT}"
SICK = f"CUDA error: uncorrectable ECC error encountered{CUDA_HINT}"
OTHERS = (
    "it is in use by others, whom nvidia-smi names: wait for them, or name another card, or use cpu"
)
TORCH = re.escape(torch.__version__)
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "a torch without CUDA": (
        {"init": AssertionError(NO_CUDA)},
        f"got '{NO_CUDA}'; install a build of torch with CUDA, or use cpu",
    ),
    "an old driver": (
        {"init": RuntimeError(OLD_DRIVER)},
        "got 'The NVIDIA driver on your system is too old (found version 11040)'; "
        "install a driver that fits this torch, or a torch that fits the driver, or use cpu",
    ),
    "no driver": (
        {"init": RuntimeError(NO_DRIVER)},
        "got 'Found no NVIDIA driver on your system'; "
        "install a driver that fits this torch, or a torch that fits the driver, or use cpu",
    ),
    "no card": (
        {"init": RuntimeError("No CUDA GPUs are available")},
        "got 'No CUDA GPUs are available'; nvidia-smi tells its state, or use cpu",
    ),
    "a card in exclusive mode": (
        {"mem_get_info": torch.AcceleratorError(BUSY)},
        f"got 'CUDA error: CUDA-capable device(s) is/are busy or unavailable'; {OTHERS}",
    ),
    "a card without room for a context": (
        {"mem_get_info": torch.AcceleratorError(FULL)},
        f"got 'CUDA error: out of memory'; {OTHERS}",
    ),
    "a broken card": (
        {"mem_get_info": RuntimeError(SICK)},
        "got 'CUDA error: uncorrectable ECC error encountered'; nvidia-smi tells its state, or "
        "use cpu",
    ),
}


def fake_cards(patch: pytest.MonkeyPatch, *, triton: str | None = "3.6.0", **changes: Any) -> None:
    """Makes torch.cuda tell of two cards, the second one too old.

    `changes` replaces results of its functions by name; an exception is raised instead.
    """
    answers = {"init": None, "device_count": 2, "mem_get_info": (60 << 30, 80 << 30)} | changes

    def answer(value: Any) -> Any:
        if isinstance(value, Exception):
            raise value
        return value

    for name, value in answers.items():
        patch.setattr(torch.cuda, name, lambda *_args, value=value: answer(value))
    patch.setattr(
        torch.cuda, "get_device_capability", lambda device: (7, 5) if device.index == 1 else (9, 0)
    )
    distributions = [] if triton is None else [SimpleNamespace(version=triton)]
    patch.setattr(importlib.metadata, "distributions", lambda *, name: distributions)


@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
@pytest.mark.parametrize("triton", ["3.6.0", "3.7.1", "3.99.0+git1234"])
def test_working_card_is_selected(name: str, triton: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cards(monkeypatch, triton=triton)
    assert select_device(name) == torch.device(name)


@pytest.mark.parametrize("case", CASES)
def test_unusable_card_is_refused(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changes, message = CASES[case]
    fake_cards(monkeypatch, **changes)
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        select_device("cuda:0")
    prefix = f"run.device: cuda:0 must be a card that torch {torch.__version__} can use, "
    assert str(refused.value) == prefix + message


def test_missing_card_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cards(monkeypatch)
    message = (
        "^run.device: cuda:2 must be a device of this machine, which has 2 CUDA devices; "
        "name one of them, or"
    )
    with pytest.raises(ValueError, match=message):
        select_device("cuda:2")


def test_old_card_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cards(monkeypatch)
    message = (
        "^run.device: cuda:1 must be of compute capability 8.0 or newer, got 7.5; name a "
        "newer card, or use cpu$"
    )
    with pytest.raises(ValueError, match=message):
        select_device("cuda:1")


@pytest.mark.parametrize(
    ("triton", "expected"), [(None, "none"), ("3.5.1", "3.5.1"), ("4.0.0", "4.0.0")]
)
def test_unsupported_triton_is_refused(
    triton: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_cards(monkeypatch, triton=triton)
    message = (
        f"run.device: cuda must be one beside Triton >=3.6,<4, got {expected}; pip install "
        "'triton>=3.6,<4', or use cpu"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        select_device("cuda")


def test_triton_range_equals_pyproject() -> None:
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    low, high = (".".join(map(str, bound)) for bound in TRITON)
    assert f'gpu = ["triton>={low},<{high}"]' in text


def test_refused_device_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    fake_cards(monkeypatch, mem_get_info=torch.AcceleratorError(BUSY))
    for command in ("train", "rollout", "eval"):
        assert main(words_of(command, tmp_path / "runs", {"run.device": "cuda"})) == 2
        assert_refused(
            capsys.readouterr().err,
            f"run.device: cuda must be a card that torch {TORCH} can use, got 'CUDA",
        )
        assert not (tmp_path / "runs").exists()
