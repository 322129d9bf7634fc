"""Makes the study's students: the shipped one, and some that are right more often unassisted."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch

from bench.learning.plan import STUDENTS
from socpo_fast.model import load_student
from socpo_fast.socratic.bridge import load_tokenizer
from socpo_fast.socratic.tasks.molar_mass import STUDENT_DIR
from tools.builtin_student.warm_up import calibrate, save

CACHE = Path("runs/learning")


def student_folder(name: str, cache: Path) -> Path:
    """Returns a student's folder; makes the student if it is absent, which takes minutes."""
    variant = STUDENTS[name]
    if variant.shares is None:
        return STUDENT_DIR
    folder = cache / name
    if not folder.exists():
        print(f"student {name}: {variant.num_updates} updates of warm-up", flush=True)
        student = load_student(STUDENT_DIR)
        tokenizer = load_tokenizer(STUDENT_DIR)
        calibrate(
            student.requires_grad_(True),
            tokenizer,
            seed=variant.seed,
            shares=variant.shares,
            num_updates=variant.num_updates,
        )
        # Saved under another name first, so that an interrupted save is never taken for a student.
        partial = cache / f"{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        save(student, tokenizer, partial)
        partial.rename(folder)
    return folder


def main() -> None:
    """Makes all students, in the folder of the first argument or in `runs/learning`."""
    torch.set_num_threads(1)
    cache = Path(sys.argv[1] if len(sys.argv) > 1 else CACHE)
    for name in STUDENTS:
        print(name, student_folder(name, cache))


if __name__ == "__main__":
    main()
