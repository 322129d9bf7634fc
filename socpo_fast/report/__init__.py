"""Writes and reads a run's folder, and shows a run to people: live progress and one HTML page."""
