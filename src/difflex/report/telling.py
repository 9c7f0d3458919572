"""Numbers as a reader is told them: few digits, and never a wrong one."""

import math
from collections.abc import Mapping

__all__ = ["NONE", "apart", "count", "exact", "number", "percent"]

NONE = "\N{EN DASH}"


def number(value: float | None, digits: int = 3) -> str:
    """`value` with so many significant digits; what is no number is called so."""
    if value is None:
        return NONE
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞" if value > 0 else "-∞"
    if value and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}"
    places = max(digits - 1 - math.floor(math.log10(abs(value))), 0) if value else 0
    return f"{value:,.{places}f}"


def percent(value: float | None) -> str:
    """A share in per cent; nearly none and nearly all are not told as none and all."""
    if value is None or not math.isfinite(value):
        return number(value)
    rest = abs(1 - value)
    if 0 < rest < 0.01:
        return f"{100 * value:.{max(math.ceil(-math.log10(rest)) - 2, 0)}f} %"
    return f"{100 * value:.0f} %" if abs(value) >= 0.1 or not value else f"{100 * value:.2g} %"


def count(value: int, one: str, many: str = "") -> str:
    """`3 dictionaries`."""
    return f"{value:,} {one if value == 1 else many or one + 's'}"


def apart(said: Mapping[str, str]) -> str:
    """What is said of several by name: once where the same is said of all, else each with the names it is said of."""
    names = {told: [name for name, each in said.items() if each == told] for told in said.values()}
    return "; ".join(told if len(names) == 1 else f"{told} ({', '.join(of)})" for told, of in names.items())


def exact(value: str | float | None) -> str:
    """`value` for a file of numbers: all its digits, nothing for None."""
    return "" if value is None else value if isinstance(value, str) else repr(value)
