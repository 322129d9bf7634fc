"""Makes memory plans for released models; their config.json files are written here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from socpo_fast.config import load_config
from socpo_fast.report.cards import CARDS, Card
from socpo_fast.report.memory_plan import Plan, make_plan
from tools.gpu_check.models import CONFIGS

QWEN3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "tie_word_embeddings": False,
}
GIB = 2**30
RAW = CONFIGS | {"Qwen3-8B": CONFIGS["Qwen3-4B"] | QWEN3_8B}


class Planner:
    """Makes plans for models that are config.json files in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def model(self, name: str) -> Path:
        """Writes the model's folder, without weights, and returns its path."""
        path = self.folder / name / "config.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(RAW[name]), encoding="utf-8")
        return path.parent

    def words(self, name: str, *words: str) -> list[str]:
        """Returns the command line of a plan for an H100."""
        return ["plan", "--student.path", str(self.model(name)), "--card", "h100", *words]

    def __call__(
        self,
        name: str,
        card: str | Card = "h100",
        *,
        is_training: bool = True,
        **settings: Any,
    ) -> Plan:
        """Returns a plan; settings are named section__key.

        The student is in bf16 unless they say otherwise.
        """
        changes = {key.replace("__", "."): value for key, value in settings.items()}
        folder = self.model(name)
        base = {"run.device": "cuda", "student.dtype": "bfloat16", "student.path": str(folder)}
        config = load_config(None, base | changes)
        known_card = CARDS[card] if isinstance(card, str) else card
        return make_plan(config, folder, known_card, is_training=is_training)


class FakeCard:
    """A stand-in for this machine's card: what a plan asks torch.cuda about it."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, name: str, free_gib: float, total_gib: float
    ):
        self.peak_gib = 0.0
        answers: dict[str, Any] = {
            "is_available": lambda: True,
            "get_device_name": lambda _device: name,
            "mem_get_info": lambda _device: (int(free_gib * GIB), int(total_gib * GIB)),
            "memory_reserved": lambda _device: 3 * GIB,
            "memory_allocated": lambda _device: 2 * GIB,
            "max_memory_allocated": lambda _device: int(self.peak_gib * GIB),
        }
        for function, answer in answers.items():
            monkeypatch.setattr(torch.cuda, function, answer)


@pytest.fixture
def planner(tmp_path: Path) -> Planner:
    return Planner(tmp_path)
