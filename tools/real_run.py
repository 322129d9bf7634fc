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
STOP_AFTER = "train batch 2/"  # start of the line after which the first run is stopped


def main() -> None:
    options, overrides = parse(sys.argv[1:])
    # Also the run's name, so its folder is known below.
    name = f"smollm2_sciknoweval_{options.teacher}"
    arguments = ["--config", str(CONFIGS / f"{name}.toml"), "--student.path", str(options.student)]
    arguments += ["--run.dir", options.out, "--run.device", str(options.device)]
    arguments += ["--data.grader", "tools.real_run:first_letter"]
    arguments += ["--data.train", str(options.data / "train.parquet")]
    arguments += ["--data.eval", str(options.data / "test.parquet")]
    started = time.perf_counter()
    is_local = options.teacher == "local"
    teacher = local(options.student) if is_local else served(options.student, options.device)
    with teacher as teacher_arguments:
        arguments += [*teacher_arguments, *overrides]
        stopped_with = run(["train", *arguments], stop_after=STOP_AFTER)
        resumed_with = run(["train", *arguments])
        run(["eval", *arguments])
    summary = summarize(Path(options.out) / name, options.student)
    minutes = (time.perf_counter() - started) / 60
    report = {"stopped_with": stopped_with, "resumed_with": resumed_with, "minutes": minutes}
    print(json.dumps(report | summary))


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns (options of this script, all other arguments, which go to `socpo`)."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "tools.real_run", description=__doc__, formatter_class=formatter
    )
    parser.add_argument("--teacher", choices=("local", "endpoint"), required=True)
    about = "Hugging Face folder of student and teacher"
    parser.add_argument("--student", type=Path, required=True, help=about)
    about = "folder with train.parquet and test.parquet"
    parser.add_argument("--data", type=Path, required=True, help=about)
    parser.add_argument("--out", default="runs", help="folder of the run")
    machine.add_options(parser, with_dtype=False)
    options, overrides = parser.parse_known_args(argv)
    machine.settle(parser, options)
    return options, overrides


def first_letter(text: str, question: Question) -> bool:
    """Grades by the first capital letter from A to D that stands as a word of its own.

    An article at the start of a phrase ("A dog") is no answer: an A before a lower-case word does
    not count.
    """
    letters = re.findall(r"(?<![\w'])([B-D]|A(?! [a-z]))(?![\w'])", text)
    return bool(letters) and letters[0] == question.ground_truth


def run(arguments: Sequence[str], stop_after: str | None = None) -> int:
    """Runs one socpo command, prints its lines as they come, and returns its exit code.

    Sends SIGTERM as soon as a line starts with `stop_after`.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "socpo_fast.cli", *arguments],
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
    """Yields the arguments of a teacher that runs in the trainer's own process."""
    yield ["--teacher.path", str(folder)]


@contextmanager
def served(folder: Path, device: torch.device) -> Iterator[list[str]]:
    """Serves a folder on a free loopback port; yields the arguments of that teacher."""
    with socket.socket() as free_socket:
        free_socket.bind(("127.0.0.1", 0))
        # Port 0 lets the system choose a free port; closing the socket frees it for the server.
        port = free_socket.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(folder)]
    command += ["--device", str(device), "--dtype", "float32"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    # One thread only: the student's threads need the other cores.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, env=environment, stdout=quiet, stderr=quiet) as server:
        try:
            wait_until_healthy(f"http://127.0.0.1:{port}/health", server)
            yield ["--teacher.url", f"http://127.0.0.1:{port}/v1", "--teacher.model", str(folder)]
        finally:
            server.terminate()


def wait_until_healthy(url: str, server: subprocess.Popen, limit_s: float = 300.0) -> None:
    """Waits for the first answer of a server that may still be loading its weights."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        # Otherwise a server that cannot start would be waited for until the limit.
        if server.poll() is not None:
            raise RuntimeError(
                f"transformers serve: must stay up, got exit code {server.returncode}; "
                "run it by hand"
            )
        try:
            if httpx.get(url, timeout=2.0).is_success:
                return
        except httpx.TransportError:
            pass  # the server does not listen yet
        time.sleep(1.0)
    raise RuntimeError(
        f"transformers serve: must answer {url} within {limit_s} s; is the machine busy?"
    )


def summarize(folder: Path, student: Path) -> dict[str, Any]:
    """Returns metrics at start and end, token counts, and whether transformers sees a change."""
    from transformers import AutoModelForCausalLM

    from socpo_fast.report.tracker import read_metrics
    from socpo_fast.training.checkpoint import latest_checkpoint

    rows = read_metrics(folder / "metrics.jsonl")
    batches = [row for row in rows if row["kind"] == "batch"]
    evals = [row for row in rows if row["kind"] == "eval"]
    checkpoint = latest_checkpoint(folder / "checkpoints")
    untrained, trained = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for path in (student, checkpoint)
    )
    ids = torch.arange(100, 140)[None]  # any tokens do: only the change of the logits matters
    with torch.no_grad():
        change = float((trained(ids).logits - untrained(ids).logits).abs().max())
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
