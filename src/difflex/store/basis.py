"""The units of int8: rows are stored as z, where x = mean + root z and root is a square root of the covariance of the first rows.

In units of x, or of each coordinate, the step of 8 bits is set by the coordinates with the largest entries; it drowns the small
principal axes, which whitening then amplifies. The entries of z have variance 1 and are uncorrelated, so that rounding adds the
same share of its variance to every axis of x. For rows distributed as the first ones that share is at most
GROUP / (12 x 127^2) = 0.07 %, however heavy their tails: the mean square of the largest of GROUP entries is at most GROUP.
"""

from functools import cached_property
from pathlib import Path
from typing import final

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from difflex.errors import BrokenFile
from difflex.files import file_sha256
from difflex.tensors import read_tensors, write_tensors

BASIS = "basis.safetensors"
BASIS_FORMAT = 1
REMEDY = "Run the same harvest again: it makes the basis again from the same rows."
GROUP, SMALLEST_GROUP = 128, 16
"""Entries of a row that share a scale: at most, and at least where the width has such a divisor."""
ROWS = 8
"""Rows needed for a full root, as a multiple of the width; a store of fewer rows cannot be whitened, and has a diagonal one."""
LARGEST_WIDTH = 8192
"""Of a store with a covariance; rows of a larger width cannot be whitened, and have a diagonal root."""
RIDGE = 1e-7
"""Added to the correlation matrix, so that a coordinate that is a sum of others has a root."""


def group_size(width: int) -> int:
    """Return how many entries of a row share a scale."""
    largest = max(size for size in range(1, GROUP + 1) if width % size == 0)
    return largest if largest >= SMALLEST_GROUP else width


def has_full_root(width: int, rows: int) -> bool:
    """Return whether the basis of `rows` rows makes all axes uncorrelated."""
    return width <= LARGEST_WIDTH and rows >= ROWS * width


def basis_bytes(width: int, rows: int) -> int:
    """Return the bytes of the tensors of a basis of `rows` rows."""
    return (width + (width**2 if has_full_root(width, rows) else width)) * torch.float32.itemsize


@final
class QuantisationBasis:
    """The mean of the first rows and a square root of their covariance: x = mean + root z."""

    def __init__(self, mean: Float32[Tensor, " width"], root: Float32[Tensor, " *width width"]) -> None:
        """`root` is a lower triangular matrix, or the diagonal of one."""
        self.mean, self.root = mean, root
        self._elsewhere: dict[torch.device, QuantisationBasis] = {}

    @property
    def is_diagonal(self) -> bool:
        return self.root.ndim == 1

    @cached_property
    def inverse(self) -> Float32[Tensor, " *width width"]:
        """The inverse of `root`."""
        if self.is_diagonal:
            return 1 / self.root
        identity = torch.eye(len(self.root), dtype=torch.float64)
        return torch.linalg.solve_triangular(self.root.cpu().double(), identity, upper=False).float().to(self.root.device)

    def to(self, device: torch.device) -> "QuantisationBasis":
        """Return the same basis on `device`, where it stays."""
        if device == self.mean.device:
            return self
        if device not in self._elsewhere:
            moved = self._elsewhere[device] = QuantisationBasis(self.mean.to(device), self.root.to(device))
            if "inverse" in vars(self):
                moved.inverse = self.inverse.to(device)
        return self._elsewhere[device]

    def encode(self, x: Float[Tensor, "*rows width"]) -> Float32[Tensor, "*rows width"]:
        """Return z of rows."""
        distance = x.float() - self.mean
        return distance * self.inverse if self.is_diagonal else distance @ self.inverse.T

    def decode(self, z: Float32[Tensor, "*rows width"]) -> Float32[Tensor, "*rows width"]:
        """Return the rows of z: the inverse of `encode`."""
        return (z * self.root if self.is_diagonal else z @ self.root.T).add_(self.mean)


@final
class BasisTally:
    """Rows that arrive in blocks, summed in float64 for their basis."""

    def __init__(self) -> None:
        self._count = 0
        self._origin = self._sum = self._products = torch.zeros(0, dtype=torch.float64)

    def add(self, rows: Float[Tensor, "*rows width"]) -> None:
        """Add `rows`."""
        x = rows.detach().flatten(0, -2).double()
        full = x.shape[1] <= LARGEST_WIDTH
        if not self._count:
            self._origin, self._sum = x.mean(0), torch.zeros_like(x[0])
            self._products = x.new_zeros((x.shape[1], x.shape[1]) if full else x.shape[1])
        x -= self._origin
        self._sum += x.sum(0)
        self._products += x.T @ x if full else x.square().sum(0)
        self._count += len(x)

    def basis(self) -> QuantisationBasis:
        """Return the basis of all rows so far, on the CPU."""
        offset, products = (self._sum / self._count).cpu(), (self._products / self._count).cpu()
        squares = products.diagonal() if products.ndim == 2 else products
        deviation = (squares - offset.square()).clamp_min(0).sqrt()
        usual = deviation.square().mean().sqrt()
        constant = deviation <= 1e-6 * usual  # in these rows; in later ones it may differ as much as others
        deviation = torch.where(constant, usual if usual > 0 else torch.ones_like(usual), deviation)
        mean = (self._origin.cpu() + offset).float()
        if not has_full_root(len(mean), self._count):
            return QuantisationBasis(mean, deviation.float())
        correlation = (products - torch.outer(offset, offset)) / torch.outer(deviation, deviation)
        correlation.diagonal().add_(RIDGE)
        correlation.diagonal()[constant] = 1
        return QuantisationBasis(mean, (deviation[:, None] * torch.linalg.cholesky(correlation)).float())


def write_basis(folder: Path, basis: QuantisationBasis, origin: str, *, keep: bool) -> None:
    """Write `basis`, which is of rows described by `origin`. `keep`: unless the folder has one of such rows already."""
    path = folder / BASIS
    if keep and path.exists():
        try:
            header, tensors = read_tensors(path, BASIS_FORMAT, REMEDY)
            if header["origin"] == origin and tensors["root"].shape == basis.root.shape:  # that of fewer rows is diagonal
                return
        except BrokenFile:
            pass
        path.unlink(missing_ok=True)
    tensors = {"mean": basis.mean, "root": basis.root}
    write_tensors(path, BASIS_FORMAT, tensors, {"origin": origin}, keep=keep)


def require_basis(folder: Path) -> None:
    """Raise an error if the basis in `folder` is missing."""
    if not (folder / BASIS).is_file():
        raise BrokenFile(f"{folder / BASIS} is missing. {REMEDY}")


def read_basis(folder: Path, width: int, sha256: str) -> QuantisationBasis:
    """Read the basis in `folder`, which must have this width and checksum."""
    path = folder / BASIS
    tensors = read_tensors(path, BASIS_FORMAT, REMEDY).tensors
    basis = QuantisationBasis(tensors["mean"], tensors["root"])
    if file_sha256(path) != sha256 or basis.mean.shape != (width,) or basis.root.shape not in ((width,), (width, width)):
        raise BrokenFile(f"{path} is not the basis that the rows of {folder} were stored with. {REMEDY}")
    return basis
