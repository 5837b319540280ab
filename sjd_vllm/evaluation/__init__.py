"""Evaluation: every method on the same prompts and seeds, losslessness, scores, and a report."""
