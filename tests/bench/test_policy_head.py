"""Checks the policy-head bench: its counts, its reference, and which contenders are not timed."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from torch import Tensor

from bench import measure
from bench.machine import matmuls
from bench.policy_head import __main__ as bench
from bench.policy_head import peers, table
from bench.policy_head.contenders import (
    Contender,
    by_logprobs,
    ours,
    torch_contenders,
    torch_has_native_head,
)
from bench.policy_head.gemms import bare_gemms, gemm_choices
from bench.policy_head.problem import (
    Problem,
    errors_of,
    make_problem,
    random_weight,
    useful_bytes,
    useful_flops,
)
from socpo_fast.ops import policy_loss

V = 131
D = 24
T = 40


def user_loss(*inputs: Tensor, weights_N: Tensor, temperature: float) -> Tensor:
    """The function that --peer names in the test of the script."""
    return naive().loss_of(*inputs, weights_N=weights_N, temperature=temperature)


@pytest.fixture(scope="module")
def problem() -> Problem:
    return make_problem(random_weight(V, D), T, 25)


def naive(logits_of=lambda hidden, weight: hidden @ weight.T, scale: float = 1.0) -> Contender:
    """Returns a contender that stores all logits; logits_of and scale can make it wrong."""

    def logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        logprobs_NV = torch.log_softmax(logits_of(hidden, weight), dim=-1)
        return scale * logprobs_NV.gather(1, targets[:, None])[:, 0]

    return Contender("naive", "", by_logprobs(logprobs), None)


def test_work_of_a_hand_counted_case() -> None:
    """FLOPs and bytes of 2 rows, a vocabulary of 3 and width 4, counted by hand.

    2 * 3 * 4 = 24 multiply-adds a GEMM; 2 * 4 + 3 * 4 = 20 numbers read, 20 written.
    """
    assert useful_flops(2, 3, 4) == 3 * 24 * 2
    assert useful_bytes(2, 3, 4) == (20 + 20) * 4


def test_truth_is_the_fp64_reference_gradient(problem: Problem) -> None:
    """The bench's truth is the gradient of the reference in fp64, projected onto random probes."""
    inputs = problem.hidden_TD, problem.weight_VD
    hidden, weight = (x.detach().double().requires_grad_() for x in inputs)
    logprobs = torch.log_softmax(hidden @ weight.T, -1).gather(1, problem.targets_T[:, None])[:, 0]
    per_token = (problem.old_logprobs_T.double(), problem.advantages_T.double())
    policy = policy_loss(logprobs, *per_token, weights_N=problem.weights_T.double())
    grad_hidden, grad_weight = torch.autograd.grad(policy.loss, (hidden, weight))
    assert policy.clip_fraction == 0 and problem.rows_N.numel() == T // 4
    assert policy.loss.item() == pytest.approx(problem.loss, rel=1e-12)
    torch.testing.assert_close(grad_hidden @ problem.probes_DK, problem.hidden_probe_TK)
    torch.testing.assert_close(grad_weight @ problem.probes_DK, problem.weight_probe_VK)


RIGHT = [ours("auto"), *(c for settings in torch_contenders() for c in settings)]


@pytest.mark.parametrize("contender", RIGHT)
@pytest.mark.parametrize("only_loss_rows", [False, True])
def test_right_contenders_pass(
    problem: Problem, contender: Contender, only_loss_rows: bool
) -> None:
    contender = replace(contender, only_loss_rows=only_loss_rows)
    assert problem.accepts(errors_of(problem, *contender.gradients(problem)))


def test_bf16_has_bounds_of_its_own() -> None:
    """With bf16 inputs rounded logits pass; faults that fp32's bounds would catch still fail."""
    rounded = make_problem(random_weight(V, D, dtype=torch.bfloat16), T, 100)
    assert rounded.hidden_TD.dtype == torch.bfloat16

    def accepts(contender: Contender) -> bool:
        return rounded.accepts(errors_of(rounded, *contender.gradients(rounded)))

    for settings in [[ours("auto"), ours("ref")], torch_contenders()[0]]:
        assert all(accepts(contender) for contender in settings)
    assert not accepts(naive(without_last_column_gradient))
    assert not accepts(naive(scale=1.05))


def test_torch_without_a_native_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """On an older torch, which a CUDA machine may have, the naive head is torch's only one."""
    monkeypatch.delattr(torch.nn, "LinearCrossEntropyOptions", raising=False)
    assert [[c.name for c in settings] for settings in torch_contenders()] == [["torch naive"]]


def without_last_column_gradient(hidden: Tensor, weight: Tensor) -> Tensor:
    """Returns the right logits, but the last row of the weight's gradient is 0."""
    return torch.cat([hidden @ weight[:-1].T, (hidden @ weight[-1:].T).detach()], dim=1)


WRONG = {
    "a gradient 0.1 % too large": naive(scale=1.001),
    "rows out of place": naive(lambda hidden, weight: hidden.roll(1, 0) @ weight.T),
    "one column's gradient missing": naive(without_last_column_gradient),
    "NaN": naive(scale=float("nan")),
}


@pytest.mark.parametrize("fault", WRONG)
def test_wrong_contenders_are_named_and_not_timed(problem: Problem, fault: str) -> None:
    args = bench.parse(["--repeats", "3"])
    contenders = [ours("auto"), WRONG[fault]]
    tiles = gemm_choices(problem.rows_N.numel(), V, measure.CPU)[:1]
    rows, _ = table.measure_rows(problem, contenders, tiles, args, whole=[])
    # The wrong contender stands there twice: over all rows and over the loss rows.
    assert [row.times is None for row in rows] == [False, True, True]
    assert all("WRONG" in row.note for row in rows[1:])


def test_too_large_contender_is_skipped_with_reason(
    problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "free_gib", lambda device: 1e-6)
    row, seconds = table.check_row(problem, naive(), table.Row("naive", "", "all rows"))
    assert "GiB" in row.note and row.errors is None and seconds == 0


def test_bare_gemms_are_the_three_gemms(problem: Problem) -> None:
    """The GEMMs are logits, dX = logits W and dW = logits^T X, in every library and chunking."""
    hidden = problem.hidden_TD.detach()
    weight = problem.weight_VD.detach()
    logits = hidden @ weight.T
    for library, rows, columns in [
        (lib, r, c) for lib in matmuls() for r, c in ((T, V), (16, V), (T, 50), (16, 50))
    ]:
        [run] = bare_gemms(hidden, weight, [(library, rows, columns)]).values()
        run()
        grad_hidden, grad_weight = run()  # a second run does not add to the first one's results
        torch.testing.assert_close(grad_hidden, logits @ weight, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(grad_weight, logits.T @ hidden, rtol=1e-4, atol=1e-3)


def test_the_script_ends_with_one_json_line(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--shapes", "24x300x16", "8x300x16", "--rows", "100", "25"]
    bench.main([*words, "--threads", "1", "--repeats", "3", "--peer", f"{__name__}:user_loss"])
    lines = capsys.readouterr().out.splitlines()
    report = json.loads(lines[-1])
    assert report["card"]["torch_gflop_s"] > 0 and report["card"]["git_revision"]
    # At 25 % each contender but ours stands there twice: over all rows and over the loss rows.
    num_others = len(torch_contenders()) + 1
    tables = [(8, 100, 1), (8, 25, 2), (24, 100, 1), (24, 25, 2)]
    expected = [
        (tokens, loss) for tokens, loss, times in tables for _ in range(1 + times * num_others)
    ]
    assert [(r["T"], r["loss_percent"]) for r in report["results"]] == expected
    assert ("torch native" in report["card"]) == (not torch_has_native_head())
    for row in report["results"]:
        assert row["note"] == "" and row["num_samples"] == 3 and row["errors"]["weight"] < 1e-5
        assert row["p20_s"] <= row["median_s"] <= row["p80_s"]
        num_rows = row["T"] * row["loss_percent"] // 100
        assert row["gflop_s"] * row["median_s"] * 1e9 == pytest.approx(6 * num_rows * 300 * 16)
        assert row["bare_gemms_gflop_s"] and row["percent_of_peak"] > 0
    assert report["card"]["other projects"] == "skipped: --peers was not given"


def test_long_runs_over_all_rows_are_not_repeated(
    problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long runs over all rows are taken from the table at 100 % and marked as such.

    The limit is set to 0 s here, so that every run is long.
    """
    monkeypatch.setattr(table, "LONG_S", 0.0)
    args = bench.parse(["--repeats", "3"])
    contenders = [ours("auto"), naive()]
    tiles = gemm_choices(T, V, measure.CPU)[:1]
    all_rows_problem = make_problem(random_weight(V, D), T, 100)
    rows_at_100, _ = table.measure_rows(all_rows_problem, contenders, tiles, args, [])
    rows, _ = table.measure_rows(problem, contenders, tiles, args, rows_at_100)
    assert [row.note for row in rows] == ["", "as at 100 %", ""]
    assert rows[1].times == rows_at_100[1].times and rows[2].times != rows_at_100[1].times


def test_a_time_of_other_rounds_makes_no_ratio(problem: Problem) -> None:
    """A time taken from another table is shown, but not compared: the machine may have changed."""
    times = measure.spread([2.0])
    errors = errors_of(problem, *naive().gradients(problem))
    peak = measure.PeakMib(0, None)
    row = table.Row("naive", "", "all rows", times=times, errors=errors, peak=peak)
    fast = replace(row, contender="ours", times=measure.spread([1.0]))
    figures = table.report(row, 1e9, 0.5, fast, 5.0)  # half a GFLOP/s
    assert (figures["ours_is_times_faster"], figures["percent_of_gemms"]) == (2.0, 25.0)
    assert figures["percent_of_peak"] == 10.0
    figures = table.report(replace(row, note="as at 100 %"), 1e9, 0.5, fast, 5.0)
    assert figures["ours_is_times_faster"] is None and figures["percent_of_gemms"] is None
    assert figures["median_s"] == 2.0


def test_the_search_can_tell_the_settings_apart() -> None:
    """Settings differ on the problem of the search; otherwise chance would choose between them.

    Two chunks that are both longer than the problem are the same there.
    """
    for settings in torch_contenders():
        rows = [min(c.logit_rows or 1 << 30, bench.SEARCH_ROWS["cpu"]) for c in settings]
        assert len(set(rows)) == len(rows)


def test_shapes_are_sizes_or_a_heads_name() -> None:
    words = ["8192x151936x1024", "smollm2:256", "qwen3-1.7b:3"]
    expected = [(8192, 151936, 1024), (256, 49152, 576), (3, 151936, 2048)]
    assert bench.parse(["--shapes", *words]).shapes == expected


@pytest.mark.parametrize("shape", ["llama:16", "300x16", "8x300x0", "8x300x16x2", "x", "smollm2:"])
def test_bad_shapes_are_refused(shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.parse(["--shapes", shape])
    rule = "argument --shapes: must be TxVxD, for example 8192x151936x1024, or HEAD:T, HEAD one of"
    error = capsys.readouterr().err
    assert rule in error and f"got {shape}" in error


def test_peers_that_cannot_run_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(peers.importlib.metadata, "distribution", absent)
    contenders, skipped = peers.peer_contenders(measure.CPU)
    assert contenders == [] and list(skipped) == list(peers.DISTRIBUTIONS)
    assert skipped["cut-cross-entropy"] == "it runs on a card only"
    assert skipped["TRL"].startswith("RuntimeError: trl must be installed, got ")
    _, skipped = peers.peer_contenders(torch.device("cuda"))
    assert "cut-cross-entropy must be installed" in skipped["cut-cross-entropy"]


def test_bare_gemms_of_a_card_are_chunks_of_rows() -> None:
    choices = gemm_choices(3000, V, torch.device("cuda"))
    assert choices == [("torch", rows, V) for rows in (1024, 2048, 3000)]
