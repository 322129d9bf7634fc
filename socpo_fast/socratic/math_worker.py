"""Compares formulas for the grader `math`, in a process of its own.

It reads JSON lines [text, truth] and writes a line 1 (equal) or 0 for each.

math-verify's own time limits raise from a signal handler, and a library in between may swallow that
error. A power tower that a model wrote would then stop the run. Here the process is the limit: the
default action of SIGALRM ends it whatever it is doing. The grader finds the pipe closed, counts the
answer as wrong and starts another process. It runs this file by its path, so that nothing of the
package is imported.
"""

import json
import logging
import resource
import signal
import sys

TIMEOUT_S = 5
_MEMORY_BYTES = 4 << 30


def main() -> None:
    """Answers requests until the input is closed, or one of them takes longer than TIMEOUT_S."""
    from math_verify import parse, verify

    # Ctrl-C reaches this process, too. The trainer answers it; this process ends with its input.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # math-verify logs every text that it could not read, in full.
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    # The grader waits for this line. Whatever ends the process later is due to an answer, not to a
    # broken installation of math-verify.
    print("ready", flush=True)
    for line in sys.stdin:
        text, truth = json.loads(line)
        signal.alarm(TIMEOUT_S)
        # None turns math-verify's own limits off; the alarm is the limit.
        formulas = [parse(source, parsing_timeout=None) for source in (truth, text)]
        is_correct = bool(verify(*formulas, timeout_seconds=None))
        signal.alarm(0)
        print(int(is_correct), flush=True)


if __name__ == "__main__":
    main()
