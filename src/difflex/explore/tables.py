"""`ConceptTable` and `Evaluations`: dictionaries of a study side by side, by known concepts and by reconstruction."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from html import escape
from statistics import mean
from typing import NamedTuple, final

from difflex.errors import UnknownName
from difflex.evaluation import Evaluation
from difflex.evaluation.concepts.results import ConceptMatches, ConceptResult
from difflex.explore.dictionary import Feature, FeatureDictionary, Features
from difflex.explore.display import caption, heading, scrolled, table
from difflex.study import DictionaryRef
from difflex.tables import text_table

__all__ = ["ConceptTable", "Evaluations"]

PROBE = "a linear probe"


class _Column(NamedTuple):
    """A dictionary and the results of its concepts."""

    name: str
    dictionary: FeatureDictionary
    results: Mapping[str, ConceptResult]


@final
class ConceptTable:
    """How well single features of some dictionaries detect known concepts: average precision (AP) on held-out images.

    `table["star"]` are the best features for a concept, one of each dictionary, best first.
    """

    def __init__(self, matches: Mapping[FeatureDictionary, ConceptMatches]) -> None:
        """Hold the matches of dictionaries, at the noise level at which a linear probe finds the most concepts."""
        names = _short_names([dictionary.ref for dictionary in matches])
        self._columns = [
            _Column(name, dictionary, {result.concept.name: result for result in found.clearest_level.results})
            for name, (dictionary, found) in zip(names, matches.items(), strict=True)
        ]
        self.rare = tuple(dict.fromkeys(concept.name for found in matches.values() for concept in found.rare_concepts))
        """Concepts that were left out because too few images show them."""

    @property
    def concepts(self) -> dict[str, list[str]]:
        """The concepts by group: colours, shapes and the like."""
        groups: dict[str, list[str]] = {}
        for column in self._columns[:1]:
            for result in column.results.values():
                groups.setdefault(result.concept.group, []).append(result.concept.name)
        return groups

    def __getitem__(self, concept: str) -> Features:
        known = [column for column in self._columns if concept in column.results]
        if not known:
            names = [name for names in self.concepts.values() for name in names]
            raise UnknownName.among("The concept", concept, names, f"Too rare in these images: {', '.join(self.rare)}.")
        best = sorted(known, key=lambda column: -_ap(column.results[concept]))
        found = [
            Feature(column.dictionary, result.best.features[0], f"detects {concept}, AP {_ap(result):.2f}")
            for column in best
            for result in [column.results[concept]]
        ]
        return Features(found, f"'{concept}'")

    def _rows(self, groups: Mapping[str, Sequence[str]]) -> Iterator[list[float]]:
        """Yield for each of `groups` of concepts the mean AP of the best features by dictionary, and that of the probes."""
        for names in groups.values():
            results = [[column.results[name] for name in names] for column in self._columns]
            yield [mean(map(_ap, each)) for each in results] + [max(mean(map(_probe, each)) for each in results)]

    def _table(self, first: str, groups: Mapping[str, Sequence[str]]) -> str:
        head = [first, *(column.name for column in self._columns), f"{PROBE}, at the best site"]
        return _number_table(head, zip(groups, self._rows(groups), strict=True))

    def __repr__(self) -> str:
        head = ["mean AP", *(column.name for column in self._columns), PROBE]
        rows = [
            [group, *(f"{ap:.2f}" for ap in row)] for group, row in zip(self.concepts, self._rows(self.concepts), strict=True)
        ]
        return text_table([head, *rows], right_align=range(1, len(head)))

    def _repr_html_(self) -> str:
        single = {name: [name] for names in self.concepts.values() for name in names}
        rare = caption(f"Too rare in these images: {', '.join(self.rare)}.") if self.rare else ""
        return (
            heading("mean AP of the best feature of each concept", "by group; the highest in bold")
            + scrolled(self._table("", self.concepts))
            + f"<details><summary>{len(single)} concepts</summary>{scrolled(self._table('', single))}{rare}</details>"
        )


@final
class Evaluations(dict[str, Evaluation]):
    """Evaluations by the name of the dictionary."""

    def _columns(self) -> dict[str, Callable[[Evaluation], str]]:
        columns: dict[str, Callable[[Evaluation], str]] = {
            "features": lambda each: f"{each.size:,}",
            "per token (L0)": lambda each: f"{each.overall.l0:.1f}",
            "dead": lambda each: f"{each.dead_share:.1%}",
            "FVU": lambda each: f"{each.overall.model_space.fvu:.3f}",
        }
        if any(each.effect for each in self.values()):
            columns["prediction changed"] = lambda each: f"{each.effect.prediction.of_mean:.3f}" if each.effect else "-"
        return columns

    def _rows(self) -> list[list[str]]:
        return [[name, *(text(each) for text in self._columns().values())] for name, each in self.items()]

    def __repr__(self) -> str:
        head = ["", *self._columns()]
        return text_table([head, *self._rows()], right_align=range(1, len(head)))

    def _repr_html_(self) -> str:
        tokens, columns = max((each.tokens for each in self.values()), default=0), self._columns()
        kept = "Prediction changed: with reconstructed activations, 0 not at all, 1 as much as with their mean instead."
        return (
            heading("reconstruction", f"of {tokens:,} held-out tokens")
            + scrolled(table(("", *columns), self._rows()))
            + caption("FVU: fraction of variance unexplained, 0 is perfect. Dead features fired at none of these tokens.")
            + (caption(kept) if len(columns) > 4 else "")
        )


def _number_table(columns: Sequence[str], rows: Iterable[tuple[str, Sequence[float]]]) -> str:
    """Return a table of numbers, of which the highest in a row but for the last column is bold."""
    lines = ["".join(f'<th style="text-align:left">{escape(name)}</th>' for name in columns)]
    for name, values in rows:
        best = max(values[:-1], default=0.0)
        texts = [
            f"<b>{value:.2f}</b>" if value == best and i < len(values) - 1 else f"{value:.2f}" for i, value in enumerate(values)
        ]
        lines.append("".join(f'<td style="text-align:left">{text}</td>' for text in (escape(name), *texts)))
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _short_names(refs: Sequence[DictionaryRef]) -> list[str]:
    """Return the shortest names that tell dictionaries apart: their sites, sites and kinds, or their full names."""
    for name in (lambda ref: str(ref.site), lambda ref: f"{ref.site} {ref.label.partition('-')[0]}"):
        if len({*map(name, refs)}) == len(refs):
            return [*map(name, refs)]
    return [*map(str, refs)]


def _ap(result: ConceptResult) -> float:
    return result.best.ap.value


def _probe(result: ConceptResult) -> float:
    return result.probe.value
