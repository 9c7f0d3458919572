"""How figures write numbers, and the names and styles of the kinds of dictionaries."""

import math
from collections.abc import Mapping, Sequence

from difflex.report.drawing.charts import Series, SeriesStyle

SAE_KINDS = ("topk", "batchtopk", "jumprelu", "matryoshka")
KINDS = {
    "topk": ("TopK SAE", SeriesStyle(0, "circle")),
    "batchtopk": ("BatchTopK SAE", SeriesStyle(6, "ring", "12 3")),
    "jumprelu": ("JumpReLU SAE", SeriesStyle(7, "square", "5 2")),
    "matryoshka": ("Matryoshka SAE", SeriesStyle(8, "triangle", "2 2")),
    "itda": ("ITDA", SeriesStyle(1, "diamond", "7 3")),
    "neurons": ("neurons", SeriesStyle(2, "square", "1 4")),
    "pca": ("principal axes", SeriesStyle(3, "triangle", "9 3 2 3")),
    "random": ("random directions", SeriesStyle(4, "cross", "3 3")),
    "untrained": ("untrained", SeriesStyle(5, "wedge", "12 3 2 3")),
}
"""The name and the style of each kind of dictionary or baseline."""
DASHES = ("", "7 3", "2 4", "9 3 2 3", "12 4", "4 2")
MARKERS = ("circle", "diamond", "square", "triangle", "cross", "wedge", "ring")


def number(value: float | None, digits: int = 3) -> str:
    """Return `value` with so many significant digits; NaN and infinity by name."""
    if value is None:
        return "\N{EN DASH}"
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞" if value > 0 else "-∞"
    if value and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}"
    places = max(digits - 1 - math.floor(math.log10(abs(value))), 0) if value else 0
    return f"{value:,.{places}f}"


def percent(value: float | None) -> str:
    """Return a share in per cent; shares close to 0 or 1 are not rounded to 0 % or 100 %."""
    if value is None or not math.isfinite(value):
        return number(value)
    rest = abs(1 - value)
    if 0 < rest < 0.01:
        return f"{100 * value:.{max(math.ceil(-math.log10(rest)) - 2, 0)}f} %"
    return f"{100 * value:.0f} %" if abs(value) >= 0.1 or not value else f"{100 * value:.2g} %"


def count(value: int, singular: str, plural: str = "") -> str:
    """Return a number with its noun, as in `3 dictionaries`."""
    return f"{value:,} {singular if value == 1 else plural or singular + 's'}"


def grouped(texts: Mapping[str, str]) -> str:
    """Return the distinct texts of several names, each with the names it is true of unless it is true of all."""
    names = {text: [name for name, own in texts.items() if own == text] for text in texts.values()}
    return "; ".join(text if len(names) == 1 else f"{text} ({', '.join(of)})" for text, of in names.items())


def kind_of(name: str) -> str:
    """Return the kind of a dictionary from its name, SITE/LABEL."""
    return name.rpartition("/")[2].partition("-")[0]


def listed(words: Sequence[str], limit: int = 6) -> str:
    """Return words as in `a, b and c`; beyond a limit only their number."""
    if len(words) > limit:
        return f"{', '.join(words[: limit - 1])} and {len(words) - limit + 1} more"
    return " and ".join([*([", ".join(words[:-1])] if len(words) > 1 else []), *words[-1:]])


def numbered_style(i: int) -> SeriesStyle:
    """Return the style of series `i` of a figure whose series have no kind."""
    return SeriesStyle(i % 9, MARKERS[i % len(MARKERS)], DASHES[i % len(DASHES)])


def kind_series(kind: str, untrained: bool = False, line: bool = True) -> Series:
    """Return the series of a kind of dictionary or baseline; `line` for a figure with lines."""
    name, style = KINDS.get(kind, (kind, SeriesStyle(8, "ring")))
    if untrained:
        return Series(f"{kind} untrained", f"{name} of an untrained model", KINDS["untrained"][1], line)
    return Series(kind, name, style, line)


def kind_styles(kinds: Mapping[str, str]) -> dict[str, SeriesStyle]:
    """Return the style of each name by its kind; names of one kind differ in their dashes."""
    styles = {}
    for name, kind in kinds.items():
        same, style = [own for own in kinds if kinds[own] == kind], kind_series(kind).style
        styles[name] = style if len(same) == 1 else style._replace(dash=DASHES[same.index(name) % len(DASHES)])
    return styles
