"""How one dictionary is trained, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from difflex.dictionary.autoencoder import Kind
from difflex.dictionary.normalisation import Method
from difflex.errors import BadInput

__all__ = ["Jump", "Optimiser", "Revival", "Start", "Training"]


@dataclass(frozen=True, kw_only=True)
class Optimiser:
    """Adam, on every weight."""

    lr: float = 1e-3
    warmup: int = 100
    """Updates over which the learning rate rises linearly."""
    decay: float = 0.2
    """The last share of the run, over which the learning rate falls linearly to zero."""
    beta1: float = 0.9
    """At 0 a feature that does not fire costs nothing: its decay is made up exactly when it fires again."""
    beta2: float = 0.999
    eps: float = 1e-8
    clip: float | None = None
    """The largest length of the whole gradient; longer ones are shortened."""
    ema: float | None = None
    """What is kept of the averaged weights at each update; the averaged weights are what is saved in the end."""


@dataclass(frozen=True, kw_only=True)
class Revival:
    """AuxK: dead features learn to explain what the living ones leave."""

    target: Literal["residual", "reconstruction"] = "residual"
    """`residual`: the error, its gradient stopped (Gao et al. 2024). `reconstruction`: the reconstruction itself, as the code of
    2505.24360 has it."""
    k: int = 64
    """Dead features per token."""
    coefficient: float = 1 / 32
    """Weight of the second loss, which is measured in units of its target's mean square."""
    after: int = 1_000_000
    """Tokens without firing after which a feature is dead."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """The weights before the first update: unit decoder rows, the encoder tied to them."""

    seed: int = 0
    directions: Literal["random", "orthogonal"] = "random"
    """`orthogonal`: as near to orthogonal as `size` rows can be."""
    gain: float = 1.0
    """Length of the encoder's rows."""
    bias: Literal["zero", "mean", "median"] = "mean"
    """What is subtracted at first: nothing, the mean, or the geometric median of the first tokens."""


@dataclass(frozen=True, kw_only=True)
class Jump:
    """What only `jumprelu` needs: thresholds learn through a rectangle of this width around them."""

    bandwidth: float = 0.5
    """In units of the scores."""
    strength: float = 1e-2
    """Weight of `(features per token / k - 1)^2` in the loss."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """One dictionary and how it is trained."""

    kind: Kind = "topk"
    size: int
    k: int
    """Features per token; for `batchtopk` and `matryoshka` on average over a batch, for `jumprelu` a target."""
    relu: bool = True
    """Without it, `topk` keeps negative scores too, where they are among the k largest."""
    prefixes: tuple[int, ...] = ()
    """For `matryoshka`: sizes, increasing, each of which is a dictionary of its own; `size` itself comes last by itself."""
    encoder_bias: bool = True
    normalisation: Method = "standardise"
    clip: float | None = None
    """Normalised inputs are held within +-clip."""
    start: Start = Start()
    optimiser: Optimiser = Optimiser()
    revival: Revival | None = Revival()
    jump: Jump = Jump()

    def __post_init__(self) -> None:
        if not 0 < self.k <= self.size:
            raise BadInput(f"k {self.k} does not fit a dictionary of size {self.size}: choose k between 1 and the size.")
        if (self.kind == "matryoshka") != bool(self.prefixes):
            raise BadInput(f"Kind {self.kind} was given prefixes {self.prefixes}: `matryoshka` needs some, other kinds none.")
        if list(self.prefixes) != sorted({size for size in self.prefixes if 0 < size < self.size}):
            raise BadInput(f"Prefixes {self.prefixes} must increase and stay between 1 and the size {self.size}.")

    @property
    def label(self) -> str:
        """`<kind>-<size>-k<k>`."""
        return f"{self.kind}-{self.size}-k{self.k}"
