"""The policy-head bench: what it counts, that its truth is the truth, and that a wrong contender gets no time."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bench import _card, bench_linear_policy_loss
from bench._head_problem import Problem, errors_of, make_problem, random_weight, useful_bytes, useful_flops
from bench._policy_heads import (
    Contender,
    bare_gemms,
    gemm_choices,
    ours,
    torch_contenders,
    torch_has_native_head,
)
from socpo_fast.ops import policy_loss

V, D, T = 131, 24, 40


@pytest.fixture(scope="module")
def problem() -> Problem:
    return make_problem(random_weight(V, D), T, 25)


def naive(logits_of=lambda hidden, weight: hidden @ weight.T, scale: float = 1.0) -> Contender:
    def logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return scale * torch.log_softmax(logits_of(hidden, weight), dim=-1).gather(1, targets[:, None])[:, 0]

    return Contender("naive", "", logprobs, None)


def test_work_of_a_hand_counted_case() -> None:
    """2 rows, 3 outcomes, width 4: 2 * 3 * 4 = 24 multiply-adds a GEMM; 2 * 4 + 3 * 4 = 20 numbers read, 20 written."""
    assert useful_flops(2, 3, 4) == 3 * 24 * 2
    assert useful_bytes(2, 3, 4) == (20 + 20) * 4


def test_truth_is_the_gradient_of_the_reference_in_fp64(problem: Problem) -> None:
    hidden, weight = (x.detach().double().requires_grad_() for x in (problem.hidden_TD, problem.weight_VD))
    logprobs = torch.log_softmax(hidden @ weight.T, -1).gather(1, problem.targets_T[:, None])[:, 0]
    per_token = (problem.old_logprobs_T.double(), problem.advantages_T.double())
    policy = policy_loss(logprobs, *per_token, weights_N=problem.weights_T.double())
    grad_hidden, grad_weight = torch.autograd.grad(policy.loss, (hidden, weight))
    assert policy.clip_fraction == 0 and problem.rows_N.numel() == T // 4
    assert policy.loss.item() == pytest.approx(problem.loss, rel=1e-12)
    torch.testing.assert_close(grad_hidden @ problem.probes_DK, problem.hidden_probe_TK)
    torch.testing.assert_close(grad_weight @ problem.probes_DK, problem.weight_probe_VK)


@pytest.mark.parametrize("contender", [ours("auto"), *(c for settings in torch_contenders() for c in settings)])
@pytest.mark.parametrize("only_loss_rows", [False, True])
def test_right_contenders_pass(problem: Problem, contender: Contender, only_loss_rows: bool) -> None:
    contender = replace(contender, only_loss_rows=only_loss_rows)
    assert errors_of(problem, *contender.gradients(problem)).acceptable


def test_torch_without_a_native_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """Older ones, which a CUDA machine may have, have no LinearCrossEntropyOptions: naive stands alone."""
    monkeypatch.delattr(torch.nn, "LinearCrossEntropyOptions", raising=False)
    assert [[c.name for c in settings] for settings in torch_contenders()] == [["torch naive"]]


def without_last_column_gradient(hidden: Tensor, weight: Tensor) -> Tensor:
    """Every value right, one row of dW zero."""
    return torch.cat([hidden @ weight[:-1].T, (hidden @ weight[-1:].T).detach()], dim=1)


WRONG = {
    "a gradient 0.1 % too large": naive(scale=1.001),
    "rows out of place": naive(lambda hidden, weight: hidden.roll(1, 0) @ weight.T),
    "one column's gradient missing": naive(without_last_column_gradient),
    "NaN": naive(scale=float("nan")),
}


@pytest.mark.parametrize("fault", WRONG)
def test_wrong_contenders_are_named_and_not_timed(problem: Problem, fault: str) -> None:
    args = bench_linear_policy_loss.parse(["--repeats", "3"])
    contenders = [ours("auto"), WRONG[fault]]
    tiles = gemm_choices(problem.rows_N.numel(), V)[:1]
    rows, _ = bench_linear_policy_loss.measure(problem, contenders, tiles, args, whole=[])
    assert [row.times is None for row in rows] == [False, True, True]  # the wrong one twice: all rows, loss rows
    assert all("WRONG" in row.note for row in rows[1:])


def test_too_large_a_contender_is_skipped_with_the_reason(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_card, "free_gib", lambda: 1e-6)
    row, seconds = bench_linear_policy_loss.check_row(
        problem, naive(), bench_linear_policy_loss.Row("naive", "", "all rows")
    )
    assert "GiB" in row.note and row.errors is None and seconds == 0


def test_bare_gemms_are_the_three_gemms(problem: Problem) -> None:
    """Logits, dX = logits W and dW = logits^T X, whatever the library and the chunking."""
    hidden, weight = problem.hidden_TD.detach(), problem.weight_VD.detach()
    logits = hidden @ weight.T
    for library, rows, columns in [
        (lib, r, c) for lib in _card.matmuls() for r, c in ((T, V), (16, V), (T, 50), (16, 50))
    ]:
        [run] = bare_gemms(hidden, weight, [(library, rows, columns)]).values()
        run()
        grad_hidden, grad_weight = run()  # starts from zero again
        torch.testing.assert_close(grad_hidden, logits @ weight, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(grad_weight, logits.T @ hidden, rtol=1e-4, atol=1e-3)


def test_the_script_ends_with_one_json_line(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--shapes", "300x16:24", "300x16:8", "--rows", "100", "25", "--threads", "1", "--repeats", "3"]
    bench_linear_policy_loss.main(words)
    lines = capsys.readouterr().out.splitlines()
    report = json.loads(lines[-1])
    assert report["card"]["torch_gflop_s"] > 0 and report["card"]["git_revision"]
    # At 25 % each of torch's ways stands twice: over all rows and over the loss rows.
    num_torch = len(torch_contenders())
    tables = [(8, 100, 1), (8, 25, 2), (24, 100, 1), (24, 25, 2)]
    expected = [(tokens, loss) for tokens, loss, times in tables for _ in range(1 + times * num_torch)]
    assert [(r["T"], r["loss_percent"]) for r in report["results"]] == expected
    assert ("torch native" in report["card"]) == (not torch_has_native_head())
    for row in report["results"]:
        assert row["note"] == "" and row["num_samples"] == 3 and row["errors"]["weight"] < 1e-5
        assert row["p20_s"] <= row["median_s"] <= row["p80_s"]
        num_rows = row["T"] * row["loss_percent"] // 100
        assert row["gflop_s"] * row["median_s"] * 1e9 == pytest.approx(6 * num_rows * 300 * 16)
        assert row["bare_gemms_gflop_s"]


def test_long_runs_over_all_rows_are_not_repeated(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a limit of 0 s everything is long: all-row times come from the table at 100 %, and say so."""
    monkeypatch.setattr(bench_linear_policy_loss, "LONG_S", 0.0)
    args, contenders = bench_linear_policy_loss.parse(["--repeats", "3"]), [ours("auto"), naive()]
    tiles = gemm_choices(T, V)[:1]
    whole, _ = bench_linear_policy_loss.measure(make_problem(random_weight(V, D), T, 100), contenders, tiles, args, [])
    rows, _ = bench_linear_policy_loss.measure(problem, contenders, tiles, args, whole)
    assert [row.note for row in rows] == ["", "as at 100 %", ""]
    assert rows[1].times == whole[1].times and rows[2].times != whole[1].times


def test_a_time_of_other_rounds_makes_no_ratio(problem: Problem) -> None:
    times, errors = _card.spread([2.0]), errors_of(problem, *naive().gradients(problem))
    row = bench_linear_policy_loss.Row("naive", "", "all rows", times=times, errors=errors, peak=_card.PeakMib(0, None))
    mine = replace(row, contender="ours", times=_card.spread([1.0]))
    known = bench_linear_policy_loss.report(row, 1e9, 0.5, mine)
    assert (known["ours_is_times_faster"], known["percent_of_gemms"]) == (2.0, 25.0)
    known = bench_linear_policy_loss.report(replace(row, note="as at 100 %"), 1e9, 0.5, mine)
    assert known["ours_is_times_faster"] is None and known["percent_of_gemms"] is None and known["median_s"] == 2.0


def test_the_search_can_tell_the_settings_apart() -> None:
    """Of two chunks longer than the searched problem, chance would choose."""
    for settings in torch_contenders():
        rows = [min(c.logit_rows or 1 << 30, bench_linear_policy_loss.SEARCH_ROWS) for c in settings]
        assert len(set(rows)) == len(rows)


@pytest.mark.parametrize("words", [["--skip"], ["--shapes", "llama:16"], ["--shapes", "300x16"]])
def test_bad_command_lines_are_refused(words: list[str]) -> None:
    with pytest.raises(SystemExit):
        bench_linear_policy_loss.parse(words)
