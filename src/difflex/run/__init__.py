"""Runs a study: the one place where recipes and commands meet."""

from difflex.run.running import Entry, Step, diary, run_study, steps

__all__ = ["Entry", "Step", "diary", "run_study", "steps"]
