"""`difflex features` and `difflex show`: list the features of a book, and draw the sheet of one."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, final

from tyro.conf import FlagCreatePairsOff, Positional, arg

from difflex.choices import HighlightStyle
from difflex.commands.inputs import open_book
from difflex.errors import BadInput
from difflex.features import BestConcept, Book, ImageAlbum, select_features, sheet
from difflex.features.entries import FeatureStats
from difflex.images import check_image_path, write_image
from difflex.study import Command, DictionaryRef, Study

__all__ = ["FeaturesCommand", "ShowCommand"]

MAX_TEXT = 48
"""Letters of an explanation in the table."""
COLUMNS = ("feature", "density", "peak", "mean", "shots", "area", "covers", "strength", "concept", "AP", "explanation")
TEXT_COLUMNS = ("concept", "explanation")


@final
@dataclass(frozen=True, kw_only=True)
class FeaturesCommand(Command):
    """List the features of a dictionary's book, sorted and filtered."""

    study: Annotated[Positional[Path], arg(metavar="STUDY")]
    """A study with books."""
    dictionary: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: the only one)")] = None
    """The dictionary: SITE/LABEL, or the site alone if it has one dictionary."""
    sort: Annotated[str, arg(metavar="COLUMN")] = "density"
    """Sort by density, peak, mean, coverage, area ..., by concept (average precision) or by score (of the explanations)."""
    ascending: FlagCreatePairsOff[bool] = False
    """Smallest first instead of largest first."""
    filter: Annotated[tuple[str, ...], arg(metavar="CONDITION...", help_behavior_hint="(default: all)")] = ()
    """List only features that fulfil all conditions: "density<0.01", "peak>3", "concept=star"."""
    top: Annotated[int, arg(metavar="N")] = 20
    """Number of features to list."""
    measure: Annotated[str, arg(metavar="NAME")] = "accuracy"
    """Score of the explanations: accuracy, auroc, ..."""

    def __call__(self) -> None:
        if self.top < 1:
            raise BadInput(f"--top {self.top} must be at least 1.")
        study = Study.open(self.study)
        ref = _find_book(study, self.dictionary)
        concepts = _best_concepts(study, ref)
        with open_book(study, ref) as book:
            rows = select_features(
                book, self.filter, sort=self.sort, ascending=self.ascending, measure=self.measure, concepts=concepts
            )
            shown = rows[: self.top]
            print(f"{ref}: {len(rows):,} of {book.about.size:,} features, showing {len(shown)}")
            print(_table(book, shown, concepts, self.measure))


def _find_book(study: Study, name: str | None) -> DictionaryRef:
    """Return the dictionary called `name`, or without a name the only one that has a book."""
    if name is not None:
        return study.find_dictionary(name)
    refs = [ref for ref in study.dictionaries() if study.book(*ref).is_file()]
    if len(refs) != 1:
        names = ", ".join(map(str, refs)) or "none; run difflex collect"
        raise BadInput(f"{study.folder} has {len(refs)} books. Name one with --dictionary: {names}.")
    return refs[0]


@final
@dataclass(frozen=True, kw_only=True)
class ShowCommand(Command):
    """Draw the sheet of one feature: statistics, top and random images with overlays, and silent images."""

    study: Annotated[Positional[Path], arg(metavar="STUDY")]
    """A study with books."""
    feature: Annotated[Positional[int], arg(metavar="FEATURE")]
    """Number of the feature."""
    dictionary: Annotated[str | None, arg(metavar="SITE/LABEL", help_behavior_hint="(default: the only one)")] = None
    """The dictionary of the feature; the site alone if it has one dictionary."""
    style: HighlightStyle = "blue"
    """Overlay. blue: the more opaque, the higher the value; outline: a black and white line, visible without colour vision."""
    columns: Annotated[int, arg(metavar="N")] = 8
    """Images of each kind."""
    side: Annotated[int, arg(metavar="PIXELS")] = 128
    """Approximate size of an image."""
    out: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(default: feature-FEATURE.png)")] = None
    """File to write the sheet to."""

    def __call__(self) -> None:
        if self.columns < 1 or self.side < 1:
            raise BadInput(f"--columns {self.columns} --side {self.side}: both must be at least 1.")
        out = self.out or Path(f"feature-{self.feature}.png")
        check_image_path(out)
        study = Study.open(self.study)
        ref = _find_book(study, self.dictionary)
        best = _best_concepts(study, ref).get(self.feature)
        concept = "" if best is None else f"{best.concept} (AP {best.ap:.2f})"
        album = ImageAlbum(study.images)
        with open_book(study, ref) as book:
            image = sheet(book, album, self.feature, style=self.style, columns=self.columns, side=self.side, concept=concept)
        write_image(image, out)
        print(out)


def _best_concepts(study: Study, ref: DictionaryRef) -> dict[int, BestConcept]:
    """Return the concept that each feature detects best; empty if the dictionary was not matched to concepts."""
    path = study.concepts(*ref)
    if not path.is_file():
        return {}
    from difflex.evaluation.concepts.results import ConceptMatches

    matches = ConceptMatches.load(path)
    columns = zip(matches.features.features, matches.features.concepts, matches.features.ap, strict=True)
    return {feature: BestConcept(matches.concepts[concept].name, ap) for feature, concept, ap in columns}


def _table(book: Book, rows: list[FeatureStats], concepts: Mapping[int, BestConcept], measure: str) -> str:
    """Return a line for each feature under a line of column names."""
    scores = book.best_scores(measure)
    columns = [*COLUMNS[:-1], measure, COLUMNS[-1]]
    lines = [columns, *(_line(book, row, concepts.get(row.feature), scores.get(row.feature)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    cells = [
        [
            cell.ljust(width) if name in TEXT_COLUMNS else cell.rjust(width)
            for name, cell, width in zip(columns, line, widths, strict=True)
        ]
        for line in lines
    ]
    return "\n".join("  ".join(line).rstrip() for line in cells)


def _line(book: Book, row: FeatureStats, concept: BestConcept | None, score: float | None) -> list[str]:
    texts = [explanation.text for explanation in book.explanations(row.feature) if explanation.state == "done"]
    text = texts[-1] if texts else ""
    return [
        str(row.feature),
        f"{row.density:.3%}",
        f"{row.peak:.3g}",
        f"{row.mean:.3g}",
        f"{row.shots:,}",
        *("-" if share is None else f"{share:.0%}" for share in (row.area, row.coverage)),
        "-" if row.strength is None else f"{row.strength:.2f}",
        "-" if concept is None else concept.concept,
        "-" if concept is None else f"{concept.ap:.2f}",
        "-" if score is None else f"{score:.2f}",
        text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…",
    ]
