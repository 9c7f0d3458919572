"""What two studies have in common and what not: pure, from the facts of both."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from difflex.errors import BadInput
from difflex.evaluation import Evaluation
from difflex.evaluation.concepts import ConfidenceInterval, NoiseLevelResult
from difflex.report.facts import DictionaryFacts, MatchFacts, StudyFacts
from difflex.report.figures.concepts import mean_ap
from difflex.report.table import TableColumn, columns
from difflex.study import CommandRecord
from difflex.study.run import Json

__all__ = ["DetectionPair", "DictionaryPair", "MetricPair", "SettingDifference", "StudyComparison", "compare"]


class SettingDifference(NamedTuple):
    """Something that was asked of the two studies, or is said of them, differently."""

    verb: str
    """The command; `study` for what is true of all of it."""
    what: str
    """The flag, or nothing where one study has the whole command and the other has not."""
    one: str
    other: str


class DictionaryPair(NamedTuple):
    """A dictionary that both studies have."""

    one: DictionaryFacts
    other: DictionaryFacts

    @property
    def name(self) -> str:
        """`SITE/LABEL`."""
        return self.one.name

    @property
    def notes(self) -> list[str]:
        """Why its figures may not be set against each other without a second thought."""
        found = []
        if self.one.normalisation != self.other.normalisation:
            found.append(f"{self.one.normalisation} against {self.other.normalisation}")
        if self.one.data != self.other.data:
            found.append("made from other data")
        if self.evaluations and self.evaluations[0].data != self.evaluations[1].data:
            found.append("measured on other data")
        return found

    @property
    def evaluations(self) -> tuple[Evaluation, Evaluation] | None:
        """Those of both; None where one has none that holds."""
        one, other = self.one.evaluation, self.other.evaluation
        return None if one is None or other is None else (one, other)


class MetricPair(NamedTuple):
    """A figure of a dictionary in both studies."""

    pair: DictionaryPair
    column: TableColumn
    one: float | None
    other: float | None

    @property
    def difference(self) -> float | None:
        """The second less the first; None where either is missing."""
        return None if self.one is None or self.other is None else self.other - self.one


class DetectionPair(NamedTuple):
    """What one method's features detect in both studies."""

    one: MatchFacts
    other: MatchFacts

    @property
    def name(self) -> str:
        """`SITE/LABEL`."""
        return f"{self.one.matches.site}/{self.one.matches.label}"

    @property
    def levels(self) -> tuple[NoiseLevelResult, NoiseLevelResult]:
        """All levels of noise together, in both."""
        return self.one.matches.levels[0], self.other.matches.levels[0]

    @property
    def coverage(self) -> ConfidenceInterval:
        """The difference of coverage; its interval as if other images had been drawn for each."""
        one, other = (level.coverage for level in self.levels)
        value = other.value - one.value
        low = math.hypot(one.high - one.value, other.value - other.low)
        high = math.hypot(one.value - one.low, other.high - other.value)
        return ConfidenceInterval(value, value - low, value + high)

    @property
    def alike(self) -> bool:
        """Whether both were held against the same images in the same way."""
        left_out = ("fingerprint", "revision", "model")
        one, other = ({k: v for k, v in each.matches.made_from.items() if k not in left_out} for each in (self.one, self.other))
        return one == other

    @property
    def groups(self) -> dict[str, tuple[float, float]]:
        """By group of concepts that both know: the mean AP of the best features."""
        one, other = self.levels
        names = dict.fromkeys(finding.concept.group for finding in one.findings)
        found = {name: (mean_ap(one.of(name)), mean_ap(other.of(name))) for name in names}
        return {name: (a, b) for name, (a, b) in found.items() if a is not None and b is not None}


@dataclass(frozen=True, kw_only=True)
class StudyComparison:
    """Two studies side by side."""

    one: StudyFacts
    other: StudyFacts
    names: tuple[str, str]
    """What they are called: as little of their paths as tells them apart."""
    asked: tuple[SettingDifference, ...]
    pairs: tuple[DictionaryPair, ...]
    only: tuple[tuple[DictionaryFacts, ...], tuple[DictionaryFacts, ...]]
    """The dictionaries that only the first, and only the second, has."""
    detected: tuple[DetectionPair, ...]

    @property
    def figured(self) -> list[MetricPair]:
        """Every figure of every dictionary that both have evaluated."""
        told = [(pair, both) for pair in self.pairs if (both := pair.evaluations) is not None]
        wanted = columns(evaluation for _, both in told for evaluation in both)
        return [MetricPair(pair, column, column.of(one), column.of(other)) for pair, (one, other) in told for column in wanted]

    @property
    def troubles(self) -> list[str]:
        """What cannot be compared, and why."""
        found = [
            f"{name}: {said}" for name, facts in zip(self.names, (self.one, self.other), strict=True) for said in facts.troubles
        ]
        for pair in self.pairs:
            lacking = [name for name, each in zip(self.names, pair, strict=True) if each.evaluation is None]
            if lacking:
                found.append(f"{pair.name}: no evaluation that holds in {' and '.join(lacking)}. difflex evaluate makes it.")
        noted: dict[str, list[str]] = {}
        for pair in self.pairs:
            for note in pair.notes:
                noted.setdefault(note, []).append(pair.name)
        noted["held against other images, or in another way"] = [each.name for each in self.detected if not each.alike]
        return [*found, *(f"{note.capitalize()}: {', '.join(names)}." for note, names in noted.items() if names)]


def compare(one: StudyFacts, other: StudyFacts) -> StudyComparison:
    """The two studies side by side; the same one twice is an error."""
    folders = [facts.study.folder.resolve() for facts in (one, other)]
    if folders[0] == folders[1]:
        raise BadInput(f"{one.study.folder} and {other.study.folder} are the same study. Name two.")
    mine, theirs = ({measured.name: measured for measured in facts.dictionaries} for facts in (one, other))
    found, there = ({_method(judged): judged for judged in facts.judged} for facts in (one, other))
    depth = next(d for d in range(1, 99) if folders[0].parts[-d:] != folders[1].parts[-d:])
    return StudyComparison(
        one=one,
        other=other,
        names=("/".join(folders[0].parts[-depth:]), "/".join(folders[1].parts[-depth:])),
        asked=(*_said(one, other), *_commands(one.diary, other.diary)),
        pairs=tuple(DictionaryPair(mine[name], theirs[name]) for name in mine if name in theirs),
        only=(_without(mine.values(), theirs), _without(theirs.values(), mine)),
        detected=tuple(DetectionPair(found[name], there[name]) for name in found if name in there),
    )


def _method(judged: MatchFacts) -> tuple[str, str]:
    return str(judged.matches.site), judged.name


def _without(measured: Iterable[DictionaryFacts], names: Iterable[str]) -> tuple[DictionaryFacts, ...]:
    there = set(names)
    return tuple(each for each in measured if each.name not in there)


def _said(one: StudyFacts, other: StudyFacts) -> list[SettingDifference]:
    """What is true of the whole studies and differs."""
    told = {
        "model": (one.study.model, other.study.model),
        "revision": (one.study.revision, other.study.revision),
        "difflex": (one.study.difflex, other.study.difflex),
        "recipe": (one.recipe, other.recipe),
    }
    return [SettingDifference("study", name, _text(a), _text(b)) for name, (a, b) in told.items() if a != b]


def _commands(one: Sequence[CommandRecord], other: Sequence[CommandRecord]) -> list[SettingDifference]:
    """Commands that only one study has, and those of one verb that differ in their flags, in the order they were given."""
    same = [(entry.verb, entry.flags) for entry in one if any((entry.verb, entry.flags) == (e.verb, e.flags) for e in other)]
    mine, theirs = ([entry for entry in each if (entry.verb, entry.flags) not in same] for each in (one, other))
    found = []
    for entry in mine:
        twin = next((each for each in theirs if each.verb == entry.verb), None)
        if twin is None:
            found.append(SettingDifference(entry.verb, "", _flags(entry), ""))
            continue
        theirs.remove(twin)
        names = dict.fromkeys([*entry.flags, *twin.flags])
        found += [
            SettingDifference(entry.verb, name, _text(entry.flags.get(name)), _text(twin.flags.get(name)))
            for name in names
            if entry.flags.get(name) != twin.flags.get(name)
        ]
    return [*found, *(SettingDifference(entry.verb, "", "", _flags(entry)) for entry in theirs)]


def _flags(entry: CommandRecord) -> str:
    return " ".join(f"{name}={_text(value)}" for name, value in entry.flags.items() if value not in (None, False, [], {}))


def _text(value: Json) -> str:
    """A value of a flag, or of a study, in words."""
    return "not given" if value is None else ",".join(map(str, value)) if isinstance(value, list) else str(value)
