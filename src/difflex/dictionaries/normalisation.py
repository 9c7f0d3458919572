"""Normalisation: the affine map from model space (x) to the space that a dictionary is trained in (z)."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import get_args

import torch
from jaxtyping import Float
from torch import Tensor

from difflex.choices import NormalisationMethod
from difflex.dictionaries.files import parse_choice
from difflex.errors import BadInput, BrokenFile, NonFinite

__all__ = ["VECTORS_PER_AXIS", "Normalisation", "VectorMoments", "estimate_normalisation"]

METHODS = get_args(NormalisationMethod)
VECTORS_PER_AXIS = 10
"""Statistics need this many vectors per axis: with fewer, principal axes are arbitrary."""
VARIANCE_FLOOR = 1e-6
"""The smallest variance of an axis, as a share of the mean variance, so that rounding noise is not scaled up to a signal."""


@dataclass(frozen=True, kw_only=True)
class Normalisation:
    """`z = (x - mean) basis / scale`, clipped if `clip` is set."""

    method: NormalisationMethod
    mean: Float[Tensor, " width"]
    scale: Float[Tensor, " width"]
    """The standard deviation of each axis, before division."""
    basis: Float[Tensor, "width width"] | None = None
    """The principal axes as columns, largest variance first; None if axes are not rotated."""
    clip: float | None = None
    """z is clipped to +-clip; `restore` does not bring back what was clipped."""

    @classmethod
    def identity(cls, width: int, device: torch.device | str = "cpu") -> "Normalisation":
        """Return the normalisation that changes nothing."""
        return cls(method="none", mean=torch.zeros(width, device=device), scale=torch.ones(width, device=device))

    @property
    def width(self) -> int:
        return self.mean.shape[0]

    def apply(self, x: Float[Tensor, "token width"]) -> Float[Tensor, "token width"]:
        """Map `x` to z, in float32."""
        x = x.float()
        if self.method != "none":
            x = x - self.mean
            x = (x if self.basis is None else x @ self.basis).div_(self.scale)
        return x if self.clip is None else x.clamp(-self.clip, self.clip)

    def clipped_share(self, x: Float[Tensor, "token width"]) -> float:
        """Return the share of the normalised values of `x` that the clip changes; 0 without a clip."""
        if self.clip is None:
            return 0.0
        return float((replace(self, clip=None).apply(x).abs() > self.clip).float().mean())

    def restore_delta(self, z: Float[Tensor, "token width"]) -> Float[Tensor, "token width"]:
        """Map a change of z to the change of x: the linear part of `restore`."""
        if self.method == "none":
            return z
        scaled = z * self.scale
        return scaled if self.basis is None else scaled @ self.basis.T

    def restore(self, z: Float[Tensor, "token width"]) -> Float[Tensor, "token width"]:
        """Map `z` back to x: the inverse of `apply` where nothing was clipped."""
        return self.restore_delta(z) + self.mean

    def to(self, device: torch.device | str) -> "Normalisation":
        """Return the same normalisation on `device`."""
        basis = None if self.basis is None else self.basis.to(device)
        return replace(self, mean=self.mean.to(device), scale=self.scale.to(device), basis=basis)

    def settings(self) -> dict[str, str | float | None]:
        """Return the settings that `from_saved` needs beside `tensors`, as plain JSON."""
        return {"method": self.method, "clip": self.clip}

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors to save, by their names in a file."""
        tensors = {"normalisation.mean": self.mean, "normalisation.scale": self.scale}
        return tensors if self.basis is None else {**tensors, "normalisation.basis": self.basis}

    @classmethod
    def from_saved(cls, settings: Mapping[str, object], tensors: Mapping[str, Tensor]) -> "Normalisation":
        """Return the normalisation that was saved as `settings` and `tensors`."""
        method, clip = parse_choice("The normalisation", settings.get("method"), METHODS), settings.get("clip")
        names = ["mean", "scale", *(["basis"] if method == "whiten" else [])]
        parts = {name.removeprefix("normalisation."): x for name, x in tensors.items() if name.startswith("normalisation.")}
        shapes = {name: [*tensor.shape] for name, tensor in parts.items()}
        width = len(parts.get("mean", ()))
        if shapes != {name: [width, width] if name == "basis" else [width] for name in names}:
            raise BrokenFile(
                f"A dictionary's normalisation '{method}' needs {', '.join(names)} of one width; its file has {shapes}."
            )
        if clip is not None and (not isinstance(clip, int | float) or not 0 < clip < math.inf):
            raise BrokenFile(f"A dictionary's normalisation clips at {clip!r}, which is no number above 0.")
        if not (parts["scale"] > 0).all():
            raise BrokenFile("A dictionary's normalisation divides by scales that are not all above 0.")
        return cls(method=method, **parts, clip=None if clip is None else float(clip))


class VectorMoments:
    """Count, mean and (co)variance of a stream of vectors, accumulated in float64."""

    def __init__(self, width: int, *, covariance: bool, device: torch.device | str = "cpu") -> None:
        """Start without vectors; whitening needs the full matrix of `covariance`."""
        self.count = 0
        self._shift: Tensor | None = None
        self._sum = torch.zeros(width, dtype=torch.float64, device=device)
        shape = (width, width) if covariance else (width,)
        self._squares = torch.zeros(shape, dtype=torch.float64, device=device)

    def add(self, x: Float[Tensor, "token width"]) -> None:
        """Add the rows of `x`."""
        if len(x) == 0:
            return
        x = x.to(self._sum.device, torch.float64)
        if not torch.isfinite(x).all():
            raise NonFinite(f"The activations after the first {self.count} hold NaN or infinity. Harvest them again.")
        if self._shift is None:
            # Sums around a point near the mean: a mean much longer than the spread would cost digits.
            self._shift = x.mean(0)
        x = x - self._shift
        self.count += len(x)
        self._sum += x.sum(0)
        self._squares += x.T @ x if self._squares.ndim == 2 else x.square().sum(0)

    @property
    def mean(self) -> Float[Tensor, " width"]:
        return self._sum / self.count + (0 if self._shift is None else self._shift)

    @property
    def covariance(self) -> Float[Tensor, "width width"]:
        """The covariance matrix; only with `covariance=True`."""
        offset = self._sum / self.count
        return self._squares / self.count - torch.outer(offset, offset)

    @property
    def variance(self) -> Float[Tensor, " width"]:
        squares = self._squares if self._squares.ndim == 1 else self._squares.diagonal()
        return (squares / self.count - (self._sum / self.count).square()).clamp_min(0)

    def normalisation(self, method: NormalisationMethod, clip: float | None = None) -> Normalisation:
        """Return the normalisation by these moments; raise if they are of too few vectors."""
        width = len(self._sum)
        method = parse_choice("The normalisation", method, METHODS)
        if method != "none" and self.count < VECTORS_PER_AXIS * width:
            raise BadInput(
                f"Normalisation '{method}' at width {width} needs {VECTORS_PER_AXIS * width} vectors, but there are "
                f"{self.count}. Harvest more shots, or choose normalisation 'none'."
            )
        variance, basis = self.variance, None
        if method == "whiten" and self._squares.ndim == 1:
            raise BadInput("Whitening needs the covariance of all axes: create VectorMoments with covariance=True.")
        if method == "whiten":
            variance, axes = torch.linalg.eigh(self.covariance)
            variance, basis = variance.flip(0), axes.flip(1).float().contiguous()
        if method == "none":
            return replace(Normalisation.identity(width, self._sum.device), clip=clip)
        mean = self.mean
        if method == "scale":  # one factor and no shift: the mean squared norm becomes the width
            variance, mean = (variance + mean.square()).mean().expand(width), torch.zeros_like(mean)
        scale = variance.clamp_min(VARIANCE_FLOOR * float(variance.mean())).sqrt()
        if not (scale > 0).all():
            raise BadInput(f"Normalisation '{method}' is undefined: all {self.count} vectors are the same.")
        return Normalisation(method=method, mean=mean.float(), scale=scale.float(), basis=basis, clip=clip)


def estimate_normalisation(
    batches: Iterable[Float[Tensor, "token width"]], method: NormalisationMethod, clip: float | None = None
) -> Normalisation:
    """Estimate a normalisation from the first batches that together hold 10 x width vectors; read no further."""
    moments = None
    for x in batches:
        if moments is None:
            moments = VectorMoments(x.shape[1], covariance=method == "whiten", device=x.device)
        moments.add(x)
        if method == "none" or moments.count >= VECTORS_PER_AXIS * x.shape[1]:
            break
    if moments is None:
        raise BadInput(f"Normalisation '{method}' needs activations, but the stream is empty. Harvest some first.")
    return moments.normalisation(method, clip)
