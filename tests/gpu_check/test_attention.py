"""Checks stage `attention` on a CPU: layouts of the same tree, and wrong or slow contenders."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from socpo_fast.ops.tree_attention import num_pairs, tree_attention_ref
from tools.gpu_check import attention, contenders
from tools.gpu_check.check import Check, Skipped
from tools.gpu_check.contenders import Contender
from tools.gpu_check.results import StageResult, read_results
from tools.gpu_check.stages import NAMES
from tools.gpu_check.trees import SHAPES, TINY_SHAPES, TreeShape, segments_of, visible_until_of
from tools.gpu_check.worker import run_parts

CPU = torch.device("cpu")
BOUND = attention.MAX_ERROR[torch.float32]
# A group of one length; answers of other lengths, in two groups; a prompt of one row.
SHAPES_HERE = (*TINY_SHAPES, TreeShape("short prompt", 1, (3, 1, 4), 3))


@pytest.fixture
def check(tmp_path: Path) -> Check:
    return Check("attention", device=CPU, tiny=True, results=tmp_path / "results.jsonl", peers=None)


def stage_of(check: Check) -> StageResult:
    return read_results(check.results, NAMES).stages["attention"]


@pytest.mark.parametrize("shape", [*SHAPES_HERE, *SHAPES], ids=lambda shape: shape.name)
def test_segments_and_mask_describe_the_same_tree(shape: TreeShape) -> None:
    """A rollout's rows attend to the prompt's segment and to their own, and to nothing else."""
    until_T = visible_until_of(shape)
    assert len(until_T) == shape.num_rows and num_pairs(until_T) == shape.num_pairs
    rows = [row for _, answer in segments_of(shape) for row in answer]
    assert rows == list(range(shape.num_rows))
    for prompt, answer in segments_of(shape):
        seen = [s for s in range(answer.stop) if until_T[s] > answer.stop - 1]
        assert seen == [*prompt, *answer]


@pytest.mark.parametrize("shape", SHAPES_HERE, ids=lambda shape: shape.name)
def test_contenders_compute_the_same_tree(check: Check, shape: TreeShape) -> None:
    problem = attention.make_problem(check, shape)
    tree = problem.tree
    scale = problem.scale
    for contender in (
        contenders.ours(tree, scale),
        contenders.over_copied_rows(check, shape, scale),
        contenders.flex(check, shape, tree.visible_until_T, scale),
    ):
        assert attention.hold_to_truth(problem, contender, BOUND) < BOUND


def varlen_of_a_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool = False,
) -> Tensor:
    """Computes what torch documents for varlen_attn: causal, aligned at the last key."""
    assert window_size == (-1, 0) and enable_gqa == (query.shape[1] != key.shape[1])
    outputs = []
    for i in range(len(cu_seq_q) - 1):
        q = query[cu_seq_q[i] : cu_seq_q[i + 1]].transpose(0, 1)[None]
        k, v = (x[cu_seq_k[i] : cu_seq_k[i + 1]].transpose(0, 1)[None] for x in (key, value))
        num_rows = q.shape[2]
        num_keys = k.shape[2]
        assert num_rows <= max_q and num_keys <= max_k
        mask = torch.ones(num_rows, num_keys, dtype=torch.bool).tril(num_keys - num_rows)
        o = F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=enable_gqa)
        outputs.append(o[0].transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("is_grouped", [True, False])
@pytest.mark.parametrize("shape", SHAPES_HERE, ids=lambda shape: shape.name)
def test_ancestors_are_gathered_in_order(
    check: Check, shape: TreeShape, is_grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The varlen contender copies each rollout's keys in the order of its path."""
    module = pytest.importorskip("torch.nn.attention.varlen")
    monkeypatch.setattr(module, "varlen_attn", varlen_of_a_cpu)
    card = SimpleNamespace(device=CPU, is_cuda=True)
    problem = attention.make_problem(check, shape)
    contender = contenders.varlen(card, shape, problem.scale, is_grouped=is_grouped)
    assert attention.hold_to_truth(problem, contender, BOUND) < BOUND


def test_one_wrong_row_is_found() -> None:
    """One row of 5000 that is off by a tenth is found, beside a row a hundred times as large."""
    truth = torch.randn(5000, 4, 16, generator=torch.Generator().manual_seed(0))
    truth[0] *= 100  # a first row sees itself only, so it is larger than rows that are means
    wrong = truth.clone()
    wrong[4321] += 0.1 * wrong[4321]
    assert attention.row_error(truth, truth) == 0
    assert attention.row_error(wrong, truth) > 2e-2
    assert attention.row_error(torch.full_like(truth, torch.nan), truth) == torch.inf


def test_a_wrong_contender_is_not_timed(check: Check) -> None:
    def make(problem: attention.Problem) -> Contender:
        right = contenders.over_copied_rows(check, problem.shape, problem.scale)
        return dataclasses.replace(right, forward=lambda q, k, v: right.forward(q, k, 1.01 * v))

    attention.measure_peer(check, TINY_SHAPES[0], "copied_rows", make)
    (skip,) = stage_of(check).skips
    assert "a row's error must be <= 0.001, got 0.01" in skip["message"]
    assert stage_of(check).figures == [] and check.num_failed == 0


def test_a_slow_contender_is_skipped_with_reason(check: Check) -> None:
    def make(problem: attention.Problem) -> Contender:
        time.sleep(5)
        return contenders.ours(problem.tree, problem.scale)

    attention.measure_peer(check, TINY_SHAPES[0], "flex", make, 0.2)
    (skip,) = stage_of(check).skips
    assert "TimeoutError: flex took more than 0.2 s" in skip["message"]


def test_a_peers_fault_is_a_skip_with_its_message() -> None:
    """An exception in other projects' code is a skip; its first line goes into the report."""
    with pytest.raises(Skipped, match="RuntimeError: no kernel"), contenders.skip_on_peer_error():
        raise RuntimeError("no kernel\nand a long trace")


@pytest.mark.parametrize(
    ("is_wrong", "message"), [(True, "a row's error must be"), (False, "of two runs: ")]
)
def test_ours_must_be_right_and_repeat(
    check: Check, monkeypatch: pytest.MonkeyPatch, is_wrong: bool, message: str
) -> None:
    """A wrong result and a result that changes from run to run are failures of ours."""
    calls = [0]

    def off(q: Tensor, k: Tensor, v: Tensor, tree: attention.TreeMask, *, scale: float) -> Tensor:
        calls[0] += 1
        o = tree_attention_ref(q, k, v, tree.visible_until_T, scale=scale)
        return 1.1 * o if is_wrong else o + 1e-6 * (calls[0] % 2)

    monkeypatch.setattr(contenders, "tree_attention", off)
    run_parts(check, {"ours": attention.measure_ours}, [])
    failures = stage_of(check).failures
    assert len(failures) == len(TINY_SHAPES)
    assert all(message in failure["message"] for failure in failures)


def test_limits_are_those_of_the_same_run(check: Check) -> None:
    """The limit of ours is the rate of one long row that was measured in the same run."""
    run_parts(
        check,
        {"long row": attention.long_row, "ours": attention.measure_ours},
        [],
    )
    stage = stage_of(check)
    limits = {f.of: f.value for f in stage.figures if f.key == "attention.limit_tflop_s"}
    for way in attention.FLOPS:  # the forward pass, and both passes
        rates = [f for f in stage.figures if f.key == f"attention.{way}_tflop_s"]
        assert [f.limit for f in rates] == [limits[way]] * len(TINY_SHAPES)
        times = [f for f in stage.figures if f.key == f"attention.{way}_ms"]
        for rate, ms in zip(rates, times, strict=True):
            assert rate.share == pytest.approx(ms.share)
