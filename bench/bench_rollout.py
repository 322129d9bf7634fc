"""Rollouts: our engine beside other ones and beside the linears it cannot do without.

    python -m bench.bench_rollout --student FOLDER [--cases a1 a16 ..] [--peers ..] [--dtype bfloat16] [--json FILE]

Cases (bench/_rollout_cases.py): aN, N prompts of 40 tokens with one answer of 64; b, 8 questions of 300 tokens with 8
answers of 100; c, b and a second attempt for half of the rollouts behind 60 tokens of guidance. Fixed lengths,
temperature 1, no truncation. Printed for each: generated tok/s over the whole case, the prompt's tok/s, tokens
prefilled (counted by a hook on layer 0) beside the unique ones, peak memory, and the share of the limit: the case's
linears replayed alone in this process, by the faster of torch's and ours. Then where our step's time goes.

A peer runs in a process of its own, with its own Python (bench/peers.txt), after our rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench._card import measure_card, print_card, print_row, timed
from bench._rollout_cases import CASES, Case, linear_flops
from socpo_fast import Engine, SamplingParams, load_student
from socpo_fast.engine.runner import Runner
from socpo_fast.model.decoder import Decoder
from socpo_fast.ops.linear import linear_unchecked
from socpo_fast.types import Attempt

PEERS = ("generate-copied", "generate-shared", "generate-batch", "ctranslate2", "vllm", "llama.cpp")
PARTS = {  # of a step, by the names of ops in a profile
    "linears": ("socpo::linear", "aten::linear"),
    "attention": ("socpo::paged_attention",),
    "norms, SwiGLU, rotary": ("socpo::rms_norm", "socpo::swiglu", "socpo::rotary_write"),
    "head and sampling": ("socpo::linear_sample",),
}


def run_case(engine: Engine, case: Case, seed: int) -> list[list[Attempt]]:
    """First attempts, and the second ones behind them."""
    vocab_size = engine.student.config.vocab_size
    params = SamplingParams(
        n=case.num_rollouts, temperature=1.0, max_new_tokens=case.new_tokens, eos_ids=(), ignore_eos=True, seed=seed
    )
    groups = engine.generate(case.prompts(seed, vocab_size), params, keep=case.resumed > 0)
    resumed = [attempt for group in groups for attempt in group[: case.resumed]]
    for attempt in resumed:
        engine.resume(attempt, case.suffix(seed, vocab_size), params)
    seconds: list[Attempt] = []
    while engine.has_work:
        seconds += engine.step()
    engine.release([attempt for group in groups for attempt in group] + seconds)
    return [*groups, sorted(seconds, key=lambda attempt: (attempt.key, attempt.rollout_idx))]


def rows_through_layer_0(student: Decoder, run: Callable[[], Any]) -> int:
    """Tokens that entered the first layer meanwhile, counted from outside."""
    counts: list[int] = []
    hook = student.layers[0].register_forward_pre_hook(lambda _, args: counts.append(len(args[1])))
    try:
        run()
    finally:
        hook.remove()
    return sum(counts)


def limit_seconds(student: Decoder, case: Case, most: int = 12) -> dict[str, float]:
    """Seconds of the case's linears alone, by each GEMM there is; at most `most` equal steps are run and scaled up."""
    layers = [m for layer in student.layers for m in layer.modules() if isinstance(m, nn.Linear)]
    widest = max(case.num_prompts * case.prompt_tokens, case.sequences)
    inputs = {m.in_features: torch.randn(widest, m.in_features) for m in [*layers, student.lm_head]}

    def forward(linear: Callable[..., Tensor], rows: int, sampled: int) -> None:
        for m in layers if rows else []:
            linear(inputs[m.in_features][:rows], m.weight, m.bias)
        if sampled:
            linear(inputs[student.lm_head.in_features][:sampled], student.lm_head.weight)

    def wide(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, weight.float(), bias if bias is None else bias.float())

    linears = {"socpo": linear_unchecked} | ({"torch": wide} if student.lm_head.weight.dtype == torch.float32 else {})
    seconds = dict.fromkeys(linears, 0.0)
    with torch.no_grad():
        for rows, sampled, times in case.linear_steps():
            for name, linear in linears.items():
                forward(linear, rows, sampled)
                each = [timed(lambda: forward(linear, rows, sampled))[1] for _ in range(min(times, most))]  # noqa: B023
                seconds[name] += median(each) * times
    return seconds


def check(engine: Engine, case: Case) -> None:
    """The same tokens twice, and log-probs that a plain forward of transformers' model would give are our tests'."""
    first, second = (run_case(engine, case, seed=0) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert [a.token_ids for a in one] == [a.token_ids for a in other], f"{case.name}: two runs differ"
        assert all(torch.equal(a.logprobs, b.logprobs) for a, b in zip(one, other, strict=True)), case.name


def parts_of(engine: Engine, case: Case) -> dict[str, float]:
    """Share of a run's time in each part of a step; the rest is Python, small tensors and the scheduler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        _, seconds = timed(lambda: run_case(engine, case, seed=99))
    spent = {event.key: event.self_cpu_time_total / 1e6 for event in profile.key_averages()}
    shares = {part: sum(spent.get(name, 0.0) for name in names) / seconds for part, names in PARTS.items()}
    return shares | {"the rest": 1 - sum(shares.values())}


def peak_rss_mib() -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def measure(engine: Engine, case: Case, repeats: int) -> dict[str, Any]:
    """Ours and the limit."""
    check(engine, case)
    limit = limit_seconds(engine.student, case)
    seconds = [timed(lambda: run_case(engine, case, seed=i))[1] for i in range(1, repeats + 1)]  # noqa: B023
    one_token = Case(**asdict(case) | {"new_tokens": 1, "guidance": 0, "resumed": 0})
    prefill = median(timed(lambda: run_case(engine, one_token, seed=i))[1] for i in range(1, repeats + 1))  # noqa: B023
    rows = rows_through_layer_0(engine.student, lambda: run_case(engine, case, seed=0))
    limit_again = limit_seconds(engine.student, case)
    limit = {name: min(value, limit_again[name]) for name, value in limit.items()}
    return {
        "seconds": seconds,
        "tok_s": case.generated / median(seconds),
        "prefill_tok_s": case.num_prompts * case.prompt_tokens / prefill,
        "prefilled": rows - (case.sequences + case.second_attempts) * (case.new_tokens - 1),
        "unique": case.unique_prefill,
        "limit_s": limit,
        "limit_tok_s": case.generated / min(limit.values()),
        "share_of_limit": min(limit.values()) / median(seconds),
        "limit_gflop_s": linear_flops(case, engine.student.config) / min(limit.values()) / 1e9,
        "peak_mib": peak_rss_mib(),
        "parts": parts_of(engine, case),
    }


def run_peer(options: argparse.Namespace, peer: str, case: Case, vocab_size: int) -> dict[str, Any]:
    """A peer's seconds, from a process of its own; an error is reported and the others go on."""
    rounds = [
        {"prompts": case.prompts(i, vocab_size), "suffix": case.suffix(i, vocab_size)}
        for i in range(options.repeats + 1)
    ]
    python = options.vllm_python if peer == "vllm" else options.peers_python
    env = os.environ | {"OMP_NUM_THREADS": str(options.threads), "SOCPO_PEER_LLAMA": options.llama_dir or ""}
    if peer == "vllm":
        libraries = sorted(Path(options.vllm_python).parent.parent.glob("lib/**/libiomp5.so"))
        env |= {"VLLM_CPU_OMP_THREADS_BIND": f"0-{options.threads - 1}", "VLLM_CPU_KVCACHE_SPACE": "4"}
        env |= {"LD_PRELOAD": str(libraries[0])} if libraries else {}
    with tempfile.TemporaryDirectory() as folder:
        request, answer = Path(folder) / "request.json", Path(folder) / "answer.json"
        job = {
            "peer": peer,
            "student": options.student,
            "threads": options.threads,
            "case": asdict(case),
            "rounds": rounds,
        }
        request.write_text(json.dumps(job | {"ct2_dir": options.ct2_dir}), encoding="utf-8")
        command = [python, str(Path(__file__).with_name("peers_rollout.py")), str(request), str(answer)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=options.timeout_s, check=False)
        if done.returncode != 0:
            return {"error": (done.stderr or done.stdout).strip().splitlines()[-1:]}
        result = json.loads(answer.read_text(encoding="utf-8"))
    return result | {"tok_s": case.generated / median(result["seconds"])}


def print_results(results: dict[str, dict[str, Any]], peers: Sequence[str]) -> None:
    names = ["ours", "limit", *peers]
    widths = [-6, *[max(9, len(name)) for name in names], 9, 15, 9, 8]
    print_row(["case", *names, "of limit", "prefilled/uniq", "prompt/s", "MiB"], widths)
    for case_name, result in results.items():
        ours = result["ours"]
        cells = [f"{ours['tok_s']:.0f}", f"{ours['limit_tok_s']:.0f}"]
        cells += [f"{result[p]['tok_s']:.0f}" if "tok_s" in result.get(p, {}) else "-" for p in peers]
        counts = f"{ours['prefilled']}/{ours['unique']}"
        cells += [f"{ours['share_of_limit']:.0%}", counts, f"{ours['prefill_tok_s']:.0f}", f"{ours['peak_mib']:.0f}"]
        print_row([case_name, *cells], widths)
    print("\ngenerated tok/s above; where a run's time goes:")
    for case_name, result in results.items():
        print(f"  {case_name:4}", "  ".join(f"{part} {share:.1%}" for part, share in result["ours"]["parts"].items()))


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.bench_rollout", description="Rollouts beside other engines.")
    parser.add_argument("--student", required=True, help="a Hugging Face folder; the figures are SmolLM2-135M's")
    parser.add_argument("--cases", nargs="*", default=[case.name for case in CASES], choices=[c.name for c in CASES])
    parser.add_argument("--peers", nargs="*", default=[], choices=PEERS)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of our stored weights")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-cascade", action="store_true", help="read shared pages once for each rollout")
    parser.add_argument("--peers-python", default=sys.executable)
    parser.add_argument("--vllm-python", default=sys.executable)
    parser.add_argument("--ct2-dir", help="the student converted by ct2-transformers-converter, fp32")
    parser.add_argument("--llama-dir", help="folder of llama-batched-bench and student.gguf (F32)")
    parser.add_argument("--timeout-s", type=float, default=1800)
    parser.add_argument("--json", help="write everything measured here")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_options(arguments)
    card = measure_card(options.threads)
    print_card(card)
    student = load_student(options.student, dtype=options.dtype, device="cpu")
    page_bytes = Runner.page_bytes(student, 32)
    results: dict[str, dict[str, Any]] = {}
    for case in (case for case in CASES if case.name in options.cases):
        tokens = case.prompt_tokens + 2 * case.new_tokens + case.guidance + 64
        gib = case.sequences * (tokens // 32 + 2) * page_bytes / 2**30
        engine = Engine(student, kv_cache_gib=gib, token_budget=2048, cascade=not options.no_cascade)
        results[case.name] = {"ours": measure(engine, case, options.repeats)}
        del engine
        for peer in options.peers:
            results[case.name][peer] = run_peer(options, peer, case, student.config.vocab_size)
            if error := results[case.name][peer].get("error"):
                print(f"{case.name}: {peer} did not run: {error}", flush=True)
    print_results(results, options.peers)
    report = {"card": card, "options": vars(options), "results": results}
    if options.json:
        Path(options.json).write_text(json.dumps(report), encoding="utf-8")
    print(json.dumps({name: round(result["ours"]["tok_s"], 1) for name, result in results.items()}))


if __name__ == "__main__":
    main()
