"""What a teacher beside the student costs: rollouts with one, the student alone, the teacher alone.

    python -m bench.teacher --student FOLDER [--teacher FOLDER] [--device cuda] [--rounds 3]

local       a model in this process. The limit is the time of the student with ready guidance plus
            that of the teacher with all requests at once: both need the same cores, or memory bus.
elsewhere   a server that answers after a while, played by an async function that sleeps. The limit
            is the longest of the student's time, the teacher's, and one rollout's own chain: until
            its first attempt ends among the others, its wait, its second attempt alone.

The same rollouts each time, token by token, which is checked before anything is timed; all of them
are told that they are wrong. Rounds are interleaved. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from bench import machine
from socpo_fast.config import Config, LocalTeacherConfig
from socpo_fast.engine import Engine
from socpo_fast.model import load_student
from socpo_fast.socratic.bridge import Bridge, load_tokenizer
from socpo_fast.socratic.episode import RolloutOptions
from socpo_fast.socratic.rollout import socratic_rollouts
from socpo_fast.socratic.tasks import molar_mass
from socpo_fast.socratic.teachers import Teacher, TeacherFunction, ask, make_teacher, result_of
from socpo_fast.types import Guidance, GuidanceRequest, Rollout, SamplingParams

Name = tuple[int, int]  # question, rollout
MEAN_DELAY_S = 1.5  # of a teacher elsewhere, exponential


@dataclass
class Scene:
    """A student, its questions, and the rules."""

    engine: Engine
    bridge: Bridge
    params: SamplingParams
    options: RolloutOptions
    num_questions: int

    def rollouts(self, teacher: Teacher | TeacherFunction) -> list[Rollout]:
        rollouts = socratic_rollouts(
            self.engine,
            self.bridge.tokenizer,
            molar_mass.questions(0, self.num_questions, "train"),
            teacher=teacher,
            grader=lambda _text, _question: False,
            params=self.params,
            options=self.options,
            batch_idx=0,
            bridge=self.bridge,
        )
        return sorted(rollouts, key=name_of)


def name_of(rollout: Rollout) -> Name:
    return rollout.question_idx, rollout.rollout_idx


def tokens_of(rollouts: Sequence[Rollout]) -> list[list[list[int]]]:
    return [[attempt.token_ids for attempt in rollout.attempts] for rollout in rollouts]


@dataclass
class Recorded:
    """What the local teacher was asked and what it said."""

    requests: list[GuidanceRequest]
    texts: dict[Name, str | None]
    asked_s: dict[Name, float] = field(default_factory=dict)  # when, last

    def say(self, request: GuidanceRequest) -> str | None:
        name = request.key.question, request.rollout_idx
        self.asked_s[name] = time.perf_counter()
        return self.texts[name]


def record(scene: Scene, teacher: Teacher) -> tuple[Recorded, list[Rollout]]:
    """Rolls out once, and notes every request and answer."""
    requests: list[GuidanceRequest] = []
    guide = teacher.guide_in_time

    async def noted(request: GuidanceRequest, timeout_s: float | None) -> Guidance | None:
        requests.append(request)
        return await guide(request, timeout_s)

    teacher.guide_in_time = noted  # type: ignore[method-assign]
    rollouts = scene.rollouts(teacher)
    teacher.guide_in_time = guide  # type: ignore[method-assign]
    shown = {name_of(r): r.turns[0].guidance for r in rollouts}
    texts = {name: guidance.raw_text if guidance else None for name, guidance in shown.items()}
    return Recorded(requests, texts), rollouts


def guide_all(teacher: Teacher, requests: Sequence[GuidanceRequest]) -> None:
    """The teacher alone, all requests at once."""
    asked = [ask(teacher, request, 600.0) for request in requests]
    while not all(future.done() for future in asked):
        teacher.step()
    for future in asked:
        result_of(future, teacher)


def slow(recorded: Recorded, delays_s: dict[Name, float]) -> TeacherFunction:
    """A teacher elsewhere."""

    async def guide(request: GuidanceRequest) -> str | None:
        await asyncio.sleep(delays_s[request.key.question, request.rollout_idx])
        return recorded.say(request)

    return guide


def token_s(scene: Scene) -> float:
    """Seconds a token of one rollout alone."""
    alone = replace(scene, options=replace(scene.options, group_size=1, max_attempts=1))
    alone.num_questions = 1
    started = time.perf_counter()
    (rollout,) = alone.rollouts(lambda _request: None)
    return (time.perf_counter() - started) / rollout.num_sampled


def longest_chain_s(scene: Scene, recorded: Recorded, delays_s: dict[Name, float]) -> float:
    """Until a rollout's first attempt has ended, then its wait, then its second attempt alone."""
    one_token_s = token_s(scene)
    started = time.perf_counter()
    rollouts = scene.rollouts(recorded.say)
    return max(
        recorded.asked_s[name_of(rollout)]
        - started
        + delays_s[name_of(rollout)]
        + rollout.attempts[-1].num_tokens * one_token_s
        for rollout in rollouts
    )


def main() -> None:
    args = parse()
    machine.print_card(machine.measure_card(args.threads, args.device))
    scene, teacher = make_scene(args)
    recorded, expected = record(scene, teacher)
    rng = random.Random(0)
    delays_s = {name: rng.expovariate(1 / MEAN_DELAY_S) for name in recorded.texts}
    elsewhere = slow(recorded, delays_s)
    for guide in (recorded.say, elsewhere):
        if tokens_of(scene.rollouts(guide)) != tokens_of(expected):
            raise SystemExit("bench.teacher: the same guidance must lead to the same tokens")
    taken = time_interleaved(
        {
            "with a local teacher": lambda: scene.rollouts(teacher),
            "student alone": lambda: scene.rollouts(recorded.say),
            "teacher alone": lambda: guide_all(teacher, recorded.requests),
            "with one elsewhere": lambda: scene.rollouts(elsewhere),
        },
        args,
    )
    medians = {name: statistics.median(seconds) for name, seconds in taken.items()}
    chain_s = longest_chain_s(scene, recorded, delays_s)
    limits_s = {
        "with a local teacher": medians["student alone"] + medians["teacher alone"],
        "with one elsewhere": max(medians["student alone"], max(delays_s.values()), chain_s),
    }
    for name, median in medians.items():
        ratio = f"{median / limits_s[name]:.2f} x its limit" if name in limits_s else ""
        print(f"{name:22} {median:7.2f} s   {ratio}")
    report = {"seconds": taken, "limits_s": limits_s, "chain_s": chain_s}
    print(json.dumps({"bench": "teacher", **vars(args), **report}, default=str))


def parse() -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("bench.teacher", description=__doc__, formatter_class=form)
    parser.add_argument("--student", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--teacher", type=Path, help="another one; default: the student's")
    machine.add_options(parser, with_dtype=False)
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--group", type=int, default=4, help="rollouts of a question")
    parser.add_argument("--new", type=int, default=48, help="tokens of an attempt, at most")
    parser.add_argument("--guidance", type=int, default=32, help="tokens of the teacher")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    machine.settle(parser, args)
    return args


def make_scene(args: argparse.Namespace) -> tuple[Scene, Teacher]:
    guidance_limit = 2 * args.guidance
    bridge = Bridge(load_tokenizer(args.student), guidance_limit=guidance_limit)
    dtype = "float32" if args.device.type == "cpu" else "bfloat16"
    student = load_student(args.student, dtype=dtype, device=args.device)
    scene = Scene(
        Engine(student, kv_cache_gib=2.0, stream_priority=-1),
        bridge,
        SamplingParams(temperature=1.0, max_new_tokens=args.new, eos_ids=bridge.eos_ids),
        RolloutOptions(group_size=args.group, max_attempts=2, guidance_limit=guidance_limit),
        args.questions,
    )
    path = str(args.teacher or args.student)
    settings = LocalTeacherConfig(path=path, max_new_tokens=args.guidance, kv_cache_gib=2.0)
    return scene, make_teacher(Config(teacher=settings), device=str(args.device))


def time_interleaved(
    runs: dict[str, Callable[[], object]], args: argparse.Namespace
) -> dict[str, list[float]]:
    """Seconds of each run in each round."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(args.rounds):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if args.device.type == "cuda":
                torch.cuda.synchronize(args.device)
            taken[name].append(time.perf_counter() - started)
    return taken


if __name__ == "__main__":
    main()
