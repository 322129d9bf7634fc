"""Makes the built-in student by supervised warm-up on the dialogues of dialogues.py.

    python -m tools.builtin_student.warm_up --out FOLDER        (25 minutes on one core)

Read: make_student -> calibrate -> updates -> warm_up_loss. Departures from the project's trainer:
nothing of the engine or the trainer is used, rows are padded, and only assistant tokens of trained
pieces are targets.
"""

from __future__ import annotations

import argparse
import math
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast

from socpo_fast.model import Decoder, ModelConfig, packed_forward, save_student
from socpo_fast.ops import visible_until_of_sequences
from tools.builtin_student.dialogues import Piece, Shares, dialogue
from tools.builtin_student.tokenizer import MAX_LENGTH, build_tokenizer

NUM_UPDATES = 4000
ROWS_PER_UPDATE = 32
UPDATES_PER_SORT = 16  # the rows of so many updates are sorted by length together
LR = 2e-3
WARMUP_UPDATES = 100
WEIGHT_DECAY = 0.01
NUM_CALIBRATING = 500
CALIBRATION_LR = 1e-3
# The shares of the main phase and of the calibration. The calibration shows no right recalls at
# all, but those learnt in the main phase fade slowly.
LEARNT = Shares(right=0.005, heed=0.5)
CALIBRATED = Shares(right=0.0, heed=0.45)


def make_student(
    seed: int, num_updates: int = NUM_UPDATES, num_calibrating: int = NUM_CALIBRATING
) -> tuple[Decoder, PreTrainedTokenizerFast]:
    """Trains a student from scratch and prints progress.

    The same seed, machine and number of threads give the same student.
    """
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    student = Decoder(student_config(tokenizer))
    for parameter in student.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.05)

    def lr_of(update: int) -> float:
        # A linear warm-up, then a cosine down to zero.
        cosine = 0.5 * (1 + math.cos(math.pi * update / num_updates))
        return LR * min(update / WARMUP_UPDATES, cosine)

    for _ in updates(student, tokenizer, seed, num_updates, lr_of, LEARNT):
        pass
    calibrate(student, tokenizer, seed=seed + 1, shares=CALIBRATED, num_updates=num_calibrating)
    return student, tokenizer


def calibrate(
    student: Decoder,
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int,
    shares: Shares,
    num_updates: int = NUM_CALIBRATING,
) -> None:
    """Trains on until the student is right as often as `shares` say, unassisted and with guidance.

    An element is right without guidance once in hundreds of dialogues. So after a single update its
    share depends on what the last few batches happened to contain. The mean of the weights over
    many updates, at a small constant learning rate, removes this noise.
    """
    means = [torch.zeros_like(parameter) for parameter in student.parameters()]
    skipped = num_updates // 4  # the first updates are left out of the mean: weights still drift
    for update in updates(student, tokenizer, seed, num_updates, lambda _: CALIBRATION_LR, shares):
        if update > skipped:
            for average, parameter in zip(means, student.parameters(), strict=True):
                average.lerp_(parameter.detach(), 1 / (update - skipped))  # a running mean
    with torch.no_grad():
        for average, parameter in zip(means, student.parameters(), strict=True):
            parameter.copy_(average)


def updates(
    student: Decoder,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    num_updates: int,
    lr_of: Callable[[int], float],
    shares: Shares,
) -> Iterator[int]:
    """Makes updates on dialogues and prints progress; yields the number of each, from 1 on."""
    optimizer = torch.optim.AdamW(
        student.parameters(), betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY
    )
    start_s = time.perf_counter()
    batches = row_batches(random.Random(seed), tokenizer, num_updates, shares)
    for update, rows in enumerate(batches, start=1):
        optimizer.param_groups[0]["lr"] = lr_of(update)
        loss = warm_up_loss(student, rows)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        yield update
        if update % 100 == 0:
            seconds = time.perf_counter() - start_s
            print(
                f"update {update} of {num_updates}: loss {loss.item():.4f} nats, {seconds:.0f} s",
                flush=True,
            )


def student_config(tokenizer: PreTrainedTokenizerFast) -> ModelConfig:
    """Returns the configuration of a Llama of 0.8 million parameters."""
    raw = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": len(tokenizer),
        "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "hidden_act": "silu",
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
        "attention_bias": False, "mlp_bias": False, "max_position_embeddings": MAX_LENGTH,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
        "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    return ModelConfig.from_hf(raw, where="warm_up: student_config")


def row_batches(
    rng: random.Random, tokenizer: PreTrainedTokenizerFast, num_updates: int, shares: Shares
) -> Iterator[list[list[Piece]]]:
    """Yields the rows of each update, alike in length so that little padding is needed.

    The rows of UPDATES_PER_SORT updates are drawn, sorted, cut into batches and shuffled together.
    All of them are used, so up to UPDATES_PER_SORT - 1 updates come on top of num_updates.
    """
    for _ in range(0, num_updates, UPDATES_PER_SORT):
        num_rows = UPDATES_PER_SORT * ROWS_PER_UPDATE
        rows = [dialogue(rng, tokenizer, shares) for _ in range(num_rows)]
        rows.sort(key=lambda pieces: sum(len(piece.token_ids) for piece in pieces))
        batches = [
            rows[start : start + ROWS_PER_UPDATE] for start in range(0, len(rows), ROWS_PER_UPDATE)
        ]
        rng.shuffle(batches)
        yield from batches


def warm_up_loss(student: Decoder, rows: list[list[Piece]]) -> Tensor:
    """Returns the mean negative log-likelihood of the trained tokens.

    Padding needs no mask: it comes last in a row, where no token attends to it.
    """
    token_ids = [[token_id for piece in pieces for token_id in piece.token_ids] for pieces in rows]
    trained = [[piece.trained for piece in pieces for _ in piece.token_ids] for pieces in rows]
    length = max(map(len, token_ids))
    token_ids_BL = torch.tensor([row + [0] * (length - len(row)) for row in token_ids])
    trained_BL = torch.tensor([row + [False] * (length - len(row)) for row in trained])

    positions_T = torch.arange(length).repeat(len(rows))
    until_T = visible_until_of_sequences([length] * len(rows))
    hidden_TD = packed_forward(student, token_ids_BL.flatten(), positions_T, until_T)
    # Position t predicts token t + 1, hence the shift.
    is_target_BL = trained_BL[:, 1:]
    logits_NV = student.lm_head(hidden_TD.unflatten(0, (-1, length))[:, :-1][is_target_BL])
    return F.cross_entropy(logits_NV, token_ids_BL[:, 1:][is_target_BL])


def save(student: Decoder, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes a Hugging Face folder with everything a rollout needs; it must be new or empty."""
    with tempfile.TemporaryDirectory() as tokenizer_folder:
        tokenizer.save_pretrained(tokenizer_folder)
        ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        GenerationConfig(**ends, max_length=MAX_LENGTH).save_pretrained(tokenizer_folder)
        save_student(student, folder, tokenizer_from=tokenizer_folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Make the built-in task's student; 25 minutes on one core."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write; new or empty")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.out.exists() and any(arguments.out.iterdir()):
        parser.error(f"--out must be a new or empty folder, got {arguments.out}")
    save(*make_student(arguments.seed), arguments.out)


if __name__ == "__main__":
    main()
