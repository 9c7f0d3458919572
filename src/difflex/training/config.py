"""How one dictionary is trained, as plain data."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from difflex.dictionaries.normalisation import METHODS, Method
from difflex.dictionaries.sae import Kind, kind_of
from difflex.errors import BadInput, UnknownName

__all__ = ["AdamConfig", "AuxKLoss", "InitConfig", "JumpReLUConfig", "TrainingConfig"]


Target = Literal["residual", "reconstruction"]
Directions = Literal["random", "orthogonal"]
Bias = Literal["zero", "mean", "median"]


def _within(what: str, value: float | None, fits: bool) -> None:
    if not fits or (value is not None and not math.isfinite(value)):
        raise BadInput(f"The {what} {value} of a training makes no sense: see the docstring of difflex.training.Training.")


def _known(what: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise UnknownName.among(what, value, known)


@dataclass(frozen=True, kw_only=True)
class AdamConfig:
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

    def __post_init__(self) -> None:
        _within("learning rate", self.lr, self.lr > 0)
        _within("warm-up", self.warmup, self.warmup >= 0)
        _within("decay", self.decay, 0 <= self.decay <= 1)
        _within("beta1", self.beta1, 0 <= self.beta1 < 1)
        _within("beta2", self.beta2, 0 <= self.beta2 < 1)
        _within("eps", self.eps, self.eps > 0)
        _within("clip", self.clip, self.clip is None or self.clip > 0)
        _within("average", self.ema, self.ema is None or 0 <= self.ema < 1)


@dataclass(frozen=True, kw_only=True)
class AuxKLoss:
    """AuxK: dead features learn to explain what the living ones leave."""

    target: Target = "residual"
    """`residual`: the error, its gradient stopped (Gao et al. 2024). `reconstruction`: the reconstruction itself, as the code of
    2505.24360 has it."""
    k: int = 64
    """Dead features per token."""
    coefficient: float = 1 / 32
    """Weight of the second loss, which is measured in units of its target's mean square."""
    after: int = 1_000_000
    """Tokens without firing after which a feature is dead."""

    def __post_init__(self) -> None:
        _known("The target of a revival", self.target, get_args(Target))
        _within("number of dead features", self.k, self.k > 0)
        _within("coefficient", self.coefficient, self.coefficient >= 0)
        _within("number of tokens", self.after, self.after > 0)


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """The weights before the first update: unit decoder rows, the encoder tied to them."""

    seed: int = 0
    directions: Directions = "random"
    """`orthogonal`: as near to orthogonal as `size` rows can be."""
    gain: float = 1.0
    """Length of the encoder's rows."""
    bias: Bias = "mean"
    """What is subtracted at first: nothing, the mean, or the geometric median of the first tokens."""

    def __post_init__(self) -> None:
        _known("The kind of first directions", self.directions, get_args(Directions))
        _known("The first bias", self.bias, get_args(Bias))
        _within("gain", self.gain, self.gain > 0)


@dataclass(frozen=True, kw_only=True)
class JumpReLUConfig:
    """What only `jumprelu` needs: thresholds learn through a rectangle of this width around them."""

    bandwidth: float = 0.5
    """In units of the scores."""
    strength: float = 1e-1
    """Weight of `(features per token / k - 1)^2` in the loss."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
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
    start: InitConfig = InitConfig()
    optimiser: AdamConfig = AdamConfig()
    revival: AuxKLoss | None = AuxKLoss()
    jump: JumpReLUConfig = JumpReLUConfig()

    def __post_init__(self) -> None:
        kind_of(self.kind)
        _known("The normalisation", self.normalisation, METHODS)
        _within("clip", self.clip, self.clip is None or self.clip > 0)
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
