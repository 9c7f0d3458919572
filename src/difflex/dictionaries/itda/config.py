"""How an ITDA dictionary grows, as plain data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal

from difflex.dictionaries.normalisation import Method
from difflex.dictionaries.pursuit import Way
from difflex.errors import BadInput
from difflex.files import Json

__all__ = ["GrowthConfig", "paper", "variant"]


@dataclass(frozen=True, kw_only=True)
class GrowthConfig:
    """One dictionary and how it grows."""

    k: int = 32
    """Atoms per token."""
    threshold: float | None = None
    """A token becomes an atom when more than this share of its squared length is unexplained; None: found so that the stream
    fills the dictionary."""
    size: int = 8192
    """Where growth ends."""
    pursuit: Way = "orthogonal"
    """By default the one that leaves least."""
    normalisation: Method = "standardise"
    clip: float | None = None
    """Normalised inputs are held within +-clip."""
    batch: int = 256
    """Tokens that are judged together, by each process."""
    most_per_batch: int | None = None
    """Restricted growth: of every batch only so many tokens, those that are explained worst, may become atoms."""
    add: Literal["point", "residual"] = "point"
    """What becomes an atom: the token itself, or what is left of it; then atoms are not rows of the data."""
    patience: int = 200_000
    """Tokens in a row without a new atom after which growth ends."""
    kept_out: float = 0.1
    """The share of prompts whose tokens are judged but never become atoms: how they fare is how new images will."""

    def __post_init__(self) -> None:
        if self.threshold is not None and not 0 < self.threshold < 1:
            raise BadInput(f"Threshold {self.threshold} is not a share: choose a number between 0 and 1, such as 0.3.")
        for name in ("k", "size", "batch", "patience"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name} is {getattr(self, name)}: it must be 1 or more.")
        if self.most_per_batch is not None and self.most_per_batch < 1:
            raise BadInput(f"most_per_batch is {self.most_per_batch}: it must be 1 or more, or None for no limit.")
        if not 0 <= self.kept_out < 1:
            raise BadInput(f"kept_out is {self.kept_out}: it must be a share of 0 or more, below 1, such as 0.1.")

    def as_json(self) -> dict[str, Json]:
        """These settings as plain JSON."""
        return json.loads(json.dumps(asdict(self)))

    @property
    def guarantees(self) -> bool:
        """Whether each token, if not kept out, is under the threshold once its batch was added, unless the dictionary is full."""
        return self.most_per_batch is None and self.add == "point"


def paper() -> GrowthConfig:
    """The settings of arXiv 2505.24360: gradient pursuit, k 64, inputs centred and divided by their standard deviation.

    Deliberate departures: the threshold is a share of each vector's own squared length (theirs: of the batch's mean), statistics
    come from at least 10 x width vectors (theirs: one batch), and no near-duplicate enters within a batch.
    """
    return GrowthConfig(k=64, size=64_000, threshold=0.6, pursuit="gradient", normalisation="standardise")


NAMED = {
    "threshold": "over{}",
    "pursuit": "{}",
    "normalisation": "{}",
    "clip": "clip{}",
    "most_per_batch": "most{}",
    "add": "{}",
    "kept_out": "out{}",
}
"""The settings that a name tells where they differ from the default, and how."""


def variant(training: Mapping[str, Json]) -> str:
    """What sets one growth apart from others of its size and k, for its name: `-over0.3-gradient`, `-seed1`; often nothing."""
    config, plain = training.get("config"), GrowthConfig().as_json()
    entries = config if isinstance(config, dict) else {}
    words = [form.format(entries[name]) for name, form in NAMED.items() if entries.get(name, plain[name]) != plain[name]]
    words += [f"{name}{training[name]}" for name in ("seed", "first") if training.get(name)]
    words += ["pruned"] if "pruned" in training else []
    return "".join(f"-{word}" for word in words)
