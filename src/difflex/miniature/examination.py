"""The examination of a text-to-image model on the drawn world: fresh captions, images, the judge's table."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from difflex.miniature.drawing import Scenes, draw
from difflex.miniature.judge import Judge
from difflex.miniature.scoring import ATTRIBUTES, CaptionScore, score, table
from difflex.miniature.world import HELD_OUT_SEEDS, SceneMix

Generate = Callable[[list[str]], Float[Tensor, "caption 3 height width"]]
"""Captions -> images in [0, 1]."""
Examination = dict[str, dict[str, float]]
"""Row name -> attribute -> share right."""
FLOORS = {
    "colour": 0.90,
    "shape": 0.85,
    "background": 0.97,
    "style": 0.90,
    "position": 0.90,
    "texture": 0.75,
    "count": 0.85,
    "relation": 0.50,
}
"""What each attribute must reach over all captions."""
COMPOSITION_FLOOR = 0.75
"""What shape and colour together must reach on combinations that training never shows."""
THIRDS = {"one object": SceneMix(1, 0, 0), "two different": SceneMix(0, 1, 0), "copies": SceneMix(0, 0, 1)}
FIRST = HELD_OUT_SEEDS + 1_000_000
"""The seed of the first scene asked."""


def examine(generate: Generate, judge: Judge, captions: int = 500) -> Examination:
    """A row for each third of the captions (one object, two, copies), one for all, one for unseen combinations."""
    rows: Examination = {}
    scores: list[CaptionScore] = []
    for number, (name, mix) in enumerate(THIRDS.items()):
        asked = captions // 3 + (number < captions % 3)
        part = _asked(generate, judge, draw(torch.arange(asked) + FIRST + number * 100_000, mix))
        rows[name] = table(part)
        scores += part
    rows["all"] = table(scores)
    unseen = _asked(generate, judge, draw(torch.arange(captions // 2) + FIRST + 500_000, held_out=True))
    rows["unseen combinations"] = table(unseen) | {"shape and colour": _both(unseen)}
    return rows


def ceiling(judge: Judge, captions: int = 500) -> dict[str, float]:
    """The judge's own table on true drawings: what no model can be seen to pass."""
    scenes = draw(torch.arange(captions) + FIRST + 900_000)
    return table(score(scenes.captions, scenes.images, judge))


def shortfalls(rows: Examination) -> list[str]:
    """The floors that the examination misses, in words."""
    missed = [
        f"{name} {rows['all'].get(name, 0):.1%} is under {floor:.0%}"
        for name, floor in FLOORS.items()
        if rows["all"].get(name, 0) < floor
    ]
    composed = rows["unseen combinations"]["shape and colour"]
    if composed < COMPOSITION_FLOOR:
        missed.append(f"shape and colour of unseen combinations {composed:.1%} is under {COMPOSITION_FLOOR:.0%}")
    return missed


def as_markdown(rows: Examination) -> str:
    """The examination as a table of percentages."""
    columns = [*ATTRIBUTES, "shape and colour"]
    head = f"| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}\n"
    cells = lambda row: " | ".join(f"{row[c]:.1%}" if c in row else "" for c in columns)  # noqa: E731
    return head + "\n".join(f"| {name} | {cells(row)} |" for name, row in rows.items())


def _asked(generate: Generate, judge: Judge, scenes: Scenes) -> list[CaptionScore]:
    return score(scenes.captions, generate(scenes.captions), judge)


def _both(scores: list[CaptionScore]) -> float:
    """Share of images with shape and colour both right, among those that state both."""
    stated = [s.right for s in scores if {"shape", "colour"} <= s.right.keys()]
    return sum(right["shape"] and right["colour"] for right in stated) / len(stated)
