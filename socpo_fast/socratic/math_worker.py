"""The process that compares formulas for the grader `math`: JSON lines [text, truth] in, 1 or 0
out.

math-verify's own time limits raise from a signal handler, which a library in between may swallow;
then a power tower that a model wrote stops the run. Here the limit is the process: SIGALRM's
default action ends it whatever it is doing, and the grader, which finds the pipe closed, calls the
answer wrong and starts another one. Run by its path, so that it imports nothing of the package.
"""

import json
import logging
import resource
import signal
import sys

TIMEOUT_S = 5
_MEMORY_BYTES = 4 << 30


def main() -> None:
    from math_verify import parse, verify

    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C is the trainer's; this process ends with its input
    logging.getLogger("math_verify").setLevel(
        logging.CRITICAL
    )  # it logs what it could not read, in full
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    print("ready", flush=True)  # from here on, only an answer can end this process
    for line in sys.stdin:
        text, truth = json.loads(line)
        signal.alarm(TIMEOUT_S)
        formulas = [parse(written, parsing_timeout=None) for written in (truth, text)]
        is_correct = bool(verify(*formulas, timeout_seconds=None))
        signal.alarm(0)
        print(int(is_correct), flush=True)


if __name__ == "__main__":
    main()
