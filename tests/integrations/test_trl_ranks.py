"""Checks SocraticPO in TRL on two ranks: DDP against one process, and FSDP2 around the fused loss.

Each rank is a process of its own on the CPU, so that a test takes half a minute: all are slow.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", minversion="1.16")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]

TRAIN = """
import sys, torch
from pathlib import Path
from tests.helpers.tiny_trl import make_trainer
folder, rank, num_ranks = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
trainer = make_trainer(folder / "run", of_trl={"per_device_train_batch_size": 8 // num_ranks})
trainer.train()
outcome = {
    "weights": trainer.model.state_dict(),
    "tokens": [[a.token_ids for a in r.attempts] for r in trainer.rollouts],
    "advantages": [[t.advantage for t in r.turns] for r in trainer.rollouts],
    "log": trainer.state.log_history,
}
torch.save(outcome, folder / f"rank{rank}.pt")
"""

# Two prompts, one a rank. The loss is a weighted sum over a rank's rows, so FSDP's mean over ranks
# is the gradient of the mean of both losses.
SHARD = """
import sys, torch
import torch.distributed as dist
from pathlib import Path
from torch.distributed.fsdp import fully_shard
from socpo_fast.integrations.trl_loss import add_policy_head
from socpo_fast.ops.linear_policy_loss import linear_policy_loss
from tests.helpers.tiny_trl import make_model
folder, rank, num_ranks = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
own_head = sys.argv[4] == "own_head"

def backward(model, ids):
    advantages = ids[0, 1:].sin()
    head = lambda hidden, weight, bias: linear_policy_loss(
        hidden[0], weight, ids[0, 1:], None, advantages, temperature=1.0,
        rows_N=torch.arange(len(advantages)), num_loss_tokens=float(len(advantages)), bias_V=bias,
    )
    model(input_ids=ids, policy_head=head).loss.backward()

prompts = [torch.arange(3, 12)[None], torch.arange(40, 55)[None]]
expected = make_model(tied=not own_head)
add_policy_head(expected)
for ids in prompts:
    backward(expected, ids)
dist.init_process_group("gloo")
mesh = dist.device_mesh.init_device_mesh("cpu", (num_ranks,))
model = make_model(tied=not own_head)
add_policy_head(model)
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh)
if own_head:
    fully_shard(model.lm_head, mesh=mesh)
fully_shard(model, mesh=mesh)
backward(model, prompts[rank])
for (name, actual), reference in zip(
    model.named_parameters(), expected.parameters(), strict=True
):
    gap = (actual.grad.full_tensor() - reference.grad / num_ranks).abs().max()
    assert gap < 1e-5 * reference.grad.abs().max(), (name, gap)
dist.destroy_process_group()
"""


def run_ranks(code: str, folder: Path, num_ranks: int, *arguments: str) -> None:
    """Runs code in num_ranks processes; they get the folder, rank and number of ranks."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    base = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ranks = []
    for rank in range(num_ranks):
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "MASTER_PORT": port}
        joined = {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"}
        command = [sys.executable, "-c", code, str(folder), str(rank), str(num_ranks), *arguments]
        environment = base | (joined if num_ranks > 1 else {})
        ranks.append(
            subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        )
    errors = [rank.communicate(timeout=240)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * num_ranks, "\n".join(errors)[-3000:]


def test_two_ranks_train_as_one_process(tmp_path: Path) -> None:
    """The same rollouts, credited as one batch; the same weights but for rounding."""
    outcomes: list[list[Any]] = []
    for num_ranks in (1, 2):
        folder = tmp_path / str(num_ranks)
        run_ranks(TRAIN, folder, num_ranks)
        files = [folder / f"rank{rank}.pt" for rank in range(num_ranks)]
        outcomes.append([torch.load(file, weights_only=False) for file in files])
    ((one,), two) = outcomes
    assert two[0]["tokens"] + two[1]["tokens"] == one["tokens"]
    assert two[0]["advantages"] + two[1]["advantages"] == one["advantages"]
    for name, weight in one["weights"].items():
        torch.testing.assert_close(two[0]["weights"][name], weight, atol=1e-5, rtol=1e-5)
        assert torch.equal(two[0]["weights"][name], two[1]["weights"][name])
    for name in ("success/unassisted", "decay/f_1", "guidance/rate", "reward", "entropy"):
        actual, expected = (
            [row[name] for row in outcome["log"] if name in row] for outcome in (two[0], one)
        )
        assert actual == pytest.approx(expected, rel=1e-5), name


@pytest.mark.parametrize("head", ["own_head", "root"])
def test_fsdp_gradients_are_those_of_whole_weights(tmp_path: Path, head: str) -> None:
    """The head belongs to FSDP's root, or is a unit of its own, a DTensor inside the forward."""
    run_ranks(SHARD, tmp_path, 2, head)
