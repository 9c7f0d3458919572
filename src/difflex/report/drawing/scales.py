"""Axes: from values to places, and the ticks between."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from difflex.report.drawing.elements import wide

__all__ = ["Axis", "AxisScale", "AxisTick", "scaled"]


class AxisTick(NamedTuple):
    """A place on an axis that is named."""

    value: float
    label: str


@dataclass(frozen=True, kw_only=True)
class Axis:
    """What is told along one direction; bounds and ticks that are not given follow the values."""

    label: str
    log: bool = False
    low: float | None = None
    high: float | None = None
    ticks: tuple[AxisTick, ...] = ()
    """In place of round numbers: the sizes that there are, say."""
    percent: bool = False
    """Shares are written as per cent."""
    reversed: bool = False
    """Large values first."""

    def has(self, value: float | None) -> bool:
        """Whether `value` has a place on such an axis."""
        return value is not None and math.isfinite(value) and (value > 0 or not self.log)


@dataclass(frozen=True, kw_only=True)
class AxisScale:
    """An axis laid out from `start` to `end`, in units of the drawing."""

    axis: Axis
    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Where `value` is; what lies outside is held at the border."""
        low, high, at = map(math.log10, (self.low, self.high, value)) if self.axis.log else (self.low, self.high, value)
        share = min(max((at - low) / (high - low), 0.0), 1.0)
        return self.start + (1 - share if self.axis.reversed else share) * (self.end - self.start)

    def ticks(self, across: bool) -> list[AxisTick]:
        """The ticks that have room; `across` where labels stand side by side."""
        given = [tick for tick in self.axis.ticks if self.low <= tick.value <= self.high]
        kept: list[AxisTick] = []
        reach = -math.inf
        for tick in sorted(given or self._round(), key=lambda tick: self(tick.value) * (1 if across else -1)):
            place = self(tick.value) if across else -self(tick.value)
            half = wide(tick.label) / 2 + 3 if across else 9
            if place - half >= reach:
                kept.append(tick)
                reach = place + half
        return kept

    def _round(self) -> list[AxisTick]:
        if self.axis.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            decades = math.log10(self.high / self.low)
            factors = (1,) if decades > 3 else (1, 2, 5) if decades > 1.2 else (1, 1.5, 2, 3, 5, 7)
            values = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
        else:
            step = _step(self.high - self.low)
            count = math.floor(self.high / step + 1e-9) - math.ceil(self.low / step - 1e-9)
            values = [(math.ceil(self.low / step - 1e-9) + i) * step for i in range(count + 1)]
        inside = [value for value in values if self.low * (1 - 1e-9) <= value <= self.high * (1 + 1e-9) or value == 0]
        return [AxisTick(value, _label(value, self.axis)) for value in inside]


def scaled(axis: Axis, values: Sequence[float], start: float, end: float) -> AxisScale:
    """`axis` from `start` to `end` with room for `values`; round bounds where none are given."""
    there = [value for value in values if axis.has(value)]
    low = axis.low if axis.low is not None else min(there, default=1.0 if axis.log else 0.0)
    high = axis.high if axis.high is not None else max(there, default=10.0 if axis.log else 1.0)
    if axis.log:
        low, high = (low / 1.5, high * 1.5) if high / low < 1.5 else (low, high)
        low = low if axis.low is not None else low / (high / low) ** 0.06
        high = high if axis.high is not None else high * (high / low) ** 0.06
        return AxisScale(axis=axis, low=low, high=high, start=start, end=end)
    if high <= low:
        low, high = low - (abs(low) * 0.1 or 0.5), high + (abs(high) * 0.1 or 0.5)
    step = _step(high - low)
    low = axis.low if axis.low is not None else math.floor(low / step) * step
    high = axis.high if axis.high is not None else math.ceil(high / step) * step
    return AxisScale(axis=axis, low=low, high=high, start=start, end=end)


def _step(span: float) -> float:
    """A round number of which four to eight make `span`."""
    rough = span / 5
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.9999)


def _label(value: float, axis: Axis) -> str:
    if axis.percent:
        return f"{round(100 * value, 6):g} %"
    if value == 0:
        return "0"
    if axis.log and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{round(value, 10):,.10g}" if abs(value) < 1e15 else f"{value:.1e}"
