"""SocraticPO in a plain PyTorch loop around a live transformers model.

The engine samples from the model's own parameters: no copy, no sync. Any optimizer may step them.
"""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import socpo_fast
from socpo_fast.ops import compute_advantages
from socpo_fast.socratic.graders import grade_exact
from socpo_fast.socratic.tasks.molar_mass import STUDENT_DIR, questions, tutor


def main(num_batches=40, questions_per_batch=16, group_size=8):
    tokenizer = AutoTokenizer.from_pretrained(STUDENT_DIR)
    model = AutoModelForCausalLM.from_pretrained(STUDENT_DIR)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4, betas=(0.9, 0.95))
    student = socpo_fast.adopt_student(model, share=True)  # the optimizer's parameters remain
    engine = socpo_fast.Engine(student, kv_cache_gib=0.1)
    eos_ids = (tokenizer.eos_token_id,)
    params = socpo_fast.SamplingParams(temperature=1, max_new_tokens=128, eos_ids=eos_ids)
    options = socpo_fast.RolloutOptions(group_size=group_size, max_attempts=2, guidance_limit=64)
    dataset = questions(seed=0, n=num_batches * questions_per_batch)
    for batch in range(num_batches):
        rollouts = list(
            socpo_fast.socratic_rollouts(
                engine,
                tokenizer,
                dataset[batch * questions_per_batch :][:questions_per_batch],
                teacher=tutor,
                grader=grade_exact,
                params=params,
                options=options,
            )
        )
        table = socpo_fast.attempt_table(rollouts)
        advantages = compute_advantages(*table, schedule="batch_mean")
        socpo_fast.policy_gradients(
            student, rollouts, advantages_A=advantages, token_budget=4096, temperature=1.0
        )
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()  # the engine notices that the weights have changed
        optimizer.zero_grad()
        unassisted = table.rewards_A[table.attempt_idx_A == 0].mean()
        assisted = table.rewards_A.sum() / len(rollouts)
        print(f"batch {batch}: {unassisted:.0%} right alone, {assisted:.0%} with guidance")
    return model


if __name__ == "__main__":
    main().save_pretrained("student")
