"""Teachers of your own: a plain function, and an async one that asks an OpenAI-compatible server.

python examples/your_teacher.py
TEACHER_KEY=.. python examples/your_teacher.py https://HOST/v1 MODEL
"""

import os
import re
import sys

import httpx
from transformers import AutoTokenizer

from socpo_fast import Engine, RolloutOptions, SamplingParams, load_student, socratic_rollouts
from socpo_fast.socratic.graders import grade_exact
from socpo_fast.socratic.tasks.molar_mass import ATOMIC_MASSES, STUDENT_DIR, questions


def recheck_masses(request):
    """Returns a message to the student, or None: nothing to say, and the rollout ends."""
    for symbol, mass in re.findall(r"([A-Z][a-z]?): \d x (\d+)", request.student_answer):
        if str(ATOMIC_MASSES.get(symbol)) != mass:
            return f"There is a mistake in the line of {symbol}. Recheck its atomic mass."
    return None


def api_teacher(url, model):
    headers = {"Authorization": f"Bearer {os.environ['TEACHER_KEY']}"}
    client = httpx.AsyncClient(base_url=url, headers=headers)

    async def ask(request):  # if this raises, the rollout ends and the reason is told; others go on
        texts = "Say what to recheck, never the answer.", request.question, request.student_answer
        messages = [{"role": "user", "content": "\n\n".join(texts)}]
        reply = await client.post("chat/completions", json={"model": model, "messages": messages})
        return reply.raise_for_status().json()["choices"][0]["message"]["content"]

    return ask


def main(*server):
    tokenizer = AutoTokenizer.from_pretrained(STUDENT_DIR)
    rollouts = socratic_rollouts(
        Engine(load_student(STUDENT_DIR), kv_cache_gib=0.05),
        tokenizer,
        questions(seed=0, n=8),
        teacher=api_teacher(*server) if server else recheck_masses,
        grader=grade_exact,
        params=SamplingParams(temperature=1, max_new_tokens=128, eos_ids=(tokenizer.eos_token_id,)),
        options=RolloutOptions(group_size=2, guidance_limit=64, guidance_timeout_s=30),
    )
    for rollout in rollouts:
        for turn in rollout.turns:
            print(f"question {rollout.question_idx}:", "right" if turn.is_correct else "wrong")
            if turn.guidance:
                print(f"  {turn.guidance.text}")


if __name__ == "__main__":
    main(*sys.argv[1:])
