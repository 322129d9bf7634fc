"""An update's forward and backward: a group's tree beside rows with a prompt of their own each.

    python -m bench.update --student FOLDER [--cases a b c] [--rounds 5] [--threads 2] [--json FILE]
    python -m bench.update --student FOLDER --peers trl     # beside GRPOTrainer's, on the CPU
    python -m bench.update --student FOLDER --device cuda [--dtype bf16]

Cases: a, eight rollouts of a prompt of 300 tokens with answers of 100; b, the same, half of which
go on with 60 tokens of guidance and a second answer of 100; c, a prompt of 1000 and answers of 300.
fp32, on a card bf16; random token ids, every answer with an advantage, log-probs that are the
student's own: no ratio clips and no row of the head is left out.

Before a case is timed, all must agree about the gradient, and no more tokens may be forwarded than
the tree has. `trl` is TRL's own update of the same rollouts (bench/trl_peer.py) with its fastest
number of rows a microbatch. One round runs each once; `ours is` is paired by rounds.
`attention` is tree_attention's share of a profiled run, forward and backward. GFLOP/s counts what
was forwarded: 6 a weight and token, the head over sampled tokens only, 14 E a pair of query and key
and head; `of peak` is of the header's. MiB is the most that was allocated beyond weights. The last
line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.autograd.profiler import profile

from bench import machine, measure
from bench.trl_peer import TrlUpdate
from socpo_fast.model import Decoder, load_student
from socpo_fast.model.config import ModelConfig
from socpo_fast.ops.tree_attention import num_pairs
from socpo_fast.training.packing import Packing, count_unique_tokens, pack_rollouts
from socpo_fast.training.step import GradientStats, compute_logprobs, policy_gradients
from socpo_fast.types import Attempt, Rollout, RolloutKey, ShownGuidance, Turn

PACKINGS: tuple[Packing, ...] = ("tree", "rows")
ATTENTION = ("socpo_fast::tree_attention", "socpo_fast::tree_attention_backward")
# The largest difference between the packings' gradients, relative to the gradient's norm. In bf16
# each activation is rounded to 3 digits, and the packings add up in different orders.
MOST_ERROR = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
TOKEN_BUDGET = {"cpu": 4096, "cuda": 16384}
HEADINGS = ("case", "packing", "median s", "p20-p80", "GFLOP/s", "of peak", "attention")
HEADINGS = (*HEADINGS, "forwarded", "unique", "MiB", "ours is")
WIDTHS = (-4, -7, 8, 13, 7, 7, 9, 9, 6, 6, 8)


@dataclass(frozen=True)
class Case:
    """Rollouts of one question, with lengths in tokens.

    If guidance > 0, every second rollout has a second attempt behind it.
    """

    name: str
    prompt: int
    answer: int
    guidance: int = 0
    group_size: int = 8


CASES = {
    "a": Case("a", 300, 100),
    "b": Case("b", 300, 100, guidance=60),
    "c": Case("c", 1000, 300),
}


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    card = machine.measure_card(args.threads, args.device, args.dtype)
    machine.print_card(card)
    dtype = str(args.dtype).removeprefix("torch.")
    student = load_student(args.student, dtype=dtype, device=args.device)
    measure.print_row(HEADINGS, WIDTHS)
    cases = {}
    for name in args.cases:
        case = CASES[name]
        if args.quick:
            case = Case(name, case.prompt // 25, case.answer // 25, case.guidance // 25, 4)
        cases[name] = bench_case(case, student, card, args)
    report = {"bench": "update", "card": card, "args": vars(args), "cases": cases}
    if args.json:
        args.json.write_text(json.dumps(report, default=str) + "\n", encoding="utf-8")
    print(json.dumps({"bench": "update"} | cases))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the options."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("bench.update", description=__doc__, formatter_class=form)
    parser.add_argument("--student", required=True, help="Hugging Face folder")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    machine.add_options(parser)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    words = "tokens of a microbatch; default 4096, on a card 16384"
    parser.add_argument("--token-budget", type=int, help=words)
    words = "trl: GRPOTrainer's update beside ours, on the CPU in fp32"
    parser.add_argument("--peers", nargs="*", default=[], choices=["trl"], help=words)
    parser.add_argument("--quick", action="store_true", help="a few tokens: does everything run?")
    parser.add_argument("--json", type=Path, help="file for everything measured")
    args = parser.parse_args(argv)
    machine.settle(parser, args)
    if args.peers and args.device.type != "cpu":
        parser.error("--peers needs --device cpu")
    args.token_budget = args.token_budget or TOKEN_BUDGET[args.device.type]
    return args


def bench_case(
    case: Case,
    student: Decoder,
    card: dict[str, Any],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Checks, times and prints one case; a wrong gradient ends the bench."""
    rollouts = make_rollouts(case, student, args.token_budget)

    def update(packing: Packing) -> GradientStats:
        student.zero_grad(set_to_none=True)
        options = {"packing": packing, "token_budget": args.token_budget}
        return policy_gradients(student, rollouts, temperature=1.0, **options)

    stats = {}
    gradients = {}
    peaks_mib = {}
    for packing in PACKINGS:
        student.zero_grad(set_to_none=True)
        run = partial(update, packing)
        if args.device.type == "cuda":
            run()  # compiles the kernels, so that the measured run is like all later ones
            student.zero_grad(set_to_none=True)
        stats[packing], peak = measure.extra_peak_mib(run, args.device)
        peaks_mib[packing] = peak.tensors
        gradients[packing] = [param.grad for param in student.parameters()]
    error = check(stats, gradients, rollouts, MOST_ERROR[args.dtype])
    del gradients["rows"]  # of the model's size; the timed runs should not have to bear it

    runs: dict[str, Callable[[], object]] = {name: partial(update, name) for name in PACKINGS}
    if "trl" in args.peers:
        peer = TrlUpdate(args.student, rollouts)
        peaks_mib["trl"] = measure.extra_peak_mib(peer.run, args.device)[1].tensors
        assert_close(gradients["tree"], peer.gradients_as(student), "trl", MOST_ERROR[args.dtype])
        peer.choose_microbatch()
        runs["trl"] = peer.run
    del gradients

    samples = measure.time_rounds(list(runs.values()), args.rounds, args.device)
    seconds = dict(zip(runs, samples, strict=True))
    results = {}
    for name in runs:
        spread = measure.spread(seconds[name])
        pairs = zip(seconds["tree"], seconds[name], strict=True)
        results[name] = spread._asdict() | {
            "peak_mib": peaks_mib[name],
            "tree_is_times_faster": median(other / tree for tree, other in pairs),
        }
        if name == "trl":
            results[name] |= {"microbatch": peer.microbatch, "tokens_forwarded": peer.num_tokens}
        else:
            flops = update_flops(student.config, rollouts, name, args.token_budget)
            gflop_s = 1e-9 * flops / spread.median_s
            results[name] |= (
                counts_of(stats[name])
                | stats[name].figures._asdict()
                | {
                    "gflop_s": gflop_s,
                    "of_peak": gflop_s / card["peak_gflop_s"],
                    "attention_share": attention_share(runs[name], args.device),
                }
            )
        print_result(case, name, results[name])
    return asdict(case) | {"gradients_apart": error, "packings": results}


def make_rollouts(case: Case, student: Decoder, token_budget: int) -> list[Rollout]:
    """Makes a group of rollouts with random tokens and the student's own log-probs."""
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(student.config.vocab_size, (count,), generator=generator).tolist()

    prompt_ids = tokens(case.prompt)
    rollouts = []
    for rollout_idx in range(case.group_size):
        rollout = Rollout(question_idx=0, rollout_idx=rollout_idx, prompt_ids=prompt_ids)
        num_attempts = 2 if case.guidance and rollout_idx % 2 else 1
        for attempt_idx in range(num_attempts):
            attempt = Attempt(
                token_ids=tokens(case.answer),
                logprobs=torch.zeros(case.answer),
                kept_mass=torch.ones(case.answer),
                finish_reason="length",
                key=RolloutKey(0, 0),
                rollout_idx=rollout_idx,
                attempt_idx=attempt_idx,
                policy_version=0,
            )
            # Never 0, as the update leaves out rollouts without an advantage.
            advantage = 1.0 if rollout_idx % 2 else -0.5
            rollout.turns.append(Turn(attempt=attempt, advantage=advantage))
        if num_attempts == 2:
            rollout.turns[0].guidance = ShownGuidance(
                raw_text="",
                text="",
                kept_tokens=case.prompt + case.answer,
                bridge_ids=tokens(case.guidance),
            )
        rollouts.append(rollout)
    logprobs = compute_logprobs(student, rollouts, token_budget=token_budget, temperature=1.0)
    # With the student's own log-probs every ratio is 1: no token is clipped, and all of them have a
    # gradient.
    for rollout, attempt_logprobs in zip(rollouts, logprobs, strict=True):
        for attempt, logprobs_L in zip(rollout.attempts, attempt_logprobs, strict=True):
            attempt.logprobs = logprobs_L
    return rollouts


def counts_of(stats: GradientStats) -> dict[str, int]:
    """Returns the counts of a call of policy_gradients."""
    return {name: x for name, x in vars(stats).items() if isinstance(x, int)}


def check(
    stats: dict[Packing, GradientStats],
    gradients: dict[Packing, list[Tensor]],
    rollouts: list[Rollout],
    bound: float,
) -> float:
    """Returns the distance between the packings' gradients, relative to their norm.

    Raises:
        RuntimeError: the distance is too large, or the tree forwards more than its nodes.
    """
    error = assert_close(gradients["tree"], gradients["rows"], "rows", bound)
    # The last token of a rollout predicts nothing, so the tree's leaves are not forwarded. Over
    # several microbatches the prompt is forwarded again, and the count does not hold.
    tree = stats["tree"]
    unique = count_unique_tokens(rollouts)
    if tree.num_microbatches == 1 and tree.tokens_forwarded != unique - len(rollouts):
        raise RuntimeError(
            f"bench: the tree must forward {unique} nodes but {len(rollouts)} leaves, got "
            f"{tree.tokens_forwarded} tokens"
        )
    return error


def assert_close(tree: list[Tensor], other: list[Tensor], name: str, bound: float) -> float:
    """Returns the distance of two gradients relative to the second one's norm; at most bound."""
    pairs = list(zip(tree, other, strict=True))
    distance = sum(float((a - b).double().square().sum()) for a, b in pairs) ** 0.5
    norm = sum(float(b.double().square().sum()) for b in other) ** 0.5
    if not distance <= bound * norm:
        raise RuntimeError(
            f"bench: gradients of tree and {name} must be equal within rounding, "
            f"got {distance / norm:.2g} of their norm, which is above {bound:g}"
        )
    return distance / norm


def update_flops(
    config: ModelConfig,
    rollouts: list[Rollout],
    packing: Packing,
    token_budget: int,
) -> float:
    """Returns the FLOPs of a forward and backward of all that this packing forwards."""
    # 6 a weight and token: 2 in the forward, 4 in the backward (dx, dW). 14 E a pair of query and
    # key and head: seven products of attention at 2 E each.
    heads = config.num_heads + 2 * config.num_kv_heads
    attention = (heads + config.num_heads) * config.head_dim * config.hidden_size
    layer = attention + 3 * config.hidden_size * config.intermediate_size
    total = 0.0
    for batch in pack_rollouts(rollouts, packing=packing, token_budget=token_budget):
        pairs = num_pairs(batch.visible_until_T) * config.num_heads
        total += 6.0 * config.num_layers * layer * batch.tokens_forwarded
        total += 14.0 * config.num_layers * config.head_dim * pairs
        total += 6.0 * config.vocab_size * config.hidden_size * batch.targets_N.numel()
    return total


def attention_share(run: Callable[[], object], device: torch.device) -> float:
    """Returns tree_attention's share of a run's time; 0 where plain torch replaces the kernel."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else each profile prints two lines
    is_card = device.type == "cuda"
    with profile(use_cpu=True, use_device="cuda" if is_card else None) as events:
        seconds = measure.seconds_of(run, device)
    name = "device_time_total" if is_card else "cpu_time_total"
    inside = [event for event in events.key_averages() if event.key in ATTENTION]
    return sum(getattr(event, name) for event in inside) / 1e6 / seconds


def print_result(case: Case, packing: str, result: dict[str, Any]) -> None:
    """Prints a case's row for one packing, or for the peer."""
    of_ours = ("", "", "", f"{result['tokens_forwarded']}", "")
    if packing != "trl":  # what only our own counts and profiles tell
        of_ours = (
            f"{result['gflop_s']:.0f}",
            f"{100 * result['of_peak']:.0f}%",
            f"{100 * result['attention_share']:.0f}%",
            f"{result['tokens_forwarded']}",
            f"{result['unique_tokens']}",
        )
    cells = (
        case.name,
        packing,
        f"{result['median_s']:.2f}",
        f"{result['p20_s']:.2f}-{result['p80_s']:.2f}",
        *of_ours,
        f"{result['peak_mib']:.0f}",
        f"{result['tree_is_times_faster']:.2f}x",
    )
    measure.print_row(cells, WIDTHS)


if __name__ == "__main__":
    main()
