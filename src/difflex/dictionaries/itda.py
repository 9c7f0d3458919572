"""ITDA: dictionaries whose atoms are activations and whose codes are found by pursuit (arXiv 2505.17769, 2505.24360)."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Literal, NamedTuple, final, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from difflex.choices import NormalisationMethod, PursuitName
from difflex.devices import free_memory
from difflex.dictionaries.base import DictionaryOrigin, DictionaryState, NormalisedDictionary
from difflex.dictionaries.files import parse_choice
from difflex.dictionaries.normalisation import Normalisation
from difflex.dictionaries.pursuit import (
    RULES,
    AtomSet,
    GramMatrix,
    PursuitBackend,
    PursuitPath,
    choose_backend,
    product,
    run_pursuit,
)
from difflex.dictionaries.pursuit.correlations import check_norms
from difflex.errors import BadInput
from difflex.files import Json
from difflex.records import Codes, Shot

__all__ = [
    "ITDA",
    "AtomPatch",
    "AtomProvenance",
    "GrowthConfig",
    "cluster_atoms",
    "label_suffix",
    "paper_config",
    "remove_similar",
]

BLOCK = 1024
"""Atoms that are compared with all others at a time."""
GRAM_SHARE = 0.6
"""The share of the free memory that a Gram matrix may take."""
LARGE_K = 1024
"""Fewer atoms than k may have been found in the data, but no pursuit needs more rounds than this for them."""


@dataclass(frozen=True, kw_only=True)
class GrowthConfig:
    """How an ITDA dictionary grows."""

    k: int = 32
    """Atoms per token."""
    threshold: float | None = None
    """A token becomes an atom if more than this share of its squared norm is unexplained; by default the threshold at which the
    data fills the dictionary is searched."""
    size: int = 8192
    """The largest number of atoms."""
    pursuit: PursuitName = "orthogonal"
    """The default leaves the smallest residual."""
    normalisation: NormalisationMethod = "standardise"
    clip: float | None = None
    """Normalised inputs are clipped to +-clip."""
    batch: int = 256
    """Tokens per process that are compared with the dictionary together."""
    max_per_batch: int | None = None
    """How many tokens of a batch, those that are explained worst, may become atoms."""
    add: Literal["point", "residual"] = "point"
    """The vector that becomes an atom: the token, or its residual, which is not a row of the data."""
    patience: int = 200_000
    """Growth ends after this many tokens without a new atom."""
    holdout: float = 0.1
    """The share of the training prompts whose tokens never become atoms, so that how well they are explained predicts it for
    new images. The published code lets every prompt become atoms: 0 does the same, and predicts nothing."""

    def __post_init__(self) -> None:
        if self.threshold is not None and not 0 < self.threshold < 1:
            raise BadInput(f"Threshold {self.threshold} is not a share: choose a number between 0 and 1, such as 0.3.")
        for name in ("k", "size", "batch", "patience"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name} is {getattr(self, name)}: it must be 1 or more.")
        if self.max_per_batch is not None and self.max_per_batch < 1:
            raise BadInput(f"max_per_batch is {self.max_per_batch}: it must be 1 or more, or None for no limit.")
        if not 0 <= self.holdout < 1:
            raise BadInput(f"holdout is {self.holdout}: it must be a share of 0 or more, below 1, such as 0.1.")

    def as_json(self) -> dict[str, Json]:
        """Return these settings as plain JSON."""
        return json.loads(json.dumps(asdict(self)))


def paper_config() -> GrowthConfig:
    """Return the settings of arXiv 2505.24360: gradient pursuit, k 64, inputs centred and divided by their standard deviation.

    There are four deliberate differences: the threshold is a share of each vector's squared norm (theirs: of the batch's mean),
    statistics come from at least 10 x width vectors (theirs: one batch), no near-duplicates enter within a batch, and a tenth of
    the prompts never become atoms (`holdout`).
    """
    return GrowthConfig(k=64, size=64_000, threshold=0.6, pursuit="gradient", normalisation="standardise")


LABEL_PARTS = {
    "threshold": "over{}",
    "pursuit": "{}",
    "normalisation": "{}",
    "clip": "clip{}",
    "max_per_batch": "most{}",
    "add": "{}",
    "holdout": "out{}",
}
"""The settings that a label contains if they differ from the default, and their form there."""


def label_suffix(training: Mapping[str, Json]) -> str:
    """Return the part of a label that distinguishes growths of one size and k: `-over0.3-gradient`, `-seed1`; often empty."""
    config, defaults = training.get("config"), GrowthConfig().as_json()
    entries = config if isinstance(config, dict) else {}
    parts = [
        form.format(entries[name]) for name, form in LABEL_PARTS.items() if entries.get(name, defaults[name]) != defaults[name]
    ]
    parts += [f"{name}{training[name]}" for name in ("seed", "first") if training.get(name)]
    parts += ["pruned"] if "pruned" in training else []
    return "".join(f"-{part}" for part in parts) + str(training.get("variant", ""))


class AtomPatch(NamedTuple):
    """The token of the data that an atom is."""

    number: int
    """The number of its shot in the activations that the dictionary was grown from."""
    token: int
    """Its position within the shot."""
    shot: Shot | None
    """The shot, if it is known."""


@dataclass(frozen=True, kw_only=True)
class AtomProvenance:
    """The shot and token of every atom."""

    shots: Int[Tensor, " size"]
    """Numbers of shots; -1 if unknown."""
    tokens: Int[Tensor, " size"]
    details: Mapping[int, Shot] = field(default_factory=dict)
    """The shots by number, as far as they are known."""

    def patch(self, feature: int) -> AtomPatch | None:
        """Return the patch that `feature` is; None if unknown."""
        number = int(self.shots[feature])
        return None if number < 0 else AtomPatch(number, int(self.tokens[feature]), self.details.get(number))

    @classmethod
    def unknown(cls, size: int) -> AtomProvenance:
        """Return the provenance of `size` atoms of unknown origin."""
        shots = torch.full((size,), -1)
        return cls(shots=shots, tokens=shots.clone())

    def select(self, features: Int[Tensor, " feature"]) -> AtomProvenance:
        """Return the provenance of these features alone."""
        shots = self.shots[features]
        numbers = set(shots.tolist())
        details = {number: shot for number, shot in self.details.items() if number in numbers}
        return type(self)(shots=shots, tokens=self.tokens[features], details=details)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors to save; shots are lines of JSON, as bytes."""
        lines = "\n".join(json.dumps([number, shot.as_json()]) for number, shot in sorted(self.details.items()))
        packed = torch.frombuffer(bytearray(lines.encode() or b"\n"), dtype=torch.uint8)
        return {"provenance.shots": self.shots, "provenance.tokens": self.tokens, "provenance.known": packed}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> AtomProvenance:
        """Return the provenance that was saved as `tensors`."""
        lines = tensors["provenance.known"].cpu().numpy().tobytes().decode().split("\n")
        entries = [json.loads(line) for line in lines if line]
        details = {int(number): Shot(**{**entry, "pixels": tuple(entry["pixels"])}) for number, entry in entries}
        return cls(shots=tensors["provenance.shots"].cpu(), tokens=tensors["provenance.tokens"].cpu(), details=details)


@final
class ITDA(NormalisedDictionary, kinds=("itda",)):
    """A dictionary of atoms of norm one in the normalised space, with the shot and token that each atom is."""

    kind = "itda"

    def __init__(
        self,
        *,
        k: int,
        origin: DictionaryOrigin,
        normalisation: Normalisation,
        atoms: Float[Tensor, "size width"],
        provenance: AtomProvenance,
        pursuit: PursuitName = "orthogonal",
    ) -> None:
        """Make the dictionary of `atoms`, whose codes are found by `pursuit`."""
        _check(k, atoms, provenance, normalisation)
        self.k, self.origin, self.normalisation = k, origin, normalisation
        self.atoms, self.provenance = atoms, provenance
        self.pursuit: PursuitName = pursuit
        self.bias = torch.zeros(atoms.shape[1], device=atoms.device)

    @property
    def label(self) -> str:
        """`itda-<size>-k<k>`, followed by settings of the growth that are not the default: `itda-812-k32-over0.3-gradient`.

        Without a threshold the size is the one in the config, which a recipe knows before the growth; the dictionary may have a
        few atoms less.
        """
        training = self.origin.training
        config = training.get("config")
        settings = config if isinstance(config, dict) and "pruned" not in training else {}
        size = settings.get("size", self.size) if settings.get("threshold", 0) is None else self.size
        return f"{self.kind}-{size}-k{self.k}{label_suffix(training)}"

    def encode(self, x: Float[Tensor, "token width"]) -> Codes:
        codes = self._run(x).codes
        order = codes.values.abs().argsort(dim=1, descending=True, stable=True)
        return Codes(codes.values.gather(1, order), codes.indices.gather(1, order))

    def unexplained(self, x: Float[Tensor, "token width"]) -> Float[Tensor, " token"]:
        """Return the residual's share of each token's squared norm in the normalised space, the measure of growth."""
        return self._run(x).unexplained

    def patch(self, feature: int) -> AtomPatch | None:
        """Return the patch of the data that `feature` is; None if it is unknown."""
        return self.provenance.patch(feature)

    @cached_property
    def backend(self) -> PursuitBackend:
        """The backend of its pursuits, chosen by the shapes; without the memory for it, by products, which is slower."""
        device = self.atoms.device
        backend = choose_backend(self.pursuit, self.size, self.width, self.k, device.type)
        if backend.gram is None or (need := backend.memory(self.size, self.width)) <= GRAM_SHARE * free_memory(device):
            return backend
        warnings.warn(
            f"{self.name} is used without a Gram matrix, which needs {need / 1e9:.1f} GB of memory on {device}: codes take "
            "longer, and their last bits may differ.",
            stacklevel=2,
        )
        return PursuitBackend(None, None, "products with the residual (too little memory is free for a Gram matrix)")

    @cached_property
    def _atom_set(self) -> AtomSet:
        gram = None if self.backend.gram is None else GramMatrix.of(self.atoms, self.backend.gram)
        half = AtomSet.half_rows(self.atoms) if self.backend.half else None
        return AtomSet(self.atoms, gram, self.backend.pool, half)

    def _run(self, x: Float[Tensor, "token width"]) -> PursuitPath:
        return run_pursuit(self._atom_set, RULES[self.pursuit], self.normalisation.apply(self._validated(x)), self.k)

    def state(self) -> DictionaryState:
        return DictionaryState(
            kind=self.kind,
            k=self.k,
            origin=self.origin,
            settings={"pursuit": self.pursuit, "normalisation": dict(self.normalisation.settings())},
            tensors={"atoms": self.atoms, **self.provenance.tensors(), **self.normalisation.tensors()},
        )

    @classmethod
    def from_state(cls, state: DictionaryState) -> ITDA:
        return cls(
            k=state.k,
            origin=state.origin,
            normalisation=Normalisation.from_saved(state.normalisation, state.tensors),
            atoms=state.tensors["atoms"],
            provenance=AtomProvenance.from_tensors(state.tensors),
            pursuit=parse_choice("The pursuit", state.settings.get("pursuit"), get_args(PursuitName)),
        )


def _check(k: int, atoms: Tensor, provenance: AtomProvenance, normalisation: Normalisation) -> None:
    if atoms.ndim != 2 or not len(atoms):
        raise BadInput(f"A dictionary needs atoms [size, width], but got {[*atoms.shape]}.")
    size, width = atoms.shape
    if not 1 <= k <= max(size, LARGE_K):
        raise BadInput(f"k {k} does not fit a dictionary of {size} atoms: choose k between 1 and {max(size, LARGE_K)}.")
    if provenance.shots.ndim != 1 or provenance.tokens.ndim != 1:
        raise BadInput("The provenance of atoms is one shot and one token for each.")
    if normalisation.width != width or not len(provenance.shots) == len(provenance.tokens) == size:
        raise BadInput(
            f"{size} atoms of width {width} do not fit a normalisation of width {normalisation.width} and a provenance of "
            f"{len(provenance.shots)} shots and {len(provenance.tokens)} tokens."
        )
    check_norms(atoms)


def remove_similar(itda: ITDA, cosine: float = 0.8) -> ITDA:
    """Return `itda` without atoms whose cosine with an earlier remaining atom exceeds `cosine`."""
    if not 0 < cosine < 1:
        raise BadInput(f"A cosine of {cosine} removes nothing or everything: choose a number between 0 and 1.")
    atoms, keep = itda.atoms, torch.zeros(itda.size, dtype=torch.bool, device=itda.atoms.device)
    for start in range(0, itda.size, BLOCK):
        block = atoms[start : start + BLOCK]
        differs = (product(block, atoms[:start][keep[:start]]) <= cosine).all(1)
        similar = (product(block, block) > cosine).cpu()
        for row in range(len(block)):
            if differs[row] and not similar[row, :row][keep[start : start + row].cpu()].any():
                keep[start + row] = True
    features = keep.nonzero()[:, 0]
    return _pruned(itda, atoms[features], itda.provenance.select(features.cpu()), {"remove_similar": cosine})


def cluster_atoms(itda: ITDA, size: int, seed: int = 0, rounds: int = 20) -> ITDA:
    """Return a dictionary of `size` centres of the atoms by spherical k-means, each with the patch of its nearest atom.

    Its atoms are not rows of the data.
    """
    if not 0 < size <= itda.size:
        raise BadInput(f"{itda.size} atoms cannot form {size} clusters: choose a size between 1 and {itda.size}.")
    atoms = itda.atoms
    start = torch.randperm(itda.size, generator=torch.Generator().manual_seed(seed))[:size]
    centres = atoms[start.to(atoms.device)].clone()
    for _ in range(rounds):
        sums = torch.zeros_like(centres).index_add_(0, _nearest(atoms, centres), atoms)
        # A centre without atoms stays where it is.
        centres = torch.where(sums.any(1, keepdim=True), F.normalize(sums, dim=1), centres)
    provenance = itda.provenance.select(_nearest(centres, atoms).cpu())
    return _pruned(itda, centres, provenance, {"cluster_atoms": size, "seed": seed})


def _nearest(rows: Float[Tensor, "row width"], others: Float[Tensor, "other width"]) -> Tensor:
    """Return, for every row, the index of the other row with the largest inner product."""
    return torch.cat([product(part, others).argmax(1) for part in rows.split(BLOCK)])


def _pruned(itda: ITDA, atoms: Tensor, provenance: AtomProvenance, settings: Mapping[str, Json]) -> ITDA:
    training = {**itda.origin.training, "pruned": {**settings, "from": itda.size}}
    return ITDA(
        k=itda.k,
        origin=replace(itda.origin, training=training),
        normalisation=itda.normalisation,
        atoms=atoms,
        provenance=provenance,
        pursuit=itda.pursuit,
    )
