"""Pictures with their shots: one call of the diffusers pipeline per batch, noise drawn per shot by its own seed."""

import hashlib
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar, cast

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from PIL import Image

from difflex.errors import BadInput, OutOfMemory
from difflex.pipeline.families import Family
from difflex.pipeline.loading import Card
from difflex.records import Shot, Split

__all__ = [
    "Generated",
    "arguments_of",
    "call",
    "check_size",
    "halving",
    "is_guided",
    "split_of",
    "stride_of",
    "warn_of_unknown_words",
]

Item = TypeVar("Item")
Result = TypeVar("Result")


class Generated(NamedTuple):
    """A picture and everything needed to make it again."""

    picture: Image.Image
    shot: Shot


def split_of(content: str | bytes) -> Split:
    """`held-out` for a fixed tenth of all prompts or pictures, chosen by a hash of the content."""
    digest = hashlib.sha256(content.encode() if isinstance(content, str) else content).digest()
    return "held-out" if int.from_bytes(digest[:8], "big") % 10 == 0 else "train"


def is_guided(pipeline: DiffusionPipeline, family: Family, guidance: float) -> bool:
    """Whether the denoiser computes two halves, conditional and unconditional."""
    denoiser = pipeline.components[family.denoiser]
    folded = family.folded and (denoiser.config.get(family.folded) or pipeline.config.get(family.folded))
    return family.guidance != "none" and guidance > 1 and not folded


def arguments_of(family: Family, shots: Sequence[Shot], guided: bool) -> dict[str, object]:
    """The keyword arguments of `__call__` that make `shots`, which differ in prompt and seed only, but for the prompts."""
    first = shots[0]
    arguments: dict[str, object] = {
        **family.arguments,
        "height": first.pixels[0],
        "width": first.pixels[1],
        "num_inference_steps": first.steps,
        "guidance_scale": first.guidance,
        "generator": [torch.Generator("cpu").manual_seed(shot.seed) for shot in shots],
    }
    if guided and family.guided:
        arguments[family.guided] = first.guidance
    return arguments


def call(pipeline: DiffusionPipeline, **arguments: object) -> ImagePipelineOutput:
    """What the pipeline makes of `arguments`; each class of diffusers has its own `__call__`, the base has none."""
    return cast(Callable[..., ImagePipelineOutput], pipeline)(**arguments)


def stride_of(pipeline: DiffusionPipeline, family: Family) -> int:
    """The side of a picture's patch that becomes one token of the denoiser's input, in pixels."""
    config = pipeline.components[family.denoiser].config
    patch = 2 if family.latents != "plain" else int(config.get("patch_size") or 1)
    return int(pipeline.vae_scale_factor) * patch


def check_size(pixels: tuple[int, int], card: Card, stride: int) -> None:
    """Nothing; a size that the model cannot make is an error that says which ones it can."""
    if card.pixels and tuple(pixels) not in card.pixels:
        sizes = ", ".join(f"{height} x {width}" for height, width in card.pixels)
        raise BadInput(f"Pictures of {pixels[0]} x {pixels[1]} pixels are not possible with this model. It makes: {sizes}.")
    if min(pixels) < stride or any(side % stride for side in pixels):
        near = " x ".join(str(max(stride, round(side / stride) * stride)) for side in pixels)
        raise BadInput(
            f"Pictures of {pixels[0]} x {pixels[1]} pixels are not possible with this model. "
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


def halving(
    work: Callable[[Sequence[Item]], Result], items: Sequence[Item], batch: int, advice: str
) -> Iterator[tuple[Sequence[Item], Result]]:
    """Slices of `items` with the result of `work` on each; out of memory halves the slices from there on, and says so."""
    start = 0
    while start < len(items):
        part = items[start : start + batch]
        try:
            result = work(part)
        except torch.OutOfMemoryError as error:
            batch = _half(len(part), advice, error)
            continue
        yield part, result
        start += len(part)


def _half(batch: int, advice: str, error: Exception) -> int:
    if batch == 1:
        raise OutOfMemory(f"A batch of 1 does not fit into the memory of the card. {advice}") from error
    torch.cuda.empty_cache()
    warnings.warn(f"A batch of {batch} does not fit into the memory of the card: going on with {batch // 2}.", stacklevel=4)
    return batch // 2
