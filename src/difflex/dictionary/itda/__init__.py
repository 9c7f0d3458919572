"""ITDA: dictionaries made of data. `grow` makes them from a stream; codes are found by pursuit."""

from difflex.dictionary.itda.config import Growth, paper
from difflex.dictionary.itda.curve import Moment, expected_over
from difflex.dictionary.itda.dictionary import ITDA
from difflex.dictionary.itda.growing import Progress, Source, grow
from difflex.dictionary.itda.provenance import Patch, Provenance
from difflex.dictionary.itda.pruning import clustered, without_similar

__all__ = [
    "ITDA",
    "Growth",
    "Moment",
    "Patch",
    "Progress",
    "Provenance",
    "Source",
    "clustered",
    "expected_over",
    "grow",
    "paper",
    "without_similar",
]
