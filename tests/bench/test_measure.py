"""Checks what the benches measure with: CUDA events, peak memory, rounds, quantiles, options."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from bench import machine, measure, update
from bench.policy_head import __main__ as policy_head
from bench.rollout import __main__ as rollout
from tools import real_run

CARD = torch.device("cuda")


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Returns a fake card: its clock is at `ms`, its memory at `mib`, and `log` records calls."""
    state = SimpleNamespace(ms=0.0, mib=100, peak_mib=0, log=[])

    class Event:
        def __init__(self, *, enable_timing: bool):
            assert enable_timing

        def record(self) -> None:
            self.ms = state.ms

        def synchronize(self) -> None:
            state.log.append("wait")

        def elapsed_time(self, end: Event) -> float:
            return end.ms - self.ms

    def reset_peak(device: torch.device) -> None:
        state.peak_mib = state.mib

    stand_ins = {
        "Event": Event,
        "synchronize": lambda device: None,
        "memory_allocated": lambda device: state.mib << 20,
        "memory_reserved": lambda device: 300 << 20,
        "max_memory_allocated": lambda device: state.peak_mib << 20,
        "mem_get_info": lambda device: (824 << 20, 1000 << 20),
        "reset_peak_memory_stats": reset_peak,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return state


def taking(card: SimpleNamespace, name: str, ms: float) -> Callable[[], str]:
    """Returns a function that takes `ms` of the card's time and is logged under `name`."""

    def run() -> str:
        card.log.append(name)
        card.ms += ms
        return name

    return run


def test_seconds_of_a_card_are_those_of_its_events(card: SimpleNamespace) -> None:
    run = taking(card, "a", 250.0)
    assert measure.timed(run, CARD) == ("a", 0.25)
    assert card.log == ["a", "wait"]
    assert measure.seconds_of(run, CARD) == 0.25
    assert measure.seconds_of(run) < 0.2  # by the CPU's clock, which does not see the card's


def test_first_call_on_a_card_is_not_timed(card: SimpleNamespace) -> None:
    """On a card the first call compiles and loads kernels, so it is run once more before timing."""
    ms = iter([900.0, 100.0])
    assert measure.first_seconds(lambda: taking(card, "a", next(ms))(), CARD) == 0.1
    runs = [taking(card, "b", 1000.0), taking(card, "c", 2000.0)]
    card.log.clear()
    assert measure.time_rounds(runs, 2, CARD) == [[1.0, 1.0], [2.0, 2.0]]
    assert [name for name in card.log if name != "wait"] == ["b", "c"] * 3
    assert measure.time_rounds(runs, 0, CARD) == [[], []]


def test_a_cards_memory(card: SimpleNamespace) -> None:
    """100 MiB are live; a call takes 50 more, of which 20 stay allocated."""

    def run() -> str:
        card.peak_mib, card.mib = card.mib + 50, card.mib + 20
        return "done"

    assert measure.extra_peak_mib(run, CARD) == ("done", (50, None))
    assert measure.peak_held_mib(run, CARD) == ("done", 170)
    # 824 MiB are free on the card, and the allocator has cached 300 - 140.
    assert measure.free_gib(CARD) == (824 + 160) / 1024


@pytest.mark.parametrize("num_mib", [32, 96])
def test_extra_peak_counts_memory_given_back(num_mib: int) -> None:
    """The extra peak of a call is what it allocates at once, even if it frees all of it."""
    live = torch.ones(64 << 18)  # 64 MiB from before the call, which do not count

    def run() -> torch.Tensor:
        return (torch.ones(num_mib << 18) + 1).sum()  # two tensors alive at once

    for _ in range(2):  # the second call may reuse memory that the first one freed; it counts
        result, peak = measure.extra_peak_mib(run)
        assert result == 2 * num_mib << 18 and live.numel()
        assert 2 * num_mib <= peak.tensors < 2 * num_mib + 0.01
        # The operating system counts pages in batches, so the number is up to 1 MiB too low.
        assert peak.resident is not None and peak.resident > 2 * num_mib - 1


def test_rounds_interleave() -> None:
    calls: list[str] = []
    runs = [lambda: calls.append("a"), lambda: calls.append("b")]
    seconds = measure.time_rounds(runs, 3)
    assert calls == ["a", "b"] * 3
    assert [len(samples) for samples in seconds] == [3, 3] and min(map(min, seconds)) > 0


def test_spread() -> None:
    spread = measure.spread([5.0, 1.0, 4.0, 2.0, 3.0, 6.0])
    assert spread == pytest.approx((3.5, 2.0, 5.0, 6))


def test_peaks_are_positive_and_plausible() -> None:
    for library in machine.matmuls():
        assert 0.1 < machine.peak_gflop_s(library, size=128, num_runs=2) < 1e6
    assert 0.01 < machine.peak_gb_s(num_mib=8, num_runs=2) < 1e5
    assert measure.free_gib() > 0


def test_default_dtype_depends_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default is fp32 on a CPU and bf16 on a card."""

    def settled(*words: str) -> argparse.Namespace:
        parser = argparse.ArgumentParser()
        machine.add_options(parser)
        args = parser.parse_args(words)
        machine.settle(parser, args)
        return args

    assert (settled().device, settled().dtype) == (measure.CPU, torch.float32)
    assert settled("--dtype", "bf16").dtype == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert settled("--device", "cuda").dtype == torch.bfloat16
    assert settled("--device", "cuda", "--dtype", "fp32").dtype == torch.float32
    assert settled("--device", "cuda").device == CARD
    assert machine.product_dtype(measure.CPU, torch.bfloat16) == torch.float32
    assert machine.product_dtype(CARD, torch.bfloat16) == torch.bfloat16
    assert list(machine.matmuls(CARD)) == ["torch"]


STUDENT = ["--student", "x"]
PARSERS = {
    "policy_head": (policy_head.parse, []),
    "rollout": (rollout.parse, STUDENT),
    "update": (update.parse, STUDENT),
    "real_run": (real_run.parse, [*STUDENT, "--teacher", "local", "--data", "x"]),
}


@pytest.mark.parametrize("bench", PARSERS)
def test_cuda_without_a_card_is_refused(
    bench: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    parse, words = PARSERS[bench]
    with pytest.raises(SystemExit) as ended:
        parse([*words, "--device", "cuda"])
    assert ended.value.code == 2
    line = "bench: --device must be cpu where no CUDA card is found, got cuda\n"
    assert capsys.readouterr().err == line


def test_defaults_of_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a card the defaults are the design's shapes and larger microbatches.

    Engines that run on a CPU only are skipped with that reason.
    """
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    words = ["--device", "cuda"]
    shapes = policy_head.parse(words).shapes
    assert shapes == [(8192, 151936, 1024), (8192, 151936, 2048)]
    assert update.parse([*STUDENT, *words]).token_budget == 16384
    args = rollout.parse([*STUDENT, *words, "--peers", "all"])
    assert args.peers == ["generate-copied", "generate-shared", "generate-batch"]
    names = ("ctranslate2", "vllm", "llama.cpp", "llama.cpp-bf16")
    assert args.skipped == dict.fromkeys(names, "it runs on a CPU only")
    with pytest.raises(SystemExit):
        rollout.parse([*STUDENT, *words, "--bf16"])
