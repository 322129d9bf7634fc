"""A run folder as one page for people: write_report; an evaluation as a table: accuracy_text."""

from socpo_fast.report.accuracy import accuracy_text
from socpo_fast.report.write import write_report

__all__ = ["accuracy_text", "write_report"]
