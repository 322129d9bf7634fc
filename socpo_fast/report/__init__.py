"""A run for people: while it goes (progress), as one page (write_report); an evaluation as a table (accuracy_text)."""

from socpo_fast.report.accuracy import accuracy_text
from socpo_fast.report.write import write_report

__all__ = ["accuracy_text", "write_report"]
