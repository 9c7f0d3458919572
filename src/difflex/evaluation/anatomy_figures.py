"""Figures of an anatomy: norms as a heat map of sites by timesteps, spectra as curves. Drawn with pillow alone."""

import math
from collections.abc import Callable, Sequence

from PIL import Image, ImageDraw, ImageFont

from difflex.errors import BadInput
from difflex.evaluation.anatomy import Anatomy
from difflex.records import Site, Stream

__all__ = ["heat_map", "spectra"]

PAPER, INK, GRID = "white", "#222222", "#dddddd"
# Dark blue over violet and orange to pale yellow: read in grey too, and by the colour-blind.
RAMP = ((13, 8, 60), (84, 3, 120), (165, 32, 105), (225, 85, 60), (250, 160, 40), (245, 235, 150))
CURVES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#444444", "#8b4513")
LETTERS, LINE, GAP = 15, 20, 12
CELL = (58, 22)
PLOT = (640, 420)


def heat_map(anatomy: Anatomy, stream: Stream = "image") -> Image.Image:
    """Mean token norms of the residual stream: a row for each site, a column for each timestep, noise at the left."""
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
                _cell(pen, (left + CELL[0] * column, y), share, norms[timestep])
    return sheet


def _cell(pen: ImageDraw.ImageDraw, at: tuple[int, int], share: float, value: float) -> None:
    x, y = at
    pen.rectangle((x, y, x + CELL[0] - 2, y + CELL[1] - 2), fill=_colour(share))
    small = ImageFont.load_default(LETTERS - 3)
    pen.text((x + CELL[0] // 2 - 1, y + CELL[1] // 2 - 1), f"{value:.3g}", INK if share > 0.6 else PAPER, small, anchor="mm")


def _colour(share: float) -> tuple[int, int, int]:
    """The place of `share`, from 0 to 1, on the ramp."""
    place = min(max(share, 0.0), 1.0) * (len(RAMP) - 1)
    i = min(int(place), len(RAMP) - 2)
    red, green, blue = (round(a + (place - i) * (b - a)) for a, b in zip(RAMP[i], RAMP[i + 1], strict=True))
    return red, green, blue


def spectra(anatomy: Anatomy, sites: Sequence[Site] | None = None) -> Image.Image:
    """The share of the variance that each principal direction holds, both axes logarithmic; a curve for each site."""
    chosen = list(anatomy.shapes if sites is None else sites)[: len(CURVES)]
    if not chosen:
        raise BadInput("The anatomy has no spectrum. Measure one for at least one site.")
    curves = {site: _shares(anatomy.shapes[site].variances) for site in chosen}
    longest = max(len(curve) for curve in curves.values())
    lowest = math.floor(math.log10(min(curve[-1] for curve in curves.values())))
    font = ImageFont.load_default(LETTERS)
    left, top = 70, GAP + 3 * LINE
    sheet = Image.new("RGB", (left + PLOT[0] + GAP, top + PLOT[1] + 3 * LINE + LINE * len(chosen)), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, GAP), f"{anatomy.model}: variance along the principal directions", INK, font)
    pen.text((GAP, GAP + LINE), "share of the whole, by rank of the direction", INK, font)

    def place(rank: int, share: float) -> tuple[float, float]:
        x = math.log10(rank) / (math.log10(longest) or 1.0)
        return left + PLOT[0] * x, top + PLOT[1] * math.log10(share) / lowest

    _axes(pen, place, longest, lowest)
    for number, (site, curve) in enumerate(curves.items()):
        pen.line([place(rank, share) for rank, share in enumerate(curve, 1)], CURVES[number], 2)
        shape, y = anatomy.shapes[site], top + PLOT[1] + 2 * LINE + LINE * number
        pen.line([(GAP, y), (GAP + 30, y)], CURVES[number], 3)
        said = f"first {100 * shape.share(1):.0f} %, first ten {100 * shape.share(10):.0f} %"
        pen.text((GAP + 40, y), f"{site}: {said}, 90 % in {shape.components_for_90} of {len(curve)}", INK, font, anchor="lm")
    return sheet


def _shares(variances: Sequence[float]) -> list[float]:
    """Shares of the whole; what rounding made of nothing is left out, as it has no logarithm."""
    whole = sum(variances) or 1.0
    return [share for variance in variances if (share := variance / whole) > 1e-12] or [1.0]


def _axes(pen: ImageDraw.ImageDraw, place: Callable[[int, float], tuple[float, float]], longest: int, lowest: int) -> None:
    small = ImageFont.load_default(LETTERS - 2)
    for power in range(lowest, 1):
        (x, y), (end, _) = place(1, 10.0**power), place(longest, 10.0**power)
        pen.line([(x, y), (end, y)], GRID)
        pen.text((x - 6, y), f"1e{power}" if power else "1", INK, small, anchor="rm")
    for power in range(int(math.log10(longest)) + 1):
        (x, y), (_, end) = place(10**power, 10.0**lowest), place(10**power, 1.0)
        pen.line([(x, y), (x, end)], GRID)
        pen.text((x, y + 4), str(10**power), INK, small, anchor="mt")
