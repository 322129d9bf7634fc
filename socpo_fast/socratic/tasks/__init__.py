"""Holds the built-in task: molar_mass, its questions and tutor, and molar_mass_student.

tools/builtin_student made the student.
"""
