"""Checks the rollout bench: what it counts, what it does not time, and a run on a tiny Llama."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench.rollout import __main__ as bench
from bench.rollout import ours as engines
from bench.rollout import peer_worker, table
from bench.rollout.__main__ import Own
from bench.rollout.cases import (
    CASES,
    Case,
    Step,
    Work,
    layer_shapes,
    linear_bytes,
    linear_flops,
    linear_steps,
    make_work,
    prefilled_tokens,
    read_text,
    roofline_s,
)
from bench.rollout.limit import Limit
from bench.rollout.peers import Worker
from bench.rollout.table import Row
from socpo_fast.model import load_student
from socpo_fast.socratic.tasks.molar_mass import STUDENT_DIR

VOCAB = 131
CASE = Case("c", questions=2, rollouts=3, prompt=5, new=4, guidance=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    sizes |= {"num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 256}
    path = tmp_path_factory.mktemp("llama")
    model = LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.3, tie_word_embeddings=True))
    # An engine that heeds this instead of the bench's options stops at the first token.
    model.generation_config.eos_token_id = list(range(VOCAB))
    model.save_pretrained(path)
    return path


def test_tokens_of_a_hand_counted_case() -> None:
    """Tokens of 6 rollouts, of which the 1st, 3rd and 5th have a second attempt, by hand.

    9 attempts of 4 tokens; 2 prompts of 5, and 3 times 1 + 2 tokens of guidance.
    """
    assert (CASE.num_first, CASE.num_second, CASE.generated, CASE.longest) == (6, 3, 36, 15)
    assert CASE.unique_tokens == 2 * 5 + 3 * (1 + 2)
    # Each attempt forwards 3 of its 4 tokens one by one.
    rows = 2 * 5 + 6 * 3 + 3 * (1 + 2) + 3 * 3
    assert prefilled_tokens(CASE, rows) == CASE.unique_tokens
    assert CASES["b"].unique_tokens == 2400 and CASES["c"].unique_tokens == 2400 + 32 * 61
    assert CASES["c"].generated == 96 * 100 and CASES["a64"].unique_tokens == 64 * 40


def test_work_of_a_hand_counted_case(folder: Path) -> None:
    """FLOPs and bytes of a model of width 32, 4 + 2 * 2 heads of 8 and an MLP of 48, by hand.

    qkv 64 x 32, o 32 x 32, gate and up 96 x 32, down 32 x 48; LM head 131 x 32.
    """
    config = load_student(folder).config
    assert layer_shapes(config) == [(64, 32), (32, 32), (96, 32), (32, 48)]
    layers = 2 * (64 * 32 + 32 * 32 + 96 * 32 + 32 * 48)
    lm_head = 131 * 32
    steps = linear_steps(CASE, token_budget=8)
    first = [Step(8, 0, True), Step(2, 2, True), *[Step(6, 6, False)] * 3]
    second = [Step(8, 0, True), Step(1, 3, True), *[Step(3, 3, False)] * 3]
    assert steps == first + second
    assert linear_flops(config, steps) == 2 * (
        (10 + 18 + 9 + 9) * layers + (2 + 18 + 3 + 9) * lm_head
    )
    assert linear_bytes(config, steps) == 4 * (10 * layers + 8 * lm_head)


def test_roofline_of_a_pass_is_the_longer_of_two(folder: Path) -> None:
    """A pass takes the longer of its bytes and its FLOPs.

    With as many FLOPs as bytes a second, 4-byte weights make bytes the longer for 1 row (4 bytes, 2
    FLOPs a weight) and FLOPs for 3 rows (4 bytes, 6 FLOPs).
    """
    config = load_student(folder).config
    weights = 2 * (64 * 32 + 32 * 32 + 96 * 32 + 32 * 48)
    peaks = {"gflop_s": 2.0, "gb_s": 2.0, "element_size": 4}
    steps = [Step(1, 0, True), Step(3, 0, True)]
    assert roofline_s(config, steps, **peaks) == pytest.approx(1e-9 * weights * (4 + 6) / 2)


def test_token_ids_are_fixed_and_differ_by_round() -> None:
    """The round's seed determines the ids; from a text they are its first tokens, in order."""
    first, second = (make_work(CASE, VOCAB, seed) for seed in (0, 1))
    assert first == make_work(CASE, VOCAB, 0) and first.prompts != second.prompts
    assert [len(ids) for ids in first.prompts + first.suffixes] == [5, 5, 2, 2, 2]
    from_text = make_work(CASE, VOCAB, 0, list(range(100)))
    assert list(chain(*from_text.prompts, *from_text.suffixes)) == list(range(16))
    with pytest.raises(ValueError, match=r"more than 16 tokens, got 3; see --data"):
        make_work(CASE, VOCAB, 0, [1, 2, 3])


def test_text_is_read_from_the_questions(tmp_path: Path) -> None:
    data = tmp_path / "questions.jsonl"
    rows = [{"question": f"molar mass of {name}?", "ground_truth": "18"} for name in ("H2O", "CO2")]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    ids = read_text(str(STUDENT_DIR), str(data))
    assert len(ids) > 10 and all(isinstance(i, int) for i in ids)


def test_limit_runs_every_linear_of_every_pass(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replay runs every linear layer of every pass in order, and the LM head."""
    student = load_student(folder)
    steps = linear_steps(CASE, token_budget=8)
    launched = []
    limit = Limit(student, steps)
    assert set(limit.chosen) == set(steps)

    def note_sizes(rows_in: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        launched.append((len(rows_in), weight.shape[0]))

    monkeypatch.setattr(limit, "linears", dict.fromkeys(limit.linears, note_sizes))
    limit.replay()
    outs = [outs for outs, _ in layer_shapes(student.config)] * 2
    expected = [
        [(s.rows, n) for n in outs] + [(s.head_rows, VOCAB)] * (s.head_rows > 0) for s in steps
    ]
    assert launched == list(chain(*expected))
    launched.clear()
    limit.prefill()
    assert launched == list(chain(*expected[:2]))


@pytest.mark.parametrize("guidance", [0, 2])
def test_ours_prefills_once_and_matches_transformers(folder: Path, guidance: int) -> None:
    case = replace(CASE, guidance=guidance)
    engine = engines.Ours.of(load_student(folder), case)
    checked = engines.check(engine, make_work(case, VOCAB, 0), str(folder))
    assert checked["prefilled"] == checked["unique"] == case.unique_tokens
    assert checked["logprobs_off"] < 1e-4


def test_wrong_log_probs_are_not_timed(folder: Path) -> None:
    student = load_student(folder)
    with torch.no_grad():
        student.norm.weight[3] *= 1.1
    with pytest.raises(RuntimeError, match="log-probs must be within"):
        engines.check(engines.Ours.of(student, CASE), make_work(CASE, VOCAB, 0), str(folder))


def greedy(peer: type[peer_worker.Generate], folder: Path) -> peer_worker.Generate:
    """Returns a peer on the tiny Llama that decodes greedily instead of sampling."""
    options = {
        "student": str(folder),
        "threads": 1,
        "dtype": "float32",
        "device": "cpu",
        "page_size": 32,
        "cache_tokens": 1024,
    }
    greedy_peer = peer(options)
    greedy_peer.sampling = lambda new, **more: greedy_peer.config(  # type: ignore[method-assign]
        do_sample=False, max_new_tokens=new, eos_token_id=None, pad_token_id=0, **more
    )
    return greedy_peer


def test_transformers_peers_give_the_same_attempts(folder: Path) -> None:
    """Greedy attempts of both transformers peers agree, with the work that each of them counts.

    One copies the prompt for every rollout and prefills second attempts whole. The other shares the
    prompt and goes on behind its cache.
    """
    num_threads = torch.get_num_threads()
    work = make_work(CASE, VOCAB, 0).to_json()
    try:
        attempts = {}
        for kind in (peer_worker.Generate, peer_worker.GenerateShared):
            peer = greedy(kind, folder)
            attempts[kind] = (
                peer_worker.rollouts(peer, work, CASE.new),
                peer_worker.answer(peer, work),
            )
    finally:
        torch.set_num_threads(num_threads)
        torch.set_grad_enabled(True)
    (copied, copied_counts), (shared, shared_counts) = attempts.values()
    assert copied == shared and len(copied) == 9
    assert copied_counts["prefilled"] == 6 * 5 + 3 * (5 + 4 + 2)
    # The last token of a prompt is not shared.
    assert shared_counts["prefilled"] == 2 * 4 + 6 + 3 * (1 + 2)
    assert (
        copied_counts["prefill_s"] > 0
        and copied_counts["seconds"] > 0
        and copied_counts["peak_mib"] > 1
    )


def test_attempts_of_a_wrong_length_are_an_error() -> None:
    class Short(peer_worker.Peer):
        def generate(self, contexts: list[list[int]], n: int, new: int) -> list[list[int]]:
            return [[0] * max(1, new - 1) for _ in contexts for _ in range(n)]

    answer = peer_worker.answer(Short(), make_work(CASE, VOCAB, 0).to_json())
    assert answer == {"error": "gave 9 attempts of lengths [3], not 9 of 4"}


def test_a_peer_that_cannot_start_says_why() -> None:
    worker = Worker("vllm", "", sys.executable, {}, {}, timeout_s=60)
    assert "ended: " in worker.run(make_work(CASE, VOCAB, 0))["error"]


def test_slow_peer_runs_once_and_ratios_are_paired() -> None:
    """A slow peer runs in the first round only, and ratios compare times of the same rounds.

    So ours against the slow peer is 5 s by 1 s, the first round's, and not by the median of ours.
    """
    seconds = {"ours": iter([1.0, 2.0, 3.0]), "limit": iter([0.5, 1.0, 2.4]), "slow": iter([5.0])}

    def contender(name: str) -> Own:
        constants = {"prefill_s": 0.1, "peak_mib": 1.0}
        return Own(name, lambda work: {"seconds": next(seconds[name])} | constants)

    rows = [
        Row("ours"),
        Row("limit"),
        Row("slow", tried={"": 5.0}),
        Row("broken", error="no such file"),
    ]
    works = [Work(CASE, seed, [], []) for seed in range(3)]
    bench.run_rounds([contender(row.name) for row in rows], rows, works, ours_s=1.0)
    assert [len(row.rounds) for row in rows] == [3, 3, 1, 0]
    figures = [table.figures(row, CASE, rows, {"": 0.25}) for row in rows]
    assert [f.get("ours_is_times_faster") for f in figures] == [1.0, 0.5, 5.0, None]
    assert figures[0]["of_limit"] == 0.5 and figures[0]["tok_s"] == 36 / 2.0
    assert figures[0]["of_peak"] == 0.125


def test_the_fastest_working_setting_is_chosen() -> None:
    results = {"a": {"seconds": 3.0}, "b": {"error": "none"}, "c": {"seconds": 2.0}}
    settings = [
        SimpleNamespace(name="x", setting=setting, run=lambda work, result=result: result)
        for setting, result in results.items()
    ]
    row, best = bench.search(settings, make_work(CASE, VOCAB, 0))  # type: ignore[arg-type]
    assert best.setting == row.setting == "c" and row.tried == {"a": 3.0, "c": 2.0}
    row, _ = bench.search(settings[1:2], make_work(CASE, VOCAB, 0))  # type: ignore[arg-type]
    assert row.error == "b none"


def test_the_script_ends_with_one_json_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "--student",
        str(folder),
        "--quick",
        "--threads",
        "1",
        "--repeats",
        "2",
        "--bf16",
        "--cases",
        "a1",
        "c",
    ]
    bench.main([*words, "--json", str(tmp_path / "all.json")])
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(last["a1"]["tok_s"]) == ["ours", "limit", "ours, bf16", "limit, bf16"]
    assert last["a1"]["best_peer"] is None
    report = json.loads((tmp_path / "all.json").read_text(encoding="utf-8"))
    case = report["cases"]["c"]
    assert case["checks"]["ours"]["prefilled"] == case["unique_tokens"] == 2 * 12 + 2 * 6
    assert all(len(row["rounds"]) == 2 and row["tok_s"] > 0 for row in case["rows"])
    assert case["parts_s"]["ours"]["linears"] > 0 and report["card"]["torch_gflop_s"] > 0


def test_peers_need_their_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.parse(["--student", "x", "--peers", "vllm"])
    assert "--peers vllm needs --vllm-python; see bench/peers.txt" in capsys.readouterr().err


def test_kernels_are_assigned_to_parts_of_a_step() -> None:
    """A profile's kernels are named by what they do; library GEMMs are linear layers."""
    parts = {
        "_decode_kernel": "attention",
        "_rotary_kernel": "KV write, rotary",
        "_rms_norm_kernel": "norms",
        "_swiglu_kernel": "swiglu",
        "_sample_tile_kernel": "head and draw",
        "nvjet_tst_64x8_64x16_4x2_h_bz_TNN": "linears",
        "sm90_xmma_gemm_bf16bf16_bf16f32": "linears",
        "void at::native::elementwise_kernel<128, 4>": engines.OTHER_OPS,
    }
    assert {name: engines.part_of_kernel(name) for name in parts} == parts
