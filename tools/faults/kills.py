"""SIGKILL at random moments, and signals that can be answered: the next start goes on."""

from __future__ import annotations

import signal
import time

from tools.faults.run import Faults, Promise, differences

LENGTH = {"run__num_batches": 4, "run__checkpoint_every_updates": 2, "data__eval": "builtin"}


def kills(faults: Faults) -> list[Promise]:
    promise = Promise(
        "A run that is killed at any moment goes on bit for bit: weights, moments, metrics and "
        "rollouts",
        "tests/test_faults.py",
    )
    since = time.monotonic()
    straight = faults.start("straight", **LENGTH)
    said, _ = straight.communicate()
    assert straight.returncode == 0, said
    seconds = time.monotonic() - since
    for idx in range(3 if faults.short else 20):
        name = f"killed_{idx}"
        moments = []
        # One to three kills, each in the time of a whole run but for the first third of it.
        for _ in range(faults.random.choice((1, 1, 2, 3))):
            after_s = faults.random.uniform(0.3, 1.0) * seconds
            process = faults.start(name, **LENGTH)
            time.sleep(after_s)
            process.kill()
            process.communicate()
            moments.append(f"{after_s:.1f} s")
        process = faults.start(name, **LENGTH)
        said, _ = process.communicate()
        code = None if process.returncode == 0 else f"exit code {process.returncode}: {said[-200:]}"
        after = code or differences(faults.folder / name, faults.folder / "straight")
        promise.check(f"killed after {', '.join(moments)}", after, faults.audit(name, **LENGTH))
    return [promise, signals(faults)]


def signals(faults: Faults) -> Promise:
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
            since = time.monotonic()
            process.send_signal(signal.Signals[name])
            said = output.read()
            code = process.wait()
            took_s = time.monotonic() - since
            slowest_s = max(slowest_s, took_s)
            num_batches = said.count("train batch") + 2
            length = LENGTH | {"run__num_batches": num_batches}
            goes_on = faults.train(run, **length)
            promise.check(
                f"{name} {promise.injected} in batch {num_batches}",
                None if code == 128 + signal.Signals[name] else f"exit code {code}",
                None if f"{name}: stopping" in said and "and saved" in said else f"said {said!r}",
                None if took_s < 2 else f"took {took_s:.1f} s",
                goes_on.must_end(0, saying=" from update_"),
                faults.audit(run, **length),
            )
    promise.figure = f"slowest {slowest_s:.2f} s"
    return promise
