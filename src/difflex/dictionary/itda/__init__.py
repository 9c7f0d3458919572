"""ITDA: dictionaries made of data. `grow` makes them from a stream; codes are found by pursuit."""

from difflex.dictionary.itda.config import Growth, paper
from difflex.dictionary.itda.curve import Moment, expected_over
from difflex.dictionary.itda.dictionary import ITDA
from difflex.dictionary.itda.growing import Progress, Source, grow
from difflex.dictionary.itda.provenance import Patch, Provenance
from difflex.dictionary.itda.pruning import clustered, without_similar
from difflex.dictionary.itda.ranks import Ranks, joined

__all__ = [
    "ITDA",
    "Growth",
    "Moment",
    "Patch",
    "Progress",
    "Provenance",
    "Ranks",
    "Source",
    "clustered",
    "expected_over",
    "grow",
    "joined",
    "paper",
    "without_similar",
]
