"""Match the features of dictionaries and baselines to concepts; a linear probe on the same activations is the ceiling."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
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
    above_chance,
    absorbing_features,
    average_precision,
    combine_features,
    detection_scores,
    relative_strengths,
    split_features,
    unrelated_concepts,
)
from difflex.evaluation.concepts.labels import LabelledActivations
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

PROBE_TOKENS = 32_768
"""Maximum number of training tokens of a probe."""
PROBE_ITERATIONS = 40


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
        """Return `dictionary` as a method; a feature fires where its code is positive."""
        return cls(site=dictionary.site, label=dictionary.label, size=dictionary.size, encode=dictionary.encode)


def principal_axes(labelled: LabelledActivations, k: int) -> FeatureMethod:
    """Return the principal axes of the training tokens, with one feature for each direction of an axis."""
    x = labelled.values[~labelled.held_out].double()
    directions = torch.linalg.eigh((x - x.mean(0)).T @ (x - x.mean(0))).eigenvectors.flip(1).T
    return _axes(labelled, "pca", directions.float(), k)


def random_directions(labelled: LabelledActivations, size: int, k: int, seed: int = 0) -> FeatureMethod:
    """Return `size` untrained features: both directions of `size / 2` random axes."""
    axes = torch.randn(size // 2, labelled.values.shape[1], generator=torch.Generator().manual_seed(seed))
    return _axes(labelled, "random", F.normalize(axes, dim=1), k)


def _axes(labelled: LabelledActivations, kind: str, directions: Float[Tensor, "axis width"], k: int) -> FeatureMethod:
    """Return both directions of some axes; at each token the k axes with the largest z-scores are active."""
    count = len(directions)
    if not 0 < k <= count:
        raise BadInput(f"k {k} does not fit {count} axes: choose k between 1 and {count}.")
    train = labelled.values[~labelled.held_out]
    mean = train.mean(0)
    scaled = directions / ((train - mean) @ directions.T).std(0).clamp_min(1e-30)[:, None]

    def encode(x: Float[Tensor, "token width"]) -> Codes:
        z = (x - mean) @ scaled.T
        axes = z.abs().topk(k, dim=1).indices
        values = z.gather(1, axes)
        return Codes(values.abs(), axes + count * (values < 0))

    return FeatureMethod(site=labelled.site, label=f"{kind}-{2 * count}-k{k}", size=2 * count, encode=encode)


def linear_probe(labelled: LabelledActivations, *, ridge: float = 1e-4, seed: int = 0) -> Float[Tensor, "concept token"]:
    """Return the logits of one logistic regression per concept at all tokens, trained on the images that are not held out."""
    train = (~labelled.held_out).nonzero()[:, 0]
    if len(train) > PROBE_TOKENS:
        train = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:PROBE_TOKENS]]
    mean, axes = _whitening(labelled.values[train])
    weights, bias = _logistic_regression((labelled.values[train] - mean) @ axes, labelled.truth[:, train], ridge)
    return (((labelled.values - mean) @ (axes @ weights)) + bias).T


def _whitening(x: Float[Tensor, "token width"]) -> tuple[Tensor, Tensor]:
    """Return the mean and axes in which `x` has unit variance in all directions: descent is fast, and ridge treats all alike."""
    mean = x.double().mean(0)
    variances, directions = torch.linalg.eigh((x.double() - mean).T @ (x.double() - mean) / len(x))
    floor = variances.max().clamp_min(1e-30) * 1e-6  # so that nearly constant directions are not amplified to noise
    return mean.float(), (directions / (variances.clamp_min(0) + floor).sqrt()).float()


def _logistic_regression(
    x: Float[Tensor, "token width"], truth: Int8[Tensor, "concept token"], ridge: float
) -> tuple[Tensor, Tensor]:
    """Return weights [width, concept] and bias of one logistic regression per concept, all trained at once."""
    labelled, target = (truth.T >= 0).float(), (truth.T == 1).float()
    share = labelled / labelled.sum(0).clamp_min(1)
    weights = torch.zeros(x.shape[1], len(truth), requires_grad=True)
    bias = torch.logit((target * share).sum(0).clamp(1e-4, 1 - 1e-4)).requires_grad_()
    optimiser = torch.optim.LBFGS([weights, bias], max_iter=PROBE_ITERATIONS, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        cross_entropy = F.binary_cross_entropy_with_logits(x @ weights + bias, target, weight=share, reduction="sum")
        loss = cross_entropy + ridge * weights.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimiser.step(closure)
    return weights.detach(), bias.detach()


def match(
    labelled: LabelledActivations,
    methods: Iterable[FeatureMethod],
    config: MatchingConfig = MatchingConfig(),  # noqa: B008 (a constant)
) -> list[ConceptMatches]:
    """Match the features of each method to concepts, over all noise levels together and, if there are several, at each.

    Features are chosen on training images and measured on held-out ones.
    """
    frequent = _frequent_concepts(labelled, config.min_images)
    rare = tuple(concept for i, concept in enumerate(labelled.concepts) if i not in frequent)
    labelled = replace(labelled, concepts=tuple(labelled.concepts[i] for i in frequent), truth=labelled.truth[frequent])
    levels = labelled.noise_levels
    data = [_LevelData(labelled, noise, config) for noise in (None, *(levels if len(levels) > 1 else ()))]
    matches = []
    for method in methods:
        if method.site != labelled.site:
            raise BadInput(f"{method.label} is a method for {method.site}, but the labelled activations are of {labelled.site}.")
        firings = FeatureFirings.of(method.encode, labelled.values, method.size)
        matchers = [_Matcher(level, firings, config.max_features) for level in data]
        matches.append(
            ConceptMatches(
                site=labelled.site,
                label=method.label,
                size=method.size,
                concepts=labelled.concepts,
                rare_concepts=rare,
                levels=tuple(matcher.level() for matcher in matchers),
                features=matchers[0].features(),
            )
        )
    return matches


def _frequent_concepts(labelled: LabelledActivations, min_images: int) -> list[int]:
    """Return the concepts that enough images show on both sides of the split, at every noise level."""
    sides = [side & (labelled.noise == level) for side in _sides(labelled) for level in labelled.noise_levels]
    counts = torch.tensor([[len(labelled.images[side & shown].unique()) for shown in labelled.truth == 1] for side in sides])
    is_frequent = counts.amin(0) >= min_images
    if not bool(is_frequent.any()):
        held_out, total = len(labelled.images[labelled.held_out].unique()), len(labelled.images.unique())
        raise BadInput(
            f"No concept is shown in {min_images} held-out images and as many others: of {total} images {held_out} are held out, "
            f"and none is in more than {int(counts.amin(0).max())} on both sides. Give more images; a tenth of them is held out."
        )
    return is_frequent.nonzero()[:, 0].tolist()


def _sides(labelled: LabelledActivations) -> tuple[Bool[Tensor, " token"], Bool[Tensor, " token"]]:
    return ~labelled.held_out, labelled.held_out


class _SplitSide(NamedTuple):
    """The tokens of one side of the split."""

    mask: Bool[Tensor, " total"]
    """Which of all tokens these are."""
    truth: Int8[Tensor, "concept token"]
    images: Int[Tensor, " token"]

    @property
    def chance(self) -> Float[Tensor, " concept"]:
        """Share of the labelled tokens that show each concept: the average precision of a random ranking."""
        return (self.truth == 1).sum(1) / (self.truth >= 0).sum(1).clamp_min(1)


@final
class _LevelData:
    """What all methods are compared on at one noise level: ground truth, linear probe, and bootstrap samples of images."""

    def __init__(self, labelled: LabelledActivations, noise: float | None, config: MatchingConfig) -> None:
        at_level = torch.ones_like(labelled.held_out) if noise is None else labelled.noise == noise
        self.noise, self.concepts = noise, labelled.concepts
        self.train, self.test = (
            _SplitSide(at_level & side, labelled.truth[:, at_level & side], labelled.images[at_level & side])
            for side in _sides(labelled)
        )
        self.weights = _bootstrap_weights(self.test.images, int(labelled.images.max()) + 1, config.bootstrap_samples, config.seed)
        selected = labelled if noise is None else labelled.select(at_level)
        logits = linear_probe(selected, ridge=config.ridge, seed=config.seed)[:, selected.held_out]
        tokens = torch.arange(logits.shape[1])
        self.probe = torch.stack([self.average_precision(tokens, values, i) for i, values in enumerate(logits)])
        self.unrelated = unrelated_concepts(labelled.concepts, self.train.truth)

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
