"""The worlds that concepts are removed in: the drawn world, and concepts in words with CLIP or a VLM as the judge."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from PIL import Image

from difflex.dictionaries import Dictionary
from difflex.effects.concept_specs import ConceptFile, ConceptSpec, greyed, region_of
from difflex.effects.drawn_world import CAPTION_GROUPS, ConceptCaption, DrawnJudge, captions_by_concept
from difflex.effects.inputs import ModelFunctions, to_images, to_tensor
from difflex.effects.judging import Images, JudgeVerdict
from difflex.effects.removal_features import GenerationCodes, RemovalImages
from difflex.evaluation import ClipModel
from difflex.explanation import PresenceAnswer, PresenceQuestion
from difflex.miniature import load_judge
from difflex.miniature.world import CONCEPTS
from difflex.records import Site
from difflex.steering import SteeringHook
from difflex.study import DictionaryRef

SEED_DISTANCE = 10**6
"""Between the first seeds of two sets of images."""
CaptionVerdicts = Callable[[Sequence[int], Images], list[JudgeVerdict]]
"""The verdicts on images of captions by their numbers: whether each shows the concept that its caption names, and all else."""
Ask = Callable[[Sequence[PresenceQuestion]], Sequence[PresenceAnswer]]


class RemovalWorld(NamedTuple):
    """The captions that name concepts of a group, and the judge of their images."""

    groups: Mapping[str, Sequence[str]]
    """The concepts that captions of a group name."""
    removed: Mapping[str, Sequence[str]]
    """Those of them that are removed."""
    captions: Callable[[str, int], list[list[ConceptCaption]]]
    """So many captions for each concept of a group."""
    judged: Callable[[str, Sequence[ConceptCaption], Images], CaptionVerdicts]
    """The judge of images of captions, which are given with their unedited images."""
    features: Mapping[str, int] = {}
    """The features that a concept file names, by concept."""
    judge: str = ""
    """The name of the CLIP or VLM; empty for the judge of the drawn world."""
    checksums: Callable[[], Mapping[str, str]] = dict
    """Of the CLIP and of the concept file."""


def _drawn_verdicts(group: str, captions: Sequence[ConceptCaption], unedited: Images) -> CaptionVerdicts:
    judge = DrawnJudge(_loaded_judge())
    return lambda numbers, images: judge.of_captions(group, [captions[number] for number in numbers], images)


_loaded_judge = cache(load_judge)
_DRAWN_GROUPS = {group: CONCEPTS[group] for group in CAPTION_GROUPS}
DRAWN_REMOVAL = RemovalWorld(_DRAWN_GROUPS, _DRAWN_GROUPS, captions_by_concept, _drawn_verdicts)
"""The world of the miniatures."""


class _Groups(NamedTuple):
    """The concepts of a file, by group."""

    specs: Mapping[str, ConceptSpec]

    @property
    def concepts(self) -> dict[str, tuple[str, ...]]:
        """The concepts of each group: those that the file describes, and those that it names instead."""
        names: dict[str, dict[str, None]] = {}
        for spec in self.specs.values():
            names.setdefault(spec.group, {}).update(dict.fromkeys((spec.concept, *spec.instead)))
        return {group: tuple(concepts) for group, concepts in names.items()}

    @property
    def removed(self) -> dict[str, tuple[str, ...]]:
        """The concepts of each group that the file describes."""
        return {
            group: tuple(name for name in concepts if name in self.specs and self.specs[name].group == group)
            for group, concepts in self.concepts.items()
        }

    def spec(self, group: str, concept: str) -> ConceptSpec:
        """Return the description of a concept, or else of the first of its group: for its prompts and its region."""
        own = self.specs.get(concept)
        return own if own is not None and own.group == group else next(s for s in self.specs.values() if s.group == group)

    def captions(self, group: str, count: int) -> list[list[ConceptCaption]]:
        """Return so many captions for each concept: its prompts in turn, which differ in their seeds."""
        return [
            [ConceptCaption(name, self.spec(group, name).prompt(number, name)) for number in range(count)]
            for name in self.concepts[group]
        ]


def clip_removal(concepts: ConceptFile, name: str, load: Callable[[], ClipModel], checksum: Callable[[], str]) -> RemovalWorld:
    """Return the world of concepts in words whose judge is the CLIP called `name`, which `load` opens.

    An image shows the concept of its group whose name is the most similar to its region; the rest is right if the image outside
    of the region is most similar to its own unedited image, not to that of another caption.
    """
    groups, opened = _Groups(concepts.specs), cache(load)

    def judged(group: str, captions: Sequence[ConceptCaption], unedited: Images) -> CaptionVerdicts:
        clip, names = opened(), groups.concepts[group]
        regions = [groups.spec(group, caption.concept).region for caption in captions]
        outside = lambda numbers, images: torch.cat(  # noqa: E731
            [clip.embed_images(greyed(image[None], regions[number])) for number, image in zip(numbers, images, strict=True)]
        )
        texts, before = clip.embed_texts(names), outside(range(len(captions)), unedited)

        def verdicts(numbers: Sequence[int], images: Images) -> list[JudgeVerdict]:
            parts = [image[region_of(image, regions[number])][None] for number, image in zip(numbers, images, strict=True)]
            shares = torch.cat([(clip.logit_scale * clip.embed_images(part) @ texts.T).softmax(1) for part in parts])
            similarity = outside(numbers, images) @ before.T
            own = similarity[torch.arange(len(numbers)), torch.tensor(list(numbers))]
            are_right = own >= similarity.amax(1) - 1e-6
            return [
                JudgeVerdict(names[int(row.argmax())] == captions[number].concept, {"the rest": bool(right)}, float(row.max()))
                for number, row, right in zip(numbers, shares, are_right, strict=True)
            ]

        return verdicts

    return _world(concepts, name, judged, lambda: {"judge": checksum()})


def vlm_removal(concepts: ConceptFile, name: str, ask: Ask) -> RemovalWorld:
    """Return the world of concepts in words whose judge is the VLM called `name`, which `ask` asks."""
    groups = _Groups(concepts.specs)

    def judged(group: str, captions: Sequence[ConceptCaption], unedited: Images) -> CaptionVerdicts:
        def verdicts(numbers: Sequence[int], images: Images) -> list[JudgeVerdict]:
            questions = list[PresenceQuestion]()
            for number, image, pixels in zip(numbers, to_images(images), images, strict=True):
                caption = captions[number]
                region = groups.spec(group, caption.concept).region
                part = None if region is None else next(to_images(pixels[region_of(pixels, region)][None]))
                rest = caption.caption.replace(caption.concept, "something")
                questions.append(PresenceQuestion(image, part, caption.concept, rest))
            return [JudgeVerdict(answer.shows, {"the rest": answer.rest}, 1.0) for answer in ask(questions)]

        return verdicts

    return _world(concepts, name, judged)


def _world(
    concepts: ConceptFile,
    name: str,
    judged: Callable[[str, Sequence[ConceptCaption], Images], CaptionVerdicts],
    checksums: Callable[[], Mapping[str, str]] = dict,
) -> RemovalWorld:
    groups = _Groups(concepts.specs)
    features = {spec.concept: spec.feature for spec in concepts.specs.values() if spec.feature is not None}
    files = lambda: {"concepts": concepts.checksum, **checksums()}  # noqa: E731
    return RemovalWorld(groups.concepts, groups.removed, groups.captions, judged, features, name, files)


def image_sets(
    model: ModelFunctions,
    world: RemovalWorld,
    dictionaries: Mapping[DictionaryRef, Dictionary],
    group: str,
    counts: Sequence[int],
) -> list[RemovalImages]:
    """Return sets of images of captions, with so many for each concept; they share no caption and no seed."""
    by_concept, ends = world.captions(group, sum(counts)), [0, *accumulate(counts)]
    captions = [[caption for named in by_concept for caption in named[start:end]] for start, end in pairwise(ends)]
    return [
        _judged_images(model, world, dictionaries, group, part, number * SEED_DISTANCE) for number, part in enumerate(captions)
    ]


def _judged_images(
    model: ModelFunctions,
    world: RemovalWorld,
    dictionaries: Mapping[DictionaryRef, Dictionary],
    group: str,
    captions: Sequence[ConceptCaption],
    first_seed: int,
) -> RemovalImages:
    """Generate and judge the images of captions, and collect the codes of dictionaries."""
    shot = replace(model.shots(range(1))[0], timestep=None)
    shots = [replace(shot, prompt=item.caption, seed=seed) for seed, item in enumerate(captions, first_seed)]
    codes = {place: GenerationCodes(dictionary) for place, dictionary in dictionaries.items()}

    def generated(numbers: Sequence[int], hooks: Sequence[SteeringHook]) -> list[Image.Image]:
        sites = list(dict.fromkeys(place.site for place in codes))[:1]
        images: list[Image.Image] = []
        for batch, activations in model.finish([shots[i] for i in numbers], sites, hooks):
            images += batch
            for _ in activations:  # the run goes on as they are read
                pass
        return images

    def pixels(numbers: Sequence[int], sites: Iterable[Site], hooks: Sequence[SteeringHook] = ()) -> Images:
        """Return the images of these numbers; without hooks their codes are collected."""
        generated: list[Image.Image] = []
        for images, activations in model.finish([shots[i] for i in numbers], list(dict.fromkeys(sites)), hooks):
            generated += images
            for batch in activations if not hooks else ():
                for place in [place for place in codes if place.site == batch.site]:
                    codes[place].add(batch)
        return to_tensor(generated)

    unedited = pixels(range(len(shots)), (place.site for place in codes))
    verdicts = world.judged(group, captions, unedited)
    return RemovalImages(
        concepts=tuple(caption.concept for caption in captions),
        before=tuple(verdicts(range(len(shots)), unedited)),
        codes=codes,
        edited=lambda numbers, hooks: verdicts(numbers, pixels(numbers, [hooks[0].site], hooks)),
        generated=generated,
    )
