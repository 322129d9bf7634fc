"""Checks the size of the KV cache, "auto" in particular, against cases counted by hand.

free memory of a card = KV cache + gradients and moments + three tenths for activations
"""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from socpo_fast.engine import Engine
from socpo_fast.engine.memory import OPTIMIZER_BYTES, auto_kv_cache_size, kv_cache_size
from socpo_fast.engine.runner import Runner
from socpo_fast.training.optimizer import Optimizer
from tests.helpers.tiny import make_student

GIB = 2**30
MIB = 2**20
# An 80 GiB card: three tenths, 24 GiB, are kept free for activations.
CARD = {
    "total_bytes": 80 * GIB,
    "optimizer_bytes": 7 * GIB,
    "page_bytes": 4 * MIB,
    "max_pages": 10**6,
}
PARTS = "72.0 free, 7.0 for gradients and moments, 24.0 kept for activations"


def test_auto_size_is_what_the_card_leaves() -> None:
    size = auto_kv_cache_size(72 * GIB, **CARD)
    assert size == (41.0, f"KV cache 41 GiB (auto): {PARTS}")
    frozen = auto_kv_cache_size(72 * GIB, **CARD | {"optimizer_bytes": 0})
    assert frozen.gib == 48.0
    assert "0.0 for gradients" in frozen.note
    assert auto_kv_cache_size(40 * GIB + 5, **CARD).gib == (9 * GIB + 5) / GIB


def test_auto_size_is_capped_by_max_running() -> None:
    """The cache is never larger than max_running sequences of the longest context can fill."""
    size = auto_kv_cache_size(72 * GIB, **CARD | {"max_pages": 256})
    assert size.gib == 1.0
    note_of_cap = "no more than max_running contexts can fill"
    assert size.note == f"KV cache 1 GiB (auto): {PARTS}, {note_of_cap}"
    assert auto_kv_cache_size(72 * GIB, **CARD | {"max_pages": 10496}).gib == 41.0
    assert auto_kv_cache_size(72 * GIB, **CARD | {"max_pages": 10495}).gib == 41.0 - 1 / 256


@pytest.mark.parametrize(("free_gib", "left_gib"), [(31, 0), (13, -18)])
def test_too_little_is_refused_with_its_parts(free_gib: int, left_gib: int) -> None:
    with pytest.raises(ValueError, match="^Engine: kv_cache_gib auto") as refused:
        auto_kv_cache_size(free_gib * GIB, **CARD)
    assert str(refused.value) == (
        f"Engine: kv_cache_gib auto must leave a page of KV, got {left_gib}.0 GiB: "
        f"{PARTS.replace('72', str(free_gib))}; "
        "set engine.kv_cache_gib, or use a smaller model, bfloat16 or a larger card"
    )
    assert auto_kv_cache_size(31 * GIB + 4 * MIB, **CARD).gib == 4 / 1024  # one page is enough


class Card:
    """A fake card with 80 GiB, of which the driver reports 60 as free."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.device = torch.device("cuda", 1)
        answers = {
            "mem_get_info": (60 * GIB, 80 * GIB),
            "memory_reserved": 9 * GIB,
            "memory_allocated": 7 * GIB,
        }
        for name, answer in answers.items():
            monkeypatch.setattr(torch.cuda, name, self.answer_about(answer))

    def answer_about(self, answer: Any) -> Any:
        """Returns a stand-in for a query of torch.cuda that checks which device it is about."""

        def query(device: torch.device) -> Any:
            assert device == self.device, "of the student's own card, not of the current one"
            return answer

        return query

    def student(self, *, trained: int, frozen: int) -> Any:
        """Returns what kv_cache_size reads of a student: 2 KiB of KV a token, 2^20 x 256 LM head.

        2 KiB are keys and values of 4 layers, 2 KV heads and head dim 64 in bf16.
        """
        meta_head = torch.empty(2**20, 256, device="meta")
        methods = {"numel": meta_head.numel, "element_size": lambda: 2}
        lm_head = SimpleNamespace(device=self.device, dtype=torch.bfloat16, **methods)
        sizes = {True: trained, False: frozen}
        parameters = [
            SimpleNamespace(numel=lambda size=size: size, requires_grad=requires_grad)
            for requires_grad, size in sizes.items()
        ]
        return SimpleNamespace(
            config=SimpleNamespace(
                num_layers=4,
                num_kv_heads=2,
                head_dim=64,
                max_position_embeddings=40960,
            ),
            lm_head=SimpleNamespace(weight=lm_head),
            parameters=lambda: iter(parameters),
        )


def test_auto_size_of_a_card_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """In GiB: 60 free + 2 that the allocator caches - 14 for 2^30 parameters - 24 kept of 80."""
    card = Card(monkeypatch)
    student = card.student(trained=2**30, frozen=2**31)
    assert Runner.page_bytes(student, 32) == 2**16
    size = kv_cache_size(student, "auto", 32, 256)
    assert size.gib == 256 * 1280 / 2**14 == 20.0  # 1280 pages a context, 2^14 of 64 KiB a GiB
    size = kv_cache_size(student, "auto", 32, 1024)
    assert size.gib == 60 + 2 - 14 - 24
    parts = "62.0 free, 14.0 for gradients and moments, 24.0 kept for activations"
    assert size.note == f"KV cache 24 GiB (auto): {parts}"
    frozen = card.student(trained=0, frozen=2**31)
    assert kv_cache_size(frozen, "auto", 32, 1024).gib == 60 + 2 - 24
    assert kv_cache_size(student, 2.5, 32, 256) == (2.5, "KV cache 2.5 GiB")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_optimizer_bytes_match_the_optimizer(dtype: torch.dtype) -> None:
    """OPTIMIZER_BYTES is what gradient, moments and low bits of a parameter really need."""
    student = make_student().to(dtype)
    optimizer = Optimizer(student, lr=1e-3)
    student.embed(torch.tensor([1])).sum().backward()
    state = [x for name, x in optimizer.state_tensors().items() if name.endswith(".embed.weight")]
    num_bytes = sum(x.nbytes for x in [*state, student.embed.weight.grad])
    assert num_bytes == OPTIMIZER_BYTES[dtype] * student.embed.weight.numel()


def test_a_cpu_gives_one_gib() -> None:
    student = make_student()
    engine = Engine(student)
    assert engine.kv_cache == (1.0, "KV cache 1 GiB (auto)")
    assert engine.stats.pages_total == GIB // Runner.page_bytes(student, 32)
    small = Engine(student, kv_cache_gib=0.001)
    assert small.kv_cache == (0.001, "KV cache 0.001 GiB")


@pytest.mark.parametrize("wrong", ["all", "1.0", 0, -1.0, float("nan"), float("inf")])
def test_other_words_and_numbers_are_refused(wrong: Any) -> None:
    message = rf'^Engine: kv_cache_gib must be GiB > 0 or "auto", got {wrong!r}$'
    with pytest.raises(ValueError, match=message):
        Engine(make_student(), kv_cache_gib=wrong)


def test_pages_beyond_memory_are_refused_at_once() -> None:
    """Before any list of pages is made, which takes half a minute for so many."""
    started_s = time.perf_counter()
    with pytest.raises(ValueError, match="Engine: kv_cache_gib must fit into memory, got 1e.05"):
        Engine(make_student(), kv_cache_gib=1e5)
    assert time.perf_counter() - started_s < 5
