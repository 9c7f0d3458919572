"""Prompts as the denoiser sees them, each encoded once and kept while there is room."""

import warnings
from collections import OrderedDict
from collections.abc import Sequence
from typing import final

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor

from difflex.pipeline.families import Family
from difflex.quiet import muted

__all__ = ["PromptEncoder"]

ROOM = 512 * 2**20
"""Bytes of embeddings that are kept: at FLUX's size about a hundred prompts, enough for all seeds of a prompt to meet it."""

AHEAD = 64 * 2**20
"""Bytes of embeddings that are worth making before they are needed: small text encoders spend their time on being called."""
FRAME = 4
"""Tokens that a tokenizer may put around a prompt."""


@final
class PromptEncoder:
    """Calling it gives the keyword arguments of a pipeline's `__call__` that stand for prompts."""

    def __init__(self, pipeline: DiffusionPipeline, family: Family, text_length: int | None) -> None:
        self._pipeline = pipeline
        self._family = family
        self._text_length = text_length
        self._kept: OrderedDict[str | None, dict[str, Tensor]] = OrderedDict()
        self._bytes = 0
        self._device: torch.device | None = None
        self.encoded = 0
        """How many prompts went through the text encoders."""
        self.truncated = 0
        """How many of them were longer than the text length."""

    def __call__(self, prompts: Sequence[str], guided: bool) -> dict[str, object]:
        """Embeddings of `prompts` and, if `guided`, of the empty prompt beside each."""
        if not self._family.embeds:
            return {"prompt": list(prompts)}
        self.encode(prompts)
        if guided and None not in self._kept:
            self._keep(None, {name: rows[0] for name, rows in self._encode([""], negative=True).items()})
        arguments: dict[str, object] = {
            name: torch.stack([self._kept[p][name] for p in prompts]) for name in self._kept[prompts[0]]
        }
        if guided:
            arguments |= {name: row.expand(len(prompts), *row.shape).contiguous() for name, row in self._kept[None].items()}
        return arguments

    def encode(self, prompts: Sequence[str]) -> None:
        """Nothing; the embeddings of `prompts` are at hand, those of others that there is no room for are not."""
        fresh = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._kept] if self._family.embeds else []
        if not fresh:
            return
        self._warn_of_long(fresh)
        rows = self._encode(fresh, negative=False)
        for i, prompt in enumerate(fresh):
            # A slice would keep the whole batch alive.
            self._keep(prompt, {name: rows[name][i].clone() for name in rows})
        self.encoded += len(fresh)
        self._forget({*prompts, None})

    def ahead(self, batch: int) -> int:
        """How many batches are worth encoding in one go: a few where embeddings are small, one where nothing is known yet."""
        each = next((sum(row.nbytes for row in rows.values()) for rows in self._kept.values()), AHEAD)
        return min(8, max(1, AHEAD // (each * batch)))

    def clear(self) -> None:
        """Forget all embeddings, as is needed after the pipeline was moved to another device."""
        self._kept.clear()
        self._bytes = 0
        self._device = None

    @torch.no_grad()
    def _encode(self, prompts: list[str], negative: bool) -> dict[str, Tensor]:
        family = self._family
        # diffusers asks every module where it is, which takes longer than a small text encoder.
        self._device = self._device or self._pipeline._execution_device
        arguments = {"prompt": prompts, "num_images_per_prompt": 1, "device": self._device, **family.encode}
        if self._text_length is not None and family.text_length is not None:
            arguments["max_sequence_length"] = self._text_length
        if family.guidance == "doubled":
            # The pipeline's own rule for the unconditional half (SDXL: zeros), which does not depend on the prompt.
            arguments["do_classifier_free_guidance"] = negative
        with muted(type(self._pipeline).__module__, "transformers.tokenization_utils_base"):
            returned = self._pipeline.encode_prompt(**arguments)
        named = {name: rows for name, rows in zip(family.embeds, returned, strict=True) if name is not None and rows is not None}
        if family.guidance != "doubled":
            return {f"negative_{name}": rows for name, rows in named.items()} if negative else named
        return {name: rows for name, rows in named.items() if name.startswith("negative_") == negative}

    def _keep(self, prompt: str | None, rows: dict[str, Tensor]) -> None:
        self._kept[prompt] = rows
        self._bytes += sum(row.nbytes for row in rows.values())

    def _forget(self, wanted: set[str | None]) -> None:
        """Drop the oldest embeddings beyond the room, but none of `wanted`."""
        for prompt in [p for p in self._kept if p not in wanted]:
            if self._bytes <= ROOM:
                return
            self._bytes -= sum(row.nbytes for row in self._kept.pop(prompt).values())

    def _warn_of_long(self, prompts: list[str]) -> None:
        tokenizer = self._pipeline.components.get(self._family.tokenizer)
        if tokenizer is None:
            return
        longest = self._text_length or tokenizer.model_max_length
        # A token stands for a byte at least, but for the few that frame a prompt: most prompts need no second look.
        doubtful = [prompt for prompt in prompts if len(prompt.encode()) > longest - FRAME]
        with muted("transformers.tokenization_utils_base"):
            long = sum(len(ids) > longest for ids in tokenizer(doubtful).input_ids) if doubtful else 0
        if long and not self.truncated:
            warnings.warn(
                f"{long} of {len(prompts)} prompts are longer than the {longest} tokens that the model reads and are cut there. "
                "Further ones are counted and not warned of.",
                stacklevel=3,
            )
        self.truncated += long
