"""Prints a case: one row a contender, where our engine's time goes, and the last line's summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from bench import measure
from bench.rollout.cases import Case
from bench.rollout.peers import Result

HEADINGS = ("contender", "tok/s", "p20-p80", "runs", "decode tok/s", "prompt tok/s", "prefilled")
HEADINGS = (*HEADINGS, "MiB", "of peak", "of limit", "ours is", "")
WIDTHS = (-34, 7, 13, 4, 12, 12, 9, 6, 8, 8, 8, -9)


@dataclass
class Row:
    """One contender in one case: its results by round, or an error."""

    name: str
    setting: str = ""
    rounds: list[Result] = field(default_factory=list)
    tried: dict[str, float] = field(default_factory=dict)  # seconds of each setting
    error: str = ""

    @property
    def storage(self) -> str:
        """Returns the name's suffix for weights in another dtype, such as ", bf16"; else ""."""
        return self.name[len(self.name.partition(", ")[0]) :]


def figures(
    row: Row, case: Case, rows: Sequence[Row], rooflines: Mapping[str, float]
) -> dict[str, Any]:
    """Returns the numbers that the table shows of a row; {} if it did not run.

    Args:
        rooflines: seconds of the case's linears at the machine's peaks, by Row.storage.
    """
    if row.error or not row.rounds:
        return {}

    # Paired by rounds, as the machine's speed may change from round to round.
    def ratio(other: Row) -> float:
        pairs = zip(row.rounds, other.rounds, strict=False)
        return median(result["seconds"] / base["seconds"] for result, base in pairs)

    by_name = {other.name: other for other in rows}
    seconds, prefill_s = (median(r[key] for r in row.rounds) for key in ("seconds", "prefill_s"))
    spread = measure.spread([result["seconds"] for result in row.rounds])
    num_prompt_tokens = case.questions * case.prompt
    numbers = {"tok_s": case.generated / seconds, "prompt_tok_s": num_prompt_tokens / prefill_s}
    numbers |= {
        "p20_tok_s": case.generated / spread.p80_s,
        "p80_tok_s": case.generated / spread.p20_s,
    }
    if not case.guidance and seconds > prefill_s:
        numbers["decode_tok_s"] = (case.generated - case.num_first) / (seconds - prefill_s)
    numbers["of_peak"] = rooflines[row.storage] / seconds
    numbers["of_limit"] = 1 / ratio(by_name[f"limit{row.storage}"])
    return numbers | {"ours_is_times_faster": ratio(by_name["ours"])}


def print_result(row: Row, known: Mapping[str, Any]) -> None:
    """Prints one aligned row of `figures`."""
    name = f"{row.name} ({row.setting})" if row.setting else row.name
    if not known:
        print(f"{name:34}  {row.error}", flush=True)
        return
    last = row.rounds[-1]
    decode = known.get("decode_tok_s")
    cells = [name, f"{known['tok_s']:.1f}", f"{known['p20_tok_s']:.1f}-{known['p80_tok_s']:.1f}"]
    cells += [f"{len(row.rounds)}", "-" if decode is None else f"{decode:.1f}"]
    cells += [f"{known['prompt_tok_s']:.0f}"]
    counts = (last.get(key) for key in ("prefilled", "peak_mib"))
    cells += ["-" if count is None else f"{count:.0f}" for count in counts]
    cells += [f"{known['of_peak']:.1%}", f"{known['of_limit']:.1%}"]
    measure.print_row([*cells, f"{known['ours_is_times_faster']:.2f} x", ""], WIDTHS)


def print_parts(parts: Mapping[str, Mapping[str, float]]) -> None:
    """Prints where our engine's time goes, one column a part."""
    names = list(next(iter(parts.values())))
    widths = [-34, *(max(12, len(name)) for name in names)]
    measure.print_row(["where the time goes", *names], widths)
    for name, seconds in parts.items():
        total = sum(seconds.values())
        cells = [
            f"{measure.milliseconds(s)} ms {s / total:4.0%}" if s else "-" for s in seconds.values()
        ]
        measure.print_row([name, *cells], widths)
    print(flush=True)


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns one case's entry in the last line."""
    run_rows = {row["name"]: row for row in rows if "tok_s" in row}
    rates = {name: round(row["tok_s"], 1) for name, row in run_rows.items()}
    ours_is = {
        name: row["ours_is_times_faster"]
        for name, row in run_rows.items()
        if not name.startswith(("ours", "limit"))
    }
    same_dtype = [name for name in ours_is if not name.endswith("bf16")]
    best = min(same_dtype, key=ours_is.__getitem__, default=None)
    ratio = None if best is None else round(ours_is[best], 2)
    share = round(run_rows["ours"]["of_limit"], 3)
    return {"tok_s": rates, "of_limit": share, "best_peer": best, "times_best_peer": ratio}
