"""What skip_below saves on a real model's own answers, and what error it costs: bench_linear_policy_loss --skip.

The student answers questions of the given file at temperature 1, eight times each; the answers' tokens are the loss
rows, as in training, with one random whitened advantage an answer. skip_below is given as a bound on |A| p: divided by
the number of loss rows, which is what each row's weight is. What is skipped is counted from the multiply-adds that
reach the gradient GEMMs, not taken from the op's own account.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from unittest import mock

import torch
from torch import Tensor

from bench import _card as card_of
from bench._head_problem import Problem, errors_of, useful_flops, with_truth
from bench._policy_heads import bare_gemms, fastest_gemms, torch_contenders
from socpo_fast.model.decoder import Decoder, turned_heads
from socpo_fast.ops import _head, linear_policy_loss, packed_attention
from socpo_fast.ops.packed_attention import Segment

BOUNDS = (0.0, 1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)  # on |A| p
HEADINGS = ("|A| p below", "skip_below", "skipped", "median ms", "p20-p80", "of GEMMs", "faster", "err dX", "err dW")
WIDTHS = (11, 10, 8, 9, 15, 8, 7, 8, 8)
GROUP_SIZE, ANSWER_TOKENS = 8, 64


def run(args: argparse.Namespace) -> None:
    card = card_of.measure_card(args.threads)
    card_of.print_card(card)
    problem = answers_problem(args.student, args.data, args.loss_rows)
    naive = asdict(errors_of(problem, *torch_contenders()[0][0].gradients(problem)))
    results, gemms_s = measure(problem, naive, args.repeats)
    flops = useful_flops(problem.rows_N.numel(), *problem.weight_VD.shape)
    print(f"{problem.rows_N.numel()} loss rows; three bare GEMMs {card_of.milliseconds(gemms_s)} ms", end=", ")
    print(f"{flops / gemms_s / 1e9:.0f} GFLOP/s")
    print(f"  for comparison, torch naive: err dX {naive['hidden']:.0e}, err dW {naive['weight']:.0e}")
    card_of.print_row(HEADINGS, WIDTHS)
    for r in results:
        spread_ms = f"{card_of.milliseconds(r['p20_s'])}-{card_of.milliseconds(r['p80_s'])}"
        cells = [f"{r['bound']:g}", f"{r['skip_below']:.1e}", f"{100 * r['skipped']:.1f} %"]
        cells += [card_of.milliseconds(r["median_s"]), spread_ms, f"{r['median_s'] / gemms_s:.2f} x"]
        cells += [f"{results[0]['median_s'] / r['median_s']:.2f} x"]
        card_of.print_row([*cells, f"{r['errors']['hidden']:.0e}", f"{r['errors']['weight']:.0e}"], WIDTHS)
    line = {"bench": "linear_policy_loss_skip", "card": card, "bare_gemms_s": gemms_s, "naive": naive}
    line["results"] = results
    text = json.dumps(line, allow_nan=False)
    if args.json:
        args.json.write_text(text + "\n", encoding="utf-8")
    print(text)


def measure(problem: Problem, naive: dict[str, float], num_rounds: int) -> tuple[list[dict], float]:
    """A dict a bound, timed in rounds with the bare GEMMs of all rows, and the median of the fastest of those.

    Wrong at bound 0 is more than twice as wrong as torch: on peaked rows the errors themselves can be anything.
    """
    hidden, weight = problem.hidden_TD.detach(), problem.weight_VD.detach()
    num_rows = problem.rows_N.numel()
    bounds = [bound / num_rows for bound in BOUNDS]
    results = []
    for bound, skip_below in zip(BOUNDS, bounds, strict=True):
        outputs, skipped = count_skipped(partial(gradients, problem, skip_below), problem)
        errors = asdict(errors_of(problem, *outputs))
        results.append({"bound": bound, "skip_below": skip_below, "skipped": skipped, "errors": errors})
    exact, allowed = results[0]["errors"], {name: 2 * error + 1e-6 for name, error in naive.items()}
    if any(exact[name] > allowed[name] for name in ("loss", "hidden", "weight")) or results[0]["skipped"] != 0:
        raise RuntimeError(f"bench: errors at skip_below 0 must be at most {allowed}, got {results[0]}; test the op")
    gemms = bare_gemms(hidden, weight, fastest_gemms(hidden[:512], weight))
    runs = [partial(gradients, problem, skip_below) for skip_below in bounds]
    samples = card_of.time_rounds([*runs, *gemms.values()], num_rounds)
    for result, seconds in zip(results, samples, strict=False):
        result |= card_of.spread(seconds)._asdict()
    return results, min(card_of.spread(seconds).median_s for seconds in samples[len(runs) :])


def gradients(problem: Problem, skip_below: float) -> tuple[Tensor, Tensor, Tensor]:
    p = problem
    inputs = (p.hidden_TD, p.weight_VD, p.targets_T, p.old_logprobs_T, p.advantages_T)
    loss = linear_policy_loss(*inputs, weights_N=p.weights_T, temperature=1.0, skip_below=skip_below).loss
    grad_hidden, grad_weight = torch.autograd.grad(loss, (p.hidden_TD, p.weight_VD))
    return loss.detach(), grad_hidden, grad_weight


def count_skipped(call: Callable[[], tuple], problem: Problem) -> tuple[tuple, float]:
    """The call's result, and the share of its gradient GEMMs' multiply-adds that were left out; padding is not."""
    multiplied, hidden_size = 0, problem.weight_VD.shape[1]

    def counting(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool = False) -> None:
        nonlocal multiplied
        if out.shape[1] == hidden_size:  # dX or dW; logits are [.., V]
            multiplied += a.shape[0] * a.shape[1] * b.shape[1]
        matmul_(out, a, b, accumulate=accumulate)

    matmul_ = _head.matmul_
    with mock.patch.object(_head, "matmul_", counting):
        result = call()
    return result, 1 - multiplied / (2 * problem.rows_N.numel() * problem.weight_VD.numel())


def answers_problem(student_folder: str, data: str, num_loss_rows: int) -> Problem:
    """Answers of the student to the first questions, its hidden states at their tokens, and the truth in fp64."""
    from transformers import AutoTokenizer

    from socpo_fast import Engine, SamplingParams, load_student
    from socpo_fast.socratic.bridge import Bridge
    from socpo_fast.socratic.data import load_questions

    student, tokenizer = load_student(student_folder), AutoTokenizer.from_pretrained(student_folder)
    bridge = Bridge(tokenizer, guidance_limit=1)
    questions = load_questions(data)[: max(1, num_loss_rows // (GROUP_SIZE * ANSWER_TOKENS))]
    prompts = [bridge.prompt_ids(question.messages) for question in questions]
    params = SamplingParams(
        temperature=1.0, max_new_tokens=ANSWER_TOKENS, eos_ids=(tokenizer.eos_token_id,), n=GROUP_SIZE
    )
    keys = [(0, question) for question in range(len(prompts))]
    groups = Engine(student).generate(prompts, params, keys=keys)
    pairs = [(prompt, attempt.token_ids) for prompt, group in zip(prompts, groups, strict=True) for attempt in group]
    hidden = torch.cat([hidden_of_answer(student, prompt, answer) for prompt, answer in pairs])
    targets = torch.tensor([token for _, answer in pairs for token in answer])
    generator = torch.Generator().manual_seed(4)
    advantages = torch.randn(len(pairs), generator=generator)
    lengths = torch.tensor([len(answer) for _, answer in pairs])
    return with_truth(
        hidden_TD=hidden.requires_grad_(),
        weight_VD=student.lm_head.weight.detach().clone().requires_grad_(),
        targets_T=targets,
        log_ratio_T=(torch.rand(targets.numel(), generator=generator) - 0.5) * 0.2,
        advantages_T=((advantages - advantages.mean()) / advantages.std()).repeat_interleave(lengths),
        weights_T=torch.full((targets.numel(),), 1 / targets.numel()),
    )


@torch.no_grad()
def hidden_of_answer(student: Decoder, prompt: list[int], answer: list[int]) -> Tensor:
    """Hidden states that predict the answer's tokens, [len(answer), D]."""
    ids = torch.tensor([*prompt, *answer[:-1]])
    segments, scale = [Segment(0, ids.numel())], student.config.head_dim**-0.5

    def attend(_: int, qkv_THE: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        q_THE, k_TKE, v_TKE = turned_heads(qkv_THE, rotary, student.config.num_kv_heads)
        return packed_attention(q_THE, k_TKE, v_TKE, segments, scale=scale)

    return student(ids, torch.arange(ids.numel()), attend)[len(prompt) - 1 :]
