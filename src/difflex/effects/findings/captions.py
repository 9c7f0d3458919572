"""The captions that experiments are made with: like those a contrast was found on, and of other kinds."""

from __future__ import annotations

import re
from functools import cache
from typing import Literal

from difflex.effects import SteeringTask, SteeringTrial
from difflex.effects.trials import drawn_pairs, drawn_task, group_of
from difflex.errors import BadInput
from difflex.miniature.captions import CaptionRequest, read
from difflex.miniature.world import BACKGROUNDS, CONCEPTS, OBJECT_GROUPS, STYLES, SceneMix

__all__ = ["ANYWHERE", "Kind", "concepts_of", "pairs_for", "task_of"]

Kind = Literal["alike", "other scenery", "two objects", "unsaid", "against", "an object", "no object"]
"""`alike`: as the pairs of the contrast. `other scenery`: grounds and styles that no pair has. `two objects`: the concept is put
at the first of two. `unsaid`: the caption names no concept of the group. `against`: it names another one three times.
`an object`: as the pairs, but seen anywhere. `no object`: the same captions with ground and style alone, and nothing that could
have the concept; the edit is where the object was to be."""
ANYWHERE = ("an object", "no object")
"""Where a caption asks for no object, nothing says where the model will draw one: the judge looks for the concept anywhere."""
PAIRED, UNPAIRED = (BACKGROUNDS[:4], STYLES[:2]), (BACKGROUNDS[4:], STYLES[2:])
"""Grounds and styles of the pairs, and the others."""
TIMES = 3
"""So often does a caption that argues against a concept name another one."""
LOOKED_AT = 12
"""Captions looked at for each that is wanted."""
ALIKE, TWO = SceneMix(1, 0, 0), SceneMix(0, 1, 0)


def concepts_of(group: str, count: int) -> list[str]:
    """`count` concepts of a group, spread over it."""
    if group not in ("shape", "colour", "texture", "size", "background", "style"):
        raise BadInput(
            f"There is no experiment with the group '{group}'. Name shape, colour, texture, size, background or style."
        )
    names = CONCEPTS[group]
    if not 0 < count <= len(names):
        raise BadInput(f"The group {group} has {len(names)} concepts, {count} were asked for. Ask for 1 to {len(names)}.")
    return [names[(2 * i + 1) * len(names) // (2 * count)] for i in range(count)]


@cache
def pairs_for(concept: str, count: int) -> list[tuple[str, str]]:
    """Pairs of captions of single objects that are alike but for the concept, on half of the grounds, in half of the styles."""
    return drawn_pairs(concept, count, lambda request: _is_in(request, group_of(concept), PAIRED))


@cache
def task_of(concept: str, kind: Kind, trials: int) -> SteeringTask:
    """Captions of a kind in which a concept is to appear; as many as asked for, with seeds that follow one another."""
    group, looked = group_of(concept), LOOKED_AT
    wanted = UNPAIRED if kind == "other scenery" else PAIRED
    while True:
        task = drawn_task(concept, trials * looked, TWO if kind == "two objects" else ALIKE)
        found = [trial for trial in task.trials if _is_in(read(trial.prompt), group, wanted, kind == "other scenery")]
        if len(found) >= trials:
            break
        looked *= 2
    made = [trial._replace(prompt=_said(trial, group, kind), seed=number) for number, trial in enumerate(found[:trials])]
    return SteeringTask(concept=concept, group=group, trials=tuple(made))


def _is_in(request: CaptionRequest, group: str, scenery: tuple[tuple[str, ...], ...], stated: bool = False) -> bool:
    """Whether ground and style, where they are not what is looked at, are of `scenery`; or, unless `stated`, not said."""
    pairs = (("background", request.background, scenery[0]), ("style", request.style, scenery[1]))
    return all((said is None and not stated) or said in among for name, said, among in pairs if name != group)


def _said(trial: SteeringTrial, group: str, kind: Kind) -> str:
    if kind == "no object":
        request = read(trial.prompt)
        return " ".join(
            [*(["on", request.background] if request.background else []), *([request.style] if request.style else [])]
        )
    if kind == "unsaid":
        return _unsaid(trial.prompt, group)
    if kind == "against":
        return " ".join(word if group_of(word) != group else " ".join([word] * TIMES) for word in trial.prompt.split())
    return trial.prompt


def _unsaid(caption: str, group: str) -> str:
    """The caption without what it says of the group."""
    names = "|".join(CONCEPTS[group])
    if group == "background":
        caption = re.sub(rf"\bon (?:{names})\b", "", caption)
    elif group == "style":
        caption = re.sub(rf"\b(?:in (?:{names}) style|(?:{names}) (?:picture|drawing) of|(?:{names}))\b", "", caption)
    elif group in OBJECT_GROUPS:
        caption = re.sub(rf"\b(?:{names})\b", "", caption)
        caption = re.sub(r"\ban? +(?=(\w))", lambda found: "an " if found[1] in "aeiou" else "a ", caption)
    return " ".join(caption.split())
