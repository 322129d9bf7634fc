"""SocraticPO in TRL: GRPOTrainer with a teacher and a grader, on the built-in task. Needs TRL 1.16.

The engine samples from the model that TRL trains; nothing is copied or synchronised.
python examples/trl_socratic.py --steps 40
"""

import argparse

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig

from socpo_fast import RolloutOptions
from socpo_fast.integrations.trl import SocraticGRPOTrainer
from socpo_fast.socratic.graders import grade_exact
from socpo_fast.socratic.tasks.molar_mass import STUDENT_DIR, questions, tutor


def rows(seed, n):
    return Dataset.from_list(
        [{"prompt": q.messages, "ground_truth": q.ground_truth} for q in questions(seed, n)]
    )


def main(steps=40, questions_per_step=16, num_eval=128, folder="trl_socratic"):
    args = GRPOConfig(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=8 * questions_per_step,
        num_generations=8,
        num_generations_eval=1,
        max_completion_length=128,  # of an attempt
        learning_rate=2e-4,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        logging_steps=10,
    )
    trainer = SocraticGRPOTrainer(
        AutoModelForCausalLM.from_pretrained(STUDENT_DIR),
        args=args,
        train_dataset=rows(seed=0, n=steps * questions_per_step),
        eval_dataset=rows(seed=1, n=num_eval),
        processing_class=AutoTokenizer.from_pretrained(STUDENT_DIR),
        teacher=tutor,  # a function of the request: what to say about a wrong attempt
        grader=grade_exact,  # text, question -> whether it is right
        options=RolloutOptions(group_size=8, max_attempts=2, attempt_limit=128, guidance_limit=64),
        kv_cache_gib=0.2,
    )
    before = trainer.evaluate()["eval_success/unassisted"]
    trainer.train()
    print(f"right alone: {before:.0%}, {trainer.evaluate()['eval_success/unassisted']:.0%} now")
    return trainer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    main(parser.parse_args().steps)
