"""Rollouts as a data set: roll out without training, write parquet, read it, make tensors.

python examples/rollouts_dataset.py FOLDER
"""

import sys

from datasets import load_dataset
from transformers import AutoTokenizer

import socpo_fast
from socpo_fast.report.rollouts import export_rollouts, write_rollouts
from socpo_fast.socratic.graders import grade_exact
from socpo_fast.socratic.tasks.molar_mass import STUDENT_DIR, questions, tutor


def main(folder):
    tokenizer = AutoTokenizer.from_pretrained(STUDENT_DIR)
    asked = {question.question_idx: question for question in questions(seed=0, n=4)}
    eos_ids = (tokenizer.eos_token_id,)
    rolled_out = socpo_fast.socratic_rollouts(
        socpo_fast.Engine(socpo_fast.load_student(STUDENT_DIR), kv_cache_gib=0.05),
        tokenizer,
        list(asked.values()),
        teacher=tutor,
        grader=grade_exact,
        params=socpo_fast.SamplingParams(temperature=1, max_new_tokens=128, eos_ids=eos_ids),
        options=socpo_fast.RolloutOptions(group_size=4, guidance_limit=64),
    )
    rollouts = list(rolled_out)
    # JSON lines of each batch, then parquet of all batches in verl's layout: prompt, reward_model,
    # data_source; extra_info.turns holds the attempts.
    write_rollouts(folder, rollouts, asked, batch=1)
    export_rollouts(folder, f"{folder}/rollouts.parquet")

    for row in load_dataset("parquet", data_files=f"{folder}/rollouts.parquet", split="train"):
        turns = row["extra_info"]["turns"]
        if len(turns) == 2 and turns[1]["is_correct"]:
            print(row["prompt"][-1]["content"], "\n\nStudent:", turns[0]["text"])
            print("\nTeacher:", turns[0]["guidance"], "\n\nStudent:", turns[1]["text"])
            break

    # For a trainer: one row a rollout, with the advantage of each sampled token.
    padded = socpo_fast.pad_rollouts(rollouts, rows="rollout", pad_id=tokenizer.pad_token_id)
    advantages = socpo_fast.socratic_advantages(
        padded.rewards_BL, padded.loss_mask_BL, padded.group_B
    )
    print(
        f"\n{list(padded.ids_BL.shape)} token ids, {int(padded.loss_mask_BL.sum())} of them sampled"
    )
    print(f"advantages from {float(advantages.min()):.2f} to {float(advantages.max()):.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
