"""The features that are measured: their top images, the images that their explanations ask for, and a random other feature."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple, final

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.nn import functional as F

from difflex.effects.drawn_world import CAPTION_GROUPS, captions_by_concept, group_of
from difflex.errors import BadInput, UnknownName
from difflex.features import Book, ImageAlbum
from difflex.features.detected import DetectedConcepts
from difflex.features.entries import COVER_THRESHOLD, TokenMap
from difflex.measures.image_aspects import Images
from difflex.measures.records import MeasureConfig
from difflex.miniature.world import PIXELS
from difflex.study import DictionaryRef, Study

TRIES = 100


class TopImage(NamedTuple):
    """An image in which a feature is strongest, and where it fires there."""

    file: str
    map: TokenMap


class FeatureExplanation(NamedTuple):
    """What a feature means: a text, or a concept of the drawn world."""

    text: str
    prompts: tuple[str, ...]
    """Of the images that it asks for; none for a concept that captions do not name."""


@final
@dataclass(frozen=True, kw_only=True)
class MeasuredFeature:
    """A feature with everything that its measures read."""

    feature: int
    partner: int
    """A random other feature, of another explanation if it has one."""
    top: tuple[TopImage, ...]
    partner_top: tuple[TopImage, ...]
    random_images: tuple[str, ...]
    """As many images of the book, drawn at random."""
    explanation: FeatureExplanation | None
    partner_explanation: FeatureExplanation | None


@final
@dataclass(frozen=True, kw_only=True)
class MeasureInputs:
    """Everything that the measures of a dictionary's features read, besides the model."""

    features: tuple[MeasuredFeature, ...]
    prompts: tuple[str, ...]
    """Of the images that are edited."""
    grid: tuple[int, int] | None
    """Rows and columns of the tokens; None for text."""
    peaks: Mapping[int, float]
    """The largest code of each feature in its book."""
    are_judged: bool
    """Whether explanations are concepts that the judge of the drawn world reads."""

    @cached_property
    def digest(self) -> str:
        """A checksum that changes with the inputs."""
        plain = [(each.feature, each.partner, each.top, each.random_images, each.explanation) for each in self.features]
        return hashlib.sha256(json.dumps([plain, self.prompts, self.are_judged]).encode()).hexdigest()


def read_inputs(study: Study, place: DictionaryRef, book: Book, config: MeasureConfig) -> MeasureInputs:
    """Return the inputs of the measures of a dictionary's features, from its book and what is known about it."""
    counts = Counter(feature for feature, _ in book.top_images())
    eligible = sorted(feature for feature, count in counts.items() if count >= config.images)
    if len(eligible) < 2:
        raise BadInput(
            f"{len(eligible)} features of {place} have {config.images} top images, and 2 are needed. Run difflex collect with "
            "more images, or give --images fewer."
        )
    chooser = random.Random(config.seed)
    for feature in config.features:
        if feature not in counts or counts[feature] < config.images:
            raise UnknownName(
                f"Feature {feature} of {place} has {counts[feature]} top images, and {config.images} are measured. Name another "
                "one, or give --images fewer."
            )
    chosen = config.features or tuple(sorted(chooser.sample(eligible, min(config.sample, len(eligible)))))
    are_judged, explain = _explanations(study, place, book, config)
    files = [image.file for image in book.images()]
    prompts = sorted({caption.caption for caption in book.captions() if caption.caption}) or [""]

    def measured(feature: int) -> MeasuredFeature:
        own, partner = explain(feature), _partner(feature, eligible, explain, chooser)
        return MeasuredFeature(
            feature=feature,
            partner=partner,
            top=_top(book, feature, config.images),
            partner_top=_top(book, partner, config.images),
            random_images=tuple(chooser.sample(files, config.images) if len(files) >= config.images else files),
            explanation=own,
            partner_explanation=explain(partner),
        )

    features = tuple(map(measured, chosen))
    return MeasureInputs(
        features=features,
        prompts=tuple(chooser.choices(prompts, k=config.images)),
        grid=book.about.grid,
        peaks={feature: book.feature(feature).peak for feature in chosen},
        are_judged=are_judged,
    )


def _explanations(
    study: Study, place: DictionaryRef, book: Book, config: MeasureConfig
) -> tuple[bool, Callable[[int], FeatureExplanation | None]]:
    """Return whether features are explained by concepts of the drawn world, and the explanation of each."""
    detected = DetectedConcepts.read(study, place)
    sizes = {(image.height, image.width) for image in book.images()}
    if detected is not None and detected.are_drawn and detected.is_current and sizes == {(PIXELS, PIXELS)}:
        captions = _drawn_captions(config.images)
        names = {feature: best.concept for feature, best in detected.by_feature.items()}
        return (
            True,
            lambda feature: (
                FeatureExplanation(names[feature], captions.get(names[feature], ()))
                if feature in names and group_of(names[feature])
                else None
            ),
        )
    texts: dict[int, str] = {}
    for explanation in book.explanations():
        if explanation.state == "done":
            texts.setdefault(explanation.feature, explanation.text)
    return (
        False,
        lambda feature: FeatureExplanation(texts[feature], (texts[feature],) * config.images) if feature in texts else None,
    )


@cache
def _drawn_captions(count: int) -> Mapping[str, tuple[str, ...]]:
    """Return captions that name each concept of the drawn world which captions of a single object can name."""
    by_concept = [named for group in CAPTION_GROUPS for named in captions_by_concept(group, count)]
    return {named[0].concept: tuple(caption for _, caption in named) for named in by_concept}


def _partner(
    feature: int, eligible: Sequence[int], explain: Callable[[int], FeatureExplanation | None], chooser: random.Random
) -> int:
    """Return a random other feature; for a feature with an explanation, one with another explanation if there is one."""
    others, own = [other for other in eligible if other != feature], explain(feature)
    for other in chooser.sample(others, min(TRIES, len(others))):
        explanation = explain(other)
        if own is None or (explanation is not None and explanation.prompts and explanation.text != own.text):
            return other
    return chooser.choice(others)


def _top(book: Book, feature: int, count: int) -> tuple[TopImage, ...]:
    examples = sorted(book.examples(feature, "top"), key=lambda example: -example.peak)[:count]
    shots = book.shots(example.shot for example in examples)
    return tuple(TopImage(shots[example.shot].image.file, example.map) for example in examples)


def open_images(album: ImageAlbum, files: Sequence[str]) -> Images:
    """Return the pixels of images of the album."""
    from difflex.effects.inputs import to_tensor

    return to_tensor(album.open(file) for file in files)


def covered(where: TokenMap, grid: tuple[int, int], pixels: int) -> Bool[Tensor, "row column"]:
    """Return the pixels of a square image at which a feature fires with 20 % of its largest value there or more."""
    weights = torch.zeros(grid[0] * grid[1])
    weights[list(where.tokens)] = torch.tensor(where.values)
    mask = (weights >= COVER_THRESHOLD * weights.max()).float().view(1, 1, *grid)
    return F.interpolate(mask, size=(pixels, pixels), mode="nearest")[0, 0] > 0
