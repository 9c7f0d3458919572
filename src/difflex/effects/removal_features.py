"""The features of a concept, chosen by the importance score of SAeUron (arXiv 2501.18052), and the rates of their removal."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, final

import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from difflex.dictionaries import Dictionary
from difflex.effects.judging import JudgeVerdict
from difflex.errors import BadInput
from difflex.records import Activations, Edit
from difflex.steering import EditFeatures, SteeringHook, dictionary_features, steering_hooks
from difflex.study import DictionaryRef

BAR, ENOUGH = 0.9, 0.95
"""The rates at which a concept counts as removed, and at which the search for more ends."""
PART = 6
"""Of the prompts that name each other concept, one in so many is generated with an edit."""
Setting = tuple[int, float]
"""A number of features at each step and site, and what their codes are multiplied by."""


@final
class GenerationCodes:
    """The codes of a dictionary's features while images are generated without an edit, by step and image."""

    def __init__(self, dictionary: Dictionary) -> None:
        self.dictionary = dictionary
        self._means: dict[float, list[Tensor]] = {}
        self._peaks: dict[float, list[Tensor]] = {}

    def add(self, activations: Activations) -> None:
        """Add the activations of images at one step; images must come in the same order at every step."""
        if activations.site != self.dictionary.site:
            raise BadInput(
                f"{self.dictionary.name} is for {self.dictionary.site}, but the activations are of {activations.site}."
            )
        images, tokens, _ = activations.values.shape
        x = activations.values.flatten(0, 1).float()
        values, indices = self.dictionary.on(x.device).encode(x)
        row = torch.arange(images, device=x.device).repeat_interleave(tokens * indices.shape[1])
        values, zeros = values.clamp(min=0).flatten(), values.new_zeros(images * self.dictionary.size)
        flat = row * self.dictionary.size + indices.flatten()
        timestep = activations.shots[0].timestep or 0.0
        means, peaks = zeros.index_add(0, flat, values) / tokens, zeros.scatter_reduce(0, flat, values, "amax")
        self._means.setdefault(timestep, []).append(means.view(images, -1).cpu())
        self._peaks.setdefault(timestep, []).append(peaks.view(images, -1).cpu())

    def means(self) -> Float[Tensor, "step image feature"]:
        """Return the mean code of each feature over the tokens of each image; steps in the order they run."""
        return _by_step(self._means)

    def peaks(self) -> Float[Tensor, "step image feature"]:
        """Return the largest code of each feature in each image."""
        return _by_step(self._peaks)


def _by_step(by_timestep: Mapping[float, Sequence[Tensor]]) -> Tensor:
    if not by_timestep:
        raise BadInput("No image was generated to choose features by. Ask for 1 or more.")
    return torch.stack([torch.cat(list(by_timestep[timestep])) for timestep in sorted(by_timestep, reverse=True)])


def importance(positive: Float[Tensor, "image feature"], negative: Float[Tensor, "other feature"]) -> Float[Tensor, " feature"]:
    """Return each feature's share in the sum of codes on images with a concept, minus that on images without it.

    Both arguments are mean codes at one step; the images without the concept show others of its group.
    """
    shares = [codes / codes.sum().clamp(min=1e-30) for codes in (positive.mean(0), negative.mean(0))]
    return shares[0] - shares[1]


@final
@dataclass(frozen=True)
class FeatureCut:
    """The features to remove at the site of a dictionary."""

    dictionary: Dictionary
    features: tuple[tuple[int, ...], ...]
    """Of each step, the most important first."""
    floors: tuple[tuple[float, ...], ...]
    """Codes above these are changed: the mean codes over all images that features were chosen by."""

    def first(self, count: int) -> FeatureCut:
        """Return the cut with at most `count` features at a step."""
        features, floors = (tuple(step[:count] for step in self.features), tuple(step[:count] for step in self.floors))
        return replace(self, features=features, floors=floors)

    def changes(self, codes: GenerationCodes) -> Bool[Tensor, " image"]:
        """Return which images change: those in which a feature fires above its floor."""
        peaks = codes.peaks()
        is_changed = torch.zeros(peaks.shape[1], dtype=torch.bool)
        for step, features, floors in zip(peaks, self.features, self.floors, strict=True):
            is_changed |= (step[:, list(features)] > torch.tensor(floors)).any(1)
        return is_changed

    def steering_hooks(self, strength: float) -> list[SteeringHook]:
        """Return hooks that multiply by `strength`, at each step, the codes of its features that are above their floors."""
        by_edit: dict[Edit, EditFeatures] = {}
        for step, (features, floors) in enumerate(zip(self.features, self.floors, strict=True)):
            if features:
                steps = (step, step + 1)
                edit = Edit(operation="scale", site=self.dictionary.site, features=features, strength=strength, steps=steps)
                by_edit[edit] = _above(dictionary_features(self.dictionary, features, None), torch.tensor(floors))
        return steering_hooks(by_edit, by_edit.__getitem__)


def _above(features: EditFeatures, floors: Float[Tensor, " feature"]) -> EditFeatures:
    """Return `features` with codes of 0 where they are not above `floors`."""

    def codes(x: Float[Tensor, "token width"]) -> Float[Tensor, "token feature"]:
        values = features.codes(x)
        return torch.where(values > floors.to(values), values, 0.0)

    return features._replace(codes=codes)


def choose_features(
    codes: GenerationCodes, concepts: Sequence[str], concept: str, count: int, steps: range | None = None
) -> FeatureCut:
    """Return the `count` features with the highest importance for `concept` at each of `steps` (None: at all).

    `concepts` are those that the prompts of the images name. Features without a positive importance are left out.
    """
    is_named = torch.tensor([name == concept for name in concepts])
    means = codes.means()
    if len(is_named) != means.shape[1] or not bool(is_named.any()) or bool(is_named.all()):
        raise BadInput(
            f"The features of '{concept}' are found by prompts that name it and prompts that name others of its group; it is "
            f"named by {int(is_named.sum())} of {len(is_named)} prompts, for {means.shape[1]} images. Give images of both kinds."
        )
    features, floors = [], []
    for step, step_means in enumerate(means):
        scores, order = importance(step_means[is_named], step_means[~is_named]).topk(min(count, step_means.shape[1]))
        order = order[scores > 0] if steps is None or step in steps else order[:0]
        features.append(tuple(order.tolist()))
        floors.append(tuple(step_means.mean(0)[order].tolist()))
    return FeatureCut(codes.dictionary, tuple(features), tuple(floors))


def matched_features(codes: GenerationCodes, features: Sequence[int], steps: range | None = None) -> FeatureCut:
    """Return the cut of `features`, which detect a concept, at each of `steps` (None: at all)."""
    means = codes.means().mean(1)
    is_edited = [steps is None or step in steps for step in range(len(means))]
    return FeatureCut(
        codes.dictionary,
        tuple(tuple(features) if edited else () for edited in is_edited),
        tuple(tuple(row[list(features)].tolist()) if edited else () for edited, row in zip(is_edited, means, strict=True)),
    )


class RemovalRates(NamedTuple):
    """The shares that an edit removed and kept; each concept that prompts name has the same weight."""

    ua: float
    """Unlearning accuracy: of the images that showed the concept their prompts name, the share that no longer does; 0 if none
    did."""
    ira: float
    """In-domain retention: of the images that showed another concept of the group, which their prompts name, the share that
    still does."""
    cra: float
    """Cross-domain retention: of all else that prompts state and images had right, the share that still is."""
    own: float
    """The same in those images alone whose prompts name the removed concept: the cost of the edit where it acts."""

    def reach(self, bar: float = BAR) -> bool:
        """Return whether removal and both retentions reach `bar`."""
        return self.least >= bar

    @property
    def least(self) -> float:
        """The least of removal and both retentions."""
        return min(self.ua, self.ira, self.cra)


class RemovalTrial(NamedTuple):
    """The rates of a setting on the prompts that settings are chosen by."""

    features: int
    """At each step and site."""
    strength: float
    """What their codes are multiplied by."""
    rates: RemovalRates


def removal_rates(
    concept: str, concepts: Sequence[str], before: Sequence[JudgeVerdict], after: Sequence[JudgeVerdict]
) -> RemovalRates:
    """Return the rates of an edit that removes `concept`; `concepts` are those that the prompts of the images name.

    Verdicts tell whether an image shows the concept that its prompt names.
    """
    shows, right = defaultdict[str, list[bool]](list), defaultdict[str, list[bool]](list)
    for name, old, new in zip(concepts, before, after, strict=True):
        shows[name] += [new.shows] if old.shows else []
        right[name] += [new.right[statement] for statement, was_right in old.right.items() if was_right]
    return RemovalRates(
        ua=1 - _share([shows[concept]]),
        ira=_share([answers for name, answers in shows.items() if name != concept]),
        cra=_share(right.values()),
        own=_share([right[concept]]),
    )


def _share(answers: Iterable[Sequence[bool]]) -> float:
    """Return the mean over concepts of the share of true answers; 1 where there is nothing to lose."""
    shares = [math.fsum(values) / len(values) for values in answers if values]
    return math.fsum(shares) / len(shares) if shares else 1.0


def best_trial(trials: Sequence[RemovalTrial]) -> RemovalTrial:
    """Return the last trial that is good enough, or else the one with the largest least rate.

    Among equals the one with the largest `own` rate is taken, then the first.
    """
    if not trials:
        raise BadInput("There is no setting to choose from. Name at least one number of features and one strength.")
    enough = [trial for trial in trials if trial.rates.reach(ENOUGH)]
    return enough[-1] if enough else max(trials, key=lambda trial: (trial.rates.least, trial.rates.own))


@final
@dataclass(frozen=True, kw_only=True)
class RemovalImages:
    """Images whose prompts each name a concept of one group, judged without an edit, and a function that judges them with one."""

    concepts: tuple[str, ...]
    """The concept that its prompt names, of each image."""
    before: tuple[JudgeVerdict, ...]
    codes: Mapping[DictionaryRef, GenerationCodes]
    """Of each dictionary, on all images."""
    edited: Callable[[Sequence[int], Sequence[SteeringHook]], Sequence[JudgeVerdict]]
    """Generates the images of these numbers with hooks and returns the verdicts."""
    generated: Callable[[Sequence[int], Sequence[SteeringHook]], Sequence[Image.Image]] | None = None
    """Generates the images of these numbers with hooks and returns them."""

    def rates(self, concept: str, cuts: Mapping[DictionaryRef, FeatureCut], strength: float) -> RemovalRates:
        """Return the rates of `cuts`. Images in which none of their features fires do not change and are not generated again."""
        numbers = self._numbers(concept)
        changed = torch.stack([cut.changes(self.codes[place]) for place, cut in cuts.items()]).any(0)
        stale, before = [number for number in numbers if changed[number]], [self.before[number] for number in numbers]
        after = dict(zip(numbers, before, strict=True))
        if stale:
            hooks = [hook for cut in cuts.values() for hook in cut.steering_hooks(strength)]
            after |= zip(stale, self.edited(stale, hooks), strict=True)
        return removal_rates(concept, [self.concepts[number] for number in numbers], before, list(after.values()))

    def trials(
        self, concept: str, cuts: Mapping[DictionaryRef, FeatureCut], settings: Iterable[Setting]
    ) -> Iterator[RemovalTrial]:
        """Yield trials of `settings` from the mildest to the first that is good enough, and the next stronger one.

        The stronger one is tried because what is just enough for these few images may be too little for others. Settings that
        are no milder than one that retains too little are skipped.
        """
        lossy: list[Setting] = []
        enough: Setting | None = None
        for setting in sorted(settings, key=lambda setting: setting[0] * (1 - setting[1])):
            if any(_no_milder(setting, other) for other in lossy) or (enough is not None and not _no_milder(setting, enough)):
                continue
            count, strength = setting
            first = {place: cut.first(count) for place, cut in cuts.items()}
            trial = RemovalTrial(count, strength, self.rates(concept, first, strength))
            yield trial
            if enough is not None:
                return
            if trial.rates.reach(ENOUGH):
                enough = setting
            elif min(trial.rates.ira, trial.rates.cra) < BAR:
                lossy.append(setting)

    def _numbers(self, concept: str) -> list[int]:
        """Return the images that a removal is judged on: all that name `concept`, and a part of those of each other concept."""
        by_name = {name: [i for i, other in enumerate(self.concepts) if other == name] for name in dict.fromkeys(self.concepts)}
        if concept not in by_name:
            raise BadInput(f"No prompt names '{concept}'. Named are: {', '.join(by_name)}.")
        parts = [numbers if name == concept else numbers[: -(-len(numbers) // PART)] for name, numbers in by_name.items()]
        return sorted(number for numbers in parts for number in numbers)


def _no_milder(setting: Setting, other: Setting) -> bool:
    """Return whether `setting` removes at least as many features as `other`, at least as strongly."""
    return setting[0] >= other[0] and setting[1] <= other[1]


class MatchedFeatures(NamedTuple):
    """The features of a dictionary that detect a concept better than all others, the best first."""

    features: tuple[int, ...] = ()
    ap: float = 0.0
    """Average precision of the best."""


def candidate_cuts(
    selection: RemovalImages,
    concept: str,
    count: int,
    matched: Mapping[DictionaryRef, MatchedFeatures],
    steps: range | None = None,
) -> list[dict[DictionaryRef, FeatureCut]]:
    """Return the cuts to try: `count` features of the highest importance of each dictionary, those matched to the concept, and,
    as one would choose by hand, those of the one dictionary alone that detects the concept best.
    """
    codes, named = selection.codes, selection.concepts
    cuts = {place: matched_features(codes[place], own.features[:count], steps) for place, own in matched.items()}
    detecting = [place for place, own in matched.items() if own.features]
    candidates = [{place: choose_features(codes[place], named, concept, count, steps) for place in matched}]
    candidates += [cuts] if detecting else []
    if len(detecting) > 1:
        best = max(detecting, key=lambda place: matched[place].ap)
        candidates.append({best: cuts[best]})
    return candidates
