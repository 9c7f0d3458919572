"""ITDA: dictionaries made of data. `grow` makes them from a stream; codes are found by pursuit."""

from difflex.dictionary.itda.config import GrowthConfig, paper
from difflex.dictionary.itda.curve import GrowthInterval, expected_over
from difflex.dictionary.itda.dictionary import ITDA
from difflex.dictionary.itda.growing import GrowthData, GrowthProgress, grow
from difflex.dictionary.itda.provenance import AtomPatch, AtomProvenance
from difflex.dictionary.itda.pruning import clustered, without_similar

__all__ = [
    "ITDA",
    "AtomPatch",
    "AtomProvenance",
    "GrowthConfig",
    "GrowthData",
    "GrowthInterval",
    "GrowthProgress",
    "clustered",
    "expected_over",
    "grow",
    "paper",
    "without_similar",
]
