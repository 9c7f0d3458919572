"""Figures of a study, a file for each of its stations."""
