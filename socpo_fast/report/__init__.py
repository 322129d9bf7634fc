"""A run's folder and what is written there; a run for people, while it goes and as one page."""
