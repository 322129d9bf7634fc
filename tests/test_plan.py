"""What the plan chooses and refuses, in which words, and what a run does with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from socpo_fast import session as session_module
from socpo_fast.cli import main
from socpo_fast.config import load_config
from socpo_fast.report import memory_plan
from socpo_fast.report.cards import CARDS, Card, card_of
from socpo_fast.report.plan import plan_table
from socpo_fast.session import Session
from socpo_fast.trainer import train
from tests.plans import Planner, planner

__all__ = ["planner"]  # a fixture

GIB = 2**30
CONFIG = Path(__file__).parent.parent / "configs" / "molar_mass.toml"

# (card, dtype) -> for each model train.token_budget, train.checkpointing and thousands of tokens of
# KV; None: refused.
MODELS = ("Qwen3-0.6B", "Qwen3-1.7B", "Qwen3-4B", "Qwen3-8B")
FITS: dict[tuple[str, str], list[tuple[int, bool, int] | None]] = {
    ("rtx4090", "bfloat16"): [(6144, False, 69), None, None, None],
    ("rtx4090", "float32"): [(7168, True, 49), None, None, None],
    ("a6000", "bfloat16"): [(12288, False, 246), (6144, False, 142), None, None],
    ("a6000", "float32"): [(6144, False, 123), (10240, True, 84), None, None],
    ("h100", "bfloat16"): [(24576, False, 450), (12288, False, 366), (16384, True, 161), None],
    ("h100", "float32"): [(12288, False, 226), (6144, False, 183), (8192, True, 81), None],
    ("h200", "bfloat16"): [
        (32768, False, 957),
        (27648, False, 753),
        (10240, False, 464),
        (16384, True, 229),
    ],
    ("h200", "float32"): [
        (24576, False, 418),
        (13312, False, 383),
        (6144, False, 213),
        (8192, True, 115),
    ],
}


@pytest.mark.parametrize("card", ["rtx4090", "a6000", "h100", "h200"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_fits_where(planner: Planner, card: str, dtype: str) -> None:
    for name, expected in zip(MODELS, FITS[card, dtype], strict=True):
        if expected is None:
            with pytest.raises(ValueError, match=f"^plan: the run must .* too many; .*{LARGER}$"):
                planner(name, card, student__dtype=dtype)
            continue
        plan = planner(name, card, student__dtype=dtype)
        train, tokens = plan.config.train, plan.kv_pages * plan.config.engine.page_size
        assert (train.token_budget, train.checkpointing, tokens // 1000) == expected
        assert 0 <= plan.left < plan.page_bytes
        assert plan.kv_pages * plan.page_bytes >= plan.kv_of(8), "a group at its longest"


def test_4b_leaves_kv_for_a_batch_on_80_gb(planner: Planner) -> None:
    assert planner("Qwen3-4B").kv_pages * 32 >= 120_000


def test_what_is_fixed_stays(planner: Planner) -> None:
    fixed = {"train__token_budget": 5000, "train__checkpointing": False, "engine__kv_cache_gib": 3.0}
    plan = planner("Qwen3-0.6B", **fixed)
    assert plan.config == plan.asked
    assert plan.num_tokens == 6176, "a longer rollout is taken alone"
    assert plan.left > 40 * GIB
    # A large cache leaves less to microbatches, which are chosen so that it fits.
    large = planner("Qwen3-0.6B", engine__kv_cache_gib=60.0)
    assert large.config.engine.kv_cache_gib == 60.0
    assert large.config.train.token_budget < planner("Qwen3-0.6B").config.train.token_budget
    assert large.left >= 0


def test_no_more_kv_than_its_rollouts_fill(planner: Planner) -> None:
    plan = planner("Qwen3-0.6B", "b200", engine__max_running=16)
    assert plan.kv_pages == 16 * 193  # 6176 tokens in pages of 32
    assert plan.left > 50 * GIB


def test_a_run_without_updates(planner: Planner) -> None:
    plan = planner("Qwen3-8B", is_training=False)
    assert list(plan.residents) == ["weights", "context, graph pools (estimate)"]
    draws = 64 * 256 * 151936 + 4 * 151936 * 4096  # arrays of the sort; the head in fp32
    step = 2048 * (4 * 4096 + 3 * 12288) * 2
    assert plan.temporaries == {"rollouts: a step, draws with top-p": draws + step}
    assert plan.gradients == 0
    assert "update" not in plan_table(plan)


TOO_MANY = "plan: the run must fit into the {} GiB of {}, got {} GiB, {} too many; "
LARGER = "use a smaller model or a larger card"


def test_a_local_teacher_beside_4b_is_refused(planner: Planner) -> None:
    teacher = {"teacher__kind": "local", "teacher__path": str(planner.model("Qwen3-8B"))}
    with pytest.raises(ValueError, match="^plan: ") as refused:
        planner("Qwen3-4B", **teacher)
    assert str(refused.value) == TOO_MANY.format("79.1", "H100", "84.4", "5.3") + (
        f"put the teacher behind an endpoint, {LARGER}"
    )


def test_a_card_in_use_by_others_is_named(planner: Planner) -> None:
    card = CARDS["h100"]._replace(others_gib=12.25)
    with pytest.raises(ValueError, match="^plan: ") as refused:
        planner("Qwen3-4B", card)
    others = "H100, 12.2 of them held by others (a card in use by others)"
    assert str(refused.value) == TOO_MANY.format("79.1", others, "71.9", "5.1") + (f"use a free card, {LARGER}")
    plan = planner("Qwen3-1.7B", card)
    alone = planner("Qwen3-1.7B")
    assert plan.config.train == alone.config.train, "bits do not depend on what others hold"
    assert plan.shared + 12.25 * GIB <= alone.shared + plan.page_bytes
    assert "  held by others                               12.25\n" in plan_table(plan)


REFUSED = {
    "fp32 of 4B as it is": (
        ["--train.checkpointing", "false"],
        TOO_MANY.format("79.1", "H100", "96.2", "17.1")
        + f"set train.checkpointing true, lower rollout.max_new_tokens or rollout.guidance_limit, {LARGER}",
    ),
    "card": (
        ["--card", "h10"],
        f"plan: --card must be one of {', '.join(CARDS)}, got h10; did you mean h100?",
    ),
    "cards that begin so": (
        ["--card", "A100"],
        f"plan: --card must be one of {', '.join(CARDS)}, got A100; did you mean a100-80 or a100-40?",
    ),
    "no such card": (
        ["--card", "tpu"],
        f"plan: --card must be one of {', '.join(CARDS)}, got tpu; name one; without it, this machine's own is asked",
    ),
    "no card here": (
        ["--card", "none"],
        f"plan: --card must be one of {', '.join(CARDS)}, got none; name one; without it, this machine's own is asked",
    ),
    "CPU": (
        ["--run.device", "cpu"],
        "plan: run.device must be cuda, or left out: on a CPU there is nothing to plan, got 'cpu'",
    ),
    "no folder": (
        ["--student.path", "FOLDER"],
        "FOLDER/config.json: is missing; a Hugging Face folder has one",
    ),
    "tokens": (
        ["--answer-tokens", "0"],
        "plan: --answer-tokens must be an integer >= 1, got '0'",
    ),
    "a small cache": (
        ["--engine.kv_cache_gib", "0.5"],
        "plan: engine.kv_cache_gib must be >= 1.7, the longest context of 6176 tokens, got 0.5; raise it, "
        "or lower data.max_prompt_tokens, rollout.max_new_tokens or rollout.guidance_limit",
    ),
    "a large cache": (
        ["--engine.kv_cache_gib", "40", "--loss.kl_coef", "0.1", "--train.token_budget", "8192"],
        TOO_MANY.format("79.1", "H100", "111.8", "32.7") + "lower engine.kv_cache_gib and set loss.kl_coef 0, "
        f"lower engine.kv_cache_gib and set student.dtype bfloat16, {LARGER}",
    ),
    "a large budget": (
        ["--student.dtype", "bfloat16", "--train.token_budget", "300000"],
        TOO_MANY.format("79.1", "H100", "211.0", "131.9") + f"lower train.token_budget, {LARGER}",
    ),
    "longer answers than the model": (
        ["--rollout.max_new_tokens", "40960"],
        "rollout: rollout.max_new_tokens must be below the model's 40960 positions, got 40960; lower it",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(planner: Planner, case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, message = REFUSED[case]
    words = [word.replace("FOLDER", str(tmp_path)) for word in words]
    assert main(planner.words("Qwen3-4B", *words)) == 2
    assert capsys.readouterr().err == message.replace("FOLDER", str(tmp_path)) + "\n"


def test_the_command_needs_no_card(planner: Planner, capsys: pytest.CaptureFixture[str]) -> None:
    words = planner.words("Qwen3-0.6B", "--student.dtype", "bfloat16", "--prompt-tokens", "77")
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "memory plan, GiB: 0.596B parameters, bfloat16, trained, on H100 with 79.1"
    assert lines[1] == "  weights                                       1.11"
    assert "  train.token_budget = 24576 (auto)" in lines
    assert "prompt 77, answer 1024, guidance 130 tokens, 50% resumed" in lines[14]
    assert lines[-1] == "  at 3 TB/s, 798 TFLOP/s in bf16, 66.9 in fp32 (measured; fp32: data sheet)"
    sizes = [float(line.split()[-1]) for line in lines[1:10]]
    assert sum(sizes) == pytest.approx(79.1, abs=0.05)


def test_a_file_of_a_run_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is planned for the card that is named all the same."""
    path = tmp_path / "run.toml"
    text = CONFIG.read_text(encoding="utf-8").replace("[run]\n", '[run]\ndevice = "cpu"\n')
    path.write_text(text, encoding="utf-8")
    assert load_config(path).run.device == "cpu"
    assert main(["plan", "--config", str(path), "--card", "l4"]) == 0
    assert "engine.kv_cache_gib = 0.25 (fixed, 131072 tokens)" in capsys.readouterr().out


class FakeCard:
    """A card of this machine, as far as a plan asks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, free_gib: float, total_gib: float):
        self.peak_gib = 0.0
        answers: dict[str, Any] = {
            "get_device_name": lambda _device: name,
            "mem_get_info": lambda _device: (int(free_gib * GIB), int(total_gib * GIB)),
            "memory_reserved": lambda _device: 3 * GIB,
            "memory_allocated": lambda _device: 2 * GIB,
            "max_memory_allocated": lambda _device: int(self.peak_gib * GIB),
        }
        for function, answer in answers.items():
            monkeypatch.setattr(torch.cuda, function, answer)


def test_a_card_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unused memory of this process's allocator is free, and its context is its own."""
    FakeCard(monkeypatch, "NVIDIA A100-SXM4-40GB", 30, 39.5)
    device = torch.device("cuda")
    own = CARDS["a100-40"]._replace(name="NVIDIA A100-SXM4-40GB", total_gib=39.5, others_gib=7.25)
    assert card_of(device, 1.25) == own
    FakeCard(monkeypatch, "NVIDIA A100-SXM4-80GB", 78, 79.25)
    assert card_of(device, 1.25)[1:4] == (79.25, 2.04, 312)
    for name in ("Nobody's X1", "NVIDIA L40"):  # which is no L4
        FakeCard(monkeypatch, name, 39, 40)
        assert card_of(device) == Card(name, 40)


def test_an_unknown_card_has_no_times(planner: Planner) -> None:
    text = plan_table(planner("Qwen3-0.6B", Card("X1", 40.0)))
    assert text.endswith("\nno times: the rates of X1 are not known")


def test_a_run_is_refused_before_anything_is_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    FakeCard(monkeypatch, "NVIDIA L4", 0, 22)
    monkeypatch.setattr(session_module, "select_device", torch.device)
    monkeypatch.setattr(session_module, "load_student", lambda *_, **__: pytest.fail("loaded"))
    config = load_config(CONFIG, {"run.device": "cuda", "run.dir": str(tmp_path)})
    with pytest.raises(ValueError, match=r"of NVIDIA L4, 19\.8 of them held by others \(a card in use"):
        train(config)
    assert not list(tmp_path.rglob("*.toml"))


def test_a_session_follows_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run on a card would be told and make, of a student that stays on the CPU."""
    FakeCard(monkeypatch, "NVIDIA L4", 22, 22)
    monkeypatch.setattr(session_module, "select_device", lambda _name: torch.device("cpu"))
    config = load_config(CONFIG, {"engine.kv_cache_gib": "auto", "engine.max_running": 4})
    assert Session(config).memory_note == "KV cache 1 GiB (auto)"
    assert Session(config).peak_memory(pytest.fail) == {}
    settle = memory_plan.settle
    cuda = torch.device("cuda")
    monkeypatch.setattr(session_module, "settle", lambda c, f, _d, **to: settle(c, f, cuda, **to))
    session = Session(config, for_training=True)
    assert session.plan is not None
    assert session.config.train.token_budget == 32768
    assert session.engine.stats.pages_total == session.plan.kv_pages
    assert session.memory_note == plan_table(session.plan)


def test_a_wrong_plan_is_told_once(planner: Planner, monkeypatch: pytest.MonkeyPatch) -> None:
    card = FakeCard(monkeypatch, "NVIDIA H100 80GB HBM3", 79, 79.1)
    told: list[str] = []
    for peak, is_wrong in ((1.09, False), (0.91, False), (1.11, True), (0.89, True)):
        session = Session(load_config(CONFIG, {"engine.kv_cache_gib": 0.01}))
        session.plan = planner("Qwen3-0.6B")
        planned_gib = session.plan.peak_bytes / GIB
        card.peak_gib = peak * planned_gib
        for _ in range(2):
            [value] = session.peak_memory(told.append).values()
            assert value == pytest.approx(card.peak_gib)
        line = f"memory: the first batch took {card.peak_gib:.1f} GiB, {planned_gib:.1f} were planned"
        assert told == [line] * is_wrong
        told.clear()


def test_the_docs_show_what_is_printed(planner: Planner) -> None:
    docs = (CONFIG.parent.parent / "docs" / "memory.md").read_text(encoding="utf-8")
    printed = plan_table(planner("Qwen3-4B")).splitlines()
    assert "\n".join(f"    {line}" for line in printed) in docs
    for name, card in CARDS.items():
        rates = f"{card.tb_s:g} | {card.bf16_tflop_s:g} | {card.fp32_tflop_s:g}"
        assert f"| {name} | {card.total_gib:g} | {rates} |" in docs
