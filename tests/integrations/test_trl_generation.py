"""Checks SocraticPO on TRL's own generation: rows, rewards and advantages, and vLLM's weights.

What TRL samples is scripted where a test needs to know it.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from socpo_fast import pad_rollouts

pytest.importorskip("trl", minversion="1.16")

from tests.helpers.tiny_trl import (
    GradRecorder,
    largest_difference,
    logged,
    make_data,
    make_trainer,
    tokens_of,
    trained,
)

NO, YES = "no", "yes"
# Answers to attempts 0 and 1 of the four rollouts of one question.
SCRIPT = [[YES], [NO, YES], [NO, NO], [NO, YES]]


def scripted(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> list[list[list[int]]]:
    """Lets TRL's generation follow SCRIPT; returns the list of contexts of every call."""
    calls: list[list[list[int]]] = []

    def generate(contexts: list[list[int]], *_args: Any) -> tuple[list[list[int]], None]:
        turn = len(calls)
        calls.append(contexts)
        answers = [answers[turn] for answers in SCRIPT if len(answers) > turn]
        assert len(contexts) == len(answers)
        bridge = trainer.bridge
        return [[*bridge.untrusted_ids(text), bridge.end_of_turn_id] for text in answers], None

    monkeypatch.setattr(trainer, "_generate_single_turn", generate)
    return calls


def test_rows_of_trls_generation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows, masks, decayed rewards and advantages are those written out by hand here."""
    trainer = make_trainer(
        tmp_path,
        generation="trl",
        grader=lambda text, question: text == YES,
        of_trl={"per_device_train_batch_size": 4, "max_steps": 1, "num_generations": 4},
        train_dataset=make_data(1),
    )
    calls = scripted(trainer, monkeypatch)
    trainer.model.train()
    batch = trainer._generate_and_score_completions([make_data(1)[0] for _ in range(4)])
    bridge = trainer.bridge
    prompt = bridge.prompt_ids(make_data(1)[0]["prompt"])
    no, yes = ([*bridge.untrusted_ids(text), bridge.end_of_turn_id] for text in (NO, YES))
    seam = bridge.bridge_ids("check every step", ended=True)
    assert calls == [[prompt] * 4, [prompt + no + seam] * 3]
    rows = [yes, no + seam + yes, no + seam + no, no + seam + yes]
    masks = [[1] * len(yes)] + [
        [1] * len(no) + [0] * len(seam) + [1] * len(last) for last in (yes, no, yes)
    ]
    for i, (row, mask) in enumerate(zip(rows, masks, strict=True)):
        completion = batch["completion_mask"][i].bool()
        assert batch["prompt_ids"][i].tolist() == prompt
        assert batch["completion_ids"][i][completion].tolist() == row
        assert batch["tool_mask"][i][completion].tolist() == mask
    # One of four first attempts is right, so a success with guidance earns a quarter.
    rewards = [[turn.reward for turn in rollout.turns] for rollout in trainer.rollouts]
    assert rewards == [[1.0], [0.0, 0.25], [0.0, 0.0], [0.0, 0.25]]
    assert trainer._metrics["train"]["decay/f_1"] == [0.25]
    assert trainer._metrics["train"]["rewards/socratic_reward/mean"] == [1.5 / 4]
    # Whitened over tokens: all attempts have as many, except that yes may be longer than no.
    centred = [[x - 1.5 / 7 for x in row] for row in rewards]
    lens = [[turn.attempt.num_tokens for turn in r.turns] for r in trainer.rollouts]
    tokens = torch.tensor(
        [
            x
            for xs, ns in zip(centred, lens, strict=True)
            for x, n in zip(xs, ns, strict=True)
            for _ in range(n)
        ],
        dtype=torch.float64,
    )
    expected = ((tokens - tokens.mean()) / (tokens.var() + 1e-8).sqrt()).float()
    mask = (batch["completion_mask"] * batch["tool_mask"]).bool()
    torch.testing.assert_close(batch["advantages"][mask], expected)
    assert (batch["advantages"][~mask] == 0).all()
    assert "old_per_token_logps" not in batch


def test_both_generations_keep_the_same_books(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the engine sampled, replayed as TRL's generation, gives the same batch."""
    engine = make_trainer(tmp_path)
    engine.model.train()
    inputs = [make_data(2)[i // 4] for i in range(8)]
    expected = engine._generate_and_score_completions([dict(row) for row in inputs])
    attempts = tokens_of(engine.rollouts)
    replay = make_trainer(tmp_path, generation="trl")
    replay.model.train()
    turns = iter(range(2))

    def generate(*_args: Any) -> tuple[list[list[int]], None]:
        turn = next(turns)
        return [ids[turn] for ids in attempts if len(ids) > turn], None

    monkeypatch.setattr(replay, "_generate_single_turn", generate)
    actual = replay._generate_and_score_completions([dict(row) for row in inputs])
    for name in actual:
        assert torch.equal(actual[name], expected[name]), name


def test_weighs_tokens_of_vllm_as_trl_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for vLLM samples, whose log-probs are a little off and sometimes missing."""
    trainers = []
    for loss in ("fused", "trl"):
        recorder = GradRecorder()
        trainer = make_trainer(
            tmp_path,
            generation="trl",
            loss=loss,
            callbacks=[recorder],
            of_trl={
                "vllm_importance_sampling_mode": "token_truncate",
                "vllm_importance_sampling_clip_max": 1.2,
                "learning_rate": 0.0,
                "max_grad_norm": 0.0,
            },
        )
        generator = torch.Generator().manual_seed(0)

        def generate(
            contexts: list[list[int]], *_args: Any, generator: torch.Generator = generator
        ) -> tuple[list[list[int]], list[list[float | None]]]:
            shape = len(contexts), 6
            ids = torch.randint(10, 300, shape, generator=generator).tolist()
            logprobs = (torch.rand(shape, generator=generator) - 6.5).tolist()
            return ids, [[None, *row[1:]] for row in logprobs]

        monkeypatch.setattr(trainer, "_generate_single_turn", generate)
        syncs: list[int] = []
        trainer.use_vllm = True
        trainer._last_loaded_step = -1
        trainer.vllm_generation = SimpleNamespace(sync_weights=lambda syncs=syncs: syncs.append(1))
        trainer.train()
        assert len(syncs) == 2
        trainers.append((recorder, logged(trainer, "sampling/importance_sampling_ratio/mean")))
    (ours, ratios), (theirs, same_ratios) = trainers
    for actual, expected in zip(ours.grads, theirs.grads, strict=True):
        assert largest_difference(actual, expected) < 1e-5
    assert ratios == pytest.approx(same_ratios, rel=1e-5)
    assert 0.5 < ratios[0] < 1.19


def test_trains_on_trls_generation(tmp_path: Path) -> None:
    """transformers' generate samples both attempts; TRL's loss takes its current log-probs."""
    trainer = trained(tmp_path, generation="trl")
    assert {len(rollout.turns) for rollout in trainer.rollouts} == {1, 2}
    padded = pad_rollouts(trainer.rollouts, rows="rollout", pad_id=0)
    assert padded.logprobs_BL[padded.loss_mask_BL].isnan().all()
    assert max(logged(trainer, "grad_norm")) > 0
