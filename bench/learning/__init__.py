"""A study of what the teacher is good for: plan (start here), run, results, tables, figures."""
