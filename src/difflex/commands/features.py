"""`difflex features`: the features of a dictionary in figures, sorted and filtered."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple, final

from tyro.conf import FlagCreatePairsOff, Positional, arg

from difflex.commands.books import opened_book
from difflex.errors import BadInput, UnknownName
from difflex.evaluation.concepts.results import ConceptMatches
from difflex.features import SORT_COLUMNS, Book, FeatureFilter
from difflex.features.entries import FeatureStats
from difflex.study import Command, DictionaryRef, Study

__all__ = ["BestConcept", "FeaturesCommand", "detected"]

SORTED = ("concept", "score", *SORT_COLUMNS)
WORDS = 48
"""Letters of an explanation that are shown."""


class BestConcept(NamedTuple):
    """The known concept that a feature detects best."""

    concept: str
    ap: float
    """Average precision on held-out images."""


def detected(study: Study, place: DictionaryRef) -> dict[int, BestConcept]:
    """What the features of a dictionary detect, by feature; nothing where it was not held against known concepts."""
    path = study.concepts(*place)
    if not path.is_file():
        return {}
    matches = ConceptMatches.load(path)
    found = matches.features
    return {
        feature: BestConcept(matches.concepts[concept].name, ap)
        for feature, concept, ap in zip(found.features, found.concepts, found.ap, strict=True)
    }


@final
@dataclass(frozen=True, kw_only=True)
class FeaturesCommand(Command):
    """List the features of a dictionary's book, sorted and filtered."""

    study: Annotated[Positional[Path], arg(metavar="STUDY")]
    """A study with books."""
    dictionary: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: the only one)")] = None
    """Whose features: SITE/LABEL, or the site alone where it has one dictionary."""
    sort: Annotated[str, arg(metavar="COLUMN")] = "density"
    """density, peak, mean, coverage, area ..., concept (how well one is detected) or score (of explanations); largest first."""
    ascending: FlagCreatePairsOff[bool] = False
    """Smallest first."""
    filter: Annotated[tuple[str, ...], arg(metavar="CONDITION...", help_behavior_hint="(default: all)")] = ()
    """What must hold, all of it: "density<0.01", "peak>3", "concept=star"."""
    top: Annotated[int, arg(metavar="N")] = 20
    """How many to list."""
    measure: Annotated[str, arg(metavar="NAME")] = "accuracy"
    """Of the explanations' scores: accuracy, auroc, ..."""

    def __call__(self) -> None:
        if self.sort not in SORTED:
            raise UnknownName.among("The column", self.sort, SORTED)
        if self.top < 1:
            raise BadInput(f"--top {self.top} lists nothing. Ask for 1 or more.")
        study = Study.open(self.study)
        place = self._place(study)
        known = detected(study, place)
        with opened_book(study, place) as book:
            rows = self._rows(book, known)
            print(f"{place}: {len(rows):,} of {book.about.size:,} features, {min(self.top, len(rows))} are shown")
            print(_table(book, rows[: self.top], known, self.measure))

    def _place(self, study: Study) -> DictionaryRef:
        if self.dictionary is not None:
            return study.find_dictionary(self.dictionary)
        there = [place for place in study.dictionaries() if study.book(*place).is_file()]
        if len(there) != 1:
            names = ", ".join(map(str, there)) or "none; difflex collect makes them"
            raise BadInput(f"{study.folder} has {len(there)} books. Name one by --dictionary: {names}.")
        return there[0]

    def _rows(self, book: Book, known: Mapping[int, BestConcept]) -> list[FeatureStats]:
        """The features that are wanted, in order."""
        wanted = [text.split("=", 1)[1].strip() for text in self.filter if text.replace(" ", "").startswith("concept=")]
        where = [FeatureFilter.parse(text) for text in self.filter if not text.replace(" ", "").startswith("concept=")]
        if (wanted or self.sort == "concept") and not known:
            raise UnknownName(f"What the features of {book.about.dictionary} detect is not known. difflex concepts finds out.")
        sort = "feature" if self.sort == "concept" else self.sort
        rows = book.features(sort, descending=not self.ascending, where=where, measure=self.measure)
        for name in wanted:
            names = sorted({each.concept for each in known.values()})
            if name not in names:
                raise UnknownName.among("The concept", name, names)
            rows = [row for row in rows if row.feature in known and known[row.feature].concept == name]
        if self.sort == "concept":
            rows = sorted((row for row in rows if row.feature in known), key=lambda row: known[row.feature].ap)
            return rows if self.ascending else rows[::-1]
        return rows


def _table(book: Book, rows: list[FeatureStats], known: Mapping[int, BestConcept], measure: str) -> str:
    """A line for each feature under a line of columns."""
    scores = book.best_scores(measure)
    names = ("feature", "density", "peak", "mean", "shots", "area", "covers", "strength", "concept", "AP", measure, "what it is")
    lines = [names, *(_line(book, row, known.get(row.feature), scores.get(row.feature)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    words = (8, 11)  # columns that are not figures
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in words else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _line(book: Book, row: FeatureStats, found: BestConcept | None, score: float | None) -> tuple[str, ...]:
    texts = [each.text for each in book.explanations(row.feature) if each.state == "done"]
    text = texts[-1] if texts else ""
    return (
        str(row.feature),
        f"{row.density:.3%}",
        f"{row.peak:.3g}",
        f"{row.mean:.3g}",
        f"{row.shots:,}",
        *("-" if share is None else f"{share:.0%}" for share in (row.area, row.coverage)),
        "-" if row.strength is None else f"{row.strength:.2f}",
        "-" if found is None else found.concept,
        "-" if found is None else f"{found.ap:.2f}",
        "-" if score is None else f"{score:.2f}",
        text if len(text) <= WORDS else text[: WORDS - 1] + "…",
    )
