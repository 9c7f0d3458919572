"""ITDA: dictionaries whose atoms are activations, and whose codes are found by pursuit."""

from difflex.dictionaries.itda.config import GrowthConfig, paper, variant
from difflex.dictionaries.itda.dictionary import ITDA
from difflex.dictionaries.itda.provenance import AtomPatch, AtomProvenance
from difflex.dictionaries.itda.pruning import clustered, without_similar

__all__ = ["ITDA", "AtomPatch", "AtomProvenance", "GrowthConfig", "clustered", "paper", "variant", "without_similar"]
