"""Studies what the teacher is good for. Read plan first, then run, results, tables, figures."""
