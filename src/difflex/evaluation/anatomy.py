"""Norms, spectra, outlier coordinates and offsets of activations, gathered in one pass over a stream of them."""

import json
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from difflex.errors import BadInput, BrokenFile
from difflex.files import write_json
from difflex.records import Activations, Site

__all__ = ["ActivationShape", "Anatomy", "measure"]

FORMAT = 1
TOP = 10
"""How many directions and coordinates are told of."""


@dataclass(frozen=True, kw_only=True)
class ActivationShape:
    """What the activations of a site look like as a cloud of points."""

    tokens: int
    variances: tuple[float, ...]
    """Along the principal directions, the largest first: the spectrum."""
    components_for_90: int
    """The fewest principal directions that hold 90 % of the variance."""
    alignments: tuple[float, ...]
    """Of the top directions: the share of each that lies in its largest coordinate; 1 is a coordinate axis."""
    outliers: tuple[tuple[int, float, float], ...]
    """The coordinates of the largest variance: index, variance over the median coordinate's, mean over the median deviation."""
    offset: float
    """Length of the mean over length of the deviations; the larger, the more features of a dictionary die (arXiv 2605.31518)."""

    def share(self, count: int) -> float:
        """The part of the variance that the `count` largest directions hold."""
        return sum(self.variances[:count]) / (sum(self.variances) or 1.0)


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """What was measured, by site."""

    model: str
    norms: dict[Site, dict[float, float]]
    """Mean length of a token's activation, by timestep."""
    shapes: dict[Site, ActivationShape]
    """For the sites whose spectrum was asked for."""
    made_from: Mapping[str, str] = field(default_factory=dict)
    """What was asked of which model: an anatomy that was made from something else is measured again."""

    def save(self, path: Path) -> None:
        """Write the anatomy to the JSON file `path`."""
        entries = {
            "model": self.model,
            "norms": {str(site): {f"{t:g}": norm for t, norm in norms.items()} for site, norms in self.norms.items()},
            "shapes": {str(site): asdict(shape) for site, shape in self.shapes.items()},
            "made_from": dict(self.made_from),
        }
        write_json(path, FORMAT, entries)

    @classmethod
    def load(cls, path: Path) -> "Anatomy":
        """The anatomy saved in `path`."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["format"] != FORMAT:
                raise BrokenFile(f"{path} has format {data['format']}, this difflex reads {FORMAT}. Measure the anatomy again.")
            norms = {Site.parse(name): {float(t): float(n) for t, n in norms.items()} for name, norms in data["norms"].items()}
            shapes = {Site.parse(name): _shape_of(entries) for name, entries in data["shapes"].items()}
            return cls(model=data["model"], norms=norms, shapes=shapes, made_from=data.get("made_from", {}))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BrokenFile(f"{path} is not an anatomy ({error}). Measure it again.") from error


def _shape_of(entries: dict[str, object]) -> ActivationShape:
    """A shape from JSON, which knows no tuples."""
    frozen = {name: tuple(map(_frozen, entry)) if isinstance(entry, list) else entry for name, entry in entries.items()}
    return ActivationShape(**frozen)  # pyright: ignore[reportArgumentType]


def _frozen(entry: object) -> object:
    return tuple(entry) if isinstance(entry, list) else entry


def measure(activations: Iterable[Activations], spectra: Collection[Site] | None = None) -> Anatomy:
    """The anatomy that `activations` show; spectra for all sites, or for those in `spectra` (a width x width matrix each)."""
    lengths: dict[Site, dict[float, _RunningMean]] = {}
    clouds: dict[Site, _CloudMoments] = {}
    model = ""
    for seen in activations:
        model = seen.shots[0].model
        timestep = seen.shots[0].timestep or 0.0
        mean = lengths.setdefault(seen.site, {}).setdefault(timestep, _RunningMean())
        mean.take(seen.values.float().norm(dim=-1))
        if spectra is None or seen.site in spectra:
            clouds.setdefault(seen.site, _CloudMoments(seen.values.shape[-1], seen.values.device)).take(seen.values.flatten(0, 1))
    if not lengths:
        raise BadInput("No activations were given, so there is no anatomy. Harvest at least one shot.")
    norms = {site: {t: by[t].value for t in sorted(by, reverse=True)} for site, by in lengths.items()}
    return Anatomy(model=model, norms=norms, shapes={site: cloud.shape() for site, cloud in clouds.items()})


@final
class _RunningMean:
    """A running mean."""

    def __init__(self) -> None:
        self._sum, self._count = 0.0, 0

    def take(self, values: Tensor) -> None:
        self._sum += float(values.double().sum())
        self._count += values.numel()

    @property
    def value(self) -> float:
        return self._sum / self._count


@final
class _CloudMoments:
    """First and second moments, in float64 and about the first batch's mean: large offsets must not eat the digits."""

    def __init__(self, width: int, device: torch.device) -> None:
        self._about: Tensor | None = None
        self._sum = torch.zeros(width, dtype=torch.float64, device=device)
        self._products = torch.zeros(width, width, dtype=torch.float64, device=device)
        self._count = 0

    def take(self, values: Float[Tensor, "token width"]) -> None:
        x = values.double()
        if self._about is None:
            self._about = x.mean(0)
        x = x - self._about
        self._sum += x.sum(0)
        self._products.addmm_(x.T, x)
        self._count += len(x)

    def shape(self) -> ActivationShape:
        assert self._about is not None
        moved = self._sum / self._count
        mean = self._about + moved
        covariance = self._products / self._count - torch.outer(moved, moved)
        variances, directions = torch.linalg.eigh(covariance)
        variances, directions = variances.flip(0).clamp(min=0), directions.flip(1)
        return ActivationShape(
            tokens=self._count,
            variances=tuple(variances.tolist()),
            components_for_90=_components(variances, 0.9),
            alignments=tuple((directions[:, :TOP] ** 2).amax(0).tolist()),
            outliers=_outliers(covariance.diagonal().clamp(min=0), mean),
            offset=float(mean.norm()) / (math.sqrt(float(variances.sum())) or 1.0),
        )


def _components(variances: Tensor, share: float) -> int:
    held = variances.cumsum(0) / variances.sum().clamp(min=torch.finfo(torch.float64).tiny)
    return min(int((held < share).sum()) + 1, len(variances))


def _outliers(variances: Tensor, mean: Tensor) -> tuple[tuple[int, float, float], ...]:
    tiny = torch.finfo(torch.float64).tiny
    median = variances.median().clamp(min=tiny)
    top = variances.topk(min(TOP, len(variances)))
    return tuple(
        (int(i), float(variance / median), float(mean[i] / median.sqrt()))
        for variance, i in zip(top.values, top.indices, strict=True)
    )
