"""Smaller dictionaries from grown ones: without near-duplicates, or with the centres of clusters for atoms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from difflex.dictionaries.itda.dictionary import ITDA
from difflex.dictionaries.itda.provenance import AtomProvenance
from difflex.dictionaries.pursuit.products import product
from difflex.errors import BadInput
from difflex.files import Json

__all__ = ["clustered", "without_similar"]

BLOCK = 1024


def without_similar(itda: ITDA, cosine: float = 0.8) -> ITDA:
    """`itda` without every atom whose cosine with an earlier one that stays exceeds `cosine`."""
    if not 0 < cosine < 1:
        raise BadInput(f"A cosine of {cosine} prunes nothing or everything: choose a number between 0 and 1.")
    atoms, kept = itda.atoms, torch.zeros(itda.size, dtype=torch.bool, device=itda.atoms.device)
    for start in range(0, itda.size, BLOCK):
        block = atoms[start : start + BLOCK]
        free = (product(block, atoms[:start][kept[:start]]) <= cosine).all(1)
        inside = (product(block, block) > cosine).cpu()
        for place in range(len(block)):
            if free[place] and not inside[place, :place][kept[start : start + place].cpu()].any():
                kept[start + place] = True
    features = kept.nonzero()[:, 0]
    return _remade(itda, atoms[features], itda.provenance.take(features.cpu()), {"without_similar": cosine})


def clustered(itda: ITDA, size: int, seed: int = 0, rounds: int = 20) -> ITDA:
    """A dictionary of `size` centres of the atoms by spherical k-means; each keeps the patch of the atom nearest to it.

    Its atoms are no longer rows of the data.
    """
    if not 0 < size <= itda.size:
        raise BadInput(f"{itda.size} atoms have no {size} centres: choose a size between 1 and {itda.size}.")
    atoms = itda.atoms
    start = torch.randperm(itda.size, generator=torch.Generator().manual_seed(seed))[:size]
    centres = atoms[start.to(atoms.device)].clone()
    for _ in range(rounds):
        sums = torch.zeros_like(centres).index_add_(0, _nearest(atoms, centres), atoms)
        # A centre without atoms stays where it is.
        centres = torch.where(sums.any(1, keepdim=True), F.normalize(sums, dim=1), centres)
    return _remade(itda, centres, itda.provenance.take(_nearest(centres, atoms).cpu()), {"clustered": size, "seed": seed})


def _nearest(rows: Float[Tensor, "row width"], others: Float[Tensor, "other width"]) -> Tensor:
    """The number of the other row with the largest inner product, for every row."""
    return torch.cat([product(part, others).argmax(1) for part in rows.split(BLOCK)])


def _remade(itda: ITDA, atoms: Tensor, provenance: AtomProvenance, how: Mapping[str, Json]) -> ITDA:
    origin = replace(itda.origin, training={**itda.origin.training, "pruned": {**how, "from": itda.size}})
    return ITDA(k=itda.k, origin=origin, normalisation=itda.normalisation, atoms=atoms, provenance=provenance, way=itda.way)
