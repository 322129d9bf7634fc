"""A real model, end to end: train, stop, go on, evaluate, load the result in transformers.

    python -m tools.real_run --teacher local|endpoint --student FOLDER --data FOLDER [--out runs]
                             [--device cuda]

With --teacher endpoint the teacher is the same folder behind `transformers serve` (extra `serving`)
on loopback, started and stopped here. The last line is one JSON object. --data holds train.parquet
and test.parquet. Options that this script does not know go to `socpo`.

A model of 135M parameters names a letter in one answer of ten, so that even the grader `mcq` gives
almost nothing but zeros; here first_letter grades, which is more lenient still. Its accuracy is no
one's benchmark figure.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch

from bench import machine
from socpo_fast.types import Question

CONFIGS = Path(__file__).parent.parent / "configs"
STOP_AFTER = "train batch 2/"


def main() -> None:
    known, overrides = parse(sys.argv[1:])
    name = f"smollm2_sciknoweval_{known.teacher}"
    words = ["--config", str(CONFIGS / f"{name}.toml"), "--student.path", str(known.student)]
    words += ["--run.dir", known.out, "--run.device", str(known.device)]
    words += ["--data.grader", "tools.real_run:first_letter"]
    words += ["--data.train", str(known.data / "train.parquet")]
    words += ["--data.eval", str(known.data / "test.parquet")]
    started = time.perf_counter()
    is_local = known.teacher == "local"
    teacher = local(known.student) if is_local else served(known.student, known.device)
    with teacher as teacher_words:
        words += [*teacher_words, *overrides]
        stopped_with = run(["train", *words], stop_after=STOP_AFTER)
        resumed_with = run(["train", *words])
        run(["eval", *words])
    summary = summarize(Path(known.out) / name, known.student)
    minutes = (time.perf_counter() - started) / 60
    report = {"stopped_with": stopped_with, "resumed_with": resumed_with, "minutes": minutes}
    print(json.dumps(report | summary))


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """(Options of this script, all others)."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("tools.real_run", description=__doc__, formatter_class=form)
    parser.add_argument("--teacher", choices=("local", "endpoint"), required=True)
    words = "Hugging Face folder of student and teacher"
    parser.add_argument("--student", type=Path, required=True, help=words)
    words = "folder with train.parquet and test.parquet"
    parser.add_argument("--data", type=Path, required=True, help=words)
    parser.add_argument("--out", default="runs", help="folder of the run")
    machine.add_options(parser, with_dtype=False)
    known, overrides = parser.parse_known_args(argv)
    machine.settle(parser, known)
    return known, overrides


def first_letter(text: str, question: Question) -> bool:
    """The first capital A to D that stands alone is the right letter.

    A sentence's "A dog" has none.
    """
    letters = re.findall(r"(?<![\w'])([B-D]|A(?! [a-z]))(?![\w'])", text)
    return bool(letters) and letters[0] == question.ground_truth


def run(words: Sequence[str], stop_after: str | None = None) -> int:
    """One socpo command, its lines shown as they come.

    It gets SIGTERM once a line starts with stop_after.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "socpo_fast.cli", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        if stop_after is not None and line.startswith(stop_after):
            process.send_signal(signal.SIGTERM)
    return process.wait()


@contextmanager
def local(folder: Path) -> Iterator[list[str]]:
    yield ["--teacher.path", str(folder)]


@contextmanager
def served(folder: Path, device: torch.device) -> Iterator[list[str]]:
    """An OpenAI-compatible server of the folder on a free loopback port, while the block runs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(folder)]
    command += ["--device", str(device), "--dtype", "float32"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    # the student's threads need the other cores
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, env=environment, stdout=quiet, stderr=quiet) as server:
        try:
            wait_until_healthy(f"http://127.0.0.1:{port}/health", server)
            yield ["--teacher.url", f"http://127.0.0.1:{port}/v1", "--teacher.model", str(folder)]
        finally:
            server.terminate()


def wait_until_healthy(url: str, server: subprocess.Popen, limit_s: float = 300.0) -> None:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError(
                f"transformers serve: must stay up, got exit code {server.returncode}; "
                "run it by hand"
            )
        try:
            if httpx.get(url, timeout=2.0).is_success:
                return
        except httpx.TransportError:
            pass  # not listening yet
        time.sleep(1.0)
    raise RuntimeError(
        f"transformers serve: must answer {url} within {limit_s} s; is the machine busy?"
    )


def summarize(folder: Path, student: Path) -> dict[str, Any]:
    """Metrics at start and end, token counts, and what transformers makes of the trained folder."""
    from transformers import AutoModelForCausalLM

    from socpo_fast.report.tracker import read_metrics
    from socpo_fast.train.checkpoint import latest_checkpoint

    rows = read_metrics(folder / "metrics.jsonl")
    batches = [row for row in rows if row["kind"] == "batch"]
    evals = [row for row in rows if row["kind"] == "eval"]
    checkpoint = latest_checkpoint(folder / "checkpoints")
    before, after = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for path in (student, checkpoint)
    )
    ids = torch.arange(100, 140)[None]
    with torch.no_grad():
        change = float((after(ids).logits - before(ids).logits).abs().max())
    return {
        "updates": rows[-1]["update"],
        "sampled_tokens": round(
            sum(row["perf/rollout_tok_s"] * row["time/rollout_s"] for row in batches)
        ),
        "prefill_tokens": sum(row["perf/prefill_tokens"] for row in batches),
        "first_batch": {
            name: batches[0][name]
            for name in ("success/unassisted", "success/assisted", "guidance/rate")
        },
        "last_batch": {
            name: batches[-1][name]
            for name in ("success/unassisted", "success/assisted", "guidance/rate")
        },
        "guidance_failed": sum(row["guidance/failed"] for row in batches),
        "leak_rate": [row["guidance/leak_rate"] for row in batches],
        "max_mismatch_nats": max(
            row["policy/sampler_mismatch_nats"] for row in rows if row["kind"] == "update"
        ),
        "rollout_tok_s": [round(row["perf/rollout_tok_s"]) for row in batches],
        "seconds_a_batch": [round(row["time/total_s"]) for row in batches],
        "eval_start": evals[0]["success/unassisted"],
        "eval_end": evals[-1]["success/unassisted"],
        "largest_logit_change_in_transformers": change,
    }


if __name__ == "__main__":
    main()
