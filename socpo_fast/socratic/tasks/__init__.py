"""The built-in task: molar_mass (questions, tutor) and its student, which bench/builtin_student made."""
