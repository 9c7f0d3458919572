"""`lay_out`: places the features of a dictionary in two dimensions, so that neighbours are close together.

The layout is t-SNE (van der Maaten and Hinton 2008) of the graph of neighbours, from a spectral start (Kobak and Berens 2019).
Repulsion is a convolution on a grid, by FFT, as in FIt-SNE (Linderman et al. 2019), so that an update takes time in proportion to
the number of features. The same graph gives the same layout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, final

import numpy as np
from numpy.typing import NDArray

UPDATES, UPDATES_OF_MANY, MANY = 400, 160, 16_384
"""Of the layout; fewer for more than so many features."""
EXAGGERATED, EXAGGERATION = 3 / 8, 6.0
"""Share of the updates in which neighbours attract each other more strongly, and how much."""
SEED = 0
CELLS = 256
"""Most cells of the grid, on each side."""
Plane = NDArray[np.complex128]
"""Points of the plane as complex numbers."""
FINEST = 1 / 8
"""The smallest side of a cell; the kernel of t-SNE has a width of 1."""


class NeighbourGraph(NamedTuple):
    """Pairs of related features, each once."""

    size: int
    first: np.ndarray
    second: np.ndarray
    weight: np.ndarray
    """Their sum is 1."""

    @classmethod
    def of(cls, size: int, source: np.ndarray, target: np.ndarray, value: np.ndarray, kind: np.ndarray) -> NeighbourGraph:
        """Make the graph of directed edges of several kinds (numbers).

        The edges of one kind of a feature weigh as much together as those of any other, and each in proportion to its value.
        """
        keep = (source != target) & (value > 0)
        source, target, value = source[keep].astype(np.int64), target[keep].astype(np.int64), value[keep].astype(np.float64)
        group = source + size * kind[keep].astype(np.int64)
        value = value / np.bincount(group, value)[group]
        pairs, where = np.unique(np.minimum(source, target) * size + np.maximum(source, target), return_inverse=True)
        weight = np.bincount(where, value)
        weight = (weight / max(weight.sum(), 1e-9)).astype(np.float32)
        return cls(size, (pairs // size).astype(np.intp), (pairs % size).astype(np.intp), weight)

    @property
    def degree(self) -> np.ndarray:
        """The weight of all pairs of each feature; 0 for one without neighbours."""
        return np.bincount(self.first, self.weight, self.size) + np.bincount(self.second, self.weight, self.size)

    def gather(self, to_first: NDArray[np.complexfloating], to_second: NDArray[np.complexfloating]) -> Plane:
        """Return the sum of complex values at the first and at the second feature of the pairs, by feature."""
        total = np.zeros(self.size, dtype=np.complex128)
        for end, values in ((self.first, to_first), (self.second, to_second)):
            total.real += np.bincount(end, values.real, self.size)
            total.imag += np.bincount(end, values.imag, self.size)
        return total


def lay_out(graph: NeighbourGraph, report: Callable[[float], None] = lambda share: None) -> np.ndarray:
    """Return a place for each feature, two numbers between 0 and 1; NaN for one without neighbours.

    `report` gets the share of the work that is done.
    """
    places = np.full((graph.size, 2), np.nan)
    connected = np.flatnonzero(graph.degree)
    if not len(connected):
        return places
    number = np.zeros(graph.size, dtype=np.intp)
    number[connected] = np.arange(len(connected))
    graph = graph._replace(size=len(connected), first=number[graph.first], second=number[graph.second])
    plane = _tsne(graph, _spectral_start(graph), report)
    points = np.stack([plane.real, plane.imag], 1)
    low, high = points.min(0), points.max(0)
    places[connected] = 0.5 + (points - (low + high) / 2) / max(float((high - low).max()), 1e-9)
    return places


def _spectral_start(graph: NeighbourGraph, rounds: int = 30) -> Plane:
    """Return about the two slowest directions of diffusion on a graph."""
    degree, rng = graph.degree, np.random.default_rng(SEED)
    x = rng.standard_normal(graph.size) + 1j * rng.standard_normal(graph.size)
    for number in range(rounds):
        x = (x + graph.gather(graph.weight * x[graph.second], graph.weight * x[graph.first]) / degree) / 2
        if number % 5 == 4:
            x -= np.average(x, weights=degree)
            axes = np.linalg.qr(np.stack([x.real, x.imag], 1) * np.sqrt(degree)[:, None])[0] / np.sqrt(degree)[:, None]
            x = axes[:, 0] + 1j * axes[:, 1]
    return x.real / max(x.real.std(), 1e-12) + 1j * x.imag / max(x.imag.std(), 1e-12)


def _tsne(graph: NeighbourGraph, start: Plane, report: Callable[[float], None]) -> Plane:
    """Return points that fit the graph."""
    x, speed, repulsion = 0.01 * start, np.zeros_like(start), _Repulsion(graph.size)
    gain_x, gain_y = np.ones(graph.size), np.ones(graph.size)
    rate = max(200.0, graph.size / EXAGGERATION)
    updates = UPDATES if graph.size <= MANY else UPDATES_OF_MANY
    for update in range(updates):
        near = x.astype(np.complex64)
        pull = near[graph.second] - near[graph.first]
        pull *= graph.weight / (2 + 2 * (pull.real**2 + pull.imag**2))
        force = graph.gather(pull, -pull) * (EXAGGERATION if update < EXAGGERATED * updates else 1) + repulsion(x)
        for gain, pushed, moved in ((gain_x, force.real, speed.real), (gain_y, force.imag, speed.imag)):
            gain[:] = np.maximum(np.where(pushed * moved > 0, gain + 0.2, gain * 0.8), 0.01)
        speed = speed * (0.5 if update < EXAGGERATED / 2 * updates else 0.8) + rate * (
            gain_x * force.real + 1j * gain_y * force.imag
        )
        x = x + speed
        report((update + 1) / updates)
    return x


@final
class _Repulsion:
    """The repulsion between all points, normalised as in t-SNE."""

    def __init__(self, points: int) -> None:
        self._cells = 2 ** int(np.clip(np.ceil(np.log2(2 * np.sqrt(points))), 5, np.log2(CELLS)))
        self._cell = 0.0
        self._kernels: list[np.ndarray] = []

    def __call__(self, x: Plane) -> Plane:
        """Return the force on each point."""
        cells = self._cells
        low = x.real.min() + 1j * x.imag.min()
        extent = max(float(np.ptp(x.real)), float(np.ptp(x.imag)), 1e-9)
        cell = max(FINEST, 2.0 ** np.ceil(np.log2(extent / (cells - 3))))
        if cell != self._cell:
            self._cell, self._kernels = cell, _kernels(cell, cells)
        row, y = np.divmod((x.real - low.real) / cell + 1, 1)
        column, z = np.divmod((x.imag - low.imag) / cell + 1, 1)
        corner = (row * cells + column).astype(np.intp)
        corners = np.concatenate([corner, corner + 1, corner + cells, corner + cells + 1])
        shares = np.concatenate([(1 - y) * (1 - z), (1 - y) * z, y * (1 - z), y * z])
        mass = np.fft.rfft2(np.bincount(corners, shares, cells * cells).reshape(cells, cells), (2 * cells, 2 * cells))
        fields = (np.fft.irfft2(mass * kernel)[:cells, :cells].ravel() for kernel in self._kernels)
        total, along, across = ((field[corners] * shares).reshape(4, -1).sum(0) for field in fields)
        return (along + 1j * across) / max(float(total.sum()) - len(x), 1e-9)


def _kernels(cell: float, cells: int) -> list[np.ndarray]:
    """Return the transforms of 1 / (1 + r^2), and of r / (1 + r^2)^2 along both axes."""
    steps = np.fft.fftfreq(2 * cells, 1 / (2 * cells)) * cell
    y, x = steps[:, None], steps[None, :]
    near = 1 / (1 + y * y + x * x)
    return [np.fft.rfft2(kernel) for kernel in (near, near * near * y, near * near * x)]
