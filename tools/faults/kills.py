"""Kills runs at random moments and sends them signals: the next start must resume."""

from __future__ import annotations

import signal
import time

from tools.faults.run import Faults, Promise, differences

LENGTH = {"run__num_batches": 4, "run__checkpoint_every_updates": 2, "data__eval": "builtin"}


def kills(faults: Faults) -> list[Promise]:
    """Kills runs with SIGKILL: what they end with must equal a run that was never killed."""
    promise = Promise(
        "A run that is killed at any moment goes on bit for bit: weights, moments, metrics and "
        "rollouts",
        "tests/test_faults.py",
    )
    started = time.monotonic()
    # The run that is never killed gives the expected result and the duration.
    straight = faults.start("straight", **LENGTH)
    output, _ = straight.communicate()
    assert straight.returncode == 0, output
    seconds = time.monotonic() - started
    for idx in range(3 if faults.short else 20):
        name = f"killed_{idx}"
        moments = []
        # One to three kills, each at a random moment of a run but not in its first 30 %.
        for _ in range(faults.random.choice((1, 1, 2, 3))):
            after_s = faults.random.uniform(0.3, 1.0) * seconds
            process = faults.start(name, **LENGTH)
            time.sleep(after_s)
            process.kill()
            process.communicate()
            moments.append(f"{after_s:.1f} s")
        process = faults.start(name, **LENGTH)
        output, _ = process.communicate()
        code = (
            None if process.returncode == 0 else f"exit code {process.returncode}: {output[-200:]}"
        )
        fault = code or differences(faults.folder / name, faults.folder / "straight")
        promise.check(f"killed after {', '.join(moments)}", fault, faults.audit(name, **LENGTH))
    return [promise, signals(faults)]


def signals(faults: Faults) -> Promise:
    """Sends signals that a run can answer: it must save, exit and be resumable."""
    promise = Promise(
        "SIGINT, SIGTERM and SIGHUP are answered, saved and obeyed within 2 s",
        "tests/test_signals.py",
    )
    slowest_s = 0.0
    names = ("SIGTERM",) if faults.short else ("SIGINT", "SIGTERM", "SIGHUP")
    for name in names:
        for _ in range(1 if faults.short else 3):
            run = f"signal_{name}_{promise.injected}"
            process, output = faults.start_and_see(run, **LENGTH | {"run__num_batches": 200})
            time.sleep(faults.random.uniform(0, 1))
            started = time.monotonic()
            process.send_signal(signal.Signals[name])
            text = output.read()
            code = process.wait()
            took_s = time.monotonic() - started
            slowest_s = max(slowest_s, took_s)
            # start_and_see has read the line of the first batch; one more batch makes the run
            # resume.
            num_batches = text.count("train batch") + 2
            length = LENGTH | {"run__num_batches": num_batches}
            resumed = faults.train(run, **length)
            promise.check(
                f"{name} {promise.injected} in batch {num_batches}",
                None if code == 128 + signal.Signals[name] else f"exit code {code}",
                None if f"{name}: stopping" in text and "and saved" in text else f"said {text!r}",
                None if took_s < 2 else f"took {took_s:.1f} s",
                resumed.must_end(0, saying=" from update_"),
                faults.audit(run, **length),
            )
    promise.figure = f"slowest {slowest_s:.2f} s"
    return promise
