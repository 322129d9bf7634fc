"""The memory plan: what it chooses for a model and a card, and what a run does with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from socpo_fast import session as session_module
from socpo_fast.cli import main
from socpo_fast.config import load_config
from socpo_fast.report import cards, memory_plan
from socpo_fast.report.cards import CARDS, Card, card_of
from socpo_fast.report.plan import plan_table
from socpo_fast.session import Session
from socpo_fast.trainer import train
from tests.helpers.plans import FakeCard, Planner, planner

__all__ = ["planner"]  # a fixture

GIB = 2**30
CONFIG = Path(__file__).parent.parent / "configs" / "molar_mass.toml"

# (card, dtype) -> for each model: train.token_budget, train.checkpointing and the KV cache in
# thousands of tokens. None: the plan refuses this model.
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
def test_models_that_fit_a_card(planner: Planner, card: str, dtype: str) -> None:
    for name, expected in zip(MODELS, FITS[card, dtype], strict=True):
        if expected is None:
            with pytest.raises(
                ValueError,
                match="^plan: the run must .* too many; .*use a smaller model or a larger card$",
            ):
                planner(name, card, student__dtype=dtype)
            continue
        plan = planner(name, card, student__dtype=dtype)
        train = plan.config.train
        tokens = plan.kv_pages * plan.config.engine.page_size
        assert (train.token_budget, train.checkpointing, tokens // 1000) == expected
        assert 0 <= plan.left < plan.page_bytes
        assert plan.kv_pages * plan.page_bytes >= plan.kv_of(8), "a group at its longest"


def test_4b_leaves_kv_for_a_batch_on_80_gb(planner: Planner) -> None:
    assert planner("Qwen3-4B").kv_pages * 32 >= 120_000


def test_fixed_settings_stay(planner: Planner) -> None:
    fixed = {
        "train__token_budget": 5000,
        "train__checkpointing": False,
        "engine__kv_cache_gib": 3.0,
    }
    plan = planner("Qwen3-0.6B", **fixed)
    assert plan.config == plan.asked
    assert plan.num_tokens == 6176, "a longer rollout is taken alone"
    assert plan.left > 40 * GIB
    # A large cache leaves less to microbatches, which are chosen so that it fits.
    large_cache = planner("Qwen3-0.6B", engine__kv_cache_gib=60.0)
    assert large_cache.config.engine.kv_cache_gib == 60.0
    assert large_cache.config.train.token_budget < planner("Qwen3-0.6B").config.train.token_budget
    assert large_cache.left >= 0


def test_kv_cache_is_no_larger_than_needed(planner: Planner) -> None:
    plan = planner("Qwen3-0.6B", "b200", engine__max_running=16)
    assert plan.kv_pages == 16 * 193  # a context of 6176 tokens in pages of 32
    assert plan.left > 50 * GIB


def test_plan_of_a_run_without_updates(planner: Planner) -> None:
    plan = planner("Qwen3-8B", is_training=False)
    assert list(plan.residents) == ["weights", "context, graph pools (estimate)"]
    draws = 4 * 256 * 151936  # logits
    step = 2048 * (4 * 4096 + 3 * 12288) * 2
    assert plan.temporaries == {"rollouts: a step, draws with top-p": draws + step}
    assert plan.gradients == 0
    assert "update" not in plan_table(plan)


def test_the_command_needs_no_card(planner: Planner, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = planner.words("Qwen3-0.6B", "--student.dtype", "bfloat16", "--prompt-tokens", "77")
    assert main(arguments) == 0
    loading, *lines = capsys.readouterr().out.splitlines()
    assert loading == "loading PyTorch .."
    assert lines[0] == "memory plan, GiB: 0.596B parameters, bfloat16, trained, on H100 with 79.1"
    assert lines[1] == "  weights                                       1.11"
    assert "  train.token_budget = 24576 (auto)" in lines
    assert "prompt 77, answer 1024, guidance 130 tokens, 50% resumed" in lines[14]
    assert (
        lines[-1] == "  at 3 TB/s, 798 TFLOP/s in bf16, 66.9 in fp32 (measured; fp32: data sheet)"
    )
    sizes = [float(line.split()[-1]) for line in lines[1:10]]
    assert sum(sizes) == pytest.approx(79.1, abs=0.05)


def test_plan_for_a_named_card_ignores_device_cpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--card overrides run.device cpu of a config file."""
    path = tmp_path / "run.toml"
    text = CONFIG.read_text(encoding="utf-8").replace("[run]\n", '[run]\ndevice = "cpu"\n')
    path.write_text(text, encoding="utf-8")
    assert load_config(path).run.device == "cpu"
    assert main(["plan", "--config", str(path), "--card", "l4"]) == 0
    assert "engine.kv_cache_gib = 0.25 (fixed, 131072 tokens)" in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["--card", "none"], ["--run.device", "cpu"]])
def test_without_a_card_the_run_itself_is_planned(
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: words == ["--run.device", "cpu"])
    assert main(["plan", *words, "--run.num-batches", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "  batches        3 of 256 rollouts (32 questions x 8), 768 in all" in lines
    assert lines[-1] == f"for memory and time on a card add --card, one of {', '.join(CARDS)}"
    assert list(tmp_path.iterdir()) == []


def test_card_facts_come_from_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unused memory of our own allocator counts as free, and our CUDA context is not of others."""
    FakeCard(monkeypatch, "NVIDIA A100-SXM4-40GB", 30, 39.5)
    device = torch.device("cuda")
    expected = CARDS["a100-40"]._replace(
        name="NVIDIA A100-SXM4-40GB", total_gib=39.5, others_gib=7.25
    )
    assert card_of(device, 1.25) == expected
    FakeCard(monkeypatch, "NVIDIA A100-SXM4-80GB", 78, 79.25)
    assert card_of(device, 1.25)[1:4] == (79.25, 2.04, 312)


# Cards that are not in CARDS, although most of their names contain the name of one that is.
UNKNOWN = [
    "Nobody's X1",
    "NVIDIA L40",
    "NVIDIA L40G",
    "NVIDIA GH200 480GB",
    "NVIDIA H100 PCIe",
    "NVIDIA H100 NVL",
    "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
    "NVIDIA GeForce RTX 4090 Laptop GPU",
    "NVIDIA GeForce RTX 4090 D",
]


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_card_of_another_kind(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    FakeCard(monkeypatch, name, 39, 40)
    assert card_of(torch.device("cuda")) == Card(name, 40)


@pytest.mark.parametrize("name", ["NVIDIA H100 80GB HBM3", "NVIDIA L4", "NVIDIA GeForce RTX 4090"])
def test_a_card_of_a_known_kind(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    FakeCard(monkeypatch, name, 39, 40)
    [known] = [
        card
        for card in CARDS.values()
        if card.name.removeprefix("NVIDIA ") in name.split(" ", 1)[1]
    ]
    assert card_of(torch.device("cuda")) == known._replace(name=name, total_gib=40)


def test_plan_queries_cuda_for_a_file_with_device_cpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """run.device cpu of a config file is ignored; only an argument selects another device."""
    FakeCard(monkeypatch, "NVIDIA L4", 22, 22)
    device_names: list[str] = []
    monkeypatch.setattr(
        cards, "select_device", lambda name: device_names.append(name) or torch.device(name)
    )
    path = tmp_path / "run.toml"
    text = CONFIG.read_text(encoding="utf-8").replace("[run]\n", '[run]\ndevice = "cpu"\n')
    path.write_text(text, encoding="utf-8")
    assert main(["plan", "--config", str(path)]) == 0
    assert main(["plan", "--config", str(path), "--run.device", "cuda:2"]) == 0
    assert device_names == ["cuda", "cuda:2"]
    assert "on NVIDIA L4 with 22.0" in capsys.readouterr().out


def test_an_unknown_card_has_no_times(planner: Planner) -> None:
    text = plan_table(planner("Qwen3-0.6B", Card("X1", 40.0)))
    assert text.endswith("\nno times: the rates of X1 are not known")


def test_a_run_is_refused_before_anything_is_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    FakeCard(monkeypatch, "NVIDIA L4", 0, 22)
    monkeypatch.setattr(session_module, "select_device", torch.device)
    monkeypatch.setattr(session_module, "load_student", lambda *_, **__: pytest.fail("loaded"))
    config = load_config(CONFIG, {"run.device": "cuda", "run.dir": str(tmp_path)})
    with pytest.raises(
        ValueError, match=r"of NVIDIA L4, 19\.8 of them held by others \(a card in use"
    ):
        train(config)
    assert not list(tmp_path.rglob("*.toml"))


def test_a_session_follows_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """A session sizes the KV cache and microbatches as planned; the student stays on the CPU."""
    FakeCard(monkeypatch, "NVIDIA L4", 22, 22)
    monkeypatch.setattr(session_module, "select_device", lambda _name: torch.device("cpu"))
    config = load_config(CONFIG, {"engine.kv_cache_gib": "auto", "engine.max_running": 4})
    assert Session(config).memory_note.startswith("KV cache 1 GiB (auto), weights ")
    assert Session(config).peak_memory(pytest.fail) == {}
    settle = memory_plan.settle
    cuda = torch.device("cuda")
    monkeypatch.setattr(session_module, "settle", lambda c, f, _d, **to: settle(c, f, cuda, **to))
    session = Session(config, for_training=True)
    assert session.plan is not None
    assert session.config.train.token_budget == 32768
    assert session.engine.stats.pages_total == session.plan.kv_pages
    assert session.memory_note == plan_table(session.plan)


def test_wrong_plan_is_reported_once(planner: Planner, monkeypatch: pytest.MonkeyPatch) -> None:
    card = FakeCard(monkeypatch, "NVIDIA H100 80GB HBM3", 79, 79.1)
    notes: list[str] = []
    for share, is_wrong in ((1.09, False), (0.91, False), (1.11, True), (0.89, True)):
        session = Session(load_config(CONFIG, {"engine.kv_cache_gib": 0.01}))
        session.plan = planner("Qwen3-0.6B")
        planned_gib = session.plan.peak_bytes / GIB
        card.peak_gib = share * planned_gib
        for _ in range(2):
            [value] = session.peak_memory(notes.append).values()
            assert value == pytest.approx(card.peak_gib)
        line = (
            f"memory: the first batch took {card.peak_gib:.1f} GiB, {planned_gib:.1f} were planned"
        )
        assert notes == [line] * is_wrong
        notes.clear()


def test_the_docs_show_what_is_printed(planner: Planner) -> None:
    docs = (CONFIG.parent.parent / "docs" / "memory.md").read_text(encoding="utf-8")
    printed = plan_table(planner("Qwen3-4B")).splitlines()
    assert "\n".join(f"    {line}" for line in printed) in docs
    for name, card in CARDS.items():
        rates = f"{card.tb_s:g} | {card.bf16_tflop_s:g} | {card.fp32_tflop_s:g}"
        assert f"| {name} | {card.total_gib:g} | {rates} |" in docs
