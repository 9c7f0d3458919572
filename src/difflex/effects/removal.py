"""Concept removal: which features are a concept's, and what is lost with them; by the scores of SAeUron (arXiv 2501.18052)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from difflex.dictionaries import Dictionary
from difflex.effects.judging import JudgeVerdict
from difflex.errors import BadInput
from difflex.files import parsing, read_json, write_json
from difflex.records import Activations, Edit
from difflex.steering import EditFeatures, SteeringHook, dictionary_features, steering_hooks

__all__ = [
    "FeatureCut",
    "GenerationCodes",
    "RemovalImages",
    "RemovalRates",
    "RemovalResults",
    "RemovalTrial",
    "RemovedConcept",
    "about",
    "best_of",
    "choose",
    "importance",
    "rates",
]

FORMAT = 1
AGAIN = "Delete it and run the command that makes it again."
BAR, ENOUGH = 0.9, 0.95
"""What removal and retention are to reach; and what ends the search for more where they do."""
PART = 6
"""Of the prompts that name each other concept, one in so many is drawn with an edit."""


Setting = tuple[int, float]
"""A number of features at each step and site, and what their codes are multiplied by."""


class RemovalRates(NamedTuple):
    """What an edit took from images, and what it left; each concept that prompts name counts alike."""

    ua: float
    """Unlearning accuracy: of the images that showed the concept their prompts name, the share that no longer does; 0 where
    none did."""
    ira: float
    """In-domain retention: of the images that showed another concept of the group, which their prompts name, the share that
    still does."""
    cra: float
    """Cross-domain retention: of all else that prompts state and images had right, the share that still is."""
    own: float
    """The same in the images alone whose prompts name the concept that is removed: what the edit costs where it is at work."""

    def reach(self, bar: float = BAR) -> bool:
        """Whether removal and both retentions do."""
        return self.least >= bar

    @property
    def least(self) -> float:
        """The least of removal and both retentions."""
        return min(self.ua, self.ira, self.cra)


class RemovalTrial(NamedTuple):
    """What came of a setting on the prompts it was chosen by."""

    features: int
    """At each step and site."""
    strength: float
    """What their codes were multiplied by."""
    rates: RemovalRates


@final
@dataclass(frozen=True, kw_only=True)
class RemovedConcept:
    """A concept, what was taken away for it, and what came of that on prompts that nothing was chosen by."""

    concept: str
    group: str
    features: Mapping[str, tuple[tuple[int, ...], ...]]
    """By dictionary: the features of each step."""
    strength: float
    """What their codes were multiplied by: 0 takes them away, less writes the opposite."""
    tried: tuple[RemovalTrial, ...]
    """Settings on the prompts they were chosen by, in the order they were tried; none where there was nothing to choose."""
    images: int
    """How many of those prompts name it."""
    shown: float
    """The share of their unedited images that show it."""
    rates: RemovalRates

    @property
    def each(self) -> int:
        """How many features go at a step and site, at most."""
        return max((len(step) for steps in self.features.values() for step in steps), default=0)


@final
@dataclass(frozen=True, kw_only=True)
class RemovalResults:
    """Concepts removed with the same dictionaries, as it is written and read again."""

    model: str
    dictionaries: tuple[str, ...]
    """SITE/LABEL of each; the features of all were edited at once."""
    concepts: tuple[RemovedConcept, ...]
    made_from: Mapping[str, str | int | float]
    """What the figures depend on."""

    def reaching(self, bar: float = BAR) -> list[RemovedConcept]:
        """The concepts of which at least `bar` is removed while at least `bar` of everything else stays."""
        return [each for each in self.concepts if each.rates.reach(bar)]

    def save(self, path: Path) -> Path:
        """`path`, which now holds this as JSON."""
        return write_json(path, FORMAT, asdict(self))

    @classmethod
    def load(cls, path: Path) -> RemovalResults:
        """What was written to `path`."""
        said = read_json(path, FORMAT, AGAIN)
        with parsing(path, "what was removed", AGAIN):
            concepts = tuple(map(_removed, said.pop("concepts")))
            return cls(**{**said, "dictionaries": tuple(said["dictionaries"]), "concepts": concepts})


def _removed(said: dict) -> RemovedConcept:
    tried = tuple(RemovalTrial(number, strength, RemovalRates(*shares)) for number, strength, shares in said["tried"])
    features = {name: tuple(tuple(step) for step in steps) for name, steps in said["features"].items()}
    return RemovedConcept(**{**said, "features": features, "tried": tried, "rates": RemovalRates(*said["rates"])})


def rates(concept: str, named: Sequence[str], before: Sequence[JudgeVerdict], after: Sequence[JudgeVerdict]) -> RemovalRates:
    """What an edit that is to remove `concept` did: `named` are the concepts of the group that the prompts name, one for each
    image, and verdicts tell whether an image shows that."""
    still, kept = defaultdict[str, list[bool]](list), defaultdict[str, list[bool]](list)
    for name, old, new in zip(named, before, after, strict=True):
        still[name] += [new.shows] if old.shows else []
        kept[name] += [new.right[what] for what, right in old.right.items() if right]
    others = [name for name in still if name != concept]
    return RemovalRates(
        ua=1 - _share([still[concept]]),
        ira=_share([still[name] for name in others]),
        cra=_share(kept.values()),
        own=_share([kept[concept]]),
    )


def _share(answers: Iterable[Sequence[bool]]) -> float:
    """The mean over several of the share of yes; where there is nothing to lose, nothing is lost."""
    shares = [math.fsum(each) / len(each) for each in answers if each]
    return math.fsum(shares) / len(shares) if shares else 1.0


def best_of(tried: Sequence[RemovalTrial]) -> RemovalTrial:
    """The setting to take: the last that is good enough; if none is, the one whose least rate is largest, among equals the one
    that costs least where it is at work, then the first."""
    if not tried:
        raise BadInput("There is no setting to choose from. Name at least one number of features and one strength.")
    enough = [each for each in tried if each.rates.reach(ENOUGH)]
    return enough[-1] if enough else max(tried, key=lambda each: (each.rates.least, each.rates.own))


@final
class GenerationCodes:
    """How the features of a dictionary fire while images are drawn without an edit, step by step and image by image."""

    def __init__(self, dictionary: Dictionary) -> None:
        self.dictionary = dictionary
        self._means: dict[float, list[Tensor]] = {}
        self._peaks: dict[float, list[Tensor]] = {}

    def add(self, seen: Activations) -> None:
        """Nothing; further images at one step are taken in. Images come in the same order at every step."""
        if seen.site != self.dictionary.site:
            raise BadInput(f"{self.dictionary.name} reads {self.dictionary.site}; these are activations of {seen.site}.")
        images, tokens, _ = seen.values.shape
        values, indices = (part.cpu() for part in self.dictionary.encode(seen.values.flatten(0, 1).float()))
        values, row = values.clamp(min=0).flatten(), torch.arange(images).repeat_interleave(tokens * indices.shape[1])
        flat, whole = row * self.dictionary.size + indices.flatten(), torch.zeros(images * self.dictionary.size)
        timestep = seen.shots[0].timestep or 0.0
        means, peaks = whole.index_add(0, flat, values) / tokens, whole.scatter_reduce(0, flat, values, "amax")
        self._means.setdefault(timestep, []).append(means.view(images, -1))
        self._peaks.setdefault(timestep, []).append(peaks.view(images, -1))

    def means(self) -> Float[Tensor, "step image feature"]:
        """The mean code of each feature over the tokens of each image; steps in the order they are run."""
        return _by_step(self._means)

    def peaks(self) -> Float[Tensor, "step image feature"]:
        """The largest code of each feature in each image."""
        return _by_step(self._peaks)


def _by_step(found: Mapping[float, Sequence[Tensor]]) -> Tensor:
    if not found:
        raise BadInput("No image was drawn to choose features by. Ask for 1 or more.")
    return torch.stack([torch.cat(list(found[timestep])) for timestep in sorted(found, reverse=True)])


def importance(with_it: Float[Tensor, "image feature"], without: Float[Tensor, "other feature"]) -> Float[Tensor, " feature"]:
    """How much more of all code each feature has on images with a concept than on images with others of its group.

    Given mean codes at one step: the feature's share in the sum over features with the concept, less that share without it.
    """
    shares = [codes / codes.sum().clamp(min=1e-30) for codes in (with_it.mean(0), without.mean(0))]
    return shares[0] - shares[1]


@final
@dataclass(frozen=True)
class FeatureCut:
    """What goes at the site of a dictionary."""

    dictionary: Dictionary
    features: tuple[tuple[int, ...], ...]
    """Of each step, the most telling first."""
    floors: tuple[tuple[float, ...], ...]
    """Codes above these are touched: the mean codes over all images that features were chosen by."""

    def of(self, number: int) -> FeatureCut:
        """The same with no more than `number` features at a step."""
        features, floors = (tuple(step[:number] for step in self.features), tuple(step[:number] for step in self.floors))
        return replace(self, features=features, floors=floors)

    def touches(self, firings: GenerationCodes) -> Bool[Tensor, " image"]:
        """Which of the images it changes at all: those in which one of its features fires above its floor."""
        peaks = firings.peaks()
        found = torch.zeros(peaks.shape[1], dtype=torch.bool)
        for step, features, floors in zip(peaks, self.features, self.floors, strict=True):
            found |= (step[:, list(features)] > torch.tensor(floors)).any(1)
        return found

    def steering_hooks(self, strength: float) -> list[SteeringHook]:
        """The edit: at each step the codes of its features that are above their floors, multiplied by `strength`."""
        given: dict[Edit, EditFeatures] = {}
        for step, (features, floors) in enumerate(zip(self.features, self.floors, strict=True)):
            if features:
                edit = Edit(
                    operation="scale", site=self.dictionary.site, features=features, strength=strength, steps=(step, step + 1)
                )
                given[edit] = _above(dictionary_features(self.dictionary, features, None), torch.tensor(floors))
        return steering_hooks(given, given.__getitem__)


def _above(features: EditFeatures, floors: Float[Tensor, " feature"]) -> EditFeatures:
    """The same features, silent where their codes are no larger than `floors`."""

    def codes(x: Float[Tensor, "token width"]) -> Float[Tensor, "token feature"]:
        found = features.codes(x)
        return torch.where(found > floors.to(found), found, 0.0)

    return features._replace(codes=codes)


def choose(firings: GenerationCodes, named: Sequence[str], concept: str, number: int, steps: range | None = None) -> FeatureCut:
    """The `number` features of each step (of `steps` alone, if given) with the highest importance for `concept`.

    `named` are the concepts that the prompts of the images name. Features that are no more important with the concept than
    without it are left out.
    """
    is_it = torch.tensor([name == concept for name in named])
    means = firings.means()
    if len(is_it) != means.shape[1] or not bool(is_it.any()) or bool(is_it.all()):
        raise BadInput(
            f"The features of '{concept}' are found by prompts that name it beside prompts that name others of its group; there "
            f"are {int(is_it.sum())} among {len(is_it)}, and {means.shape[1]} images. Give some of both, and all images."
        )
    features, floors = [], []
    for step, codes in enumerate(means):
        scores, order = importance(codes[is_it], codes[~is_it]).topk(min(number, codes.shape[1]))
        order = order[scores > 0] if steps is None or step in steps else order[:0]
        features.append(tuple(order.tolist()))
        floors.append(tuple(codes.mean(0)[order].tolist()))
    return FeatureCut(firings.dictionary, tuple(features), tuple(floors))


@final
@dataclass(frozen=True, kw_only=True)
class RemovalImages:
    """Images whose prompts name a concept of one group each, as they are without an edit, and a way to draw them with one."""

    named: tuple[str, ...]
    """The concepts, image by image."""
    before: tuple[JudgeVerdict, ...]
    firings: tuple[GenerationCodes, ...]
    """Of each dictionary, on all images."""
    edited: Callable[[Sequence[int], Sequence[SteeringHook]], Sequence[JudgeVerdict]]
    """What is seen of the images of these numbers, drawn under edits."""

    def chosen(self, concept: str, number: int, steps: range | None = None) -> list[FeatureCut]:
        """What is to go for `concept` at the site of each dictionary."""
        return [choose(firings, self.named, concept, number, steps) for firings in self.firings]

    def rates(self, concept: str, cuts: Sequence[FeatureCut], strength: float) -> RemovalRates:
        """What comes of taking away `cuts`. An image in which none of their features fires is not drawn anew: it is the same."""
        about = self._about(concept)
        touched = torch.stack([cut.touches(firings) for cut, firings in zip(cuts, self.firings, strict=True)]).any(0)
        anew, after = [number for number in about if touched[number]], list(self.before)
        if anew:
            edits = [steering for cut in cuts for steering in cut.steering_hooks(strength)]
            for number, verdict in zip(anew, self.edited(anew, edits), strict=True):
                after[number] = verdict
        named = [self.named[number] for number in about]
        return rates(concept, named, [self.before[number] for number in about], [after[number] for number in about])

    def tried(self, concept: str, cuts: Sequence[FeatureCut], settings: Iterable[Setting]) -> Iterator[RemovalTrial]:
        """What comes of numbers of features and strengths, from the mildest on, up to the first that is more than good enough,
        and one step further: what is just enough for these few images may be too little for others.

        What is in both no milder than a setting that retains too little is not tried.
        """
        lost: list[Setting] = []
        enough: Setting | None = None
        for setting in sorted(settings, key=lambda each: each[0] * (1 - each[1])):
            if any(_no_milder(setting, other) for other in lost) or (enough is not None and not _no_milder(setting, enough)):
                continue
            number, strength = setting
            found = RemovalTrial(number, strength, self.rates(concept, [cut.of(number) for cut in cuts], strength))
            yield found
            if enough is not None:
                return
            if found.rates.reach(ENOUGH):
                enough = setting
            elif min(found.rates.ira, found.rates.cra) < BAR:
                lost.append(setting)

    def _about(self, concept: str) -> list[int]:
        """The images that removing `concept` is judged by: all that name it, and of every other concept a part."""
        of = {name: [number for number, each in enumerate(self.named) if each == name] for name in dict.fromkeys(self.named)}
        if concept not in of:
            raise BadInput(f"No prompt names '{concept}'. Named are: {', '.join(of)}.")
        return sorted(number for name, each in of.items() for number in (each if name == concept else each[: _part(len(each))]))


def about(concepts: int, each: int) -> int:
    """By how many images the removal of one of so many concepts is judged, if prompts name each of them so often."""
    return each + (concepts - 1) * _part(each)


def _part(images: int) -> int:
    return -(-images // PART)


def _no_milder(one: Setting, other: Setting) -> bool:
    """Whether `one` takes no fewer features than `other`, and no less strongly."""
    return one[0] >= other[0] and one[1] <= other[1]
