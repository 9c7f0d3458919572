"""The parts of a page: sections with their text, tables and figures. A section is made by a function of a study's facts."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from markupsafe import Markup

from difflex.report.drawing import Drawing, element
from difflex.report.drawing.charts import Series

__all__ = ["MissingFigure", "ReportFigure", "ReportSection", "SortableRow", "html_table", "sortable_table"]

EMPTY = Markup()


class MissingFigure(NamedTuple):
    """A figure whose records do not exist yet."""

    name: str
    command: str
    """The command that writes the records."""


@dataclass(frozen=True, kw_only=True)
class ReportFigure:
    """Drawings side by side, their caption and their numbers; without drawings a CSV file only."""

    name: str
    """Of its CSV file, and its anchor on the page."""
    title: str = ""
    caption: str
    formula: str = ""
    """How its values are computed."""
    columns: tuple[str, ...]
    rows: Sequence[tuple[str | float | None, ...]]
    """The numbers behind the drawings."""
    drawings: Sequence[Drawing] = ()
    files: Mapping[str, Drawing] = field(default_factory=dict)
    """Those of the drawings that are SVG files as well, by the names of their files."""
    legend: Sequence[Series] = ()
    ramp: Markup = EMPTY
    """The legend of a heat map."""
    paired: bool = False
    """Whether the drawings are pairs, two in a row."""

    @property
    def csv(self) -> str:
        """The numbers as comma-separated values, with all digits."""
        file = io.StringIO()
        csv.writer(file, lineterminator="\n").writerows([self.columns, *self.rows])
        return file.getvalue()

    @property
    def left_out(self) -> int:
        """The number of values that the drawings cannot show; the CSV has them."""
        return sum(drawing.left_out for drawing in self.drawings)


@dataclass(frozen=True, kw_only=True)
class ReportSection:
    """A section of the page."""

    name: str
    """Its anchor."""
    title: str
    lead: str = ""
    """An introduction in a sentence or two."""
    body: Markup = EMPTY
    """What comes before the figures, such as a table or a list of claims."""
    parts: Sequence[ReportFigure | MissingFigure] = ()
    """The figures in their order; missing ones are listed at the end of the page."""

    @property
    def figures(self) -> list[ReportFigure]:
        """The figures that are not missing."""
        return [part for part in self.parts if isinstance(part, ReportFigure)]

    @property
    def is_shown(self) -> bool:
        """Whether it has something to show; what it lacks is listed at the end of the page."""
        return bool(self.body) or any(figure.drawings for figure in self.figures) or not self.parts

    @property
    def missing(self) -> list[MissingFigure]:
        """The figures that are missing."""
        return [part for part in self.parts if isinstance(part, MissingFigure)]


class SortableRow(NamedTuple):
    """A row of a table that sorts by its columns: two of text, then numbers."""

    name: str
    word: str
    numbers: Sequence[tuple[float | None, str]]
    """Each with its text."""
    word_title: str | None = None
    """A tooltip of the second cell."""


def html_table(heads: Sequence[str], rows: Iterable[Sequence[str]], label: str, words: int) -> Markup:
    """Return a table that scrolls in its own box; its first `words` columns are text, the others numbers."""
    kinds = ["word" if i < words else None for i in range(len(heads))]
    head = [element("th", name, scope="col", class_=kind) for name, kind in zip(heads, kinds, strict=True)]
    body = []
    for row in rows:
        cells = [element("td", cell, class_=kind) for cell, kind in zip(row[1:], kinds[1:], strict=True)]
        body.append(element("tr", element("th", row[0], scope="row"), *cells))
    return _box(element("table", element("thead", element("tr", *head)), element("tbody", *body)), label)


def sortable_table(heads: Mapping[str, str], rows: Iterable[SortableRow], label: str) -> Markup:
    """Return a table that sorts by the column that is clicked; `heads` are names with their tooltips."""
    buttons = [element("button", name, type="button", title=title or None) for name, title in heads.items()]
    head = element("tr", *(element("th", button, scope="col") for button in buttons))
    body = []
    for row in rows:
        numbers = [element("td", text, data_value="" if x is None else repr(float(x))) for x, text in row.numbers]
        name = element("th", row.name, scope="row", data_value=row.name)
        word = element("td", row.word, data_value=row.word, class_="word", title=row.word_title)
        body.append(element("tr", name, word, *numbers))
    return _box(element("table", element("thead", head), element("tbody", *body), class_="sortable"), label)


def _box(table: Markup, label: str) -> Markup:
    return element("div", table, class_="box", tabindex="0", role="region", aria_label=label)
