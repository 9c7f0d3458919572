"""Sections of the page: words, figures, and what is missing. A new one is a function from facts to a Section."""

import csv
import io
from dataclasses import dataclass
from typing import NamedTuple

from markupsafe import Markup

from difflex.report.drawing import Drawing, LegendEntry
from difflex.report.telling import exact

__all__ = ["FigureTable", "MissingFigure", "ReportFigure", "ReportSection"]

NOTHING = Markup()
Value = str | float | None


class FigureTable(NamedTuple):
    """The numbers behind a figure."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Value, ...], ...]

    @property
    def csv(self) -> str:
        """As a file of comma-separated values, with all digits."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows([[exact(value) for value in row] for row in self.rows])
        return file.getvalue()


class MissingFigure(NamedTuple):
    """A figure that cannot be drawn yet."""

    what: str
    verb: str
    """The command that makes what it needs."""


@dataclass(frozen=True, kw_only=True)
class ReportFigure:
    """Drawings side by side, what they show, and their numbers."""

    name: str
    """Of its CSV file, and its anchor on the page."""
    title: str
    caption: str
    """What is seen."""
    formula: str
    """How it was computed."""
    table: FigureTable
    drawings: tuple[Drawing, ...]
    keys: tuple[LegendEntry, ...] = ()
    """Of the legend."""
    ramp: Markup = NOTHING
    """The legend of a heat map."""
    paired: bool = False
    """Whether the drawings are pairs, to stand side by side."""

    @property
    def left_out(self) -> int:
        """How many values have no place in the drawings; the CSV has them."""
        return sum(drawing.left_out for drawing in self.drawings)


@dataclass(frozen=True, kw_only=True)
class ReportSection:
    """A part of the page."""

    name: str
    """Its anchor."""
    title: str
    lead: str
    """What it is about, in a sentence or two."""
    figures: tuple[ReportFigure, ...] = ()
    missing: tuple[MissingFigure, ...] = ()
    body: Markup = NOTHING
    """What is neither: a table, a list of claims."""
