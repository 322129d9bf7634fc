"""Makes one table of the bench: checks, times and prints contenders.

Read measure_rows. check_row checks each contender; those that are right then run in rounds,
together with the bare GEMMs. `search` runs once before all tables of a head and picks each
contender's fastest setting.
"""

from __future__ import annotations

import argparse
import math
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import measure
from bench.policy_head.contenders import Contender
from bench.policy_head.gemms import Gemms, bare_gemms, fastest_gemms
from bench.policy_head.problem import Errors, Problem, errors_of, useful_flops
from socpo_fast.socratic.plugin import text_of

LONG_S = 10.0  # contenders that take longer are not run again where it would tell nothing new
OWN_SEARCH_FLOPS = 2e11  # smaller problems choose their own chunking of the bare GEMMs
HEADINGS = ("contender", "projects", "median ms", "p20-p80", "runs", "GFLOP/s", "% of peak")
HEADINGS = (*HEADINGS, "% of GEMMs", "extra MiB", "RSS MiB", "err loss", "err dX", "err dW")
HEADINGS = (*HEADINGS, "ours is", "")
WIDTHS = (-34, -9, 9, 15, 4, 7, 9, 10, 9, 7, 8, 8, 8, 8, -11)
_TORCH = Path(torch.__file__).parent


@dataclass(frozen=True)
class Row:
    """One contender on one problem; `note` says why it has no time, or where its time is from."""

    contender: str
    setting: str
    projects: str
    note: str = ""
    times: measure.Spread | None = None
    errors: Errors | None = None
    peak: measure.PeakMib | None = None


def search(
    problem: Problem, choices: Sequence[Sequence[Contender]]
) -> tuple[list[Contender], list[Gemms]]:
    """Returns each contender's fastest setting with right results, and the fastest bare GEMMs."""
    best = []
    for settings in choices:
        if len(settings) > 1:
            rounds = [[seconds_if_right(problem, c) for c in settings] for _ in range(2)]
            seconds = [min(pair) for pair in zip(*rounds, strict=True)]
            pairs = zip(settings, seconds, strict=True)
            tried_text = ", ".join(f"{c.setting} {s:.2f} s" for c, s in pairs)
            name = settings[0].name
            num_rows = problem.rows_N.numel()
            print(f"  {name} at {num_rows} rows: {tried_text}", flush=True)
            settings = [settings[seconds.index(min(seconds))]]
        best += settings
    return best, fastest_gemms(problem.hidden_TD.detach(), problem.weight_VD.detach())


def seconds_if_right(problem: Problem, contender: Contender) -> float:
    """Returns the seconds of a run; inf if its results are wrong or it raises.

    A row of the table will show the error. check() would measure memory as well, which takes time.
    """
    run = partial(contender.gradients, problem)
    try:
        results, seconds = measure.timed(run, problem.device)
    except Exception:
        # An error of a peer belongs into its row of the table; an error of ours is a bug.
        if contender.is_ours:
            raise
        return math.inf
    return seconds if problem.accepts(errors_of(problem, *results)) else math.inf


def measure_rows(
    problem: Problem,
    contenders: Sequence[Contender],
    tiles: Sequence[Gemms],
    args: argparse.Namespace,
    whole: Sequence[Row],
) -> tuple[list[Row], dict[Gemms, measure.Spread]]:
    """Returns the rows of one table, and the times of the bare GEMMs.

    Args:
        whole: the rows of the table at 100 % loss rows, if it was made before.
    """
    long_ones = {r.contender: r for r in whole if r.times is not None and r.times.median_s > LONG_S}
    masked = problem.rows_N.numel() < problem.targets_T.numel()
    # A trainer that masks its loss could give a contender the loss rows only. Such variants of all
    # contenders but ours, which skips the other rows by itself, come after them.
    loss_row_variants = [
        replace(c, only_loss_rows=True) for c in contenders if not c.is_ours and masked
    ]
    rows = []
    runs = []
    first_seconds = []
    indices = []
    faults: dict[int, str] = {}  # by row
    for contender in [*contenders, *loss_row_variants]:
        projects = "loss rows" if contender.only_loss_rows or not masked else "all rows"
        row = Row(contender.name, contender.setting, projects)
        if projects == "all rows" and contender.name in long_ones:
            full_row = long_ones[contender.name]
            rows.append(replace(full_row, projects=projects, note="as at 100 %"))
            continue
        row, seconds = check_row(problem, contender, row)
        if not row.note:
            indices.append(len(rows))
            runs.append(partial(run_again, problem, contender, faults, len(rows)))
            first_seconds.append(seconds)
        rows.append(row)
    gemms = gemms_of_table(problem, tiles)
    first_gemms = [measure.first_seconds(run, problem.device) for run in gemms.values()]
    num_rounds = min(args.repeats, int(args.budget / (sum(first_seconds) + sum(first_gemms))))
    samples = measure.time_rounds([*runs, *gemms.values()], num_rounds, problem.device)
    if num_rounds < 3:
        # Few rounds fit into the budget, so runs are long. Then the checked run counts as well: its
        # warming up is too short to show.
        pairs = zip([*first_seconds, *first_gemms], samples, strict=True)
        samples = [[first, *more] for first, more in pairs]
    for idx, seconds in zip(indices, samples, strict=False):
        if idx in faults:
            rows[idx] = replace(rows[idx], note=f"RAISED in a later run: {faults[idx]}")
        else:
            rows[idx] = replace(rows[idx], times=measure.spread(seconds))
    gemm_samples = zip(gemms, samples[len(runs) :], strict=True)
    return rows, {tile: measure.spread(seconds) for tile, seconds in gemm_samples}


def gemms_of_table(problem: Problem, tiles: Sequence[Gemms]) -> dict[Gemms, Any]:
    """Returns bare GEMMs of the loss rows, by these tiles or by the best ones for this table.

    The tiles of the search were the best for its number of rows. A small table looks for its own
    best tiles, and so does every table on a card.
    """
    hidden = problem.hidden_TD.detach()[problem.rows_N]
    weight = problem.weight_VD.detach()
    flops = useful_flops(len(hidden), *weight.shape)
    if flops < OWN_SEARCH_FLOPS or problem.device.type == "cuda":
        tiles = fastest_gemms(hidden, weight)
    return bare_gemms(hidden, weight, tiles)


def check_row(problem: Problem, contender: Contender, row: Row) -> tuple[Row, float]:
    """Returns the row with errors and memory, or with a note why it is not timed; and seconds."""
    num_rows = problem.rows_N.numel() if contender.only_loss_rows else problem.targets_T.numel()
    # A contender that swaps or dies of memory would end the bench, so it is not even tried.
    need = contender.peak_gib(num_rows, *problem.weight_VD.shape)
    free = measure.free_gib(problem.device)
    if need > 0.9 * free:
        note = f"skipped: needs about {need:.1f} GiB, {free:.1f} are free"
        return replace(row, note=note), 0.0
    try:
        errors, seconds, peak = check(problem, contender)
    except (Exception, SystemExit) as error:  # a user's function may call exit()
        if contender.is_ours:
            raise
        return replace(row, note=f"RAISED, not timed: {cause(error)}"), 0.0
    row = replace(row, errors=errors, peak=peak)
    if not problem.accepts(errors):
        errors_text = (
            f"loss off by {errors.loss:.1g}, dX {errors.hidden:.1g}, dW {errors.weight:.1g}"
        )
        row = replace(row, note=f"WRONG, not timed: {errors_text}, worst row {errors.row:.1g}")
    return row, seconds


def check(problem: Problem, contender: Contender) -> tuple[Errors, float, measure.PeakMib]:
    """Returns errors, seconds and memory of one run; on a card of the second one."""

    def run() -> tuple[tuple[Tensor, Tensor, Tensor], float]:
        return measure.timed(lambda: contender.gradients(problem), problem.device)

    if problem.device.type == "cuda":
        run()  # compiles
    (results, seconds), peak = measure.extra_peak_mib(run, problem.device)
    return errors_of(problem, *results), seconds, peak


def run_again(problem: Problem, contender: Contender, faults: dict[int, str], row_idx: int) -> None:
    """Runs a contender, to be timed; a peer that raises now gets no time, and the others go on."""
    if row_idx in faults:
        return
    try:
        contender.gradients(problem)
    except (Exception, SystemExit) as error:
        if contender.is_ours:
            raise
        faults[row_idx] = cause(error)


def cause(error: BaseException) -> str:
    """Describes an error, with the last line outside of torch, usually the contender's."""
    message = " ".join(f"{type(error).__name__}: {text_of(error, str)}".split())
    frames = traceback.extract_tb(error.__traceback__)
    frame = [frame for frame in frames if _TORCH not in Path(frame.filename).parents][-1]
    return f"{message} ({Path(frame.filename).name} line {frame.lineno})"


def report(
    row: Row,
    flops: float,
    fastest_gemms_s: float,
    ours_row: Row,
    peak_gflop_s: float,
) -> dict[str, Any]:
    """Prints one aligned row; returns the same for the JSON line."""
    name = f"{row.contender} ({row.setting})" if row.setting else row.contender
    fields: dict[str, Any] = {"contender": row.contender, "setting": row.setting}
    fields |= {"projects": row.projects, "note": row.note}
    fields["extra_peak_mib"] = None if row.peak is None else row.peak._asdict()
    fields["errors"] = None if row.errors is None else as_json(asdict(row.errors))
    if row.times is None:
        print(f"{name:34}  {row.projects:9}  {row.note}", flush=True)
        return fields
    times = row.times
    ratio = None
    percent = None
    if not row.note and ours_row.times:  # of the same rounds
        ratio = times.median_s / ours_row.times.median_s
        percent = 100 * fastest_gemms_s / times.median_s
    gflop_s = flops / times.median_s / 1e9
    fields |= times._asdict() | {"gflop_s": gflop_s, "ours_is_times_faster": ratio}
    fields |= {"percent_of_gemms": percent, "percent_of_peak": 100 * gflop_s / peak_gflop_s}
    assert row.errors is not None and row.peak is not None
    low, median, high = map(measure.milliseconds, (times.p20_s, times.median_s, times.p80_s))
    cells = [name, row.projects, median, f"{low}-{high}", str(times.num_samples), f"{gflop_s:.0f}"]
    cells += [f"{fields['percent_of_peak']:.0f} %", "-" if percent is None else f"{percent:.0f} %"]
    cells += [f"{row.peak.tensors:.0f}"]
    cells += ["-" if row.peak.resident is None else f"{row.peak.resident:.0f}"]
    cells += [f"{error:.0e}" for error in (row.errors.loss, row.errors.hidden, row.errors.weight)]
    measure.print_row([*cells, "-" if ratio is None else f"{ratio:.2f} x", row.note], WIDTHS)
    return fields


def as_json(numbers: dict[str, float]) -> dict[str, float | str]:
    """Replaces NaN and infinity, which JSON lacks, by text."""
    return {name: x if math.isfinite(x) else str(x) for name, x in numbers.items()}
