"""The worlds that edits are judged in: the drawn world, and concepts in words with CLIP or a VLM as the judge."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from types import EllipsisType
from typing import Any, NamedTuple, final

import torch
from jaxtyping import Float
from torch import Tensor

from difflex.effects.drawn_world import caption_pairs, caption_region, caption_task, group_of, with_concept
from difflex.effects.effect_aware import EffectJudge, drawn_effect_judge, similarity_effect_judge
from difflex.effects.inputs import to_images
from difflex.effects.judging import Images, JudgedGenerator, JudgeVerdict, SteeringTask, SteeringTrial
from difflex.errors import BadInput, DifflexError, UnknownName
from difflex.evaluation import ClipModel
from difflex.explanation import CachedClient, PresenceAnswer, PresenceQuestion, ask_presence
from difflex.files import file_sha256
from difflex.miniature import load_judge
from difflex.records import Rectangle, Shot
from difflex.steering import rectangle
from difflex.values import check_fields, fits, shown

__all__ = [
    "DRAWN_WORLD",
    "ConceptSpec",
    "JudgedWorld",
    "clip_world",
    "greyed",
    "read_concepts",
    "region_of",
    "similarity_judge",
    "vlm_judge",
    "vlm_world",
]

BLANK = "{}"
"""Stands in a prompt for a concept."""
KEYS = ("name", "group", "instead", "prompts", "region", "feature")
CACHED = 2
"""Batches of unedited images that are cached: of a task's trials, and of its edited prompts."""
Verdicts = Callable[[SteeringTask, Sequence[SteeringTrial], Images], list[JudgeVerdict]]


@final
@dataclass(frozen=True, kw_only=True)
class ConceptSpec:
    """A concept that edits should make appear, in words."""

    concept: str
    """As a prompt would name it: `a dog`."""
    group: str
    """The kind of concept: `animal`."""
    instead: tuple[str, ...]
    """Other concepts of the group, which the images show without the edit."""
    prompts: tuple[str, ...]
    """Each with a {} for a concept."""
    region: Rectangle | None = None
    """Where the concept should appear; None for the whole image."""
    feature: int | None = None
    """The feature of the dictionary to steer with; None for the one that detects the concept best."""

    def __post_init__(self) -> None:
        check_fields(self)
        if re.search(r"[/\\\x00-\x1f]", self.group) or not 0 < len(self.group.encode()) <= 100:
            raise BadInput(
                f"The group {shown(self.group)} cannot be part of a file name. Use up to 100 letters, without / and \\."
            )
        if self.feature is not None and self.feature < 0:
            raise BadInput(f"There is no feature {self.feature} for the concept '{self.concept}'. They are numbered from 0.")
        if not self.concept or not self.instead or not self.prompts or not all(BLANK in prompt for prompt in self.prompts):
            raise BadInput(
                f"The concept {shown(self.concept)} is incomplete. It needs a name, one or more other concepts of its group in "
                f"'instead', and one or more prompts in 'prompts', each with a {BLANK} for the concept."
            )

    def task(self, trials: int) -> SteeringTask:
        """Return trials: every prompt with every other concept, then again with other seeds."""
        prompts = [self.prompt(seed, self._other(seed)) for seed in range(trials)]
        return SteeringTask.of(self.concept, self.group, [(prompt, self.region) for prompt in prompts])

    def pairs(self, count: int) -> list[tuple[str, str]]:
        """Return pairs of prompts that differ only in the concept: it, and another one of its group; all different."""
        count = min(count, len(self.prompts) * len(self.instead))
        return [(self.prompt(i, self.concept), self.prompt(i, self._other(i))) for i in range(count)]

    def with_concept(self, trial: SteeringTrial) -> SteeringTrial:
        """Return the trial with a prompt that names the concept: the baseline that edits are compared with."""
        return trial._replace(prompt=self.prompt(trial.seed, self.concept))

    def rest(self, trial: SteeringTrial) -> str:
        """Return the prompt of a trial with `something` for the concept."""
        return self.prompt(trial.seed, "something")

    def prompt(self, number: int, word: str) -> str:
        """Return the prompt of a number, in turn, with a word in its blank."""
        return self.prompts[number % len(self.prompts)].replace(BLANK, word)

    def _other(self, number: int) -> str:
        return self.instead[number // len(self.prompts) % len(self.instead)]


class ConceptFile(NamedTuple):
    """The concepts of a TOML file by name, and its SHA-256."""

    specs: Mapping[str, ConceptSpec]
    checksum: str


def read_concepts(path: Path) -> ConceptFile:
    """Read a TOML file of concepts, each a table `[[concept]]`."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8")).get("concept")
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{path} cannot be read as concepts: {error}. Write TOML, with a table [[concept]] for each.") from error
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables) or not tables:
        raise BadInput(f"{path} has no concept. Write a table [[concept]] for each.")
    specs = [_parse_spec(path, table) for table in tables]
    names = [spec.concept for spec in specs]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise BadInput(f"{path} describes the concept {shown(twice)} twice. Give each concept one table.")
    return ConceptFile(dict(zip(names, specs, strict=True)), file_sha256(path))


def _parse_spec(path: Path, table: Mapping[str, Any]) -> ConceptSpec:
    listed = lambda key: tuple(value) if isinstance(value := table.get(key, []), list) else (value,)  # noqa: E731
    try:
        if unknown := [key for key in table if key not in KEYS]:
            raise UnknownName.among("The key", unknown[0], KEYS)
        region = table.get("region")
        if region is not None and not fits(tuple[float, ...], listed("region")):
            raise BadInput(f"The region {shown(region)} is not a list of four numbers.")
        return ConceptSpec(
            concept=table.get("name", ""),
            group=table.get("group", "concept"),
            instead=listed("instead"),
            prompts=listed("prompts"),
            region=None if region is None else rectangle(listed("region")),
            feature=table.get("feature"),
        )
    except DifflexError as error:
        raise BadInput(f"In {path} the concept {shown(table.get('name', ''))}: {error}") from error


class JudgedWorld(NamedTuple):
    """The tasks that edits are judged on, and their judge."""

    task: Callable[[str, int], SteeringTask]
    """A number of trials for a concept."""
    pairs: Callable[[str, int], list[tuple[str, str]]]
    """At most so many pairs of prompts with a concept and without it."""
    with_concept: Callable[[SteeringTrial, str], SteeringTrial]
    region: Callable[[Shot, str], Rectangle | None]
    """Where the image of a prompt shows the concept."""
    judged: Callable[[JudgedGenerator], JudgedGenerator]
    """A model with the judge of this world."""
    judge: str = ""
    """The name of the CLIP or VLM; empty for the judge of the drawn world."""
    judge_checksum: Callable[[], str] = str
    """Of the CLIP; empty for other judges."""
    concepts: ConceptFile = ConceptFile({}, "")
    """Empty for the drawn world."""
    effect_judge: Callable[[], EffectJudge] | None = None
    """The judge with gradients; None for a VLM, which has none."""


DRAWN_WORLD = JudgedWorld(
    caption_task,
    caption_pairs,
    with_concept,
    lambda shot, concept: caption_region(shot.prompt, group_of(concept)),
    lambda generator: generator,
    effect_judge=lambda: drawn_effect_judge(load_judge()),
)
"""The world of mini-flux."""


def _world(
    concepts: ConceptFile,
    judge: str,
    judged: Callable[[JudgedGenerator], JudgedGenerator],
    checksum: Callable[[], str] = str,
    effect_judge: Callable[[], EffectJudge] | None = None,
) -> JudgedWorld:
    return JudgedWorld(
        lambda concept, trials: concepts.specs[concept].task(trials),
        lambda concept, count: concepts.specs[concept].pairs(count),
        lambda trial, concept: concepts.specs[concept].with_concept(trial),
        lambda shot, concept: concepts.specs[concept].region,
        judged,
        judge,
        checksum,
        concepts,
        effect_judge,
    )


def clip_world(concepts: ConceptFile, name: str, load: Callable[[], ClipModel], checksum: Callable[[], str] = str) -> JudgedWorld:
    """Return the world of concepts in words whose judge is the CLIP called `name`, which `load` opens."""

    opened = cache(load)

    def judged(generator: JudgedGenerator) -> JudgedGenerator:
        clip = opened()
        cached = lru_cache(CACHED)(lambda trials: generator.images(trials, ()))
        unedited = lambda trials: cached(tuple(trials))  # noqa: E731 (compared with every edit)
        judge = similarity_judge(clip.embed_images, clip.embed_texts, clip.logit_scale, concepts.specs, unedited)
        images = lambda trials, hooks: generator.images(trials, hooks) if hooks else unedited(trials)  # noqa: E731
        return generator._replace(images=images, verdicts=judge)

    def effect_judge() -> EffectJudge:
        clip, instead = opened(), lambda concept: concepts.specs[concept].instead
        return similarity_effect_judge(clip.embed_images, clip.embed_texts, clip.logit_scale, instead, _parts)

    return _world(concepts, name, judged, checksum, effect_judge)


def _parts(trials: Sequence[SteeringTrial], images: Images) -> tuple[Images, Images | None]:
    """Return the region of images, which all trials share, and the images without it; None if it is the whole image."""
    region = trials[0].region
    return images[region_of(images, region)], None if region is None else greyed(images, region)


def vlm_world(concepts: ConceptFile, name: str, client: CachedClient, connections: int) -> JudgedWorld:
    """Return the world of concepts in words whose judge is a VLM called `name`, asked over so many connections at once."""
    verdicts = vlm_judge(lambda questions: ask_presence(client, questions, connections=connections), concepts.specs)
    return _world(concepts, name, lambda generator: generator._replace(verdicts=verdicts))


def similarity_judge(
    embed_images: Callable[[Images], Float[Tensor, "image width"]],
    embed_texts: Callable[[Sequence[str]], Float[Tensor, "text width"]],
    logit_scale: float,
    specs: Mapping[str, ConceptSpec],
    unedited: Callable[[Sequence[SteeringTrial]], Images],
) -> Verdicts:
    """Return the judge that compares embeddings of norm 1, as CLIP makes them; `unedited` returns images without an edit.

    An image shows the concept if its region is more similar to it than to the others of the group; the rest is right if the
    image outside of the region is most similar to its own unedited image, not to that of another trial.
    """

    def verdicts(task: SteeringTask, trials: Sequence[SteeringTrial], images: Images) -> list[JudgeVerdict]:
        texts, region = embed_texts([task.concept, *specs[task.concept].instead]), trials[0].region
        shares = torch.softmax(logit_scale * embed_images(images[region_of(images, region)]) @ texts.T, dim=1)
        after, before = (embed_images(greyed(batch, region)) for batch in (images, unedited(trials)))
        similarity = after @ before.T
        are_right = similarity.diagonal() >= similarity.amax(1) - 1e-6
        return [
            JudgeVerdict(int(row.argmax()) == 0, {"the rest": bool(is_right)}, float(row.max()))
            for row, is_right in zip(shares, are_right, strict=True)
        ]

    return verdicts


def vlm_judge(
    ask: Callable[[Sequence[PresenceQuestion]], Sequence[PresenceAnswer]], specs: Mapping[str, ConceptSpec]
) -> Verdicts:
    """Return the judge that asks a VLM about each image."""

    def verdicts(task: SteeringTask, trials: Sequence[SteeringTrial], images: Images) -> list[JudgeVerdict]:
        rest = specs[task.concept].rest
        parts = [
            image[region_of(image, trial.region)] if trial.region else None for image, trial in zip(images, trials, strict=True)
        ]
        questions = [
            PresenceQuestion(image, None if part is None else next(to_images(part[None])), task.concept, rest(trial))
            for image, part, trial in zip(to_images(images), parts, trials, strict=True)
        ]
        return [JudgeVerdict(answer.shows, {"the rest": answer.rest}, 1.0) for answer in ask(questions)]

    return verdicts


def region_of(images: Float[Tensor, "*some row column"], region: Rectangle | None) -> tuple[EllipsisType, slice, slice]:
    """Return the index of a region, of one pixel or more."""
    rows, columns = images.shape[-2:]

    def along(start: float, end: float, count: int) -> slice:
        first = min(round(start * count), count - 1)
        return slice(first, max(round(end * count), first + 1))

    left, top, right, bottom = region or (0.0, 0.0, 1.0, 1.0)
    return ..., along(top, bottom, rows), along(left, right, columns)


def greyed(images: Images, region: Rectangle | None) -> Images:
    """Return the images with a grey region; unchanged, if the region is the whole image."""
    rest = images.clone()
    if region is not None:
        rest[region_of(images, region)] = 0.5
    return rest
