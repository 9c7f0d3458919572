"""What is asked of a model and what comes back: sizes, words, images with their shots."""

import re
import warnings
from collections.abc import Iterable
from typing import NamedTuple

from PIL import Image

from difflex.errors import BadInput
from difflex.pipeline.loading import ModelDefaults
from difflex.records import Shot

__all__ = ["GeneratedImage", "check_batch", "check_size", "warn_of_unknown_words"]


class GeneratedImage(NamedTuple):
    """An image and everything needed to make it again."""

    image: Image.Image
    shot: Shot


def check_batch(batch: int) -> None:
    """Nothing; a batch without an image is an error."""
    if batch < 1:
        raise BadInput(f"A batch of {batch} images is not possible. Ask for 1 or more.")


def check_size(pixels: tuple[int, int], card: ModelDefaults, stride: int) -> None:
    """Nothing; a size that the model cannot make is an error that says which ones it can."""
    if card.pixels and tuple(pixels) not in card.pixels:
        sizes = ", ".join(f"{height} x {width}" for height, width in card.pixels)
        raise BadInput(f"Images of {pixels[0]} x {pixels[1]} pixels are not possible with this model. It makes: {sizes}.")
    if min(pixels) < stride or any(side % stride for side in pixels):
        near = " x ".join(str(max(stride, round(side / stride) * stride)) for side in pixels)
        raise BadInput(
            f"Images of {pixels[0]} x {pixels[1]} pixels are not possible with this model. "
            f"Both sides must be multiples of {stride}; the nearest size is {near}."
        )


def warn_of_unknown_words(prompts: Iterable[str], words: frozenset[str]) -> None:
    """Nothing; warns of the words that the model has never seen, if its words are known."""
    if not words:
        return
    found = dict.fromkeys(word for prompt in prompts for word in re.findall(r"[^\W\d_]+", prompt.lower()))
    unknown = [word for word in found if word not in words]
    if unknown:
        listed = ", ".join(unknown[:10]) + (", ..." if len(unknown) > 10 else "")
        warnings.warn(f"The model has never seen these words: {listed}. It knows {len(words)} words.", stacklevel=3)
