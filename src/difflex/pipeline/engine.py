"""One call of the diffusers pipeline for a batch of shots: prompts encoded once, noise by seed, the clock told what runs."""

import gc
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import NoReturn, TypeVar, cast, final

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from PIL import Image
from torch import Tensor, nn

from difflex.distributed import Ranks
from difflex.errors import OutOfMemory
from difflex.pipeline.calls import CallTracker, PipelineRun
from difflex.pipeline.encoding import PromptEncoder
from difflex.pipeline.families import Family
from difflex.pipeline.loading import ModelDefaults
from difflex.pipeline.sharded import settle
from difflex.pipeline.sites import SiteMap
from difflex.records import Shot

__all__ = ["Engine", "StopForward"]


Item = TypeVar("Item")
Result = TypeVar("Result")
Arguments = tuple[tuple[object, ...], dict[str, object]]
ADVICE = "Load the model with precision='nf4' or offload=True, ask for fewer pixels, or for a smaller batch."


class StopForward(Exception):
    """Raised in a hook when nothing further of a forward pass is needed; `Engine.run` catches it."""


@final
class Engine:
    """A diffusers pipeline, its family, its prompts, its clock and its sites."""

    def __init__(self, diffusers: DiffusionPipeline, family: Family, card: ModelDefaults) -> None:
        self.diffusers = diffusers
        self.family = family
        self.card = card
        self.encoder = PromptEncoder(diffusers, family, card.text_length)
        self.clock = CallTracker(diffusers, family)
        self.sites = SiteMap(self.denoiser, family)
        self.sharded = False
        """Whether the denoiser is shared over ranks: then all of them must call it equally often."""
        self._largest: int | None = None
        self._timesteps: dict[tuple[tuple[int, int], int, float], tuple[float, ...]] = {}

    @property
    def denoiser(self) -> nn.Module:
        """The part that is called once per step."""
        return self.diffusers.components[self.family.denoiser]

    @property
    def stride(self) -> int:
        """The side of the patch of an image that becomes one token of the denoiser's input, in pixels."""
        patch = 2 if self.family.latents != "plain" else int(cast(int, self.config("patch_size") or 1))
        return self.factor * patch

    @property
    def factor(self) -> int:
        """The side of the patch of an image that becomes one latent, in pixels."""
        return int(cast(int, self.diffusers.vae_scale_factor))

    def config(self, entry: str) -> object:
        """An entry of the denoiser's config, or else of the pipeline's; None if it has none."""
        value = dict(cast(ConfigMixin, self.denoiser).config).get(entry)
        return dict(self.diffusers.config).get(entry) if value is None else value

    def is_guided(self, guidance: float) -> bool:
        """Whether the denoiser computes two halves, conditional and unconditional."""
        folded = self.family.folded is not None and bool(self.config(self.family.folded))
        return self.family.guidance != "none" and guidance > 1 and not folded

    def run(self, shots: Sequence[Shot], timestep: float | None = None, **extra: object) -> list[Image.Image] | Tensor | None:
        """Images (latents, if asked) of `shots`, which differ in prompt and seed only; None if a hook raised `StopForward`."""
        guided = self.is_guided(shots[0].guidance)
        prompts = self.encoder([shot.prompt for shot in shots], guided)
        unconditional = prompts.get("negative_prompt_embeds")
        run = PipelineRun(tuple(shots), guided, timestep, unconditional if isinstance(unconditional, Tensor) else None)
        # Each class of diffusers has its own `__call__`, the base has none.
        pipeline = cast(Callable[..., tuple[list[Image.Image] | Tensor]], self.diffusers)
        with self.clock.running(run), torch.no_grad():
            try:
                return pipeline(**prompts, **self._settings(shots, guided), **extra, return_dict=False)[0]
            except StopForward:
                self.diffusers.maybe_free_model_hooks()
                if self.sharded:
                    settle(self.denoiser)
                return None

    def _settings(self, shots: Sequence[Shot], guided: bool) -> dict[str, object]:
        first = shots[0]
        settings: dict[str, object] = {
            **self.family.arguments,
            "height": first.pixels[0],
            "width": first.pixels[1],
            "num_inference_steps": first.steps,
            "guidance_scale": first.guidance,
            # One generator per shot, on the CPU: the noise of a shot depends on its seed alone, not on batch or device.
            "generator": [torch.Generator("cpu").manual_seed(shot.seed) for shot in shots],
        }
        if guided and self.family.guided:
            settings[self.family.guided] = first.guidance
        return settings

    def timesteps(self, shot: Shot) -> tuple[float, ...]:
        """What the scheduler calls the noise levels of the steps of a run like `shot`."""
        key = (shot.pixels, shot.steps, shot.guidance)
        if key not in self._timesteps:
            self.first_call(Shot(model=shot.model, pixels=shot.pixels, steps=shot.steps, guidance=shot.guidance))
            self._timesteps[key] = tuple(map(float, self.diffusers.components["scheduler"].timesteps))
        return self._timesteps[key]

    def first_call(self, shot: Shot) -> Arguments:
        """What the denoiser is given at the first step of a run like `shot`; nothing of the denoiser is computed."""
        given: list[Arguments] = []

        def stop(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> NoReturn:
            given.append((args, kwargs))
            raise StopForward

        with _before(self.denoiser, stop):
            self.run([shot])
        return given[0]

    def batches(
        self, work: Callable[[Sequence[Item]], Result], items: Iterable[Item], size: int, shared: bool = False
    ) -> Iterator[tuple[Sequence[Item], Result]]:
        """Batches of `items` with the result of `work` on each. Where memory runs out the batch is halved, from there on.

        `shared`: if the model is, each rank does its part of the items, and as much work as any other rank.
        """
        ranks = Ranks() if shared and self.sharded else Ranks(0, 1)
        waiting, source = [], iter(items)
        while True:
            size = min(size, self._largest or size)
            waiting += islice(source, max(0, size * ranks.world_size - len(waiting)))
            part = waiting[: size * ranks.world_size]
            if not part:
                return
            try:
                # A rank for which nothing is left repeats the work of the first, and throws it away.
                result = work(part[ranks.rank :: ranks.world_size] or part[:1])
            except torch.OutOfMemoryError as error:
                self._halve(len(part), error)
                continue
            waiting = waiting[size * ranks.world_size :]
            if part[ranks.rank :: ranks.world_size]:
                yield part[ranks.rank :: ranks.world_size], result

    def _halve(self, size: int, error: torch.OutOfMemoryError) -> None:
        if size == 1 or self.sharded:
            raise OutOfMemory(f"A batch of {size} does not fit into the memory of the card. {ADVICE}") from error
        error.__traceback__ = None  # it holds the tensors of the failed pass
        gc.collect()
        torch.cuda.empty_cache()
        self._largest = size // 2
        warnings.warn(f"A batch of {size} does not fit into the memory of the card: going on with {size // 2}.", stacklevel=4)


@contextmanager
def _before(module: nn.Module, hook: Callable[..., object]) -> Iterator[None]:
    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
