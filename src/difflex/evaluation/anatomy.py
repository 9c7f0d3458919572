"""Anatomy of activations: norms, spectra, outlier coordinates and offsets, measured in one pass, with figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import ClassVar, NamedTuple, final

import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from difflex.errors import BadInput, BrokenFile, NonFinite
from difflex.files import folder_lock
from difflex.images import write_image
from difflex.json_records import JsonRecord
from difflex.records import Activations, Site, Stream
from difflex.study import Study

__all__ = [
    "ActivationShape",
    "Anatomy",
    "AnatomyInputs",
    "AnatomyResult",
    "heat_map",
    "measure_anatomy",
    "spectra_figure",
    "update_anatomy",
]

TOP = 10
"""Number of directions and coordinates to report."""

PAPER, INK, GRID = "white", "#222222", "#dddddd"
# From dark blue over purple and orange to pale yellow: readable in greyscale and with colour blindness.
RAMP = ((13, 8, 60), (84, 3, 120), (165, 32, 105), (225, 85, 60), (250, 160, 40), (245, 235, 150))
CURVES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#444444", "#8b4513")
LETTERS, LINE, GAP = 15, 20, 12
CELL = (58, 22)
PLOT = (640, 420)


@dataclass(frozen=True, kw_only=True)
class ActivationShape:
    """The distribution of the activations of a site."""

    tokens: int
    variances: tuple[float, ...]
    """The spectrum: variances along the principal directions, the largest first."""
    components_for_90: int
    """The smallest number of principal directions that hold 90 % of the variance."""
    alignments: tuple[float, ...]
    """For each top direction, the share of its squared length in its largest coordinate; 1 is a coordinate axis."""
    outliers: tuple[tuple[int, float, float], ...]
    """The coordinates of largest variance: index, variance over the median variance, mean over the median standard deviation."""
    offset: float
    """Length of the mean over the root of the total variance; a large offset leads to dead features (arXiv 2605.31518)."""

    def share(self, count: int) -> float:
        """Return the share of the variance in the `count` largest directions."""
        return sum(self.variances[:count]) / (sum(self.variances) or 1.0)


@dataclass(frozen=True, kw_only=True)
class AnatomyInputs:
    """What an anatomy was measured on; with other inputs it is measured again."""

    model: str
    revision: str | None
    precision: str | None
    pixels: tuple[int, int]
    steps: int
    guidance: float
    prompts: str
    """Source of the prompts."""
    max_prompts: int
    sites: tuple[Site, ...]
    spectra: tuple[Site, ...]
    """Sites whose spectrum is measured."""
    text_length: int | None = None
    """Of a prompt; None for the model's own."""


@dataclass(frozen=True, kw_only=True)
class Anatomy(JsonRecord):
    """Norms and shapes of activations by site."""

    FORMAT: ClassVar[int] = 2
    COMMAND: ClassVar[str] = "anatomy"

    model: str
    norms: dict[Site, dict[float, float]]
    """Mean length of a token's activation, by timestep."""
    shapes: dict[Site, ActivationShape]
    """Only of the sites whose spectrum was measured."""
    inputs: AnatomyInputs | None = None


class AnatomyResult(NamedTuple):
    """The files that hold the anatomy of a study, and whether they were up to date before."""

    paths: list[Path]
    """The JSON file, then the figures."""
    up_to_date: bool


def update_anatomy(study: Study, inputs: AnatomyInputs, harvest: Callable[[], Iterable[Activations]]) -> AnatomyResult:
    """Measure the anatomy of the activations from `harvest`, unless the study holds it already; save it and draw its figures."""
    try:
        anatomy = Anatomy.load(study.anatomy) if study.anatomy.is_file() else None
    except BrokenFile:
        anatomy = None
    up_to_date = anatomy is not None and anatomy.inputs == inputs
    if anatomy is None or not up_to_date:
        with folder_lock(study.anatomy_figures):
            anatomy = replace(measure_anatomy(harvest(), inputs.spectra), inputs=inputs)
            study.write()
            anatomy.save(study.anatomy)
    return AnatomyResult([study.anatomy, *_save_figures(anatomy, study.anatomy_figures)], up_to_date)


def measure_anatomy(activations: Iterable[Activations], spectra: Collection[Site] | None = None) -> Anatomy:
    """Measure the anatomy of `activations`; spectra (a width x width matrix each) for all sites, or for those in `spectra`."""
    norms: dict[Site, dict[float, list[float]]] = {}
    moments: dict[Site, _CloudMoments] = {}
    model = ""
    for batch in activations:
        model = batch.shots[0].model
        lengths = batch.values.float().norm(dim=-1).double()
        sums = norms.setdefault(batch.site, {}).setdefault(batch.shots[0].timestep or 0.0, [0.0, 0.0])
        sums[0] += float(lengths.sum())
        sums[1] += lengths.numel()
        if spectra is None or batch.site in spectra:
            if batch.site not in moments:
                moments[batch.site] = _CloudMoments(batch.values.shape[-1], batch.values.device)
            moments[batch.site].add(batch.values.flatten(0, 1))
    if not norms:
        raise BadInput("No activations were given, so there is no anatomy. Harvest at least one shot.")
    if not all(math.isfinite(total) for sums in norms.values() for total, _ in sums.values()):
        raise NonFinite(f"The activations of {model} hold NaN or infinity. Load it in another precision, or copy it again.")
    means = {site: {t: sums[t][0] / sums[t][1] for t in sorted(sums, reverse=True)} for site, sums in norms.items()}
    return Anatomy(model=model, norms=means, shapes={site: cloud.shape() for site, cloud in moments.items()})


@final
class _CloudMoments:
    """First and second moments in float64, centred on the mean of the first batch so that large offsets cost no digits."""

    def __init__(self, width: int, device: torch.device) -> None:
        self._centre: Tensor | None = None
        self._sum = torch.zeros(width, dtype=torch.float64, device=device)
        self._products = torch.zeros(width, width, dtype=torch.float64, device=device)
        self._count = 0

    def add(self, values: Float[Tensor, "token width"]) -> None:
        x = values.double()
        if self._centre is None:
            self._centre = x.mean(0)
        x = x - self._centre
        self._sum += x.sum(0)
        self._products.addmm_(x.T, x)
        self._count += len(x)

    def shape(self) -> ActivationShape:
        assert self._centre is not None
        shift = self._sum / self._count
        mean = self._centre + shift
        covariance = self._products / self._count - torch.outer(shift, shift)
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
    cumulative = variances.cumsum(0) / variances.sum().clamp(min=torch.finfo(torch.float64).tiny)
    return min(int((cumulative < share).sum()) + 1, len(variances))


def _outliers(variances: Tensor, mean: Tensor) -> tuple[tuple[int, float, float], ...]:
    median = variances.median().clamp(min=torch.finfo(torch.float64).tiny)
    top = variances.topk(min(TOP, len(variances)))
    return tuple(
        (int(i), float(variance / median), float(mean[i] / median.sqrt()))
        for variance, i in zip(top.values, top.indices, strict=True)
    )


def _save_figures(anatomy: Anatomy, folder: Path) -> list[Path]:
    streams: set[Stream] = {site.stream for site in anatomy.norms if site.kind == "residual"}
    figures = {folder / f"norms-{stream}.png": heat_map(anatomy, stream) for stream in streams}
    figures[folder / "spectra.png"] = spectra_figure(anatomy)
    for path, figure in figures.items():
        write_image(figure, path)
    return sorted(figures)


def heat_map(anatomy: Anatomy, stream: Stream = "image") -> Image.Image:
    """Draw mean token norms of the residual stream: one row per site, one column per timestep, the noisiest on the left."""
    rows = {site: norms for site, norms in anatomy.norms.items() if site.stream == stream and site.kind == "residual"}
    if not rows:
        raise BadInput(f"The anatomy has no residual norms of the {stream} stream. Harvest sites that have one.")
    timesteps = sorted({timestep for norms in rows.values() for timestep in norms}, reverse=True)
    values = [norm for norms in rows.values() for norm in norms.values()]
    low, high = math.log10(max(min(values), 1e-30)), math.log10(max(max(values), 1e-30))
    font = ImageFont.load_default(LETTERS)
    left = GAP * 2 + max(int(font.getlength(str(site))) for site in rows)
    top = GAP + 3 * LINE
    sheet = Image.new("RGB", (max(left + CELL[0] * len(timesteps) + GAP, 560), top + CELL[1] * len(rows) + GAP), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, GAP), f"{anatomy.model}: mean norm of a token, residual {stream} stream", INK, font)
    pen.text((GAP, GAP + LINE), "by site and timestep (1000 is pure noise); colour on a log scale", INK, font)
    for column, timestep in enumerate(timesteps):
        pen.text((left + CELL[0] * column + CELL[0] // 2, top - 4), f"{timestep:.0f}", INK, font, anchor="md")
    for row, (site, norms) in enumerate(rows.items()):
        y = top + CELL[1] * row
        pen.text((left - GAP, y + CELL[1] // 2), str(site), INK, font, anchor="rm")
        for column, timestep in enumerate(timesteps):
            if timestep in norms:
                share = (math.log10(max(norms[timestep], 1e-30)) - low) / (high - low or 1.0)
                _draw_cell(pen, (left + CELL[0] * column, y), share, norms[timestep])
    return sheet


def _draw_cell(pen: ImageDraw.ImageDraw, corner: tuple[int, int], share: float, value: float) -> None:
    x, y = corner
    pen.rectangle((x, y, x + CELL[0] - 2, y + CELL[1] - 2), fill=_colour(share))
    small = ImageFont.load_default(LETTERS - 3)
    pen.text((x + CELL[0] // 2 - 1, y + CELL[1] // 2 - 1), f"{value:.3g}", INK if share > 0.6 else PAPER, small, anchor="mm")


def _colour(share: float) -> tuple[int, int, int]:
    """Return the colour at `share` (0 to 1) of the ramp."""
    position = min(max(share, 0.0), 1.0) * (len(RAMP) - 1)
    i = min(int(position), len(RAMP) - 2)
    red, green, blue = (round(a + (position - i) * (b - a)) for a, b in zip(RAMP[i], RAMP[i + 1], strict=True))
    return red, green, blue


def spectra_figure(anatomy: Anatomy) -> Image.Image:
    """Draw the share of the variance in each principal direction, both axes logarithmic; a curve for each of the first sites."""
    if not anatomy.shapes:
        raise BadInput("The anatomy has no spectrum. Measure one for at least one site.")
    curves = {site: _shares(shape.variances) for site, shape in islice(anatomy.shapes.items(), len(CURVES))}
    longest = max(len(curve) for curve in curves.values())
    lowest = math.floor(math.log10(min(curve[-1] for curve in curves.values())))
    font = ImageFont.load_default(LETTERS)
    left, top = 70, GAP + 3 * LINE
    sheet = Image.new("RGB", (left + PLOT[0] + GAP, top + PLOT[1] + 3 * LINE + LINE * len(curves)), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, GAP), f"{anatomy.model}: variance along the principal directions", INK, font)
    pen.text((GAP, GAP + LINE), "share of the whole, by rank of the direction", INK, font)

    def point(rank: int, share: float) -> tuple[float, float]:
        x = math.log10(rank) / (math.log10(longest) or 1.0)
        return left + PLOT[0] * x, top + PLOT[1] * math.log10(share) / lowest

    _draw_axes(pen, point, longest, lowest)
    for number, (site, curve) in enumerate(curves.items()):
        pen.line([point(rank, share) for rank, share in enumerate(curve, 1)], CURVES[number], 2)
        shape, y = anatomy.shapes[site], top + PLOT[1] + 2 * LINE + LINE * number
        pen.line([(GAP, y), (GAP + 30, y)], CURVES[number], 3)
        shares = f"first {100 * shape.share(1):.0f} %, first ten {100 * shape.share(10):.0f} %"
        pen.text((GAP + 40, y), f"{site}: {shares}, 90 % in {shape.components_for_90} of {len(curve)}", INK, font, anchor="lm")
    return sheet


def _shares(variances: Sequence[float]) -> list[float]:
    """Return shares of the total variance, without the numerically zero ones, which have no logarithm."""
    total = sum(variances) or 1.0
    return [share for variance in variances if (share := variance / total) > 1e-12] or [1.0]


def _draw_axes(pen: ImageDraw.ImageDraw, point: Callable[[int, float], tuple[float, float]], longest: int, lowest: int) -> None:
    small = ImageFont.load_default(LETTERS - 2)
    for power in range(lowest, 1):
        (x, y), (end, _) = point(1, 10.0**power), point(longest, 10.0**power)
        pen.line([(x, y), (end, y)], GRID)
        pen.text((x - 6, y), f"1e{power}" if power else "1", INK, small, anchor="rm")
    for power in range(int(math.log10(longest)) + 1):
        (x, y), (_, end) = point(10**power, 10.0**lowest), point(10**power, 1.0)
        pen.line([(x, y), (x, end)], GRID)
        pen.text((x, y + 4), str(10**power), INK, small, anchor="mt")
