"""`look`: whether finished images show a concept, asked of a model that sees."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from PIL import Image

from difflex.errors import BadInput
from difflex.explanation.asked import ImageView, PresenceAnswer
from difflex.explanation.asker import CachedClient, NoAnswer
from difflex.explanation.wording import to_see
from difflex.records import Shot

__all__ = ["PresenceQuestion", "look"]

SIDE = 256
"""Pixels that the shorter side of what is shown is enlarged to at least."""


class PresenceQuestion(NamedTuple):
    """An image, and what is asked of it."""

    image: Image.Image
    part: Image.Image | None
    """What is cut out of it, where the concept is looked for; None where that is all of it."""
    concept: str
    rest: str
    """What else the image is of."""


def look(asker: CachedClient, images: Sequence[PresenceQuestion], *, connections: int = 16) -> list[PresenceAnswer]:
    """What is seen of each image. A question that gets no answer ends it, as figures with holes mislead."""

    def seen(number: int) -> PresenceAnswer:
        asked = images[number]
        shown = [each for each in (asked.image, asked.part) if each is not None]
        instruction = to_see(asked.concept, asked.rest, asked.part is not None)
        try:
            return asker.see([_view(each) for each in shown], instruction, PresenceAnswer, [])
        except NoAnswer as error:
            raise BadInput(
                f"Whether image {number + 1} of {len(images)} shows '{asked.concept}' was not answered: {error}. Give the "
                "same command again; what was answered is kept."
            ) from None

    with ThreadPoolExecutor(connections) as threads:
        return list(threads.map(seen, range(len(images))))


def _view(image: Image.Image) -> ImageView:
    times = max(1, -(-SIDE // min(image.size)))
    shown = image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    shot = Shot(model="", pixels=(image.height, image.width), steps=1, guidance=0.0)
    return ImageView(draw=lambda: shown, shot=shot, highlight=torch.ones(1, 1))
