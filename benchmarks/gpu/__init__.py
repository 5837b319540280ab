"""Programs that measure on a GPU; README.md says what and how, `run.py` runs them all."""
