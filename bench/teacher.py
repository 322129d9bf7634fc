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
    """A student's engine, its questions, and the options of a rollout."""

    engine: Engine
    bridge: Bridge
    params: SamplingParams
    options: RolloutOptions
    num_questions: int

    def rollouts(self, teacher: Teacher | TeacherFunction) -> list[Rollout]:
        """Rolls out all questions with this teacher; returns rollouts in the order of questions."""
        rollouts = socratic_rollouts(
            self.engine,
            self.bridge.tokenizer,
            molar_mass.questions(0, self.num_questions, "train"),
            teacher=teacher,
            # All attempts count as wrong, so that every rollout asks the teacher and goes on.
            grader=lambda _text, _question: False,
            params=self.params,
            options=self.options,
            batch_idx=0,
            bridge=self.bridge,
        )
        return sorted(rollouts, key=name_of)


def name_of(rollout: Rollout) -> Name:
    """Returns (question, rollout), by which recorded guidance is found."""
    return rollout.question_idx, rollout.rollout_idx


def tokens_of(rollouts: Sequence[Rollout]) -> list[list[list[int]]]:
    """Returns the token ids of all attempts, by rollout."""
    return [[attempt.token_ids for attempt in rollout.attempts] for rollout in rollouts]


@dataclass
class Recorded:
    """The local teacher's requests and answers, to be replayed by other teachers."""

    requests: list[GuidanceRequest]
    texts: dict[Name, str | None]
    asked_s: dict[Name, float] = field(default_factory=dict)  # clock time of the last request

    def say(self, request: GuidanceRequest) -> str | None:
        """Answers at once with the recorded guidance: a teacher that costs nothing."""
        name = request.key.question, request.rollout_idx
        self.asked_s[name] = time.perf_counter()
        return self.texts[name]


def record(scene: Scene, teacher: Teacher) -> tuple[Recorded, list[Rollout]]:
    """Rolls out once and records every request and answer."""
    requests: list[GuidanceRequest] = []
    guide = teacher.guide_in_time

    async def record_and_guide(
        request: GuidanceRequest, timeout_s: float | None
    ) -> Guidance | None:
        requests.append(request)
        return await guide(request, timeout_s)

    teacher.guide_in_time = record_and_guide  # type: ignore[method-assign]
    rollouts = scene.rollouts(teacher)
    teacher.guide_in_time = guide  # type: ignore[method-assign]
    guidances = {name_of(r): r.turns[0].guidance for r in rollouts}
    texts = {name: guidance.raw_text if guidance else None for name, guidance in guidances.items()}
    return Recorded(requests, texts), rollouts


def guide_all(teacher: Teacher, requests: Sequence[GuidanceRequest]) -> None:
    """Runs the teacher without a student, with all requests at once."""
    futures = [ask(teacher, request, 600.0) for request in requests]
    while not all(future.done() for future in futures):
        teacher.step()
    for future in futures:
        result_of(future, teacher)


def slow(recorded: Recorded, delays_s: dict[Name, float]) -> TeacherFunction:
    """Returns a teacher on another machine: recorded guidance, each after its own delay."""

    async def guide(request: GuidanceRequest) -> str | None:
        await asyncio.sleep(delays_s[request.key.question, request.rollout_idx])
        return recorded.say(request)

    return guide


def token_s(scene: Scene) -> float:
    """Returns the seconds a token of one rollout that has the engine to itself."""
    single = replace(scene, options=replace(scene.options, group_size=1, max_attempts=1))
    single.num_questions = 1
    started = time.perf_counter()
    (rollout,) = single.rollouts(lambda _request: None)
    return (time.perf_counter() - started) / rollout.num_sampled


def longest_chain_s(scene: Scene, recorded: Recorded, delays_s: dict[Name, float]) -> float:
    """Returns the longest time that a single rollout needs, whatever the others do.

    asked_s is when the first attempt ended among all others; then come the teacher's delay, and the
    second attempt at the speed of a rollout that has the engine to itself.
    """
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
    # Times can only be compared if all teachers lead to the same work.
    for guide in (recorded.say, elsewhere):
        if tokens_of(scene.rollouts(guide)) != tokens_of(expected):
            raise SystemExit("bench.teacher: the same guidance must lead to the same tokens")
    seconds_by_run = time_interleaved(
        {
            "with a local teacher": lambda: scene.rollouts(teacher),
            "student alone": lambda: scene.rollouts(recorded.say),
            "teacher alone": lambda: guide_all(teacher, recorded.requests),
            "with one elsewhere": lambda: scene.rollouts(elsewhere),
        },
        args,
    )
    medians = {name: statistics.median(seconds) for name, seconds in seconds_by_run.items()}
    chain_s = longest_chain_s(scene, recorded, delays_s)
    # Two local models share the machine, so their times add up. A teacher elsewhere works at the
    # same time as the student, so the longest of the three counts.
    limits_s = {
        "with a local teacher": medians["student alone"] + medians["teacher alone"],
        "with one elsewhere": max(medians["student alone"], max(delays_s.values()), chain_s),
    }
    for name, median in medians.items():
        ratio = f"{median / limits_s[name]:.2f} x its limit" if name in limits_s else ""
        print(f"{name:22} {median:7.2f} s   {ratio}")
    report = {"seconds": seconds_by_run, "limits_s": limits_s, "chain_s": chain_s}
    print(json.dumps({"bench": "teacher", **vars(args), **report}, default=str))


def parse() -> argparse.Namespace:
    """Parses the options."""
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
    """Loads student and teacher."""
    # In the student's tokens. Twice the teacher's limit, as the two may have different tokenizers.
    guidance_limit = 2 * args.guidance
    bridge = Bridge(load_tokenizer(args.student), guidance_limit=guidance_limit)
    dtype = "float32" if args.device.type == "cpu" else "bfloat16"
    student = load_student(args.student, dtype=dtype, device=args.device)
    scene = Scene(
        # On a card the student's kernels go before the teacher's.
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
    """Returns the seconds of each run in each round."""
    # Not by CUDA events (measure.time_rounds): rollouts also wait for a teacher on the host.
    seconds_by_run: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(args.rounds):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if args.device.type == "cuda":
                torch.cuda.synchronize(args.device)
            seconds_by_run[name].append(time.perf_counter() - started)
    return seconds_by_run


if __name__ == "__main__":
    main()
