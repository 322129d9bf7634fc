"""What the benches measure with: peak memory, interleaved rounds, quantiles."""

from __future__ import annotations

import pytest
import torch

from bench import _card


@pytest.mark.parametrize("num_mib", [32, 96])
def test_extra_peak_is_what_a_call_needs_and_gives_back(num_mib: int) -> None:
    live = torch.ones(64 << 18)  # 64 MiB that were there before, not counted

    def run() -> torch.Tensor:
        return (torch.ones(num_mib << 18) + 1).sum()  # two tensors alive at once

    for _ in range(2):  # memory given back by a first call is counted again
        result, peak = _card.extra_peak_mib(run)
        assert result == 2 * num_mib << 18 and live.numel()
        assert 2 * num_mib <= peak.tensors < 2 * num_mib + 0.01
        assert peak.resident is not None and peak.resident > 2 * num_mib - 1  # the kernel counts pages in batches


def test_rounds_interleave() -> None:
    calls: list[str] = []
    seconds = _card.time_rounds([lambda: calls.append("a"), lambda: calls.append("b")], 3)
    assert calls == ["a", "b"] * 3
    assert [len(samples) for samples in seconds] == [3, 3] and min(map(min, seconds)) > 0


def test_spread() -> None:
    assert _card.spread([5.0, 1.0, 4.0, 2.0, 3.0, 6.0]) == pytest.approx((3.5, 2.0, 5.0, 6))


def test_peaks_are_positive_and_plausible() -> None:
    for library in _card.matmuls():
        assert 0.1 < _card.peak_gflop_s(library, size=128, num_runs=2) < 1e6
    assert 0.01 < _card.peak_gb_s(num_mib=8, num_runs=2) < 1e5
    assert _card.free_gib() > 0
