"""A model of the right geometry with seeded random weights: for measuring speed and memory, and for tests, without a download."""

import string
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
import transformers
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import nn

from difflex.errors import BadInput
from difflex.pipeline.plans import ComponentPlan, PipelinePlan

__all__ = ["build_parts", "build_untrained"]

Made = Callable[[str, nn.Module], nn.Module]
"""What is done to a part, of this name, as soon as it is built."""
LETTERS = [*string.ascii_lowercase, *string.digits, *string.punctuation]


def build_untrained(
    plan: PipelinePlan,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
    folder: Path | None = None,
    made: Made = lambda name, part: part,
) -> DiffusionPipeline:
    """A pipeline after `plan`, made where it will run; tokenizers come from `folder`, or spell letters where there is none.

    A part goes through `made` before the next one is built.
    """
    parts = build_parts(plan.parts, seed, dtype, device, made)
    for name, part in plan.parts.items():
        if part.config is None:
            parts[name] = _tokenizer(part, folder / name if folder else None)
    return cast(DiffusionPipeline, getattr(diffusers, plan.pipeline)(**dict.fromkeys(plan.absent), **parts, **plan.settings))


def build_parts(
    parts: Mapping[str, ComponentPlan], seed: int, dtype: torch.dtype, device: torch.device, made: Made
) -> dict[str, Any]:
    """Those of `parts` that are built from a config, with random weights of `seed`."""
    cards = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cards), _making(dtype, device):
        torch.manual_seed(seed)
        built = ((name, part.build()) for name, part in parts.items() if part.config is not None)
        ready = {name: made(name, part) if isinstance(part, nn.Module) else part for name, part in built}
    for part in ready.values():
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(False)
    return ready


def _tokenizer(part: ComponentPlan, folder: Path | None) -> Any:
    made = getattr(transformers, part.kind)
    if folder is not None and folder.is_dir():
        return made.from_pretrained(folder)
    if part.kind not in SPELLERS:
        raise BadInput(f"No stand-in for a {part.kind} is known. Name a folder that has the tokenizer's files.")
    return SPELLERS[part.kind]()


def _clip_speller() -> Any:
    """A tokenizer of letters with CLIP's two special ids."""
    pieces = {piece: i for i, piece in enumerate([*LETTERS, *(letter + "</w>" for letter in LETTERS)])}
    ends = {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    return transformers.CLIPTokenizer(vocab={**pieces, **ends}, merges=[], model_max_length=77)


def _t5_speller() -> Any:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -1.0), *((letter, -2.0) for letter in LETTERS)]
    return transformers.T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


SPELLERS = {
    "CLIPTokenizer": _clip_speller,
    "CLIPTokenizerFast": _clip_speller,
    "T5Tokenizer": _t5_speller,
    "T5TokenizerFast": _t5_speller,
}


@contextmanager
def _making(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """New tensors are of `dtype` and on `device`: a model of 12 billion parameters is never held in another precision."""
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with device:
            yield
    finally:
        torch.set_default_dtype(before)
