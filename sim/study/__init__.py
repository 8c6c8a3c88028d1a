"""Studies: one question asked of many runs, and their results on one page."""
