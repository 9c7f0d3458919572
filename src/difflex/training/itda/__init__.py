"""Grow ITDA dictionaries from a stream of activations."""

from difflex.training.itda.curve import GrowthInterval, expected_over
from difflex.training.itda.growing import GrowthData, GrowthProgress, grow

__all__ = ["GrowthData", "GrowthInterval", "GrowthProgress", "expected_over", "grow"]
