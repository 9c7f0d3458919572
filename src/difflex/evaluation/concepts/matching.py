"""`match`: what the features of several methods have to do with known concepts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from jaxtyping import Bool, Float, Int, Int8
from torch import Tensor

from difflex.errors import BadInput
from difflex.evaluation.concepts.detection import DetectionScores, FeatureFirings, TokenRanking, scores
from difflex.evaluation.concepts.labelled import LabelledActivations
from difflex.evaluation.concepts.matches import (
    COVERED,
    FINDABLE,
    ConceptDetector,
    ConceptMatches,
    ConceptResult,
    ConfidenceInterval,
    FeatureMatches,
    NoiseLevelResult,
)
from difflex.evaluation.concepts.methods import FeatureMethod
from difflex.evaluation.concepts.probing import probed
from difflex.evaluation.concepts.relations import absorbers, over_chance, pieces, strengths, together, unrelated

__all__ = ["MatchingConfig", "match"]


@dataclass(frozen=True, kw_only=True)
class MatchingConfig:
    """How concepts are held against features."""

    most: int = 4
    """Features that may stand for a concept together."""
    least: int = 8
    """Images that must show a concept, among the held-out ones and among the others; a rarer one is left out."""
    draws: int = 200
    """How often held-out images are drawn again for the confidence intervals."""
    ridge: float = 1e-4
    """How strongly the weights of the linear probe are held to zero; its inputs have variance 1 in all directions."""
    seed: int = 0
    """Of the draws, and of the tokens that the probe learns from."""

    def __post_init__(self) -> None:
        for name, least in (("most", 1), ("least", 1), ("draws", 1), ("ridge", 0)):
            if getattr(self, name) < least:
                raise BadInput(f"{name} {getattr(self, name):g} is not possible: choose at least {least}.")


def match(
    labelled: LabelledActivations, methods: Iterable[FeatureMethod], matching: MatchingConfig = MatchingConfig()
) -> list[ConceptMatches]:
    """The matches of each method, over all levels of noise together and, where there are several, at each.

    Features are chosen on training images, what is told of them is measured on held-out ones.
    """
    often = _often(labelled, matching.least)
    left_out = tuple(concept for i, concept in enumerate(labelled.concepts) if i not in often)
    labelled = labelled.of(often)
    levels = labelled.levels
    grounds = [_MatchingData(labelled, noise, matching) for noise in (None, *(levels if len(levels) > 1 else ()))]
    matches = []
    for method in methods:
        if method.site != labelled.site:
            raise BadInput(f"{method.label} reads {method.site}, the labelled activations are of {labelled.site}.")
        firings = FeatureFirings.found(method.encode, labelled.values, method.size)
        judged = [_MethodResult(ground, firings, matching.most) for ground in grounds]
        matches.append(
            ConceptMatches(
                site=labelled.site,
                label=method.label,
                size=method.size,
                concepts=labelled.concepts,
                left_out=left_out,
                levels=tuple(each.level() for each in judged),
                features=judged[0].features(),
            )
        )
    return matches


def _often(labelled: LabelledActivations, least: int) -> list[int]:
    """The concepts that enough images show on both sides of the split, at every level of noise."""
    sides = [labelled.held_out, ~labelled.held_out]
    counts = torch.stack([_shown_in(labelled, side & (labelled.noise == level)) for side in sides for level in labelled.levels])
    enough = counts.amin(0) >= least
    if not bool(enough.any()):
        held_out, of = len(labelled.images[labelled.held_out].unique()), len(labelled.images.unique())
        raise BadInput(
            f"No concept is shown in {least} held-out images and as many others: of {of} images {held_out} are held out, and "
            f"none is in more than {int(counts.amin(0).max())} on both sides. Give more images; a tenth of them is held out."
        )
    return enough.nonzero()[:, 0].tolist()


def _shown_in(labelled: LabelledActivations, chosen: Bool[Tensor, " token"]) -> Int[Tensor, " concept"]:
    """How many images show each concept at the `chosen` tokens."""
    images = labelled.images[chosen]
    return torch.tensor([len(images[truth == 1].unique()) for truth in labelled.truth[:, chosen]])


class _SplitSide(NamedTuple):
    """The tokens of one side of the split."""

    chosen: Tensor
    """Which of all tokens these are."""
    truth: Int8[Tensor, "concept token"]
    images: Tensor


@final
class _MatchingData:
    """What all methods are held against at one level of noise: the truth, the ceiling, and the draws of images."""

    def __init__(self, labelled: LabelledActivations, noise: float | None, matching: MatchingConfig) -> None:
        at = torch.ones_like(labelled.held_out) if noise is None else labelled.noise == noise
        self.noise, self.concepts = noise, labelled.concepts
        self.train, self.held = (
            _SplitSide(at & side, labelled.truth[:, at & side], labelled.images[at & side])
            for side in (~labelled.held_out, labelled.held_out)
        )
        self.weights = _redrawn(self.held.images, int(labelled.images.max()) + 1, matching.draws, matching.seed)
        here = labelled if noise is None else labelled.part(at)
        logits = probed(here, ridge=matching.ridge, seed=matching.seed)[:, here.held_out]
        everywhere = torch.arange(logits.shape[1])
        self.probe = torch.stack([self.ap_draws(everywhere, each, i) for i, each in enumerate(logits)])
        self.unrelated = unrelated(labelled.concepts, self.train.truth)

    def ap_draws(self, tokens: Tensor, values: Tensor, concept: int) -> Float[Tensor, " draw"]:
        """The average precision of a ranking on held-out tokens: as they are, then in each draw of images."""
        ranking = TokenRanking(tokens, values, self.held.truth[concept], self.held.images, self.weights.shape[1])
        return ranking.average_precision(self.weights)


def _redrawn(images: Tensor, count: int, draws: int, seed: int) -> Float[Tensor, "draw image"]:
    """How often each image counts: once in the first row, as drawn with replacement in the others."""
    there = images.unique()
    picked = torch.randint(len(there), (draws, len(there)), generator=torch.Generator().manual_seed(seed))
    weights = torch.zeros(draws + 1, count)
    weights[0, there] = 1
    weights[1:].scatter_add_(1, there[picked], torch.ones(draws, len(there)))
    return weights


def _interval(draws: Float[Tensor, " draw"]) -> ConfidenceInterval:
    """The first of `draws`, and the 2.5 and 97.5 percentiles of the others."""
    low, high = draws[1:].nanquantile(torch.tensor([0.025, 0.975])).tolist()
    return ConfidenceInterval(float(draws[0]), low, high)


def _share(ap: Float[Tensor, "concept draw"]) -> ConfidenceInterval:
    """The share of concepts that are detected."""
    known = ~ap.isnan()
    return _interval((ap >= COVERED).sum(0) / known.sum(0))


@final
class _MethodResult:
    """One method on one ground."""

    def __init__(self, ground: _MatchingData, firings: FeatureFirings, most: int) -> None:
        self._ground, self._most = ground, most
        self._train, self._held = firings.part(ground.train.chosen), firings.part(ground.held.chosen)
        self._chosen_by: DetectionScores = scores(self._train, ground.train.truth)
        self._found: DetectionScores = scores(self._held, ground.held.truth, self._chosen_by.threshold)
        self._peaks = torch.zeros(firings.size)
        alive = self._train.counts > 0
        self._peaks[alive] = self._train.values[self._train.starts[alive]]
        self._shown = (ground.held.truth == 1).sum(1)
        self._chance = self._shown / (ground.held.truth >= 0).sum(1).clamp_min(1)

    def level(self) -> NoiseLevelResult:
        """What is known of every concept."""
        judged = [self._finding(concept) for concept in range(len(self._ground.concepts))]
        draws = torch.stack([draws for _, draws in judged])
        findable = self._ground.probe[:, 0] >= FINDABLE
        return NoiseLevelResult(
            noise=self._ground.noise,
            findings=tuple(finding for finding, _ in judged),
            coverage=_share(draws),
            coverage_of_findable=_share(draws[findable]) if bool(findable.any()) else None,
        )

    def _finding(self, concept: int) -> tuple[ConceptResult, Tensor]:
        """The finding, and the average precision of the best feature in each draw of images."""
        chosen_by, truth = self._chosen_by, self._ground.train.truth[concept]
        best, segmenting = int(chosen_by.ap[:, concept].argmax()), int(chosen_by.iou[:, concept].argmax())
        few = together(self._train, truth, chosen_by.ap[:, concept], self._peaks, self._most)
        draws = self._draws(best, concept)
        other, monosemanticity = self._meaning(torch.tensor([best]), torch.tensor([concept]))
        finding = ConceptResult(
            concept=self._ground.concepts[concept],
            tokens=int(self._shown[concept]),
            chance=float(self._chance[concept]),
            probe=_interval(self._ground.probe[concept]),
            best=self._single(best, concept, draws),
            segmenting=self._single(segmenting, concept, self._draws(segmenting, concept)),
            few=self._several(few, concept),
            unrelated=self._ground.concepts[int(other)].name if bool(self._ground.unrelated[concept].any()) else None,
            monosemanticity=float(monosemanticity),
            pieces=pieces(self._train, truth, chosen_by, concept),
            absorbers=absorbers(self._train, truth, chosen_by, concept, best),
        )
        return finding, draws

    def _draws(self, feature: int, concept: int) -> Tensor:
        return self._ground.ap_draws(*self._held.one(feature), concept)

    def _single(self, feature: int, concept: int, draws: Tensor) -> ConceptDetector:
        iou, precision, recall = (
            float(each[feature, concept]) for each in (self._found.iou, self._found.precision, self._found.recall)
        )
        return ConceptDetector(features=(feature,), ap=_interval(draws), iou=iou, precision=precision, recall=recall)

    def _several(self, features: tuple[int, ...], concept: int) -> ConceptDetector:
        """Features together, as if they were one: at each token the strongest speaks, in units of its peak."""
        ground, either = self._ground, torch.tensor(features)
        train, held = (strengths(each, either, self._peaks).amax(0) for each in (self._train, self._held))
        one = lambda x: FeatureFirings.sorted(x.nonzero()[:, 0], torch.zeros_like(x).long()[x > 0], x[x > 0], 1, len(x))  # noqa: E731
        cut = scores(one(train), ground.train.truth[concept, None]).threshold
        found = scores(one(held), ground.held.truth[concept, None], cut)
        draws = ground.ap_draws(*one(held).one(0), concept)
        iou, precision, recall = float(found.iou), float(found.precision), float(found.recall)
        return ConceptDetector(features=features, ap=_interval(draws), iou=iou, precision=precision, recall=recall)

    def _meaning(self, features: Tensor, concepts: Tensor) -> tuple[Tensor, Tensor]:
        """For features and their concepts: the best unrelated concept, and the monosemanticity."""
        above = over_chance(self._found.ap[features], self._chance)
        elsewhere = above.masked_fill(~self._ground.unrelated[concepts], -torch.inf).max(1)
        own = above.gather(1, concepts[:, None])[:, 0]
        return elsewhere.indices, own - elsewhere.values.clamp_min(0)

    def features(self) -> FeatureMatches:
        """What is known of every feature that fires."""
        alive = (self._train.counts > 0).nonzero()[:, 0]
        # Over chance, or every feature would be said to mean what is commonest.
        chance = (self._ground.train.truth == 1).sum(1) / (self._ground.train.truth >= 0).sum(1).clamp_min(1)
        concepts = over_chance(self._chosen_by.ap[alive], chance).argmax(1)
        segmented = self._chosen_by.iou[alive].argmax(1)
        other, monosemanticity = self._meaning(alive, concepts)
        has_other = self._ground.unrelated[concepts].any(1)
        column = lambda values: tuple(round(value, 5) for value in values.tolist())  # noqa: E731
        return FeatureMatches(
            features=tuple(alive.tolist()),
            concepts=tuple(concepts.tolist()),
            ap=column(self._found.ap[alive, concepts]),
            segmented=tuple(segmented.tolist()),
            iou=column(self._found.iou[alive, segmented]),
            unrelated=column(self._found.ap[alive, other] * has_other),
            monosemanticity=column(monosemanticity),
        )
