"""The teacher: says what the student should look at after a wrong attempt.

config.toml names it: teacher.rule = "teacher:guide".

    guide(request) -> text, Guidance(text=..) or None        plain, or `async def`

request is a GuidanceRequest:

    question             the text of the question
    student_answer       the text of the attempt; of a long one its beginning and its end
    ground_truth         None, unless teacher.reveal_answer is true
    reference_solution   None, unless teacher.show_reference is true and the question has one
    attempt_idx          0 after the first attempt
    rollout_idx, key     which rollout of which batch and question it is

The student reads the text as a user's message and tries again. Name the flaw and what to check, and
keep the answer to yourself: metrics count guidance that states it as guidance/leak_rate.

None, an error, or no answer within teacher.guidance_timeout_s costs this one rollout its second
attempt. Metrics count such calls as guidance/failed, and the first of each kind is shown with its
reason. A batch without any guidance stops the run before the next one, unless
teacher.on_silence is "continue".
Calls run on threads of their own, so that a slow one holds up only its own rollout.
"""

import re

from socpo_fast.types import Guidance, GuidanceRequest

MASSES = {
    "H": 1, "C": 12, "N": 14, "O": 16, "F": 19, "Na": 23, "Mg": 24, "Al": 27,
    "Si": 28, "P": 31, "S": 32, "Cl": 35, "K": 39, "Ca": 40, "Fe": 56, "Zn": 65,
}  # fmt: skip
NUMBER = "([0-9]{1,9})"


def guide(request: GuidanceRequest) -> Guidance | str | None:
    """Names the first wrong line of an attempt at a molar mass. Replace it by your own."""
    formula = re.search("molar mass of ([A-Za-z0-9]+)", request.question)
    if formula is None:
        return "Read the question again and check every step."
    sum_so_far = 0
    for symbol, count in re.findall("([A-Z][a-z]?)([0-9]*)", formula[1]):
        line = re.search(
            f"^{symbol}: {NUMBER} x {NUMBER} = {NUMBER}, sum {NUMBER}$",
            request.student_answer,
            re.MULTILINE,
        )
        if line is None:
            return (
                "Recheck the elements of the formula: there the next line must be that of "
                f"{symbol}."
            )
        atoms, mass, product, total = map(int, line.groups())
        sum_so_far += product
        checks = {
            "how often it is in the formula.": atoms == int(count or 1),
            "its atomic mass.": mass == MASSES.get(symbol),
            "the product of count and mass.": product == atoms * mass,
            "the sum so far.": total == sum_so_far,
        }
        for what, is_right in checks.items():
            if not is_right:
                return f"There is a mistake in the line of {symbol}. Recheck {what}"
    return "The lines are right. Recheck the answer: it repeats the last sum."
