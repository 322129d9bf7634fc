"""The grader: says whether an attempt is right.

config.toml names it: data.grader = "grader:grade".

    grade(text, question) -> True or False
                             or a number from 0 to 1; from grader.correct_at on it counts as correct
                             or {"part": number, ..}, which add up to at most 1

text is what the student wrote. question has .ground_truth, .text (what was asked), .messages,
.reference_solution (text or None), .data_source and .question_idx.

A student writes anything, so expect any text. An error, another kind of verdict, or no verdict
within grader.timeout_s stops the run, with the line that raised: a wrong reward would train a wrong
student. `async def` is accepted, too.
"""

import re

from socpo_fast.types import Question


def grade(text: str, question: Question) -> bool:
    """Returns whether the last <answer> block holds the ground truth. Replace it by your own."""
    answers = re.findall(r"<answer>\s*(.*?)\s*</answer>", text, re.DOTALL)
    return bool(answers) and answers[-1] == question.ground_truth
