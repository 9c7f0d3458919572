"""Scores of explanations, and methods compared by them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from difflex.errors import BadInput
from difflex.features import Book
from difflex.features.explanations import ExplanationScore, Judgement
from difflex.files import write_json

DRAWS = 2000
LEVEL = 0.95


class MeanEstimate(NamedTuple):
    """A mean, and where 95 % of the means lie when what it is of is drawn again."""

    value: float
    low: float
    high: float
    of: int
    """How many values."""


def accuracy(wanted: Bool[Tensor, "*draw judgement"], scores: Float[Tensor, "*draw judgement"]) -> Float[Tensor, "*draw"]:
    """The mean of the score where the feature's own images are judged, of 1 - score where others are: 0.5 is chance."""
    return torch.where(wanted, scores, 1 - scores).mean(-1)


def auroc(wanted: Bool[Tensor, "*draw judgement"], scores: Float[Tensor, "*draw judgement"]) -> Float[Tensor, "*draw"]:
    """The share of pairs of an own and another image in which the own scores higher, equal ones by half; NaN without pairs."""
    higher = (scores[..., :, None] > scores[..., None, :]).float() + (scores[..., :, None] == scores[..., None, :]) / 2
    pairs = (wanted[..., :, None] & ~wanted[..., None, :]).float()
    return (higher * pairs).sum((-2, -1)) / pairs.sum((-2, -1))


def scores(judgements: Sequence[Judgement], seed: int = 0) -> list[ExplanationScore]:
    """Accuracy and AUROC of one explanation; intervals from judgements drawn again, own and other ones each among themselves."""
    wanted = torch.tensor([each.fires for each in judgements], dtype=torch.bool)
    given = torch.tensor([each.score for each in judgements], dtype=torch.float64)
    if not wanted.any() or wanted.all():
        raise BadInput("An explanation was scored on images of one side alone. Judge some of the feature and some of others.")
    generator = torch.Generator().manual_seed(seed)
    sides = [side.nonzero()[:, 0] for side in (wanted, ~wanted)]
    drawn = torch.cat([side[torch.randint(len(side), (DRAWS, len(side)), generator=generator)] for side in sides], dim=1)
    measures: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"accuracy": accuracy, "auroc": auroc}
    found = []
    for name, measure in measures.items():
        low, high = _bounds(measure(wanted[drawn], given[drawn]))
        found.append(ExplanationScore(name, float(measure(wanted, given)), low, high, len(judgements)))
    return found


def estimate(values: Sequence[float], seed: int = 0) -> MeanEstimate:
    """The mean of `values`; its interval from values drawn again."""
    if not values:
        raise BadInput("A mean was asked of no values. Explain at least one feature.")
    each = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    means = torch.stack([each[torch.randint(len(each), (len(each),), generator=generator)].mean() for _ in range(DRAWS)])
    return MeanEstimate(float(each.mean()), *_bounds(means), len(values))


def p_value(one: Sequence[float], other: Sequence[float], seed: int = 0, draws: int = 10_000) -> float:
    """How often the means differ as much as those of `one` and `other` when values are shuffled between the two.

    A permutation test of two sides; never 0, as what was found is one of the shuffles.
    """
    values = torch.tensor([*one, *other], dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    shuffles = (torch.randperm(len(values), generator=generator)[: len(one)] for _ in range(draws))
    sums = torch.stack([values[: len(one)].sum(), *(values[shuffle].sum() for shuffle in shuffles)])
    differences = (sums / len(one) - (values.sum() - sums) / len(other)).abs()
    return int((differences >= differences[0] - 1e-12).sum()) / (1 + draws)


def _bounds(draws: Float[Tensor, " draw"]) -> tuple[float, float]:
    low, high = draws.quantile(torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=draws.dtype)).tolist()
    return low, high


COLOURS = (
    "black white grey gray red green blue yellow orange purple violet pink brown beige cyan turquoise magenta teal gold golden "
    "silver crimson maroon navy lime olive tan ivory cream dark light bright pale vivid dull deep saturated monochrome colourful "
    "colorful colour color colours colors coloured colored tone tones tint tints hue hues shade shades reddish greenish bluish "
    "yellowish"
)
PLACES = (
    "top bottom left right upper lower centre center central middle corner corners edge edges border borders side sides above "
    "below under over beside near next background foreground margin margins rim outer inner half quarter vertical horizontal "
    "row column"
)
EMPTY = (
    "a an the of in on at to with without and or by from for as is are was be being it its that this these those which their "
    "there area areas region regions part parts patch patches spot spots section sections place places highlighted highlight "
    "highlights picture pictures image images scene scenes mostly often usually some all any both each one two several various "
    "especially where along within across into"
)
SURFACE, NOTHING = frozenset(f"{COLOURS} {PLACES}".split()), frozenset(EMPTY.split())
Share = Literal["none", "some", "all"]


class BiasGroup(NamedTuple):
    """Explanations of which none, some or all words speak of colour or place."""

    surface: Share
    accuracy: MeanEstimate


def surface(explanation: str) -> float:
    """The share of the words that mean something which speak of colour or place; 0 where none means anything."""
    words = [word for word in re.findall(r"[a-z]+", explanation.lower()) if word not in NOTHING]
    return sum(word in SURFACE for word in words) / max(1, len(words))


def biases(explanations: Sequence[str], accuracies: Sequence[float]) -> list[BiasGroup]:
    """The accuracy of explanations by how much of them is only colour or place; kinds that do not occur are left out."""
    kinds: dict[Share, list[float]] = {"none": [], "some": [], "all": []}
    for text, accuracy in zip(explanations, accuracies, strict=True):
        share = surface(text)
        kinds["all" if share == 1 else "some" if share else "none"].append(accuracy)
    return [BiasGroup(kind, estimate(values)) for kind, values in kinds.items() if values]


FORMAT = 1
BINS = 20
"""Of a histogram of accuracies from 0 to 1."""
BARS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True, kw_only=True)
class ExplainedMethod:
    """The explained features of one dictionary, by one backend and protocol."""

    study: Path
    """Its folder; two of one name are two."""
    model: str
    """With `untrained-SEED` where its weights are random."""
    dictionary: str
    """`SITE/LABEL`."""
    backend: str
    protocol: str
    features: tuple[int, ...]
    explanations: tuple[str, ...]
    accuracies: tuple[float, ...]
    aurocs: tuple[float, ...]
    intruders: tuple[float, ...]
    """1 where the image that does not belong was found, 0 where not; of the features that have such a test."""
    failed: int

    @property
    def name(self) -> str:
        """As told to people."""
        return f"{self.study.name}/{self.dictionary}"

    @cached_property
    def accuracy(self) -> MeanEstimate:
        """Mean over features."""
        return estimate(self.accuracies)

    @cached_property
    def auroc(self) -> MeanEstimate:
        """Mean over features."""
        return estimate(self.aurocs)

    @cached_property
    def intruder(self) -> MeanEstimate | None:
        """The share of strangers that were found; None where none was looked for."""
        return estimate(self.intruders) if self.intruders else None

    @cached_property
    def biases(self) -> list[BiasGroup]:
        """Its accuracy by how much of an explanation is only colour or place."""
        return biases(self.explanations, self.accuracies)


class MethodDifference(NamedTuple):
    """Two methods held against one another."""

    one: ExplainedMethod
    other: ExplainedMethod
    difference: float
    """Of the mean accuracies."""
    p: float
    """By a permutation test, corrected by Holm for how many pairs are compared."""


class ProtocolGap(NamedTuple):
    """How accuracy falls, for the same features, when the judge's images are held out."""

    paper: ExplainedMethod
    heldout: ExplainedMethod
    fall: MeanEstimate


class MethodComparison(NamedTuple):
    """Methods, and all that follows from them."""

    methods: tuple[ExplainedMethod, ...]
    differences: tuple[MethodDifference, ...]
    """All pairs of one backend and protocol."""
    falls: tuple[ProtocolGap, ...]
    """All dictionaries whose features were judged by both protocols."""

    @property
    def table(self) -> str:
        """All methods in figures for a terminal, then what can be compared."""
        columns = ("method", "backend", "protocol", "features", "failed", "accuracy", "AUROC", "intruder", "accuracy from 0 to 1")
        rows = [columns, *(_row(method) for method in self.methods)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines += [
            f"{each.one.name} against {each.other.name} ({each.one.protocol}): accuracy {each.difference:+.3f}, p {each.p:.2g}"
            for each in self.differences
        ]
        lines += [
            f"{each.paper.name}: accuracy falls by {_told(each.fall)} when judged on held-out images and near misses"
            for each in self.falls
        ]
        return "\n".join(lines)

    def save(self, path: Path) -> None:
        """Write everything to the JSON file `path`, atomically."""
        number = {id(method): i for i, method in enumerate(self.methods)}
        told = {
            "methods": [_entry(method) for method in self.methods],
            "differences": [
                {"one": number[id(each.one)], "other": number[id(each.other)], "difference": each.difference, "p": each.p}
                for each in self.differences
            ],
            "falls": [
                {"paper": number[id(each.paper)], "heldout": number[id(each.heldout)], "fall": each.fall._asdict()}
                for each in self.falls
            ],
        }
        write_json(path, FORMAT, told)


def compare(found: Sequence[ExplainedMethod]) -> MethodComparison:
    """All that follows from these methods."""
    return MethodComparison(tuple(found), tuple(_differences(found)), tuple(_falls(found)))


def methods(book: Book, study: Path) -> list[ExplainedMethod]:
    """What `book`, of the study in the folder `study`, knows of each backend and protocol by which features were explained."""
    grouped: dict[tuple[str, str], list] = {}
    for each in book.explanations():
        grouped.setdefault((each.backend, each.protocol), []).append(each)
    found = []
    for (backend, protocol), explanations in grouped.items():
        done = [each for each in explanations if each.state == "done"]
        figures = [{score.measure: score.value for score in book.scores(each.id)} for each in done]
        revision = book.about.revision
        method = ExplainedMethod(
            study=study.resolve(),
            model=f"{book.about.model}@{revision}" if revision else book.about.model,
            dictionary=book.about.dictionary,
            backend=backend,
            protocol=protocol,
            features=tuple(each.feature for each in done),
            explanations=tuple(each.text for each in done),
            accuracies=tuple(each["accuracy"] for each in figures),
            aurocs=tuple(each["auroc"] for each in figures),
            intruders=tuple(each["intruder"] for each in figures if "intruder" in each),
            failed=len(explanations) - len(done),
        )
        found += [method] if done else []
    return found


def _differences(found: Sequence[ExplainedMethod]) -> list[MethodDifference]:
    """All pairs of methods of one backend and protocol."""
    pairs = [
        (one, other) for one, other in combinations(found, 2) if (one.backend, one.protocol) == (other.backend, other.protocol)
    ]
    values = [p_value(one.accuracies, other.accuracies) for one, other in pairs]
    return [
        MethodDifference(one, other, one.accuracy.value - other.accuracy.value, p)
        for (one, other), p in zip(pairs, _holm(values), strict=True)
    ]


def _holm(values: Sequence[float]) -> list[float]:
    """p-values, corrected so that the chance of any false finding among them is kept (Holm 1979)."""
    corrected, least = [0.0] * len(values), 0.0
    for rank, place in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        least = max(least, min(1.0, values[place] * (len(values) - rank)))
        corrected[place] = least
    return corrected


def _falls(found: Sequence[ExplainedMethod]) -> list[ProtocolGap]:
    """Dictionaries whose features were judged by both protocols, of those features alone."""
    made = []
    for paper, heldout in ((one, other) for one in found for other in found):
        same = (paper.study, paper.dictionary, paper.backend) == (heldout.study, heldout.dictionary, heldout.backend)
        if same and paper.protocol.startswith("paper") and heldout.protocol.startswith("heldout"):
            before = dict(zip(paper.features, paper.accuracies, strict=True))
            after = dict(zip(heldout.features, heldout.accuracies, strict=True))
            fallen = [before[feature] - after[feature] for feature in before if feature in after]
            made += [ProtocolGap(paper, heldout, estimate(fallen))] if fallen else []
    return made


def _histogram(accuracies: Iterable[float]) -> list[int]:
    """How many accuracies lie in each of `BINS` equal parts of 0 to 1; 1 itself is in the last."""
    counts = [0] * BINS
    for accuracy in accuracies:
        counts[min(BINS - 1, int(accuracy * BINS + 1e-9))] += 1
    return counts


def _row(method: ExplainedMethod) -> tuple[str, ...]:
    counts = _histogram(method.accuracies)
    bars = "".join(BARS[-(-count * (len(BARS) - 1) // max(counts))] for count in counts)
    figures = [_told(method.accuracy), _told(method.auroc), _told(method.intruder) if method.intruder else "-"]
    return (method.name, method.backend, method.protocol, str(len(method.features)), str(method.failed), *figures, f"|{bars}|")


def _told(each: MeanEstimate) -> str:
    return f"{each.value:.3f} ({each.low:.3f} to {each.high:.3f})"


def _entry(method: ExplainedMethod) -> dict[str, object]:
    return asdict(method) | {
        "study": method.study.name,
        "accuracy": method.accuracy._asdict(),
        "auroc": method.auroc._asdict(),
        "intruder": method.intruder and method.intruder._asdict(),
        "histogram": _histogram(method.accuracies),
        "biases": [{"surface": each.surface, **each.accuracy._asdict()} for each in method.biases],
    }
