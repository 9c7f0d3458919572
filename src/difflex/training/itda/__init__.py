"""Grow ITDA dictionaries from a stream of activations."""

from difflex.training.itda.growing import GrowthData, GrowthProgress, first_atoms, grow, load_grown
from difflex.training.itda.state import GrowthInterval, GrowthWork, expected_over_threshold

__all__ = [
    "GrowthData",
    "GrowthInterval",
    "GrowthProgress",
    "GrowthWork",
    "expected_over_threshold",
    "first_atoms",
    "grow",
    "load_grown",
]
