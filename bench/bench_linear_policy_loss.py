"""The policy head, forward and backward, ours beside everybody else's; --skip: what the skipping mode saves.

    python -m bench.bench_linear_policy_loss [--quick] [--peers] [--shapes smollm2:1024 ..] [--rows 100 25]
    python -m bench.bench_linear_policy_loss --skip --student FOLDER --data FILE.parquet

Per shape and share of loss rows: every contender's loss, dX and dW are compared with fp64 (_head_problem.py); a wrong
one is named and not timed. The right ones then run in rounds, with the three bare GEMMs of the loss rows between them,
by torch.mm and by the GEMM our ops call; percentages are of the faster in its best chunking.
Rates count useful work, 6 N V D for N loss rows: projecting other rows, or the logits a second time, earns nothing.
A contender with several settings (chunk sizes) is first searched at 1024 rows of the same head, twice each, and runs at
its fastest.

With 25 % loss rows every contender but ours stands twice: projecting all rows as its users would, and given the loss
rows only, which leaves the kernel's gain. The former does what it did at 100 %; where that took long, it is not
repeated but marked "as at 100 %", without a ratio to what ran in other rounds. Extra MiB is the most that tensors made
by a run took at once, dX and dW included; RSS MiB how far resident memory rose, which sees GEMM libraries' scratch and
free heap that was not given back. The last line is one JSON object. --peers needs the environment that peers.txt
describes.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from bench import _card as card_of
from bench._head_problem import Errors, Problem, errors_of, make_problem, random_weight, useful_bytes, useful_flops
from bench._policy_heads import (
    Contender,
    Gemms,
    bare_gemms,
    fastest_gemms,
    ours,
    torch_contenders,
    torch_has_native_head,
)

HEADS = {"smollm2": (49152, 576), "qwen3-0.6b": (151936, 1024)}  # V, D
SHAPES = [f"{head}:{num_tokens}" for head in HEADS for num_tokens in (256, 1024, 4096)]
QUICK_SHAPES = ["smollm2:256", "smollm2:1024"]
SEARCH_ROWS, LONG_S = 1024, 10.0  # rows: so many that no two settings of a contender come to the same
OWN_SEARCH_FLOPS = 2e11  # smaller problems look for their own chunking of the bare GEMMs
HEADINGS = ("contender", "projects", "median ms", "p20-p80", "runs", "GFLOP/s", "% of GEMMs", "extra MiB", "RSS MiB")
HEADINGS = (*HEADINGS, "err loss", "err dX", "err dW", "ours is", "")
WIDTHS = (-34, -9, 9, 15, 4, 7, 10, 9, 7, 8, 8, 8, 8, -11)


@dataclass(frozen=True)
class Row:
    """One contender on one problem; note says why there is no time, or where the time is from."""

    contender: str
    setting: str
    projects: str
    note: str = ""
    times: card_of.Spread | None = None
    errors: Errors | None = None
    peak: card_of.PeakMib | None = None


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.skip:
        from bench import bench_linear_policy_loss_skip

        bench_linear_policy_loss_skip.run(args)
        return
    card = card_of.measure_card(args.threads)
    choices = [[ours(args.impl)], *torch_contenders()]
    if args.peers:
        from bench.peers_policy_heads import peer_contenders, peer_versions

        choices += peer_contenders()
        card |= peer_versions()
    if not torch_has_native_head():
        card["torch native"] = "left out: this torch has no torch.nn.LinearCrossEntropyOptions"
    card_of.print_card(card)
    results = []
    for head in dict.fromkeys(shape.partition(":")[0] for shape in args.shapes):
        tokens = sorted(int(shape.partition(":")[2]) for shape in args.shapes if shape.partition(":")[0] == head)
        results += bench_head(head, tokens, choices, args)
    line = json.dumps({"bench": "linear_policy_loss", "card": card, "results": results}, allow_nan=False)
    if args.json:
        args.json.write_text(line + "\n", encoding="utf-8")
    print(line)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", help=f"HEAD:T, HEAD one of {', '.join(HEADS)} or VxD; default all")
    parser.add_argument("--rows", nargs="+", type=int, default=[100, 25], help="percent of rows that carry loss")
    parser.add_argument("--impl", default="auto", help="of ours")
    parser.add_argument("--peers", action="store_true", help="TRL, Liger and verl too")
    parser.add_argument("--quick", action="store_true", help="SmolLM2's head at T 256 and 1024 only")
    parser.add_argument("--repeats", type=int, default=5, help="rounds, at most")
    parser.add_argument("--budget", type=float, default=40.0, help="seconds for the rounds of one table")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="file for the JSON line, besides")
    parser.add_argument("--skip", action="store_true", help="the skipping mode on real hidden states instead")
    parser.add_argument("--student", help="with --skip: Hugging Face folder")
    parser.add_argument("--data", help="with --skip: questions, .parquet or .jsonl")
    parser.add_argument("--loss-rows", type=int, default=1024, help="with --skip: tokens of answers, about")
    args = parser.parse_args(argv)
    args.shapes = args.shapes or (QUICK_SHAPES if args.quick else SHAPES)
    if args.skip and not (args.student and args.data):
        parser.error("--skip needs --student and --data")
    for shape in args.shapes:
        head, _, num_tokens = shape.partition(":")
        if not num_tokens.isdigit() or (head not in HEADS and not head.replace("x", "", 1).isdigit()):
            parser.error(f"--shapes must be HEAD:T, HEAD one of {', '.join(HEADS)} or VxD, got {shape}")
    return args


def bench_head(
    head: str, tokens: Sequence[int], choices: Sequence[Sequence[Contender]], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """All tables of one head, printed as they come."""
    vocab_size, hidden_size = HEADS[head] if head in HEADS else map(int, head.split("x"))
    weight_VD = random_weight(vocab_size, hidden_size)
    print(f"{head}: V {vocab_size}, D {hidden_size}")
    contenders, tiles = search(make_problem(weight_VD, min(SEARCH_ROWS, max(tokens)), 100), choices)
    results = []
    for num_tokens in tokens:
        whole: list[Row] = []
        for percent in sorted(args.rows, reverse=True):
            problem = make_problem(weight_VD, num_tokens, percent)
            num_rows = problem.rows_N.numel()
            flops, least = (work(num_rows, vocab_size, hidden_size) for work in (useful_flops, useful_bytes))
            rows, gemms = measure(problem, contenders, tiles, args, whole)
            whole = rows if percent == 100 else whole
            limits = {f"{lib}, tile {m} x {n}": flops / t.median_s / 1e9 for (lib, m, n), t in gemms.items()}
            table = f"{head}, T {num_tokens}, {percent} % loss rows"
            print(f"\n{table}: {flops / 1e9:.0f} GFLOP, at least {least / 1e9:.2f} GB")
            print("  three bare GEMMs, GFLOP/s: " + " · ".join(f"{rate:.0f} ({lib})" for lib, rate in limits.items()))
            card_of.print_row(HEADINGS, WIDTHS)
            where = {"shape": head, "V": vocab_size, "D": hidden_size, "T": num_tokens, "loss_percent": percent}
            fastest_s = min(times.median_s for times in gemms.values())
            results += [where | {"bare_gemms_gflop_s": limits} | report(row, flops, fastest_s, rows[0]) for row in rows]
    return results


def search(problem: Problem, choices: Sequence[Sequence[Contender]]) -> tuple[list[Contender], list[Gemms]]:
    """Of each contender the fastest setting that is right here; of each library the fastest chunking of bare GEMMs."""
    best = []
    for settings in choices:
        if len(settings) > 1:
            rounds = [[seconds_if_right(problem, contender) for contender in settings] for _ in range(2)]
            seconds = [min(pair) for pair in zip(*rounds, strict=True)]
            pairs = ", ".join(f"{c.setting} {s:.2f} s" for c, s in zip(settings, seconds, strict=True))
            print(f"  {settings[0].name} at {problem.rows_N.numel()} rows: {pairs}", flush=True)
            settings = [settings[seconds.index(min(seconds))]]
        best += settings
    return best, fastest_gemms(problem.hidden_TD.detach(), problem.weight_VD.detach())


def seconds_if_right(problem: Problem, contender: Contender) -> float:
    results, seconds = card_of.timed(lambda: contender.gradients(problem))  # not check(), whose profile costs time
    return seconds if errors_of(problem, *results).acceptable else math.inf


def measure(
    problem: Problem,
    contenders: Sequence[Contender],
    tiles: Sequence[Gemms],
    args: argparse.Namespace,
    whole: Sequence[Row],
) -> tuple[list[Row], dict[Gemms, card_of.Spread]]:
    """Rows of one table, and times of the bare GEMMs; `whole` is the table at 100 %, if made."""
    long_ones = {r.contender: r for r in whole if r.times is not None and r.times.median_s > LONG_S}
    masked = problem.rows_N.numel() < problem.targets_T.numel()
    rows, runs, firsts, indices = [], [], [], []
    for contender in [*contenders, *(replace(c, only_loss_rows=True) for c in contenders[1:] if masked)]:
        projects = "loss rows" if contender.only_loss_rows or not masked else "all rows"
        row = Row(contender.name, contender.setting, projects)
        if projects == "all rows" and contender.name in long_ones:
            before = long_ones[contender.name]
            rows.append(replace(before, projects=projects, note="as at 100 %"))
            continue
        row, seconds = check_row(problem, contender, row)
        if not row.note:
            indices.append(len(rows))
            runs.append(lambda contender=contender: contender.gradients(problem))
            firsts.append(seconds)
        rows.append(row)
    hidden, weight = problem.hidden_TD.detach()[problem.rows_N], problem.weight_VD.detach()
    if useful_flops(len(hidden), *weight.shape) < OWN_SEARCH_FLOPS:
        tiles = fastest_gemms(hidden, weight)
    gemms = bare_gemms(hidden, weight, tiles)
    first_gemms = [card_of.first_seconds(run) for run in gemms.values()]
    num_rounds = min(args.repeats, int(args.budget / (sum(firsts) + sum(first_gemms))))
    samples = card_of.time_rounds([*runs, *gemms.values()], num_rounds)
    if num_rounds < 3:  # the checked run counts: where it is long, what is special about a first run is small
        samples = [[first, *more] for first, more in zip([*firsts, *first_gemms], samples, strict=True)]
    for idx, seconds in zip(indices, samples, strict=False):
        rows[idx] = replace(rows[idx], times=card_of.spread(seconds))
    return rows, {tile: card_of.spread(s) for tile, s in zip(gemms, samples[len(runs) :], strict=True)}


def check(problem: Problem, contender: Contender) -> tuple[Errors, float, card_of.PeakMib]:
    """Errors, seconds and memory of one run."""

    def run() -> tuple[tuple[Tensor, Tensor, Tensor], float]:
        return card_of.timed(lambda: contender.gradients(problem))

    (results, seconds), peak = card_of.extra_peak_mib(run)
    return errors_of(problem, *results), seconds, peak


def check_row(problem: Problem, contender: Contender, row: Row) -> tuple[Row, float]:
    """The row with its errors and memory, or with a note why the contender must not be timed; seconds of the run."""
    num_rows = problem.rows_N.numel() if contender.only_loss_rows else problem.targets_T.numel()
    need, free = contender.peak_gib(num_rows, *problem.weight_VD.shape), card_of.free_gib()
    if need > 0.9 * free:
        return replace(row, note=f"skipped: needs about {need:.1f} GiB, {free:.1f} are free"), 0.0
    errors, seconds, peak = check(problem, contender)
    row = replace(row, errors=errors, peak=peak)
    return (
        row if errors.acceptable else replace(row, note=f"WRONG, not timed: worst row off by {errors.row:.1g}")
    ), seconds


def report(row: Row, flops: float, fastest_gemms_s: float, ours_row: Row) -> dict[str, Any]:
    """Print one aligned row; the same for the JSON line."""
    name = f"{row.contender} ({row.setting})" if row.setting else row.contender
    known: dict[str, Any] = {"contender": row.contender, "setting": row.setting, "projects": row.projects}
    known |= {"note": row.note, "extra_peak_mib": None if row.peak is None else row.peak._asdict()}
    known["errors"] = (
        None if row.errors is None else {k: v if math.isfinite(v) else str(v) for k, v in asdict(row.errors).items()}
    )
    if row.times is None:
        print(f"{name:34}  {row.projects:9}  {row.note}", flush=True)
        return known
    times, ratio, percent = row.times, None, None
    if not row.note and ours_row.times:  # of the same rounds
        ratio, percent = times.median_s / ours_row.times.median_s, 100 * fastest_gemms_s / times.median_s
    known |= times._asdict() | {"gflop_s": flops / times.median_s / 1e9, "ours_is_times_faster": ratio}
    known["percent_of_gemms"] = percent
    assert row.errors is not None and row.peak is not None
    card_of.print_row(
        (
            name,
            row.projects,
            card_of.milliseconds(times.median_s),
            f"{card_of.milliseconds(times.p20_s)}-{card_of.milliseconds(times.p80_s)}",
            str(times.num_samples),
            f"{known['gflop_s']:.0f}",
            "-" if percent is None else f"{percent:.0f} %",
            f"{row.peak.tensors:.0f}",
            "-" if row.peak.resident is None else f"{row.peak.resident:.0f}",
            *(f"{error:.0e}" for error in (row.errors.loss, row.errors.hidden, row.errors.weight)),
            "-" if ratio is None else f"{ratio:.2f} x",
            row.note,
        ),
        WIDTHS,
    )
    return known


if __name__ == "__main__":
    main()
