"""Worlds in which edits are judged: the drawn one, whose judge is at hand, and one told in a file, with CLIP or a VLM to see."""

import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from difflex.commands.flags import VLMCommand
from difflex.commands.inputs import open_answer_cache
from difflex.effects import (
    ConceptSpec,
    ImageAnswer,
    ImageQuestion,
    JudgedGenerator,
    SimilarityJudge,
    SteeringTask,
    SteeringTrial,
    by_answers,
)
from difflex.effects.trials import as_images, drawn_pairs, drawn_task, group_of, placed, reworded
from difflex.errors import BadInput
from difflex.evaluation import ClipModel
from difflex.explanation import CachedClient, PresenceQuestion, look
from difflex.records import Rectangle, Shot
from difflex.steering import rectangle
from difflex.study import Study

__all__ = ["DRAWN", "JudgedWorld", "read_told", "told_world"]

KEYS = ("name", "group", "instead", "prompts", "region", "feature")
KEPT = 2
"""Batches of unedited images that are kept: those of a task's trials, and of its edited prompts."""


class JudgedWorld(NamedTuple):
    """What is asked of edits, and who judges."""

    task: Callable[[str, int], SteeringTask]
    pairs: Callable[[str, int], list[tuple[str, str]]]
    reworded: Callable[[SteeringTrial, str], SteeringTrial]
    inside: Callable[[Shot, str], Rectangle | None]
    """Where the image of a pair of prompts shows the concept."""
    seen: Callable[[JudgedGenerator], JudgedGenerator]
    """The same model with the eyes of this world."""


DRAWN = JudgedWorld(
    drawn_task, drawn_pairs, reworded, lambda shot, concept: placed(shot.prompt, group_of(concept)), lambda drawn: drawn
)
"""The world of mini-flux."""


def read_told(path: Path) -> dict[str, ConceptSpec]:
    """The concepts that a TOML file tells, each as a table `[[concept]]`."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8")).get("concept")
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadInput(f"{path} cannot be read as concepts: {error}. Write TOML, a table [[concept]] for each.") from error
    if not isinstance(tables, list) or not all(isinstance(each, dict) for each in tables) or not tables:
        raise BadInput(f"{path} tells no concept. Write a table [[concept]] for each.")
    told = [_sought(path, table) for table in tables]
    return {each.concept: each for each in told}


def _sought(path: Path, table: Mapping[str, Any]) -> ConceptSpec:
    name = table.get("name", "")
    wrong = [key for key in table if key not in KEYS]
    texts = [name, table.get("group", "concept"), *_listed(table, "instead"), *_listed(table, "prompts")]
    numbers = [*_listed(table, "region"), table.get("feature", 0)]
    if wrong or not all(isinstance(each, str) for each in texts) or not all(type(each) in (int, float) for each in numbers):
        raise BadInput(
            f"In {path} the concept '{name}' is not told as it must be{f': {wrong[0]} is unknown' if wrong else ''}. It has "
            "words in 'name', 'group', 'instead' and 'prompts' (lists), and may have 'region' (four numbers) and 'feature' (one)."
        )
    if "/" in table.get("group", ""):
        raise BadInput(f"In {path} the group '{table['group']}' of '{name}' names a file: leave out the '/'.")
    return ConceptSpec(
        concept=name,
        group=table.get("group", "concept"),
        instead=tuple(_listed(table, "instead")),
        prompts=tuple(_listed(table, "prompts")),
        region=rectangle(table["region"]) if "region" in table else None,
        feature=table.get("feature"),
    )


def _listed(table: Mapping[str, Any], key: str) -> list[Any]:
    value = table.get(key, [])
    return value if isinstance(value, list) else [value]


@contextmanager
def told_world(
    told: Mapping[str, ConceptSpec], study: Study, verb: VLMCommand, clip: str | None, vlm: str | None
) -> Iterator[JudgedWorld]:
    """The world of these concepts; its eyes are a CLIP, or a model that answers `verb`."""
    if (clip is None) == (vlm is None):
        raise BadInput("Concepts that a file tells need somebody who sees them in images: name one of --clip and --vlm.")

    def world(seen: Callable[[JudgedGenerator], JudgedGenerator]) -> JudgedWorld:
        return JudgedWorld(
            lambda concept, trials: told[concept].task(trials),
            lambda concept, count: told[concept].pairs(count),
            lambda trial, concept: told[concept].reworded(trial),
            lambda shot, concept: told[concept].region,
            seen,
        )

    if clip is not None:
        yield world(_by_likeness(ClipModel(clip, offline=verb.offline), told))
        return
    assert vlm is not None
    verb.check_endpoint(vlm)
    with closing(verb.backend(vlm)) as backend, open_answer_cache(study) as answers:
        asker = CachedClient(backend, answers, verb.request_policy())
        yield world(lambda drawn: drawn._replace(verdicts=by_answers(lambda asked: _looked(asker, asked, verb), told)))
        spent = asker.asked.spent
        print(f"{spent.calls:,} calls, {spent.tokens_in:,} tokens in, {spent.tokens_out:,} tokens out, cost {spent.cost:.4g}")


def _by_likeness(clip: ClipModel, told: Mapping[str, ConceptSpec]) -> Callable[[JudgedGenerator], JudgedGenerator]:
    def seen(drawn: JudgedGenerator) -> JudgedGenerator:
        plain = lru_cache(KEPT)(lambda trials: drawn.images(trials, None))
        unedited = lambda trials: plain(tuple(trials))  # noqa: E731 (drawn once, looked at again beside every edit)
        eyes = SimilarityJudge(clip.embed_images, clip.embed_texts, clip.logit_scale, told, unedited)
        images = lambda trials, steering: unedited(trials) if steering is None else drawn.images(trials, steering)  # noqa: E731
        return drawn._replace(images=images, verdicts=eyes)

    return seen


def _looked(asker: CachedClient, asked: Sequence[ImageQuestion], verb: VLMCommand) -> list[ImageAnswer]:
    """What a model that answers says of images."""
    to_pil = lambda pixels: None if pixels is None else next(iter(as_images(pixels[None])))  # noqa: E731
    shown = [
        PresenceQuestion(next(iter(as_images(each.image[None]))), to_pil(each.part), each.concept, each.rest) for each in asked
    ]
    return [ImageAnswer(seen.shows, seen.rest) for seen in look(asker, shown, connections=verb.connections)]
