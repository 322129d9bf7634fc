"""A run for people: while it goes (progress), as one page (write), its rollouts as rows, an evaluation as a table."""
