"""What a command is expected to take, told before it runs: plain numbers, and what the commands before it will have made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from difflex.records import Shot, Site

__all__ = ["CostEstimate", "CostOutlook", "DictionaryForecast", "StoreForecast"]


class StoreForecast(NamedTuple):
    """What a store holds, or will hold."""

    rows: int
    """Of both splits."""
    tokens: int
    """Of each shot."""
    width: int
    shot: Shot
    """One of them."""


class DictionaryForecast(NamedTuple):
    """What a dictionary is, or will be."""

    size: int
    k: int
    width: int


@dataclass(frozen=True, kw_only=True)
class CostEstimate:
    """What a command is expected to take; None is what nobody can tell beforehand."""

    sites: tuple[str, ...] = ()
    tokens: int | None = None
    """Rows that it stores or reads, those of all sites together; read twice is counted twice."""
    bytes: int | None = None
    """What its files will take on disk."""
    seconds: float | None = None
    unknown: str = ""
    """Why something cannot be told."""
    stores: Mapping[tuple[Path, Site], StoreForecast] = field(default_factory=dict)
    """What it will have stored, by study and site."""
    dictionaries: Mapping[tuple[Path, Site], tuple[DictionaryForecast, ...]] = field(default_factory=dict)
    """What it will have made, by study and site."""


@dataclass(frozen=True, kw_only=True)
class CostOutlook:
    """What a command may expect: this machine, and what the commands before it will have made."""

    rate: float
    """Floating-point operations of a large matrix product in a second."""
    stores: Mapping[tuple[Path, Site], StoreForecast] = field(default_factory=dict)
    dictionaries: Mapping[tuple[Path, Site], tuple[DictionaryForecast, ...]] = field(default_factory=dict)

    def after(self, estimate: CostEstimate) -> CostOutlook:
        """What the next command may expect."""
        made = dict(self.dictionaries)
        for place, learned in estimate.dictionaries.items():
            made[place] = (*made.get(place, ()), *learned)
        return replace(self, stores={**self.stores, **estimate.stores}, dictionaries=made)
