"""Which step, half and shots a call of the denoiser computes; read from the call itself, never counted."""

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from threading import RLock
from typing import NamedTuple, final

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor, nn

from difflex.errors import BadInput, DifflexError
from difflex.pipeline.families import Family
from difflex.records import Half, Shot, Site

OTHER_THREAD = (
    "Another thread is using this pipeline, in a block of `at` or as the diffusers pipeline itself. Use it from one thread at a "
    "time, or load one pipeline for each thread."
)
HALVES: Mapping[str | None, Half] = {"cond": "conditional", "uncond": "unconditional"}


class StopForward(Exception):
    """Raised in a hook to end a run early. The code that registers such a hook suppresses it around the run."""


class RunContext(NamedTuple):
    """What difflex knows about a run of the pipeline that it starts itself."""

    shots: tuple[Shot, ...]
    guided: bool
    timestep: float | None = None
    """Instead of the scheduler's, for images that are noised to a chosen level."""
    unconditional: Tensor | None = None
    """The embedding of the empty prompt, the input of the unconditional half."""


class DenoiserCall(NamedTuple):
    """One call of the denoiser."""

    step: int
    timestep: float
    halves: tuple[Half | None, ...]
    """The parts of the batch in order: a single half, or the unconditional before the conditional one."""
    shots: tuple[Shot, ...] | None
    text_tokens: int
    grid: tuple[int, int] | None
    """Rows and columns of the denoiser's input: latents of a U-Net, image tokens of a transformer."""
    steps: int | None = None
    """The number of steps of the run; None if unknown."""


class CallTracker(ABC):
    """The current call of the denoiser, tracked by a hook as long as at least one `tracking` block is open."""

    def __init__(self, denoiser: nn.Module) -> None:
        self._denoiser = denoiser
        self._signature = inspect.signature(type(denoiser).forward)
        self._blocks = 0
        self._call: DenoiserCall | None = None
        self._lock, self._open_at = RLock(), 0
        self._site: Site | None = None
        """The site whose function is running."""

    @contextmanager
    def claimed(self, at: bool = False) -> Iterator[None]:
        """Keep other threads from the pipeline within the block: they wait for a run, and get an error during a block of `at`.

        Otherwise a thread that such a block waits for would wait for the block.
        """
        while not self._lock.acquire(timeout=0.1):
            if self._open_at:
                raise BadInput(OTHER_THREAD)
        self._open_at += at
        try:
            yield
        finally:
            self._open_at -= at
            self._lock.release()

    @contextmanager
    def calling(self, site: Site) -> Iterator[None]:
        """Refuse runs of the pipeline within the block, in which the function of a site runs."""
        self._site = site
        try:
            yield
        finally:
            self._site = None

    def check_idle(self) -> None:
        """Raise an error if the function of a site is running."""
        if self._site is not None:
            raise BadInput(
                f"The function at the site '{self._site}' runs the pipeline that it is called from. Generate and harvest outside "
                "of the function: the run in progress would be lost."
            )

    @property
    def call(self) -> DenoiserCall:
        """The call of the denoiser that is being computed."""
        if self._call is None:
            raise DifflexError(
                "A block was called outside of the denoiser, so its step is unknown. Call the pipeline, not the block."
            )
        return self._call

    @contextmanager
    def tracking(self) -> Iterator[None]:
        """Keep `call` up to date within the block. Blocks nest."""
        self._blocks += 1
        try:
            if self._blocks == 1:
                self._register()
            yield
        finally:
            self._blocks -= 1
            if self._blocks == 0:
                self._release()
                self._call = None

    def _register(self) -> None:
        self._handle = self._denoiser.register_forward_pre_hook(self._before_call, with_kwargs=True)

    def _release(self) -> None:
        self._handle.remove()

    def _before_call(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        if not self._lock.acquire(blocking=False):
            raise BadInput(OTHER_THREAD)
        self._lock.release()
        self.check_idle()
        self._call = self._read_call(module, self._signature.bind_partial(module, *args, **kwargs).arguments)

    @abstractmethod
    def _read_call(self, module: nn.Module, arguments: Mapping[str, object]) -> DenoiserCall:
        """Return what the denoiser is called with `arguments` for."""


@final
class DiffusionTracker(CallTracker):
    """The calls of the denoiser of a diffusers pipeline."""

    def __init__(self, pipeline: DiffusionPipeline, family: Family) -> None:
        super().__init__(pipeline.components[family.denoiser])
        self._pipeline, self._family = pipeline, family
        self._cache_context: str | None = None
        self.run: RunContext | None = None
        """The run that is being computed, if difflex started it."""

    def _release(self) -> None:
        super()._release()
        self._denoiser.__dict__.pop("cache_context", None)
        self._cache_context = None

    def _register(self) -> None:
        super()._register()
        original = getattr(self._denoiser, "cache_context", None)  # not all models of diffusers have it
        if original is not None:

            @contextmanager
            def cache_context(name: str, **arguments: object) -> Iterator[None]:
                self._cache_context = name
                try:
                    with original(name, **arguments):
                        yield
                finally:
                    self._cache_context = None

            self._denoiser.__dict__["cache_context"] = cache_context

    def _read_call(self, module: nn.Module, arguments: Mapping[str, object]) -> DenoiserCall:
        sample = _tensor(arguments, "hidden_states", "sample")
        text = _tensor(arguments, "encoder_hidden_states")
        assert sample is not None
        step, timestep = self._time(_tensor(arguments, "timestep"))
        return DenoiserCall(
            step=step,
            timestep=timestep,
            steps=1 if self.run and self.run.timestep is not None else len(self._pipeline.components["scheduler"].timesteps),
            halves=self._halves(sample, text),
            shots=self.run.shots if self.run else None,
            text_tokens=0 if text is None else text.shape[1],
            grid=_grid(sample, arguments, int(getattr(module, "config", {}).get("patch_size") or 1)),
        )

    def _time(self, value: Tensor | None) -> tuple[int, float]:
        """Return the step whose timestep is nearest to `value` in its dtype; among equal ones, the scheduler's index."""
        scheduler = self._pipeline.components["scheduler"]
        timesteps = scheduler.timesteps
        if self.run is not None and self.run.timestep is not None:
            return 0, self.run.timestep
        assert value is not None
        timestep, scale = float(value.reshape(-1)[0]), self._family.timestep_scale
        # The arithmetic of the diffusers pipeline: first the dtype, then the division.
        candidates = (timesteps if scale == 1 else timesteps.to(value.dtype) / scale).tolist()
        nearest = min(abs(candidate - timestep) for candidate in candidates)
        steps = [step for step, candidate in enumerate(candidates) if abs(candidate - timestep) == nearest]
        step = steps[0]
        if len(steps) > 1:
            index = getattr(scheduler, "step_index", None)  # PNDM calls it `counter`
            index = getattr(scheduler, "counter", None) if index is None else index
            step = index if index in steps else step
        return step, float(timesteps[step])

    def _halves(self, sample: Tensor, text: Tensor | None) -> tuple[Half | None, ...]:
        if self._family.guidance == "separate":
            return (self._separate_half(text),)
        doubled = self._family.guidance == "doubled" and self._is_doubled(sample, text)
        return ("unconditional", "conditional") if doubled else (None,)

    def _separate_half(self, text: Tensor | None) -> Half | None:
        """Return the half by the name that diffusers gives the call, or else by its prompt embedding."""
        if self.run is not None:
            if not self.run.guided:
                return None
            if self._cache_context is None and self.run.unconditional is not None and text is not None:
                return "unconditional" if torch.equal(text, self.run.unconditional) else "conditional"
        return HALVES.get(self._cache_context)

    def _is_doubled(self, sample: Tensor, text: Tensor | None) -> bool:
        """Compare the batch with the number of shots; if that is unknown, its two halves, which share their noise."""
        if self.run is not None:
            return sample.shape[0] == 2 * len(self.run.shots)
        if sample.shape[0] % 2 or not getattr(self._pipeline, "do_classifier_free_guidance", True):
            return False
        first, second = sample.chunk(2)
        return torch.equal(first, second)


def _tensor(arguments: Mapping[str, object], *names: str) -> Tensor | None:
    return next((value for name in names if isinstance(value := arguments.get(name), Tensor)), None)


def _grid(sample: Tensor, arguments: Mapping[str, object], patch: int) -> tuple[int, int] | None:
    """Return rows and columns from the latents and the patch size, from the position ids, or from a square token count."""
    if sample.ndim == 4:
        return sample.shape[2] // patch, sample.shape[3] // patch
    ids = arguments.get("img_ids")
    if isinstance(ids, Tensor):
        last = ids.reshape(-1, ids.shape[-1])[-1]
        return int(last[1]) + 1, int(last[2]) + 1
    side = math.isqrt(sample.shape[1])
    return (side, side) if side * side == sample.shape[1] else None
