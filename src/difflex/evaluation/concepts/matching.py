"""Match the features of dictionaries and baselines to concepts; a linear probe on the same activations is the ceiling."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import NamedTuple, final

import torch
from jaxtyping import Bool, Float, Int, Int8
from torch import Tensor
from torch.nn import functional as F

from difflex.dictionaries import Dictionary
from difflex.errors import BadInput
from difflex.evaluation.concepts.detection import (
    DetectionScores,
    FeatureFirings,
    FiringRecorder,
    above_chance,
    absorbing_features,
    average_precision,
    combine_features,
    detection_scores,
    relative_strengths,
    split_features,
    unrelated_concepts,
)
from difflex.evaluation.concepts.labels import LabelledSource, TokenLabels
from difflex.evaluation.concepts.probe import LinearProbe, probe_tokens
from difflex.evaluation.concepts.results import (
    DETECTED,
    FINDABLE,
    ConceptDetector,
    ConceptMatches,
    ConceptResult,
    ConfidenceInterval,
    FeatureMatches,
    MatchingConfig,
    NoiseLevelResult,
)
from difflex.records import Codes, Site

CHUNK = 8192
"""Tokens encoded at once."""
METHOD_BYTES = 6 * 2**30
"""Memory of the methods that activations are harvested again for together."""
NONE = torch.zeros(0, dtype=torch.int64)
AXES_AT_ONCE = 4096
"""Axes whose variances are computed at once."""


@dataclass(frozen=True, kw_only=True)
class FeatureMethod:
    """A dictionary, or a baseline that encodes activations as sparsely."""

    site: Site
    label: str
    """`<kind>-<size>-k<k>`, as for dictionaries."""
    size: int
    encode: Callable[[Float[Tensor, "token width"]], Codes]

    @classmethod
    def of(cls, dictionary: Dictionary) -> FeatureMethod:
        """Return `dictionary` as a method, which runs where the activations are; a feature fires where its code is positive."""
        encode = lambda x: dictionary.on(x.device).encode(x)  # noqa: E731
        return cls(site=dictionary.site, label=dictionary.label, size=dictionary.size, encode=encode)


def principal_axes(source: LabelledSource, k: int) -> FeatureMethod:
    """Return the principal axes of the training tokens, with one feature for each direction of an axis."""
    directions = torch.linalg.eigh(source.moments.covariance).eigenvectors.flip(1).T
    return _axes(source, "pca", directions.float(), k)


def random_directions(source: LabelledSource, size: int, k: int, seed: int = 0) -> FeatureMethod:
    """Return `size` untrained features: both directions of `size / 2` random axes."""
    axes = torch.randn(size // 2, source.width, generator=torch.Generator().manual_seed(seed))
    return _axes(source, "random", F.normalize(axes, dim=1), k)


def _axes(source: LabelledSource, kind: str, directions: Float[Tensor, "axis width"], k: int) -> FeatureMethod:
    """Return both directions of some axes; at each token the k axes with the largest z-scores are active."""
    count, moments = len(directions), source.moments
    if not 0 < k <= count:
        raise BadInput(f"k {k} does not fit {count} axes: choose k between 1 and {count}.")
    directions = directions.to(moments.mean.device)
    variances = torch.cat([((part @ moments.covariance) * part).sum(1) for part in directions.double().split(AXES_AT_ONCE)])
    deviations = (variances.clamp_min(0) * moments.count / max(1, moments.count - 1)).sqrt().float()
    scaled, mean = directions / deviations.clamp_min(1e-30)[:, None], moments.mean.float()

    def encode(x: Float[Tensor, "token width"]) -> Codes:
        z = (x - mean) @ scaled.T
        axes = z.abs().topk(k, dim=1).indices
        values = z.gather(1, axes)
        return Codes(values.abs(), axes + count * (values < 0))

    return FeatureMethod(site=source.labels.site, label=f"{kind}-{2 * count}-k{k}", size=2 * count, encode=encode)


def match(
    source: LabelledSource,
    methods: Iterable[FeatureMethod],
    config: MatchingConfig = MatchingConfig(),  # noqa: B008 (a constant)
) -> list[ConceptMatches]:
    """Match the features of each method to concepts, over all noise levels together and, if there are several, at each.

    Features are chosen on training images and measured on held-out ones. Activations that are in memory are read once for each
    method; those that are harvested again at each reading, once for as many methods as fit into the memory of their device.
    """
    labels = source.labels
    frequent = _frequent_concepts(labels, config.min_images)
    rare = tuple(concept for i, concept in enumerate(labels.concepts) if i not in frequent)
    labels = replace(labels, concepts=tuple(labels.concepts[i] for i in frequent), truth=labels.truth[frequent])
    noise = [None, *(labels.noise_levels if len(labels.noise_levels) > 1 else ())]
    masks = [torch.ones_like(labels.held_out) if level is None else labels.noise == level for level in noise]
    fitted = [probe_tokens((mask & ~labels.held_out).nonzero()[:, 0], config.seed) for mask in masks]
    levels = [_Level(*level) for level in zip(noise, masks, fitted, strict=True)]
    groups = _groups(methods, source)
    first = next(groups, [])
    firings, rows = _read(source, first, torch.cat([level.probe_tokens for level in levels]))
    data = _level_data(source, labels, levels, rows, config)
    matches = []
    for group, recorded in chain([(first, firings)], ((group, _read(source, group)[0]) for group in groups)):
        for method in group:
            matchers = [_Matcher(level, recorded[0], config.max_features) for level in data]
            del recorded[0]
            matches.append(
                ConceptMatches(
                    site=labels.site,
                    label=method.label,
                    size=method.size,
                    concepts=labels.concepts,
                    rare_concepts=rare,
                    levels=tuple(matcher.level() for matcher in matchers),
                    features=matchers[0].features(),
                )
            )
    return matches


def _groups(methods: Iterable[FeatureMethod], source: LabelledSource) -> Iterator[list[FeatureMethod]]:
    """Yield methods to read the activations for together."""
    group, size = list[FeatureMethod](), 0
    for method in methods:
        if method.site != source.labels.site:
            raise BadInput(f"{method.label} is a method for {method.site}, but the activations are of {source.labels.site}.")
        group.append(method)
        size += 8 * method.size * source.width  # the bytes of its encoder and decoder
        if source.is_kept or size > METHOD_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _read(
    source: LabelledSource, methods: Sequence[FeatureMethod], wanted: Int[Tensor, " token"] = NONE
) -> tuple[list[FeatureFirings], Float[Tensor, "token width"]]:
    """Return where the features of methods fire at all tokens, and the activations of the `wanted` tokens."""
    recorders = [FiringRecorder(method.encode, method.size) for method in methods]
    order, rows, count = wanted.unique(), list[Tensor](), 0
    for x in _chunks(source):
        for recorder in recorders:
            recorder.add(x)
        first, end = torch.searchsorted(order, torch.tensor([count, count + len(x)])).tolist()
        rows.append(x[(order[first:end] - count).to(x.device)])
        count += len(x)
    places = torch.searchsorted(order, wanted)
    return [recorder.firings() for recorder in recorders], torch.cat(rows)[places.to(rows[0].device)]


def _chunks(source: LabelledSource) -> Iterator[Float[Tensor, "token width"]]:
    """Yield the activations of all tokens in parts of one size, whatever the batches are: products round by their size."""
    rest: Tensor | None = None
    for values in source.batches():
        rest = values if rest is None or not len(rest) else torch.cat([rest, values])
        while len(rest) >= CHUNK:
            yield rest[:CHUNK].float()
            rest = rest[CHUNK:]
    if rest is not None and len(rest):
        yield rest.float()


def _frequent_concepts(labels: TokenLabels, min_images: int) -> list[int]:
    """Return the concepts that enough images show on both sides of the split, at every noise level."""
    sides = [side & (labels.noise == level) for side in _sides(labels) for level in labels.noise_levels]
    counts = torch.tensor([[len(labels.images[side & shown].unique()) for shown in labels.truth == 1] for side in sides])
    is_frequent = counts.amin(0) >= min_images
    if not bool(is_frequent.any()):
        held_out, total = len(labels.images[labels.held_out].unique()), len(labels.images.unique())
        raise BadInput(
            f"No concept is shown in {min_images} held-out images and as many others: of {total} images {held_out} are held out, "
            f"and none is in more than {int(counts.amin(0).max())} on both sides. Give more images, or hold out half of them: "
            "--held-out 0.5."
        )
    return is_frequent.nonzero()[:, 0].tolist()


def _sides(labels: TokenLabels) -> tuple[Bool[Tensor, " token"], Bool[Tensor, " token"]]:
    return ~labels.held_out, labels.held_out


@dataclass(frozen=True)
class _SplitSide:
    """The tokens of one side of the split."""

    mask: Bool[Tensor, " total"]
    """Which of all tokens these are."""
    truth: Int8[Tensor, "concept token"]
    images: Int[Tensor, " token"]

    @cached_property
    def chance(self) -> Float[Tensor, " concept"]:
        """Share of the labelled tokens that show each concept: the average precision of a random ranking."""
        return (self.truth == 1).sum(1) / (self.truth >= 0).sum(1).clamp_min(1)


class _Level(NamedTuple):
    """A noise level, or all of them together."""

    noise: float | None
    mask: Bool[Tensor, " token"]
    """Its tokens."""
    probe_tokens: Int[Tensor, " token"]
    """Those of its training tokens that its probe is fitted to."""


def _level_data(
    source: LabelledSource,
    labels: TokenLabels,
    levels: Sequence[_Level],
    rows: Float[Tensor, "token width"],
    config: MatchingConfig,
) -> list[_LevelData]:
    """Fit the probe of each level to its `rows`, one level after the other, and read all activations once for the logits."""
    parts = zip(levels, rows.split([len(level.probe_tokens) for level in levels]), strict=True)
    probes = [LinearProbe.fit(x, labels.truth[:, level.probe_tokens], config.ridge) for level, x in parts]
    logits: list[list[Tensor]] = [[] for _ in levels]
    count = 0
    for x in _chunks(source):
        for level, probe, found in zip(levels, probes, logits, strict=True):
            tested = (level.mask & labels.held_out)[count : count + len(x)].to(x.device)
            found.append(probe.logits(x[tested]).cpu())
        count += len(x)
    return [_LevelData(labels, level, torch.cat(found).T, config) for level, found in zip(levels, logits, strict=True)]


@final
class _LevelData:
    """What all methods are compared on at one noise level: ground truth, linear probe, and bootstrap samples of images."""

    def __init__(
        self, labels: TokenLabels, level: _Level, logits: Float[Tensor, "concept token"], config: MatchingConfig
    ) -> None:
        """Take the logits of the probe at the held-out tokens."""
        self.noise, self.concepts = level.noise, labels.concepts
        self.train, self.test = (
            _SplitSide(level.mask & side, labels.truth[:, level.mask & side], labels.images[level.mask & side])
            for side in _sides(labels)
        )
        self.weights = _bootstrap_weights(self.test.images, int(labels.images.max()) + 1, config.bootstrap_samples, config.seed)
        tokens = torch.arange(logits.shape[1])
        self.probe = torch.stack([self.average_precision(tokens, values, i) for i, values in enumerate(logits)])
        self.unrelated = unrelated_concepts(labels.concepts, self.train.truth)

    def average_precision(self, tokens: Tensor, values: Tensor, concept: int) -> Float[Tensor, " draw"]:
        """Return the average precision of a ranking on held-out tokens, then its value in each bootstrap sample."""
        return average_precision(tokens, values, self.test.truth[concept], self.test.images, self.weights)


def _bootstrap_weights(images: Tensor, count: int, samples: int, seed: int) -> Float[Tensor, "draw image"]:
    """Return how often each image counts: once in the first row, as drawn with replacement in the others."""
    present = images.unique()
    draws = torch.randint(len(present), (samples, len(present)), generator=torch.Generator().manual_seed(seed))
    weights = torch.zeros(samples + 1, count)
    weights[0, present] = 1
    weights[1:].scatter_add_(1, present[draws], torch.ones(samples, len(present)))
    return weights


def _interval(draws: Float[Tensor, " draw"]) -> ConfidenceInterval:
    """Return the first of `draws` with the 2.5 and 97.5 percentiles of the others."""
    low, high = draws[1:].nanquantile(torch.tensor([0.025, 0.975])).tolist()
    return ConfidenceInterval(float(draws[0]), low, high)


def _detected_share(ap: Float[Tensor, "concept draw"]) -> ConfidenceInterval:
    return _interval((ap >= DETECTED).sum(0) / (~ap.isnan()).sum(0))


@final
class _Matcher:
    """The features of one method at one noise level."""

    def __init__(self, data: _LevelData, firings: FeatureFirings, max_features: int) -> None:
        self._data, self._max_features = data, max_features
        self._train, self._test = firings.select(data.train.mask), firings.select(data.test.mask)
        self._train_scores: DetectionScores = detection_scores(self._train, data.train.truth)
        self._test_scores: DetectionScores = detection_scores(self._test, data.test.truth, self._train_scores.threshold)

    def level(self) -> NoiseLevelResult:
        """Return the results for every concept."""
        pairs = [self._result(concept) for concept in range(len(self._data.concepts))]
        draws = torch.stack([draws for _, draws in pairs])
        findable = self._data.probe[:, 0] >= FINDABLE
        return NoiseLevelResult(
            noise=self._data.noise,
            results=tuple(result for result, _ in pairs),
            coverage=_detected_share(draws),
            coverage_of_findable=_detected_share(draws[findable]) if bool(findable.any()) else None,
        )

    def _result(self, concept: int) -> tuple[ConceptResult, Tensor]:
        """Return the result for a concept, and the average precision of its best feature in each bootstrap sample."""
        data, scores, truth = self._data, self._train_scores, self._data.train.truth[concept]
        best, segmenting = int(scores.ap[:, concept].argmax()), int(scores.iou[:, concept].argmax())
        combined = combine_features(self._train, truth, scores.ap[:, concept], self._max_features)
        draws = self._draws(best, concept)
        unrelated, monosemanticity = self._monosemanticity(torch.tensor([best]), torch.tensor([concept]))
        result = ConceptResult(
            concept=data.concepts[concept],
            tokens=int((data.test.truth[concept] == 1).sum()),
            chance=float(data.test.chance[concept]),
            probe=_interval(data.probe[concept]),
            best=_detector((best,), self._test_scores, (best, concept), draws),
            segmenting=_detector((segmenting,), self._test_scores, (segmenting, concept), self._draws(segmenting, concept)),
            combined=self._combined_detector(combined, concept),
            unrelated=data.concepts[int(unrelated)].name if bool(data.unrelated[concept].any()) else None,
            monosemanticity=float(monosemanticity),
            split_features=split_features(self._train, truth, scores, concept),
            absorbing_features=absorbing_features(self._train, truth, scores, concept, best),
        )
        return result, draws

    def _draws(self, feature: int, concept: int) -> Tensor:
        return self._data.average_precision(*self._test.of_feature(feature), concept)

    def _combined_detector(self, features: tuple[int, ...], concept: int) -> ConceptDetector:
        """Measure features as if they were one, which fires as strongly as the strongest of them relative to its peak."""
        data, indices = self._data, torch.tensor(features)
        train, test = (
            FeatureFirings.from_dense(relative_strengths(firings, indices, self._train.peaks).amax(0, keepdim=True))
            for firings in (self._train, self._test)
        )
        threshold = detection_scores(train, data.train.truth[concept, None]).threshold
        scores = detection_scores(test, data.test.truth[concept, None], threshold)
        return _detector(features, scores, (0, 0), data.average_precision(*test.of_feature(0), concept))

    def _monosemanticity(self, features: Tensor, concepts: Tensor) -> tuple[Tensor, Tensor]:
        """Return for features and their concepts the best unrelated concept, and the monosemanticity."""
        ap = above_chance(self._test_scores.ap[features], self._data.test.chance)
        unrelated = ap.masked_fill(~self._data.unrelated[concepts], -torch.inf).max(1)
        return unrelated.indices, ap.gather(1, concepts[:, None])[:, 0] - unrelated.values.clamp_min(0)

    def features(self) -> FeatureMatches:
        """Return the matches of every feature that fires."""
        alive = (self._train.counts > 0).nonzero()[:, 0]
        # Above chance, or every feature would match the most common concept.
        concepts = above_chance(self._train_scores.ap[alive], self._data.train.chance).argmax(1)
        iou_concepts = self._train_scores.iou[alive].argmax(1)
        unrelated, monosemanticity = self._monosemanticity(alive, concepts)
        has_unrelated = self._data.unrelated[concepts].any(1)
        column = lambda values: tuple(round(value, 5) for value in values.tolist())  # noqa: E731
        return FeatureMatches(
            features=tuple(alive.tolist()),
            concepts=tuple(concepts.tolist()),
            ap=column(self._test_scores.ap[alive, concepts]),
            iou_concepts=tuple(iou_concepts.tolist()),
            iou=column(self._test_scores.iou[alive, iou_concepts]),
            unrelated=column(self._test_scores.ap[alive, unrelated] * has_unrelated),
            monosemanticity=column(monosemanticity),
        )


def _detector(
    features: tuple[int, ...], scores: DetectionScores, place: tuple[int, int], draws: Float[Tensor, " draw"]
) -> ConceptDetector:
    """Return the detector whose scores are at `place` (feature, concept)."""
    iou, precision, recall = (float(table[place]) for table in (scores.iou, scores.precision, scores.recall))
    return ConceptDetector(features=features, ap=_interval(draws), iou=iou, precision=precision, recall=recall)
