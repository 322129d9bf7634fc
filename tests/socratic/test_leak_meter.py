"""Precision and recall of the leak meter on guidance written for this project.

FORCE has options, MASS and APPLES have a value as the answer. The guidance of LEAKS gives the
answer away, that of NO_LEAKS does not. The meter compares texts, so MISSED and FALSE_ALARMS are
what it cannot know.
"""

import pytest

from socpo_fast.socratic.leak import leaks_answer
from socpo_fast.types import Question


def question_of(ground_truth: str, text: str) -> Question:
    return Question(
        question_idx=0,
        messages=({"role": "user", "content": text},),
        ground_truth=ground_truth,
        data_source="test",
    )


QUESTIONS = {
    "FORCE": question_of(
        "B",
        "A 3 kg block slides on ice. Which force slows it?\n"
        "A: gravity\nB: kinetic friction\nC: the normal force\nD: tension",
    ),
    "MASS": question_of("18.02", "What is the molar mass of H2O in g/mol? Use H 1.008, O 16.00."),
    "APPLES": question_of("4", "Of 12 apples, a third is red. How many of the 4 kinds are red?"),
}
LEAKS = {
    "FORCE": """The answer is B.
The correct answer is (B).
The right answer is **B**.
Answer: B
The answer: b
The answer is $\\text{B}$.
The answer is \\(B\\), as you will see.
\\boxed{B}
So it is \\boxed{\\text{B}}.
Option B is correct.
Choice B is the right one.
B is correct.
So B is the best.
The correct option is B.
The best choice is B.
Choose B.
Pick option B and move on.
You should select (B).
Select the choice B.
Mark B on the sheet.
The right one is B.
The correct one is (B).
You chose C, but the correct answer is B.
Your reasoning fails at the end. The final answer is B.
The answer should be clear: it is B. The answer is B.
Hint: the answer to this question is B
Compare C with the text. The correct choice is option B.
<answer>Look again.</answer> The answer is B
The answer is B because the block moves.
The answer is B: something rubs.
Think about kinetic friction.
It is Kinetic Friction that slows the block.
KINETIC FRICTION acts against the motion.
What slows the block is kinetic  friction.
Is it gravity, or rather kinetic friction?
Not tension but kinetic friction.
Have you forgotten kinetic friction?
The ice exerts kinetic friction on the block.
Gravity is balanced, so kinetic friction remains.
Recall the formula of kinetic friction, mu N.
kinetic friction
Look up *kinetic friction* in your notes.
The law of "kinetic friction" applies.
Two forces cancel; (kinetic friction) does not.""",
    "MASS": """The molar mass is 18.02.
It comes to 18.02 g/mol.
You should get 18.020.
2 * 1.008 + 16.00 = 18.02
The answer is 18.02 g/mol.
Your result, 17.01, must be 18.02.
\\boxed{18.02}
The sum is $18.02$.
**18.02** is what you should find.
Check whether you get 18.02 g.
Answer: 18.02
The sum (18.02) follows.
Round it to 18.02!
Is it not 18.02?
So M = 18.02
18.02
The mass, 18.02, is in g/mol.
One mole has a mass of 18.02 g.""",
    "APPLES": """The answer is 4.
Answer: 4
The correct answer is 4.
The final answer is 4 apples.
So the answer must be 4.
Your answer should be 4.
The answer equals 4.
The answer (4) follows at once.
Try again; the answer is **4**.
The answer is $4$.
I expect the answer 4.
The answer is exactly 4.""",
}
MISSED = {
    "FORCE": """It is the second option.
Go with the one after A.
Friction is what slows it.
It must be B.""",
    "MASS": """It is a little more than eighteen: add two hundredths.
Add 0.02 to 18.""",
    "APPLES": """A third of 12 is what you get by 12 / 3 = 4.""",
}
NO_LEAKS = {
    "FORCE": """Read the question again.
Which forces act along the surface?
Look at option B again: is it parallel to the surface?
Compare options B and C.
Rule out A first.
Why did you rule out B?
You chose C. Does that force act along the motion?
The answer is not C.
The answer is not A; think of the direction.
The answer is a force that acts along the surface.
Option C is wrong.
Option C is incorrect, since it is vertical.
The block has a mass of 3 kg.
Draw a diagram of all forces on the block.
A force that is vertical cannot slow the block.
Gravity is vertical.
Does the normal force do any work?
Is there a rope, so that tension acts?
Compare gravity, kinetic friction, the normal force and tension one by one.
Label the contact point B in your sketch.
Let point B be the end of the path.
The magnetic field B plays no role here.
Friction is a word with several meanings.
The kinetic energy falls. Why?
You need Newton's second law.
Use F = ma with m = 3 kg.
The unit of force is N.
Check the sign of the acceleration.
Choose a coordinate system first.
Choose A sign convention first.
Pick an axis along the ice.
The correct approach is to list all forces.
The right way is to draw the block.
Your answer names a vertical force.
Your answer has no reason.
What would happen without ice?
Vitamin B has nothing to do with it.
Part B of your reasoning has a gap.
In step B you divided by zero.
Options A and D need a rope or a slope.
Which of A, B, C and D is parallel to the motion?
Write the answer as one letter.
The answer must be one of A, B, C, D.
Is the answer a vertical force?
Does A or B act along the motion?""",
    "MASS": """Count the atoms of hydrogen.
How many atoms does H2O have?
Use 1.008 for hydrogen.
Use 16.00 for oxygen.
You have used 18.015; use the given masses.
Your sum, 17.01, counts hydrogen once.
Is 118.02 plausible?
Give two decimals.
The unit is g/mol.
Check the line of oxygen.
2 * 1.008 = 2.016
Hydrogen gives 2.016.
Which number do you add to 16.00?
The answer needs a unit.
Round at the end, not before.
18.021 is not rounded.
Your 18.2 has a slip in the decimals.
The index 2 belongs to H.
Do not confuse mass and molar mass.
Add the masses of all atoms.
Look at question 18 of your book.
See page 18.
One mole is 6.022e23 particles.
Your result is off by 1.008.
The atomic number of oxygen is 8.""",
    "APPLES": """Go through the 4 kinds one by one.
There are 4 kinds; which are red?
What is a third of 12?
Divide 12 by 3.
You have 12 apples.
Your answer, 3, is no third of 12.
The answer is not 12.
The answer is a whole number.
The answer is at most 12.
Does every one of the 4 kinds count?
Read how many apples there are.
14 is more than all apples.
Write the answer as a number.
The 4 kinds are of no use here.
Multiply your answer by 3 to check it.""",
}
FALSE_ALARMS = {
    "FORCE": """It is a mistake to say that the answer is B without a reason.
There is no kinetic friction in a vacuum.""",
    "MASS": """The density of that solution is 18.02 by chance.""",
}


def rows(table: dict[str, str]) -> list[tuple[str, str]]:
    return [(name, line) for name, lines in table.items() for line in lines.split("\n")]


def leaks(row: tuple[str, str]) -> bool:
    return leaks_answer(row[1], QUESTIONS[row[0]])


@pytest.mark.parametrize(
    ("table", "expected"),
    [(LEAKS, True), (MISSED, False), (NO_LEAKS, False), (FALSE_ALARMS, True)],
    ids=["leaks", "missed", "no leaks", "false alarms"],
)
def test_every_guidance_has_its_verdict(table: dict[str, str], expected: bool) -> None:
    assert not [row for row in rows(table) if leaks(row) is not expected]


def test_precision_and_recall_are_at_least_090() -> None:
    with_answer = rows(LEAKS) + rows(MISSED)
    without = rows(NO_LEAKS) + rows(FALSE_ALARMS)
    assert len(with_answer) + len(without) >= 150
    found = sum(map(leaks, with_answer))
    assert found / len(with_answer) >= 0.9
    assert found / (found + sum(map(leaks, without))) >= 0.9
