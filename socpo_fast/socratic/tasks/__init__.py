"""The built-in task: molar_mass (questions, tutor), tokenizer and warm_up (how its student was made)."""
