"""Scores of explanations, and the comparison of dictionaries, backends and protocols by them."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import combinations, product
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from difflex.errors import BadInput
from difflex.features import Book
from difflex.features.explanations import Explanation, ExplanationScore, Judgement
from difflex.files import write_json
from difflex.tables import text_table

__all__ = [
    "ExplainedMethod",
    "MeanEstimate",
    "MethodComparison",
    "MethodDifference",
    "compare_methods",
    "estimate_mean",
    "read_methods",
]

DRAWS = 2000
"""Bootstrap resamples of an interval."""
SHUFFLES = 1000
"""Shuffles and resamples that are computed together."""
LEVEL = 0.95


class MeanEstimate(NamedTuple):
    """A mean with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float
    size: int
    """Number of values."""

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


def accuracy(is_own: Bool[Tensor, "*draw judgement"], scores: Float[Tensor, "*draw judgement"]) -> Float[Tensor, "*draw"]:
    """Return the mean of the score on the feature's own images and of 1 - score on others; 0.5 is chance."""
    return torch.where(is_own, scores, 1 - scores).mean(-1)


def auroc(is_own: Bool[Tensor, "*draw judgement"], scores: Float[Tensor, "*draw judgement"]) -> Float[Tensor, "*draw"]:
    """Return the share of pairs of an own and another image in which the own scores higher, ties by half; NaN without pairs."""
    higher = (scores[..., :, None] > scores[..., None, :]).float() + (scores[..., :, None] == scores[..., None, :]) / 2
    pairs = (is_own[..., :, None] & ~is_own[..., None, :]).float()
    return (higher * pairs).sum((-2, -1)) / pairs.sum((-2, -1))


def score_judgements(judgements: Sequence[Judgement], seed: int = 0) -> list[ExplanationScore]:
    """Return accuracy and AUROC of an explanation, with intervals by resampling own and other judgements separately."""
    is_own = torch.tensor([judgement.fires for judgement in judgements], dtype=torch.bool)
    scores = torch.tensor([judgement.score for judgement in judgements], dtype=torch.float64)
    if not is_own.any() or is_own.all():
        raise BadInput("An explanation needs judgements of the feature's own images and of others, and has only one kind.")
    generator = torch.Generator().manual_seed(seed)
    sides = [side.nonzero()[:, 0] for side in (is_own, ~is_own)]
    draws = torch.cat([side[torch.randint(len(side), (DRAWS, len(side)), generator=generator)] for side in sides], dim=1)
    measures: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"accuracy": accuracy, "auroc": auroc}
    return [
        ExplanationScore(name, float(measure(is_own, scores)), *_interval(measure(is_own[draws], scores[draws])), len(judgements))
        for name, measure in measures.items()
    ]


def estimate_mean(values: Sequence[float], seed: int = 0) -> MeanEstimate:
    """Return the mean of `values` with its bootstrap interval."""
    if not values:
        raise BadInput("There are no values to average. Explain at least one feature.")
    tensor, generator = torch.tensor(values, dtype=torch.float64), torch.Generator().manual_seed(seed)
    size = len(tensor)
    means = torch.cat(
        [tensor[torch.randint(size, (SHUFFLES, size), generator=generator)].mean(1) for _ in range(DRAWS // SHUFFLES)]
    )
    return MeanEstimate(float(tensor.mean()), *_interval(means), size)


def permutation_p_value(first: Sequence[float], second: Sequence[float], seed: int = 0, draws: int = 10_000) -> float:
    """Return how often shuffling values between two groups makes their means differ at least as much as they do.

    A two-sided permutation test, over all ways to form the groups if they are fewer than `draws`; never 0, because the observed
    groups count as one of the shuffles.
    """
    values, size = torch.tensor([*first, *second], dtype=torch.float64), len(first)
    if math.comb(len(values), size) <= draws:
        sums = [values[torch.tensor([*combinations(range(len(values)), size)])].sum(1)]  # the first are the observed groups
    else:
        generator, sums = torch.Generator().manual_seed(seed), [values[:size].sum()[None]]
        for start in range(0, draws, SHUFFLES):
            count = min(SHUFFLES, draws - start)
            shuffles = [torch.randperm(len(values), generator=generator)[:size] for _ in range(count)]
            sums.append(values[torch.stack(shuffles)].sum(1))
    totals = torch.cat(sums)
    differences = (totals / size - (values.sum() - totals) / len(second)).abs()
    return int((differences >= differences[0] - 1e-12).sum()) / len(totals)


def _interval(draws: Float[Tensor, " draw"]) -> tuple[float, float]:
    low, high = draws.quantile(torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=draws.dtype)).tolist()
    return low, high


COLOURS = (
    "black white grey gray red green blue yellow orange purple violet pink brown beige cyan turquoise magenta teal gold golden "
    "silver crimson maroon navy lime olive tan ivory cream dark light bright pale vivid dull deep saturated monochrome colourful "
    "colorful colour color colours colors coloured colored tone tones tint tints hue hues shade shades reddish greenish bluish "
    "yellowish"
)
POSITIONS = (
    "top bottom left right upper lower centre center central middle corner corners edge edges border borders side sides above "
    "below under over beside near next background foreground margin margins rim outer inner half quarter vertical horizontal "
    "row column"
)
STOP = (
    "a an the of in on at to with without and or by from for as is are was be being it its that this these those which their "
    "there area areas region regions part parts patch patches spot spots section sections place places highlighted highlight "
    "highlights picture pictures image images scene scenes mostly often usually some all any both each one two several various "
    "especially where along within across into"
)
SURFACE_WORDS, STOP_WORDS = frozenset(f"{COLOURS} {POSITIONS}".split()), frozenset(STOP.split())
Share = Literal["none", "some", "all"]


def surface_share(explanation: str) -> float:
    """Return the share of the content words that describe colour or position; 0 without content words."""
    words = [word for word in re.findall(r"[a-z]+", explanation.lower()) if word not in STOP_WORDS]
    return sum(word in SURFACE_WORDS for word in words) / max(1, len(words))


def group_by_surface(explanations: Sequence[str], accuracies: Sequence[float]) -> dict[Share, MeanEstimate]:
    """Return the accuracy of explanations by how many of their words describe colour or position, without empty groups."""
    groups: dict[Share, list[float]] = {"none": [], "some": [], "all": []}
    for text, value in zip(explanations, accuracies, strict=True):
        share = surface_share(text)
        groups["all" if share == 1 else "some" if share else "none"].append(value)
    return {share: estimate_mean(values) for share, values in groups.items() if values}


FORMAT = 2
BINS = 20
"""Bins of a histogram of accuracies from 0 to 1."""
BARS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True, kw_only=True)
class ExplainedMethod:
    """The explained features of one dictionary, by one backend and protocol."""

    study: Path
    """The folder of the study."""
    model: str
    """With `untrained-SEED` for random weights."""
    dictionary: str
    """`SITE/LABEL`."""
    backend: str
    protocol: str
    features: tuple[int, ...]
    explanations: tuple[str, ...]
    accuracies: tuple[float, ...]
    aurocs: tuple[float, ...]
    intruders: tuple[float, ...]
    """1 for each feature whose intruder was found, 0 for others; only features with an intruder test."""
    failed: int

    @property
    def name(self) -> str:
        """Study and dictionary, as shown in tables."""
        return f"{self.study.name}/{self.dictionary}"

    @cached_property
    def accuracy(self) -> MeanEstimate:
        """Mean over features."""
        return estimate_mean(self.accuracies)

    @property
    def intruder(self) -> MeanEstimate | None:
        """Share of features whose intruder was found; None without such tests."""
        return estimate_mean(self.intruders) if self.intruders else None

    @property
    def biases(self) -> dict[Share, MeanEstimate]:
        """Accuracy of explanations of which none, some or all words describe colour or position."""
        return group_by_surface(self.explanations, self.accuracies)


class MethodDifference(NamedTuple):
    """The difference between two methods."""

    first: ExplainedMethod
    second: ExplainedMethod
    difference: float
    """Of the mean accuracies."""
    p: float
    """By a permutation test, corrected by Holm for the number of pairs."""


class ProtocolGap(NamedTuple):
    """How accuracy falls, for the same features, when the judge's images are held out."""

    paper: ExplainedMethod
    heldout: ExplainedMethod
    fall: MeanEstimate


class MethodComparison(NamedTuple):
    """Methods and their differences."""

    methods: tuple[ExplainedMethod, ...]
    differences: tuple[MethodDifference, ...]
    """All pairs of the same backend and protocol."""
    falls: tuple[ProtocolGap, ...]
    """All dictionaries whose features were judged by both protocols."""

    @property
    def table(self) -> str:
        """A table of all methods for the terminal, then their differences."""
        columns = ("method", "backend", "protocol", "features", "failed", "accuracy", "AUROC", "intruder", "accuracy from 0 to 1")
        lines = [text_table([columns, *(_row(method) for method in self.methods)])]
        lines += [
            f"{first.name} against {second.name} ({first.protocol}): accuracy {difference:+.3f}, p {p:.2g}"
            for first, second, difference, p in self.differences
        ]
        lines += [
            f"{gap.paper.name}: accuracy falls by {gap.fall} when judged on held-out images and near misses" for gap in self.falls
        ]
        return "\n".join(lines)

    def save(self, path: Path) -> None:
        """Write everything to a JSON file."""
        number = {id(method): i for i, method in enumerate(self.methods)}
        differences = [
            pair._asdict() | {"first": number[id(pair.first)], "second": number[id(pair.second)]} for pair in self.differences
        ]
        falls = [
            {"paper": number[id(gap.paper)], "heldout": number[id(gap.heldout)], "fall": gap.fall._asdict()} for gap in self.falls
        ]
        methods = [_entries(method) for method in self.methods]
        write_json(path, FORMAT, {"methods": methods, "differences": differences, "falls": falls})


def compare_methods(methods: Sequence[ExplainedMethod]) -> MethodComparison:
    """Return the methods with their differences."""
    return MethodComparison(tuple(methods), tuple(_differences(methods)), tuple(_falls(methods)))


def read_methods(book: Book, study: Path) -> list[ExplainedMethod]:
    """Return the explained features in `book` by backend and protocol; `study` is the folder of its study."""
    groups: dict[tuple[str, str], list[Explanation]] = {}
    # In a fixed order: intervals and p-values must not depend on the order in which features were explained.
    for explanation in sorted(book.explanations(), key=lambda row: (row.backend, row.protocol, row.feature)):
        groups.setdefault((explanation.backend, explanation.protocol), []).append(explanation)
    revision, methods = book.about.revision, []
    for (backend, protocol), explanations in groups.items():
        done = [explanation for explanation in explanations if explanation.state == "done"]
        scores = [{score.measure: score.value for score in book.scores(explanation.id)} for explanation in done]
        method = ExplainedMethod(
            study=study.resolve(),
            model=f"{book.about.model}@{revision}" if revision else book.about.model,
            dictionary=book.about.dictionary,
            backend=backend,
            protocol=protocol,
            features=tuple(explanation.feature for explanation in done),
            explanations=tuple(explanation.text for explanation in done),
            accuracies=tuple(values["accuracy"] for values in scores),
            aurocs=tuple(values["auroc"] for values in scores),
            intruders=tuple(values["intruder"] for values in scores if "intruder" in values),
            failed=len(explanations) - len(done),
        )
        methods += [method] if done else []
    return methods


def _differences(methods: Sequence[ExplainedMethod]) -> list[MethodDifference]:
    pairs = [
        (first, second)
        for first, second in combinations(methods, 2)
        if (first.backend, first.protocol) == (second.backend, second.protocol)
    ]
    p_values = _holm([permutation_p_value(first.accuracies, second.accuracies) for first, second in pairs])
    return [
        MethodDifference(first, second, first.accuracy.value - second.accuracy.value, p)
        for (first, second), p in zip(pairs, p_values, strict=True)
    ]


def _holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for the chance of any false positive among them (Holm 1979)."""
    corrected, lowest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        lowest = max(lowest, min(1.0, p_values[i] * (len(p_values) - rank)))
        corrected[i] = lowest
    return corrected


def _falls(methods: Sequence[ExplainedMethod]) -> list[ProtocolGap]:
    """Return the gap between protocols of the same settings for each dictionary that both judged, over shared features."""
    gaps = []
    for paper, heldout in product(methods, methods):
        same = (paper.study, paper.dictionary, paper.backend) == (heldout.study, heldout.dictionary, heldout.backend)
        names = [method.protocol.partition(" ") for method in (paper, heldout)]
        if same and [name for name, *_ in names] == ["paper", "heldout"] and names[0][2] == names[1][2]:
            before = dict(zip(paper.features, paper.accuracies, strict=True))
            after = dict(zip(heldout.features, heldout.accuracies, strict=True))
            falls = [before[feature] - after[feature] for feature in before if feature in after]
            gaps += [ProtocolGap(paper, heldout, estimate_mean(falls))] if falls else []
    return gaps


def _histogram(accuracies: Iterable[float]) -> list[int]:
    """Count accuracies in `BINS` equal bins from 0 to 1; 1 itself is in the last."""
    counts = Counter(min(BINS - 1, int(value * BINS + 1e-9)) for value in accuracies)
    return [counts[i] for i in range(BINS)]


def _row(method: ExplainedMethod) -> tuple[str, ...]:
    counts = _histogram(method.accuracies)
    bars = "".join(BARS[-(-count * (len(BARS) - 1) // max(counts))] for count in counts)
    numbers = (len(method.features), method.failed, method.accuracy, estimate_mean(method.aurocs), method.intruder or "-")
    return (method.name, method.backend, method.protocol, *map(str, numbers), f"|{bars}|")


def _entries(method: ExplainedMethod) -> dict[str, object]:
    return asdict(method) | {
        "study": method.study.name,
        "accuracy": method.accuracy._asdict(),
        "auroc": estimate_mean(method.aurocs)._asdict(),
        "intruder": method.intruder and method.intruder._asdict(),
        "histogram": _histogram(method.accuracies),
        "biases": [{"surface": share, **mean._asdict()} for share, mean in method.biases.items()],
    }
