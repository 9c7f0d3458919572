"""What two studies have in common and how they differ, from the facts of both."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from difflex.errors import BadInput
from difflex.evaluation import Evaluation
from difflex.evaluation.concepts.results import ConfidenceInterval, NoiseLevelResult
from difflex.report.facts import DictionaryFacts, MatchFacts, StudyFacts, group_by
from difflex.report.figures.concepts import mean_ap
from difflex.report.figures.dictionaries import TableColumn, metric_columns
from difflex.study import CommandRecord

SettingDifference = tuple[str, str, str, str]
"""A command (`study` for the whole study), its flag (empty if only one study has the command), and the values in both studies."""


class DictionaryPair(NamedTuple):
    """A dictionary that both studies have."""

    first: DictionaryFacts
    second: DictionaryFacts

    @property
    def name(self) -> str:
        """`SITE/LABEL`."""
        return self.first.name

    @property
    def warnings(self) -> list[str]:
        """Why its metrics compare only with care."""
        both, warnings = self.evaluations, []
        if self.first.normalisation != self.second.normalisation:
            warnings.append(f"{self.first.normalisation} against {self.second.normalisation}")
        if self.first.data != self.second.data:
            warnings.append("trained on different data")
        if both and both[0].data != both[1].data:
            warnings.append("evaluated on different data")
        return warnings

    @property
    def evaluations(self) -> tuple[Evaluation, Evaluation] | None:
        """The evaluations of both; None where one is missing."""
        first, second = self.first.evaluation, self.second.evaluation
        return None if first is None or second is None else (first, second)


class MetricPair(NamedTuple):
    """A metric of a dictionary in both studies; None where it was not measured."""

    dictionary: str
    column: TableColumn
    first: float | None
    second: float | None

    @property
    def difference(self) -> float | None:
        """The second less the first; None where either is missing."""
        return None if self.first is None or self.second is None else self.second - self.first


class DetectionPair(NamedTuple):
    """What the features of one method detect in both studies."""

    first: MatchFacts
    second: MatchFacts

    @property
    def name(self) -> str:
        """`SITE/LABEL`."""
        return f"{self.first.matches.site}/{self.first.matches.label}"

    @property
    def levels(self) -> tuple[NoiseLevelResult, NoiseLevelResult]:
        """The results over all noise levels together, in both."""
        return self.first.overall, self.second.overall

    @property
    def coverage(self) -> ConfidenceInterval:
        """The difference of coverage; its interval takes the two for independent."""
        first, second = (level.coverage for level in self.levels)
        value = second.value - first.value
        low = math.hypot(first.high - first.value, second.value - second.low)
        high = math.hypot(first.value - first.low, second.high - second.value)
        return ConfidenceInterval(value, value - low, value + high)

    @property
    def groups(self) -> dict[str, tuple[float, float]]:
        """The mean AP of the best features by group of concepts that both have."""
        first, second = self.levels
        names = dict.fromkeys(result.concept.group for result in first.results)
        means = {name: (mean_ap(first.of(name)), mean_ap(second.of(name))) for name in names}
        return {name: (a, b) for name, (a, b) in means.items() if a is not None and b is not None}


@dataclass(frozen=True, kw_only=True)
class StudyComparison:
    """Two studies compared."""

    first: StudyFacts
    second: StudyFacts
    names: tuple[str, str]
    """The ends of their paths, as short as they differ."""
    settings: tuple[SettingDifference, ...]
    pairs: tuple[DictionaryPair, ...]
    only: tuple[list[DictionaryFacts], list[DictionaryFacts]]
    """The dictionaries that only the first, and only the second, has."""
    detections: tuple[DetectionPair, ...]

    @property
    def metrics(self) -> list[MetricPair]:
        """Every metric of every dictionary that one of them has evaluated, those of both first."""
        ours, theirs = ({d.name: d.metrics for d in facts.evaluated} for facts in (self.first, self.second))
        names = sorted({**ours, **theirs}, key=lambda name: not (name in ours and name in theirs))
        columns = metric_columns([*ours.values(), *theirs.values()])
        both = [(name, ours.get(name), theirs.get(name)) for name in names]
        return [
            MetricPair(name, c, first and c.value(first), second and c.value(second))
            for name, first, second in both
            for c in columns
        ]

    @property
    def problems(self) -> list[str]:
        """What cannot be compared, or only with care, and why."""
        studies = zip(self.names, (self.first, self.second), strict=True)
        problems = [f"{name}: {problem}" for name, facts in studies for problem in facts.problems]
        for pair in self.pairs:
            lacking = [name for name, facts in zip(self.names, pair, strict=True) if facts.evaluation is None]
            if lacking:
                problems.append(f"{pair.name}: no valid evaluation in {' and '.join(lacking)}. Run difflex evaluate.")
        warnings = [(warning, pair.name) for pair in self.pairs for warning in pair.warnings]
        images = "concepts measured on different images, or in different ways"
        models = [facts.study.model for facts in (self.first, self.second)]
        if models[0] != models[1]:
            problems.append(f"{models[0]} and {models[1]} are two models: a site of one name need not be the same place in both.")
        ours, theirs = ({match.settings for match in facts.matches} for facts in (self.first, self.second))
        if ours and theirs and ours != theirs:
            problems.append("The concepts of the two studies were not measured with the same images and noise levels everywhere.")
        warnings += [(images, pair.name) for pair in self.detections if pair.first.settings != pair.second.settings]
        by_text = group_by(warnings, lambda warning: warning[0]).items()
        return [*problems, *(f"{text.capitalize()}: {', '.join(name for _, name in own)}." for text, own in by_text)]


def compare(first: StudyFacts, second: StudyFacts) -> StudyComparison:
    """Compare two studies; the same one twice is an error."""
    folders = [facts.study.folder.resolve() for facts in (first, second)]
    if folders[0] == folders[1]:
        raise BadInput(f"{first.study.folder} and {second.study.folder} are the same study. Name two different ones.")
    ours, theirs = ({d.name: d for d in facts.dictionaries} for facts in (first, second))
    matches, others = ({(str(m.matches.site), m.name): m for m in facts.matches} for facts in (first, second))
    depth = next(d for d in range(1, 99) if folders[0].parts[-d:] != folders[1].parts[-d:])
    return StudyComparison(
        first=first,
        second=second,
        names=("/".join(folders[0].parts[-depth:]), "/".join(folders[1].parts[-depth:])),
        settings=(*_study_settings(first, second), *_command_settings(first.log, second.log)),
        pairs=tuple(DictionaryPair(ours[name], theirs[name]) for name in ours if name in theirs),
        only=([ours[name] for name in ours if name not in theirs], [theirs[name] for name in theirs if name not in ours]),
        detections=tuple(DetectionPair(matches[name], others[name]) for name in matches if name in others),
    )


def _study_settings(first: StudyFacts, second: StudyFacts) -> list[SettingDifference]:
    recipes = [facts.recipe and " ".join(facts.recipe.settings) for facts in (first, second)]
    values = {
        "model": (first.study.model, second.study.model),
        "revision": (first.study.revision, second.study.revision),
        "difflex": (first.study.difflex, second.study.difflex),
        "recipe": (recipes[0], recipes[1]),
    }
    return [("study", name, _text(a), _text(b)) for name, (a, b) in values.items() if a != b]


def _command_settings(first: Sequence[CommandRecord], second: Sequence[CommandRecord]) -> list[SettingDifference]:
    """Return the commands that only one study has, and the flags that differ in commands of one verb, in their order."""
    same = [(entry.verb, entry.flags) for entry in first if any((entry.verb, entry.flags) == (e.verb, e.flags) for e in second)]
    ours, theirs = ([entry for entry in log if (entry.verb, entry.flags) not in same] for log in (first, second))
    differences: list[SettingDifference] = []
    for entry in ours:
        twin = next((other for other in theirs if other.verb == entry.verb), None)
        if twin is None:
            differences.append((entry.verb, "", " ".join(entry.settings), ""))
            continue
        theirs.remove(twin)
        differences += [
            (entry.verb, name, _text(entry.flags.get(name)), _text(twin.flags.get(name)))
            for name in dict.fromkeys([*entry.flags, *twin.flags])
            if entry.flags.get(name) != twin.flags.get(name)
        ]
    return [*differences, *((entry.verb, "", "", " ".join(entry.settings)) for entry in theirs)]


def _text(value: object) -> str:
    return "not set" if value is None else ",".join(map(str, value)) if isinstance(value, list) else str(value)
