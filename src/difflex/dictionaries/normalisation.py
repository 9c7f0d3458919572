"""Normalisation: the affine map between model space (x) and the space that a dictionary is trained in (z)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from difflex.errors import BadInput, BrokenFile, NonFinite, UnknownName

__all__ = ["METHODS", "VECTORS_PER_AXIS", "Method", "Normalisation", "VectorMoments", "estimate"]

Method = Literal["whiten", "standardise", "scale", "none"]
METHODS: tuple[Method, ...] = get_args(Method)

VECTORS_PER_AXIS = 10
"""Statistics come from at least this many vectors per axis: with fewer, principal axes are an arbitrary completion."""
FLOOR = 1e-6
"""No axis counts as having less than this share of the mean variance: else rounding noise would be blown up to a signal."""


@dataclass(frozen=True, kw_only=True)
class Normalisation:
    """`z = (x - mean) basis / scale`, clipped where `clip` is set; frozen once estimated."""

    method: Method
    mean: Float[Tensor, " width"]
    scale: Float[Tensor, " width"]
    """The standard deviation of each axis of z, before division."""
    basis: Float[Tensor, "width width"] | None = None
    """Columns are the principal axes, largest variance first; None where the axes stay."""
    clip: float | None = None
    """z is held within +-clip; what was clipped is lost to `restore`."""

    @classmethod
    def identity(cls, width: int, device: torch.device | str = "cpu") -> "Normalisation":
        """The normalisation that changes nothing."""
        return cls(method="none", mean=torch.zeros(width, device=device), scale=torch.ones(width, device=device))

    @property
    def width(self) -> int:
        return self.mean.shape[0]

    def apply(self, x: Float[Tensor, "token width"]) -> Float[Tensor, "token width"]:
        """`x` in z, as float32."""
        x = x.float()
        if self.method != "none":
            x = x - self.mean
            x = (x if self.basis is None else x @ self.basis).div_(self.scale)
        return x if self.clip is None else x.clamp(-self.clip, self.clip)

    def spread(self, z: Float[Tensor, "token width"]) -> Float[Tensor, "token width"]:
        """The change in model space that the change `z` is: the linear part of `restore`."""
        if self.method == "none":
            return z
        scaled = z * self.scale
        return scaled if self.basis is None else scaled @ self.basis.T

    def restore(self, z: Float[Tensor, "token width"]) -> Float[Tensor, "token width"]:
        """`z` back in model space: the inverse of `apply` where nothing was clipped."""
        return self.spread(z) + self.mean

    def to(self, device: torch.device | str) -> "Normalisation":
        """The same normalisation on `device`."""
        basis = None if self.basis is None else self.basis.to(device)
        return replace(self, mean=self.mean.to(device), scale=self.scale.to(device), basis=basis)

    def settings(self) -> dict[str, str | float | None]:
        """What `of` needs beside `tensors`, as plain JSON."""
        return {"method": self.method, "clip": self.clip}

    def tensors(self) -> dict[str, Tensor]:
        """The tensors to be saved, by the names they have in a file."""
        named = {"normalisation.mean": self.mean, "normalisation.scale": self.scale}
        return named if self.basis is None else {**named, "normalisation.basis": self.basis}

    @classmethod
    def of(cls, settings: Mapping[str, object], tensors: Mapping[str, Tensor]) -> "Normalisation":
        """The normalisation that `settings` and `tensors` were written from."""
        clip = settings.get("clip")
        if missing := [name for name in ("mean", "scale") if f"normalisation.{name}" not in tensors]:
            raise BrokenFile(f"A dictionary's file lacks its normalisation's {', '.join(missing)}: train or copy it again.")
        method, mean = _known(str(settings.get("method"))), tensors["normalisation.mean"]
        if (method == "whiten") != ("normalisation.basis" in tensors):
            raise BrokenFile(f"A dictionary's file says normalisation '{method}' but its axes tell another: copy it again.")
        shapes = {"scale": mean.shape, "basis": 2 * mean.shape}
        if wrong := [
            name for name, shape in shapes.items() if tensors.get(f"normalisation.{name}", mean.new_empty(shape)).shape != shape
        ]:
            raise BrokenFile(f"The normalisation's {', '.join(wrong)} in a dictionary's file is of another width: copy it again.")
        return cls(
            method=method,
            mean=mean,
            scale=tensors["normalisation.scale"],
            basis=tensors.get("normalisation.basis"),
            clip=float(clip) if isinstance(clip, int | float) else None,
        )


class VectorMoments:
    """Count, mean and (co)variance of a stream of vectors, accumulated in float64."""

    def __init__(self, width: int, *, covariance: bool, device: torch.device | str = "cpu") -> None:
        """Empty moments; `covariance` keeps the full matrix, which whitening needs."""
        self.count = 0
        self._shift: Tensor | None = None
        self._sum = torch.zeros(width, dtype=torch.float64, device=device)
        shape = (width, width) if covariance else (width,)
        self._squares = torch.zeros(shape, dtype=torch.float64, device=device)

    def add(self, x: Float[Tensor, "token width"]) -> None:
        """Take in the rows of `x`."""
        if len(x) == 0:
            return
        x = x.to(self._sum.device, torch.float64)
        if not torch.isfinite(x).all():
            raise NonFinite(f"Statistics need finite activations; after {self.count} rows came NaN or infinity.")
        if self._shift is None:
            # Sums around a point near the mean: a mean much longer than the spread would eat the digits.
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
        """The covariance matrix; only where it was asked for."""
        offset = self._sum / self.count
        return self._squares / self.count - torch.outer(offset, offset)

    @property
    def variance(self) -> Float[Tensor, " width"]:
        squares = self._squares if self._squares.ndim == 1 else self._squares.diagonal()
        return (squares / self.count - (self._sum / self.count).square()).clamp_min(0)

    def normalisation(self, method: Method, clip: float | None = None) -> Normalisation:
        """The normalisation that these moments give; an error where they saw too few vectors."""
        width = len(self._sum)
        if _known(method) != "none" and self.count < VECTORS_PER_AXIS * width:
            raise BadInput(
                f"Normalisation '{method}' at width {width} needs {VECTORS_PER_AXIS * width} vectors; {self.count} came. "
                "Harvest more shots, or choose normalisation 'none'."
            )
        variance, basis = self.variance, None
        if method == "whiten" and self._squares.ndim == 1:
            raise BadInput("Whitening needs the covariance of all axes: make the Moments with covariance=True.")
        if method == "whiten":
            variance, axes = torch.linalg.eigh(self.covariance)
            variance, basis = variance.flip(0), axes.flip(1).float().contiguous()
        if method == "none":
            plain = Normalisation.identity(width, self._sum.device)
            return replace(plain, clip=clip)
        mean = self.mean
        if method == "scale":  # a single factor and no shift: the mean squared length becomes the width
            variance, mean = (variance + mean.square()).mean().expand(width), torch.zeros_like(mean)
        scale = variance.clamp_min(FLOOR * float(variance.mean())).sqrt()
        if not (scale > 0).all():
            raise BadInput(f"Normalisation '{method}' cannot be estimated: all {self.count} vectors are the same.")
        return Normalisation(method=method, mean=mean.float(), scale=scale.float(), basis=basis, clip=clip)


def estimate(batches: Iterable[Float[Tensor, "token width"]], method: Method, clip: float | None = None) -> Normalisation:
    """The normalisation from the first 10 x width vectors (at least) of `batches`; reads no further than it must."""
    moments = None
    for x in batches:
        if moments is None:
            moments = VectorMoments(x.shape[1], covariance=method == "whiten", device=x.device)
        moments.add(x)
        if method == "none" or moments.count >= VECTORS_PER_AXIS * x.shape[1]:
            break
    if moments is None:
        raise BadInput(f"Normalisation '{method}' was asked of a stream without a batch. Harvest some activations first.")
    return moments.normalisation(method, clip)


def _known(method: str) -> Method:
    for known in METHODS:
        if method == known:
            return known
    raise UnknownName.among("The normalisation", method, METHODS)
