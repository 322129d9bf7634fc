"""Graders of your own: a bool, a number in [0, 1], or named parts of one.

A grader sees the text of an attempt and its question, and never raises on what a model wrote.
"""

import re

from transformers import AutoTokenizer

from socpo_fast import Engine, RolloutOptions, SamplingParams, load_student, socratic_rollouts
from socpo_fast.socratic.graders import CheckedGrader
from socpo_fast.socratic.tasks.molar_mass import STUDENT_DIR, questions, tutor


def stated_answer(text):
    found = re.search(r"<answer>\n(\d+)\n</answer>", text)
    return int(found.group(1)) if found else None


def is_right(text, question):
    return stated_answer(text) == int(question.ground_truth)


def closeness(text, question):
    """How near the answer is: 1 for the right one, 0 from an error of half of it on."""
    answer, truth = stated_answer(text), int(question.ground_truth)
    return 0.0 if answer is None else max(0.0, 1 - 2 * abs(answer - truth) / truth)


def answer_and_format(text, question):
    """Named parts; the reward is their sum, and the report shows each of them."""
    has_format = text.startswith("<reasoning>") and stated_answer(text) is not None
    return {"answer": 0.9 * is_right(text, question), "format": 0.1 * has_format}


def main():
    tokenizer = AutoTokenizer.from_pretrained(STUDENT_DIR)
    engine = Engine(load_student(STUDENT_DIR), kv_cache_gib=0.05)
    eos_ids = (tokenizer.eos_token_id,)
    settings = {
        "params": SamplingParams(temperature=1, max_new_tokens=128, eos_ids=eos_ids),
        "options": RolloutOptions(group_size=1, guidance_limit=64),
        "batch_idx": 0,  # the same sampling noise for each grader
    }
    # An attempt with a reward of correct_at or more counts as correct, and is the rollout's last.
    near = CheckedGrader(closeness, "near", correct_at=0.75)
    graders = {"bool": is_right, "float": closeness, "near": near, "parts": answer_and_format}
    for name, grader in graders.items():
        played = engine, tokenizer, questions(seed=0, n=8)
        rollouts = socratic_rollouts(*played, teacher=tutor, grader=grader, **settings)
        first = [rollout.turns[0] for rollout in sorted(rollouts, key=lambda r: r.question_idx)]
        num_correct = sum(turn.is_correct for turn in first)
        rewards = [round(turn.raw_reward, 2) for turn in first]
        print(f"{name}: {num_correct} correct, rewards {rewards}, parts {first[0].reward_parts}")


if __name__ == "__main__":
    main()
