"""`SiteActivations`: the stored activations of one site, and the dictionaries that are trained on them."""

from __future__ import annotations

from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import final

from difflex.choices import NormalisationMethod, PursuitName, SAEKind
from difflex.errors import BadInput
from difflex.explore.dictionary import FeatureDictionary
from difflex.explore.display import facts, heading
from difflex.explore.workspace import Workspace
from difflex.records import ActivationBatch, Shot, Site, Split
from difflex.store import Store
from difflex.study import DictionaryRef
from difflex.training.study import PRESETS, GrowthSweepConfig, SweepConfig, grow_sweep, train_sweep
from difflex.values import fits, shown

__all__ = ["SiteActivations", "grow_itda", "train_sae"]

FEW = 1_000_000
"""Training tokens up to which they are repeated."""
EPOCHS = 3
"""How often they are repeated."""
PROMPTS = 3
"""Prompts that are shown."""


@final
class SiteActivations:
    """The activations of a model at one site, on disk, with the shot and token of every row."""

    def __init__(self, workspace: Workspace, site: Site) -> None:
        """Use the activations that a study has of `site`."""
        self.workspace, self.site = workspace, site

    @cached_property
    def store(self) -> Store:
        """The store, which reads shuffled batches."""
        return Store.open(self.workspace.study.stores()[self.site])

    @property
    def width(self) -> int:
        """The width of an activation."""
        return self.store.width

    @property
    def grid(self) -> tuple[int, int] | None:
        """Rows and columns of the tokens of an image; None for text."""
        return self.store.grid

    @property
    def folder(self) -> Path:
        """The folder of the study."""
        return self.workspace.study.folder

    def sample(self, rows: int = 1024, seed: int = 0, split: Split = "train") -> ActivationBatch:
        """Return random rows in memory, as `values`, with the numbers of their `shots` and `tokens`."""
        return next(iter(self.store.batches(rows, seed=seed, split=split)))

    def shot(self, number: int) -> Shot:
        """Return the shot of this number: the prompt, seed and timestep of a row."""
        return self.store.shot(number)

    @property
    def prompts(self) -> list[str]:
        """The prompts of all shots, each once, in the order of the harvest."""
        shots = len(self) // self.store.tokens
        return list(dict.fromkeys(self.store.shot(number).prompt for number in range(shots)))

    def __len__(self) -> int:
        return self.store.count("train") + self.store.count("held-out")

    def __repr__(self) -> str:
        return f"<activations of {self.workspace.study.model} at {self.site}: {len(self):,} rows of width {self.width:,}>"

    def _repr_html_(self) -> str:
        first = dict.fromkeys(self.store.shot(number).prompt for number in range(min(64, len(self) // self.store.tokens)))
        grid = "text" if self.grid is None else f"{self.grid[0]} x {self.grid[1]}"
        values = {
            "rows": f"{len(self):,}, of which {self.store.count('held-out'):,} are held out",
            "width": f"{self.width:,}",
            "tokens": f"{self.store.tokens:,} ({grid}) at each step of an image",
            "prompts": "; ".join(islice(first, PROMPTS)) + "; …" * (len(first) > PROMPTS),
            "folder": self.workspace.describe_folder(),
        }
        return heading(f"{self.workspace.study.model}, {self.site}", "activations") + facts(values)


def train_sae(
    activations: SiteActivations,
    size: int = 2048,
    k: int = 32,
    kind: SAEKind = "topk",
    tokens: int | None = None,
    seed: int = 0,
    *,
    batch: int | None = None,
    learning_rate: float | None = None,
    normalisation: NormalisationMethod | None = None,
) -> FeatureDictionary:
    """Train a sparse autoencoder of `size` features, `k` of them at a token, and return it; a trained one is read again.

    `tokens` is the number of tokens to train on. By default they are all training tokens, three times if they are fewer than a
    million. `batch`, `learning_rate` and `normalisation` replace those of the preset; `difflex train` has further options.
    """
    _check_activations(activations)
    for name, count in (("size", size), ("k", k)):
        if not fits(int, count) or count < 1:
            raise BadInput(f"A dictionary with {name}={shown(count)} is not possible. Use a whole number above 0.")
    rows = activations.store.count("train")
    batch = PRESETS["default"].batch if batch is None else batch
    if rows < batch:
        raise BadInput(
            f"{rows:,} training tokens are fewer than the {batch:,} of one update. Harvest more prompts; an image of "
            f"{activations.workspace.study.model} has {activations.store.tokens:,} tokens at each step."
        )
    config = SweepConfig(
        size=(size,),
        k=(k,),
        kind=kind,
        tokens=tokens if tokens is not None else EPOCHS * rows if rows < FEW else rows,
        batch=batch,
        seed=seed,
        learning_rate=learning_rate,
        normalisation=normalisation,
    )
    [folder] = train_sweep(activations.workspace.study, [str(activations.site)], config)
    return FeatureDictionary(activations.workspace, DictionaryRef(activations.site, folder.name))


def grow_itda(
    activations: SiteActivations,
    size: int = 2048,
    k: int = 32,
    *,
    threshold: float | None = None,
    tokens: int | None = None,
    seed: int = 0,
    pursuit: PursuitName | None = None,
    normalisation: NormalisationMethod | None = None,
) -> FeatureDictionary:
    """Grow an ITDA dictionary, whose features are activations, and return it.

    A token becomes a feature if more than the share `threshold` of it is unexplained; without one, the threshold is searched
    that gives `size` features. `tokens` is the number of tokens of a pass, by default all training tokens.
    """
    _check_activations(activations)
    config = GrowthSweepConfig(
        thresholds=() if threshold is None else (threshold,),
        size=(size,),
        k=k,
        tokens=tokens,
        seed=seed,
        pursuit=pursuit,
        normalisation=normalisation,
    )
    [folder] = grow_sweep(activations.workspace.study, str(activations.site), config)
    return FeatureDictionary(activations.workspace, DictionaryRef(activations.site, folder.name))


def _check_activations(activations: SiteActivations) -> None:
    if not isinstance(activations, SiteActivations):
        raise BadInput(
            f"A dictionary is trained on the activations of one site, not on {shown(activations)}. "
            "Model.activations(prompts, site) returns them."
        )
