"""A run folder as one page for people: write_report."""

from socpo_fast.report.write import write_report

__all__ = ["write_report"]
