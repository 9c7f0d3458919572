"""The drawn world as labelled images."""

from collections.abc import Iterator
from functools import cache

from difflex.evaluation.concepts import Concept, LabelledImage, LabelledImages, to_image
from difflex.miniature import draw
from difflex.miniature.world import CONCEPTS, HELD_OUT_SEEDS

__all__ = ["FIRST_SEED", "drawn_concepts", "drawn_images", "drawn_source"]

BATCH = 50
"""Scenes drawn at once."""
FIRST_SEED = HELD_OUT_SEEDS + 10**6
"""The seed of the first scene; mini-flux was trained on no scene from `HELD_OUT_SEEDS` on."""


def drawn_concepts() -> tuple[Concept, ...]:
    """Return the concepts of the drawn world."""
    return tuple(Concept(name, group) for group, names in CONCEPTS.items() for name in names)


def drawn_images(count: int, first_seed: int = FIRST_SEED) -> Iterator[LabelledImage]:
    """Yield `count` scenes of the drawn world; with the default seed none of them was trained on."""
    for start in range(first_seed, first_seed + count, BATCH):
        seeds = range(start, min(start + BATCH, first_seed + count))
        scenes = draw(seeds)
        shares = cache(scenes.shares)
        for i, seed in enumerate(seeds):
            yield LabelledImage(
                to_image(scenes.images[i]), f"drawn:{seed}", scenes.captions[i], lambda *grid, i=i, of=shares: of(*grid)[i]
            )


def drawn_source(count: int) -> LabelledImages:
    """Return the first `count` scenes as a source of labelled images; they are small but slow to draw, so they are drawn once."""
    return LabelledImages(f"drawn world from {FIRST_SEED}", drawn_concepts(), cache(lambda: list(drawn_images(count))))
