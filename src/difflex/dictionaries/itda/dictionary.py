"""ITDA: a dictionary whose atoms are activations, and whose codes are found by pursuit (arXiv 2505.17769, 2505.24360)."""

from __future__ import annotations

from functools import cached_property
from typing import final, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from difflex.dictionaries.base import DictionaryOrigin, DictionaryState, NormalisedDictionary
from difflex.dictionaries.itda.config import variant
from difflex.dictionaries.itda.provenance import AtomPatch, AtomProvenance
from difflex.dictionaries.normalisation import Normalisation
from difflex.dictionaries.pursuit import RULES, Way
from difflex.dictionaries.pursuit.correlations import AtomSet
from difflex.dictionaries.pursuit.gram import GramMatrix
from difflex.dictionaries.pursuit.means import PursuitBackend, free_memory, means
from difflex.dictionaries.pursuit.rules import MatchingRule, OrthogonalRule
from difflex.dictionaries.pursuit.walk import walk
from difflex.errors import BadInput, BrokenFile, UnknownName
from difflex.records import Codes

__all__ = ["ITDA", "means_of", "way_of"]


@final
class ITDA(NormalisedDictionary, kinds=("itda",)):
    """Atoms of length one in the normalised space, each with the shot and token that it is."""

    kind = "itda"

    def __init__(
        self,
        *,
        k: int,
        origin: DictionaryOrigin,
        normalisation: Normalisation,
        atoms: Float[Tensor, "size width"],
        provenance: AtomProvenance,
        way: Way = "orthogonal",
    ) -> None:
        """The dictionary of `atoms`, whose codes are found by `way`."""
        _check(k, atoms, provenance, normalisation)
        self.k, self.origin, self.normalisation = k, origin, normalisation
        self.atoms, self.provenance = atoms, provenance
        self.way: Way = way
        self.bias = torch.zeros(atoms.shape[1], device=atoms.device)

    @property
    def label(self) -> str:
        """`itda-<size>-k<k>`, then what its growth had that the default has not: `itda-812-k32-over0.3-gradient`.

        Where a size was asked for, it is the one in the name, so that a recipe can name what will be grown; few atoms less may
        have come of it.
        """
        training = self.origin.training
        config = training.get("config")
        asked = config if isinstance(config, dict) and "pruned" not in training else {}
        size = asked.get("size", self.size) if asked.get("threshold", 0) is None else self.size
        return f"{self.kind}-{size}-k{self.k}{variant(training)}"

    def encode(self, x: Float[Tensor, "token width"]) -> Codes:
        z = self.normalisation.apply(self._checked(x))
        path = walk(self._ready, RULES[self.way], z, self.k)
        order = path.weights.abs().argsort(dim=1, descending=True, stable=True)
        return Codes(path.weights.gather(1, order), path.support.gather(1, order))

    def unexplained(self, x: Float[Tensor, "token width"]) -> Float[Tensor, " token"]:
        """The share of each token's squared length, in the normalised space, that its codes leave: what growth goes by."""
        z = self.normalisation.apply(self._checked(x))
        return walk(self._ready, RULES[self.way], z, self.k).unexplained

    def patch(self, feature: int) -> AtomPatch | None:
        """The very patch of the data that `feature` is; None for a dictionary of others that does not say."""
        return self.provenance.of(feature)

    @cached_property
    def means(self) -> PursuitBackend:
        """What its pursuits work with on this machine, chosen by shapes and the memory at hand."""
        return means_of(self.way, self.size, self.width, self.k, free_memory(self.atoms.device))

    @cached_property
    def _ready(self) -> AtomSet:
        """The atoms, with their Gram matrix where that pays."""
        gram = None if self.means.gram is None else GramMatrix.of(self.atoms, self.means.gram)
        return AtomSet(self.atoms, gram, self.means.pool)

    def saved(self) -> DictionaryState:
        return DictionaryState(
            kind=self.kind,
            k=self.k,
            origin=self.origin,
            settings={"pursuit": self.way, "normalisation": dict(self.normalisation.settings())},
            tensors={"atoms": self.atoms, **self.provenance.tensors(), **self.normalisation.tensors()},
        )

    @classmethod
    def restored(cls, saved: DictionaryState) -> ITDA:
        normalisation, pursuit = saved.settings.get("normalisation"), saved.settings.get("pursuit")
        if not isinstance(normalisation, dict) or not isinstance(pursuit, str) or "atoms" not in saved.tensors:
            raise BrokenFile("A dictionary's files lack its normalisation, its pursuit or its atoms: grow or copy it again.")
        way, provenance = way_of(pursuit), AtomProvenance.of_tensors(saved.tensors)
        try:
            return cls(
                k=saved.k,
                origin=saved.origin,
                normalisation=Normalisation.of(normalisation, saved.tensors),
                atoms=saved.tensors["atoms"],
                provenance=provenance,
                way=way,
            )
        except BadInput as error:
            raise BrokenFile(f"A dictionary's files do not belong together: {error} Grow or copy it again.") from error


def _check(k: int, atoms: Tensor, provenance: AtomProvenance, normalisation: Normalisation) -> None:
    if k < 1:
        raise BadInput(f"A dictionary needs at least one atom per token; k is {k}.")
    if atoms.ndim != 2 or not len(atoms):
        raise BadInput(f"A dictionary needs atoms [size, width]; it was given {[*atoms.shape]}.")
    size, width = atoms.shape
    if normalisation.width != width or not len(provenance.shots) == len(provenance.tokens) == size:
        raise BadInput(
            f"{size} atoms of width {width} do not go with a normalisation of width {normalisation.width} and the places of "
            f"{len(provenance.shots)} shots and {len(provenance.tokens)} tokens."
        )
    lengths = torch.linalg.vector_norm(atoms, dim=1)
    if not ((lengths - 1).abs() <= 1e-3).all():
        place = int(((lengths - 1).abs() <= 1e-3).logical_not().nonzero()[0, 0])
        raise BadInput(f"Atoms must have length one; atom {place} has {float(lengths[place]):.4g}. Normalise the rows.")


def means_of(way: Way, size: int, width: int, k: int, free: int) -> PursuitBackend:
    """What the pursuits of such a dictionary work with where `free` bytes are at hand."""
    rule = RULES[way]
    least_squares, single = isinstance(rule, OrthogonalRule), isinstance(rule, MatchingRule)
    return means(size, width, k, least_squares=least_squares, single=single, free=free)


def way_of(name: str) -> Way:
    """`name` as the pursuit that it names."""
    for way in get_args(Way):
        if name == way:
            return way
    raise UnknownName.among("The pursuit", name, get_args(Way))
