"""Which step, which half and which shots a call of the denoiser is for, read from the call itself; calls are never counted."""

import inspect
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple, final

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor, nn

from difflex.errors import DifflexError, UnknownName
from difflex.pipeline.families import Family
from difflex.records import Half, Shot

__all__ = ["CallTracker", "DenoiserCall", "PipelineRun", "check_half"]

HALVES: Mapping[str | None, Half] = {"cond": "conditional", "uncond": "unconditional"}


def check_half(half: str | None) -> None:
    """Nothing; a half that there is not is an error."""
    if half is not None and half not in HALVES.values():
        raise UnknownName.among("The half", half, HALVES.values())


class PipelineRun(NamedTuple):
    """What difflex knows of a call of the pipeline because it makes the call itself."""

    shots: tuple[Shot, ...]
    guided: bool
    timestep: float | None = None
    """Instead of the scheduler's, where the noise level was chosen by hand."""
    unconditional: Tensor | None = None
    """The embedding of the empty prompt that the unconditional half is given."""


class DenoiserCall(NamedTuple):
    """One call of the denoiser."""

    step: int
    timestep: float
    halves: tuple[Half | None, ...]
    """What lies in the batch, in order: one half, or the unconditional before the conditional."""
    shots: tuple[Shot, ...] | None
    text_tokens: int
    grid: tuple[int, int] | None
    """Rows and columns of the image as the denoiser takes it in: latents for a U-Net, tokens for a transformer."""


@final
class CallTracker:
    """Watches the calls of the denoiser while anyone asks; entered once for each who does."""

    def __init__(self, pipeline: DiffusionPipeline, family: Family) -> None:
        self._pipeline = pipeline
        self._family = family
        self._watchers = 0
        self._call: DenoiserCall | None = None
        self._context: str | None = None
        self._run: PipelineRun | None = None

    @property
    def call(self) -> DenoiserCall:
        """The call of the denoiser that is being computed."""
        if self._call is None:
            raise DifflexError(
                "A block was called outside of the denoiser; its step is unknown. Call the pipeline, not the block."
            )
        return self._call

    @property
    def denoiser(self) -> nn.Module:
        return self._pipeline.components[self._family.denoiser]

    @contextmanager
    def running(self, run: PipelineRun) -> Iterator[None]:
        """While `run` is computed, its shots and guidance are known."""
        before, self._run = self._run, run
        try:
            yield
        finally:
            self._run = before

    @contextmanager
    def watching(self) -> Iterator[None]:
        """`call` is kept up to date."""
        self._watchers += 1
        try:
            if self._watchers == 1:
                self._begin()
            yield
        finally:
            self._watchers -= 1
            if self._watchers == 0:
                self._end()

    def _begin(self) -> None:
        denoiser = self.denoiser
        self._signature = inspect.signature(type(denoiser).forward)
        self._handle = denoiser.register_forward_pre_hook(self._called, with_kwargs=True)
        named = getattr(denoiser, "cache_context", None)  # not all models of diffusers have it
        if named is not None:

            @contextmanager
            def cache_context(name: str, **where: object) -> Iterator[None]:
                self._context = name
                try:
                    with named(name, **where):
                        yield
                finally:
                    self._context = None

            denoiser.__dict__["cache_context"] = cache_context

    def _end(self) -> None:
        self._handle.remove()
        self.denoiser.__dict__.pop("cache_context", None)
        self._call = self._context = None

    def _called(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        given = self._signature.bind_partial(module, *args, **kwargs).arguments
        sample = _tensor(given, "hidden_states", "sample")
        text = _tensor(given, "encoder_hidden_states")
        step, timestep = self._time(_tensor(given, "timestep"))
        self._call = DenoiserCall(
            step=step,
            timestep=timestep,
            halves=self._halves(sample, text),
            shots=self._run.shots if self._run else None,
            text_tokens=0 if text is None else text.shape[1],
            grid=_grid(sample, given, int(getattr(module, "config", {}).get("patch_size") or 1)),
        )

    def _time(self, given: Tensor | None) -> tuple[int, float]:
        """The step whose timestep is nearest, in the denoiser's dtype, to the one given; of equal ones the scheduler's index."""
        scheduler = self._pipeline.components["scheduler"]
        known = scheduler.timesteps
        if self._run is not None and self._run.timestep is not None:
            return 0, self._run.timestep
        assert given is not None
        value = float(given.reshape(-1)[0])
        # The pipeline's own arithmetic: first the dtype, then the division.
        candidates = (known.to(given.dtype) / self._family.timestep_scale).tolist() if self._scaled else known.tolist()
        nearest = min(abs(candidate - value) for candidate in candidates)
        steps = [step for step, candidate in enumerate(candidates) if abs(candidate - value) == nearest]
        step = steps[0]
        if len(steps) > 1:
            index = getattr(scheduler, "step_index", None)  # PNDM alone counts under another name
            index = getattr(scheduler, "counter", None) if index is None else index
            step = index if index in steps else step
        return step, float(known[step])

    @property
    def _scaled(self) -> bool:
        return self._family.timestep_scale != 1

    def _halves(self, sample: Tensor | None, text: Tensor | None) -> tuple[Half | None, ...]:
        assert sample is not None
        if self._family.guidance == "separate":
            return (self._separate_half(text),)
        doubled = self._family.guidance == "doubled" and self._is_doubled(sample, text)
        return ("unconditional", "conditional") if doubled else (None,)

    def _separate_half(self, text: Tensor | None) -> Half | None:
        """By the name that diffusers gives to the call; where it gives none, by the prompt embedding that comes in."""
        run = self._run
        if run is not None and not run.guided:
            return None
        if self._context is None and run is not None and run.unconditional is not None and text is not None:
            return "unconditional" if torch.equal(text, run.unconditional) else "conditional"
        return HALVES.get(self._context)

    def _is_doubled(self, sample: Tensor, text: Tensor | None) -> bool:
        """By the number of shots where it is known; else by the noise, which both halves of a doubled batch share."""
        if self._run is not None:
            return sample.shape[0] == 2 * len(self._run.shots)
        if sample.shape[0] % 2 or not getattr(self._pipeline, "do_classifier_free_guidance", True):
            return False
        first, second = sample.chunk(2)
        return torch.equal(first, second)


def _tensor(given: Mapping[str, object], *names: str) -> Tensor | None:
    return next((value for name in names if isinstance(value := given.get(name), Tensor)), None)


def _grid(sample: Tensor | None, given: Mapping[str, object], patch: int) -> tuple[int, int] | None:
    """Rows and columns: of latents divided by the patch, or of the position ids (time, row, column ...), or of a square."""
    if sample is None or sample.ndim == 4:
        return None if sample is None else (sample.shape[2] // patch, sample.shape[3] // patch)
    ids = given.get("img_ids")
    if isinstance(ids, Tensor):
        last = ids.reshape(-1, ids.shape[-1])[-1]
        return int(last[1]) + 1, int(last[2]) + 1
    side = math.isqrt(sample.shape[1])
    return (side, side) if side * side == sample.shape[1] else None
