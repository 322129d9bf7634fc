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
from typing import Any

TIMEOUT_S = 5
_RELATIVE = 2e-4  # numbers that differ by more are different, however small they are
_MEMORY_BYTES = 4 << 30


def compare_relatively(grader: Any) -> None:
    """Makes math-verify's grader tell small numbers apart.

    It rounds to 6 decimals, under which all constants of physics are 0. Numbers that are equal to
    it must now be within _RELATIVE of each other as well.
    """
    from sympy import Expr, UnevaluatedExpr

    equal_after_rounding = grader.sympy_numeric_eq

    def are_equal(a: Any, b: Any, *precision: int) -> bool:
        if not equal_after_rounding(a, b, *precision):
            return False
        if not (isinstance(a, Expr) and isinstance(b, Expr)):
            return True
        # A factor that is not evaluated is a percent sign; math-verify takes 9% for 9.
        if a.has(UnevaluatedExpr) != b.has(UnevaluatedExpr):
            return True
        gap = abs((a.doit() / b.doit()).evalf() - 1)
        # 0 / 0 and formulas with variables are no numbers.
        return not gap.is_comparable or bool(gap <= _RELATIVE)

    grader.sympy_numeric_eq = are_equal


def main() -> None:
    """Answers requests until the input is closed, or one of them takes longer than TIMEOUT_S."""
    from math_verify import grader, parse, verify

    compare_relatively(grader)

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
