"""The built-in task: molar_mass (questions, tutor) and its student, which tools/builtin_student
made.
"""
