"""What a run writes down while it runs: metrics.jsonl and TensorBoard (rollouts/: report/rollouts.py).

Read METRICS (the names there are), then MetricsWriter. A row of metrics.jsonl is
{"kind": "batch" | "update" | "eval", "batch": 3, "update": 12, "success/unassisted": 0.41, ..}; nan becomes null.
After a crash a file may end in half a line: readers skip it, and a resumed run rewrites what came after its checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self

from socpo_fast.stopping import RunFailed

METRICS: dict[str, str] = {
    "success/unassisted": "share of rollouts whose first attempt, made alone, is correct: the headline",
    "success/assisted": "share of rollouts correct in any attempt, guided ones included; never the headline",
    "success/pass_at_4": "chance that one of 4 first attempts is correct, unbiased (pass_at_16 for 16, ..)",
    "reward/mean": "mean reward of an attempt, after decay",
    "decay/f_1": "factor on the reward of second attempts, the first ones' mean reward (f_2 for third ones, ..)",
    "guidance/rate": "share of rollouts in which the student was shown guidance",
    "guidance/rescue_rate": "share of guided rollouts that end correct",
    "guidance/leak_rate": "share of what the teacher said that states the answer, whether it was shown or not",
    "guidance/failed": "rollouts that ended because the teacher failed, count",
    "guidance/leaked": "rollouts that ended because the guidance leaked and teacher.on_leak is drop, count",
    "guidance/overflow": "rollouts that ended because the next context would exceed the model's length, count",
    "rollout/attempt_tokens": "mean length of an attempt, tokens",
    "rollout/truncated": "share of attempts that hit the length limit",
    "policy/loss": "clipped policy loss of the update",
    "policy/entropy": "mean entropy of the next token at temperature, nats",
    "policy/ratio_mean": "mean of exp(logprob - old logprob)",
    "policy/clip_fraction": "share of loss tokens whose ratio was clipped",
    "policy/grad_norm": "norm of the gradient before clipping",
    "policy/lr": "learning rate of the update",
    "policy/bad_updates": "updates skipped so far because loss or gradient was not finite, count",
    "policy/sampler_mismatch_nats": "largest |trainer's - sampler's| log-prob of a sampled token, nats",
    "perf/rollout_tok_s": "sampled tokens a second of rollout, tok/s",
    "perf/train_tok_s": "tokens forwarded a second of update, tok/s",
    "perf/prefill_tokens": "prompt, bridge and recomputed tokens the engine read, count",
    "perf/decode_tokens": "tokens the engine sampled, count",
    "perf/preemptions": "sequences that gave up their pages and were recomputed, count",
    "perf/tokens_forwarded": "tokens that passed the layers in the update, count",
    "perf/unique_tokens": "nodes of the rollout trees of the update (prompt once a group), tokens",
    "time/rollout_s": "rollout, guidance included, s",
    "time/teacher_wait_s": "mean wait of a guided rollout for its teacher, s",
    "time/update_s": "all updates of the batch, s",
    "time/total_s": "all of it, s",
}
Kind = Literal["batch", "update", "eval"]
_FAMILY = re.compile(
    r"(success/(?:unassisted|assisted|pass_at_[0-9]+)|decay/f_[0-9]+)(_low|_high)?(/[\w./-]+)?", re.ASCII
)


def meaning_of(name: str) -> str | None:
    """What a metric is, from METRICS; one of a family (other numbers, ends of intervals, data sources) by its head."""
    if name in METRICS or (match := _FAMILY.fullmatch(name)) is None:
        return METRICS.get(name)
    head, end, source = match.groups()
    head = re.sub(r"pass_at_[0-9]+", "pass_at_4", head) if "pass_at" in head else re.sub("_[0-9]+", "_1", head)
    ends = {"_low": "lower end of the 95 % interval: ", "_high": "upper end of the 95 % interval: ", None: ""}
    return ends[end] + METRICS[head] + (f"; questions of {source[1:]} only" if source else "")


def source_metric(name: str, data_source: str) -> str:
    """name/data_source, the source made safe for TensorBoard, files and pages; different ones stay different."""
    safe = re.sub(r"[^\w./-]", "_", data_source, flags=re.ASCII)[:64] or "_"
    if safe != data_source or re.search(r"-[0-9a-f]{6}$", safe):  # what looks like a made name is made as well
        safe += "-" + hashlib.sha256(data_source.encode("utf-8", "surrogatepass")).hexdigest()[:6]
    return f"{name}/{safe}"


class MetricsWriter:
    """Appends rows to metrics.jsonl and TensorBoard; each row is on the disk when write returns.

    Args:
        run_folder:          made when absent.
        resume_after_update: keep rows up to this update and drop later ones, which will be written again;
                             None starts afresh and drops all.
    """

    def __init__(self, run_folder: str | Path, *, resume_after_update: int | None = None):
        from torch.utils.tensorboard import SummaryWriter  # here: it takes half a second, and readers need none of it

        self.path = Path(run_folder) / "metrics.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        last = -1 if resume_after_update is None else resume_after_update
        kept = [row for row in read_metrics(self.path) if row["update"] <= last]
        replace_file(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = self.path.open("a", encoding="utf-8")
        self._tensorboard = SummaryWriter(str(self.path.parent / "tb"), purge_step=last + 1, flush_secs=30)

    def write(self, metrics: Mapping[str, float], *, kind: Kind, batch: int, update: int) -> None:
        """One row. batch and update count from 1; update is the number of updates made so far (0 before the first)."""
        for name in metrics:
            assert meaning_of(name), f"metric {name} is not described in METRICS"
        values = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        with named_failure(self.path):
            self._file.write(json.dumps({"kind": kind, "batch": batch, "update": update, **values}) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
            for name, value in values.items():
                if value is not None:
                    self._tensorboard.add_scalar(f"eval/{name}" if kind == "eval" else name, value, update)

    def close(self) -> None:
        self._file.close()
        self._tensorboard.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl in order, none when it is absent; of rows of one (kind, batch, update) the last."""
    rows = {(row["kind"], row["batch"], row["update"]): row for row in read_jsonl(path)}
    return list(rows.values())


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file; none when it is absent. Torn lines are left out with one warning."""
    if not Path(path).is_file():
        return []
    rows, num_torn = [], 0
    for line in Path(path).read_text(encoding="utf-8", errors="replace").split("\n"):  # not splitlines: U+2028 is text
        try:
            rows += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError:
            num_torn += 1
    if num_torn:
        warnings.warn(f"{path}: {num_torn} torn lines left out; a write was interrupted there", stacklevel=2)
    return rows


def replace_file(path: Path, text: str) -> None:
    """Write beside and rename, so that a reader or a crash meets the old file or the new one, never half of it."""
    beside = path.with_name(path.name + ".tmp")
    with named_failure(path):
        try:
            with beside.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)  # nothing there after the rename


@contextmanager
def named_failure(path: Path) -> Iterator[None]:
    """A full or failing disk as one line that names the file; errors of writing name none."""
    try:
        yield
    except OSError as error:
        raise RunFailed(f"run: {path} could not be written ({error.strerror}); free disk space, start again") from error
