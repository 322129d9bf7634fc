"""The policy head, forward and backward, ours beside everybody else's.

    python -m bench.policy_head [--quick] [--peers] [--shapes smollm2:1024 ..] [--rows 100 25]
    python -m bench.policy_head --device cuda --shapes 8192x151936x1024 --peer mine:loss

Per shape and share of loss rows: every contender's loss, dX and dW are compared with fp64
(problem.py); a wrong one is named and not timed. The right ones then run in rounds, with the three
bare GEMMs of the loss rows between them, by torch.mm and on a CPU by the GEMM our ops call too;
"% of GEMMs" is of the faster in its best chunking, "% of peak" of the card's largest square GEMM.
Rates count useful work, 6 N V D for N loss rows: projecting other rows, or the logits a second
time, earns nothing. A contender with several settings (chunk sizes) is first searched at 1024 rows
of the same head, 8192 on a card, twice each, and runs at its fastest.

With 25 % loss rows every contender but ours stands twice: projecting all rows as its users would,
and given the loss rows only, which leaves the kernel's gain. The former does what it did at 100 %;
where that took long, it is not repeated but marked "as at 100 %", without a ratio to what ran in
other rounds. Extra MiB is the most that tensors made by a run took at once, dX and dW included; RSS
MiB, on a CPU, how far resident memory rose, which sees GEMM libraries' scratch and free heap that
was not given back. The last line is one JSON object.

--peers takes TRL, Liger, verl and, on a card, cut-cross-entropy in the environment that peers.txt
describes; those that are not installed are named in the header. --peer MODULE:FUNCTION takes a
function of your own, which the folder the bench runs in may hold:

    def loss(hidden_ND, weight_VD, targets_N, old_logprobs_N, advantages_N, *,
             weights_N, temperature):
        logprobs_N = torch.log_softmax((hidden_ND @ weight_VD.T).float() / temperature, -1)
        logprobs_N = logprobs_N.gather(1, targets_N[:, None])[:, 0]
        ratio_N = (logprobs_N - old_logprobs_N).exp()
        return -(weights_N * advantages_N * ratio_N).sum()  # no ratio is near a clip

hidden [N, D] and weight [V, D] in --dtype, targets int64, the rest [N] in fp32, all on --device.
weights are 0 outside the loss rows; the loss is their weighted sum, a tensor without dimensions,
and its gradients with respect to hidden and weight come from autograd. It is held to fp64 as all
others are; one that is wrong or raises is told so in its row and not timed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench import machine, measure
from bench.policy_head import table
from bench.policy_head.contenders import (
    Contender,
    ours,
    torch_contenders,
    torch_has_native_head,
    user_contender,
)
from bench.policy_head.peers import peer_contenders, peer_versions
from bench.policy_head.problem import make_problem, random_weight, useful_bytes, useful_flops


class Shape(NamedTuple):
    """The sizes of one microbatch's policy head: T, V and D."""

    num_tokens: int
    vocab_size: int
    hidden_size: int


HEADS = {"smollm2": (49152, 576), "qwen3-0.6b": (151936, 1024), "qwen3-1.7b": (151936, 2048)}
SHAPES = {
    "cpu": [Shape(t, *HEADS[h]) for h in ("smollm2", "qwen3-0.6b") for t in (256, 1024, 4096)],
    "cuda": [Shape(8192, *HEADS[head]) for head in ("qwen3-0.6b", "qwen3-1.7b")],
}
QUICK_SHAPES = [Shape(num_tokens, *HEADS["smollm2"]) for num_tokens in (256, 1024)]
# Rows of the search for the fastest setting: enough that every chunk size makes another number of
# chunks.
SEARCH_ROWS = {"cpu": 1024, "cuda": 8192}


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    card = machine.measure_card(args.threads, args.device, args.dtype)
    choices = [[ours(args.impl)], *torch_contenders(args.device)]
    skipped = {}
    if not torch_has_native_head():
        skipped["torch native"] = "this torch has no torch.nn.LinearCrossEntropyOptions"
    if args.peers:
        peers, absent = peer_contenders(args.device)
        choices += peers
        skipped |= absent
        card |= peer_versions()
    else:
        skipped["other projects"] = "--peers was not given"
    choices += [[contender] for contender in args.peer]
    card |= {name: f"skipped: {reason}" for name, reason in skipped.items()}
    machine.print_card(card)
    results = []
    for head in dict.fromkeys(shape[1:] for shape in args.shapes):
        tokens = sorted({shape.num_tokens for shape in args.shapes if shape[1:] == head})
        results += bench_head(head, tokens, choices, card["peak_gflop_s"], args)
    report = {"bench": "policy_head", "card": card, "results": results}
    line = json.dumps(report, allow_nan=False)
    if args.json:
        args.json.write_text(line + "\n", encoding="utf-8")
    print(line)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses and checks the options; a wrong one ends the bench with exit status 2."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("bench.policy_head", description=__doc__, formatter_class=form)
    words = f"TxVxD, or HEAD:T with HEAD one of {', '.join(HEADS)}; default all on a CPU"
    parser.add_argument("--shapes", nargs="+", type=shape_of, help=f"{words}, Qwen3's on a card")
    words = "percent of rows that carry loss"
    parser.add_argument("--rows", nargs="+", type=int, default=[100, 25], help=words)
    machine.add_options(parser)
    parser.add_argument("--impl", default="auto", help="of ours")
    words = "TRL, Liger, verl and cut-cross-entropy too"
    parser.add_argument("--peers", action="store_true", help=words)
    words = "a function of your own, may be given again; see above"
    parser.add_argument(
        "--peer", action="append", default=[], metavar="MODULE:FUNCTION", help=words
    )
    words = "SmolLM2's head at T 256 and 1024 only"
    parser.add_argument("--quick", action="store_true", help=words)
    parser.add_argument("--repeats", type=int, default=5, help="rounds, at most")
    words = "seconds for the rounds of one table"
    parser.add_argument("--budget", type=float, default=40.0, help=words)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="file for the JSON line, besides")
    args = parser.parse_args(argv)
    machine.settle(parser, args)
    try:
        args.peer = [user_contender(spec) for spec in args.peer]
    except ValueError as error:
        parser.exit(2, f"{error}\n")
    args.shapes = args.shapes or (QUICK_SHAPES if args.quick else SHAPES[args.device.type])
    return args


def shape_of(text: str) -> Shape:
    """Parses one word of --shapes: TxVxD or HEAD:T."""
    head_name, _, num_tokens = text.partition(":")
    sizes = text.split("x") if not num_tokens else [num_tokens, *map(str, HEADS.get(head_name, ()))]
    if len(sizes) != 3 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        rule = f"TxVxD, for example 8192x151936x1024, or HEAD:T, HEAD one of {', '.join(HEADS)}"
        raise argparse.ArgumentTypeError(f"must be {rule}, got {text}")
    return Shape(*map(int, sizes))


def bench_head(
    lm_head: tuple[int, int],
    tokens: Sequence[int],
    choices: Sequence[Sequence[Contender]],
    peak_gflop_s: float,
    args: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Measures and prints all tables of one head; returns their rows for the JSON line."""
    vocab_size, hidden_size = lm_head
    names = [name for name, sizes in HEADS.items() if sizes == lm_head]
    name = names[0] if names else f"{vocab_size}x{hidden_size}"
    weight_VD = random_weight(vocab_size, hidden_size, args.device, args.dtype)
    print(f"{name}: V {vocab_size}, D {hidden_size}")
    num_searched = min(SEARCH_ROWS[args.device.type], max(tokens))
    # A search runs every setting of every contender, so there is one a head, not one a table.
    contenders, tiles = table.search(make_problem(weight_VD, num_searched, 100), choices)
    results = []
    for num_tokens in tokens:
        full_table: list[table.Row] = []
        # 100 % comes first, as the tables of fewer loss rows take long contenders' times from it.
        for percent in sorted(args.rows, reverse=True):
            problem = make_problem(weight_VD, num_tokens, percent)
            num_rows = problem.rows_N.numel()
            flops = useful_flops(num_rows, *lm_head)
            least = useful_bytes(num_rows, *lm_head, element_size=args.dtype.itemsize)
            rows, gemms = table.measure_rows(problem, contenders, tiles, args, full_table)
            full_table = rows if percent == 100 else full_table
            limits = {
                f"{library}, tile {m} x {n}": flops / times.median_s / 1e9
                for (library, m, n), times in gemms.items()
            }
            title = f"{name}, T {num_tokens}, {percent} % loss rows"
            print(f"\n{title}: {flops / 1e9:.0f} GFLOP, at least {least / 1e9:.2f} GB")
            rates = " · ".join(f"{rate:.0f} ({tile})" for tile, rate in limits.items())
            print(f"  three bare GEMMs, GFLOP/s: {rates}")
            measure.print_row(table.HEADINGS, table.WIDTHS)
            known = {"shape": name, "V": vocab_size, "D": hidden_size, "T": num_tokens}
            known |= {"loss_percent": percent, "bare_gemms_gflop_s": limits}
            fastest_s = min(times.median_s for times in gemms.values())
            # rows[0] is ours: choices begin with it, and ratios are relative to it.
            limit = flops, fastest_s, rows[0], peak_gflop_s
            results += [known | table.report(row, *limit) for row in rows]
    return results


if __name__ == "__main__":
    main()
