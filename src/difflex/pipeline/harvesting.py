"""What runs yield: activations at sites, final images, and predictions of the denoiser under edits."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import NamedTuple, TypeVar, final

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from difflex.errors import BadInput, DifflexError, NonFinite
from difflex.pipeline.calls import DenoiserCall, StopForward
from difflex.pipeline.engine import Engine, Run, map_runs
from difflex.pipeline.sites import SiteFunction, SiteModule, hook_site
from difflex.progress import ProgressBar
from difflex.records import Activations, EditOutcomes, HookContext, Shot, Site

Edits = Mapping[str, SiteFunction]
Hooks = Mapping[str, Callable[[], AbstractContextManager[None]]]
"""For each edit, a context manager that makes it within its block."""


WAITING_BYTES = 2**29
"""Of the activations that wait on a GPU while it computes the next ones, at most."""
Item = TypeVar("Item")
Recorded = dict[tuple[float, Site], Activations]
"""Activations by timestep and site."""


class ImageBatch(NamedTuple):
    """Images and the activations of the runs that generated them."""

    images: tuple[Image.Image, ...]
    activations: tuple[Activations, ...]
    """Of all these images, at each kept step and site."""


@final
class FiniteCheck:
    """A check of values that does not wait for the GPU to compute them, nor later for what it computes next."""

    def __init__(self, values: Sequence[Tensor]) -> None:
        """Begin to sum `values`."""
        finite = torch.stack([torch.isfinite(x.sum(dtype=torch.float32)).to(values[0].device) for x in values])
        self._summed: torch.cuda.Event | None = None
        if finite.is_cuda:
            finite = torch.empty(finite.shape, dtype=finite.dtype, pin_memory=True).copy_(finite, non_blocking=True)
            self._summed = torch.cuda.Event()
            self._summed.record()
        self._finite = finite

    def passed(self) -> bool:
        """Whether no sum is NaN or infinite. One may overflow where no value does."""
        if self._summed is not None:
            self._summed.synchronize()
        return bool(self._finite.all())


class RecordedBatch(NamedTuple):
    """The activations of a batch of runs."""

    recorded: Recorded
    finite: FiniteCheck

    @property
    def may_wait(self) -> bool:
        """Whether the next batch may be computed before this one is used: on a GPU, where that takes little memory."""
        values = [x.values for x in self.recorded.values()]
        return all(x.is_cuda for x in values) and sum(x.nbytes for x in values) <= WAITING_BYTES


def one_behind(items: Iterable[Item], may_wait: Callable[[Item], bool]) -> Iterator[Item]:
    """Yield `items`, each that may wait after the next one was taken."""
    waiting: list[Item] = []
    for item in items:
        yield from waiting
        waiting = [item]
        if not may_wait(item):
            yield waiting.pop()
    yield from waiting


def harvest(
    engine: Engine, shots: Iterable[Shot], sites: Sequence[SiteModule], batch: int, progress: bool
) -> Iterator[Activations]:
    """Yield the activations of `sites` at `shots`: for each batch of runs, each kept step, each site.

    A GPU gets the next batch to compute before the last one is yielded, so that it does not wait for the host.
    """

    def recording(run: Run) -> RecordedBatch:
        recorded = record(engine, run, sites)
        return RecordedBatch(recorded, FiniteCheck([x.values for x in recorded.values()]))

    with progress_bar(progress) as bar:
        batches = (recorded for _, recorded in map_runs(engine, shots, batch, recording))
        for recorded, finite in one_behind(batches, lambda batch: batch.may_wait):
            bar.update(sum(x.values.shape[:2].numel() for (_, site), x in recorded.items() if site == sites[0].site))
            yield from in_order(engine, recorded, sites, finite)


def progress_bar(show: bool) -> ProgressBar:
    """Return a bar that counts tokens."""
    return ProgressBar(unit=" tokens", unit_scale=True, show=show, desc="harvest")


def harvest_with_images(engine: Engine, shots: Iterable[Shot], sites: Sequence[SiteModule], batch: int) -> Iterator[ImageBatch]:
    """Yield the images of `shots` and the activations of `sites` at the kept steps, batch by batch."""

    def generate(run: Run) -> tuple[Recorded, list[Image.Image]]:
        with _recording(engine, run, sites, stop=False) as recorded:
            images = engine.images(run.shots)
        return recorded, images

    for _, (recorded, images) in map_runs(engine, shots, batch, generate):
        finite = FiniteCheck([x.values for x in recorded.values()])
        yield ImageBatch(tuple(images), tuple(in_order(engine, recorded, sites, finite)))


def record(engine: Engine, run: Run, sites: Sequence[SiteModule]) -> Recorded:
    """Return the activations of `sites` in a run that ends when all are recorded."""
    with _recording(engine, run, sites, stop=True) as recorded:
        engine.run(run.shots, run.noised)
    return recorded


@contextmanager
def _recording(engine: Engine, run: Run, sites: Sequence[SiteModule], stop: bool) -> Iterator[Recorded]:
    """Record the activations of `sites` at the timesteps of `run` within the block.

    `stop`: end the run, and the block, as soon as everything is recorded.
    """
    recorded: Recorded = {}
    size = len(run.timesteps) * len(sites)

    def record(x: Float[Tensor, "batch token width"], context: HookContext, site: Site) -> None:
        if len(x) != len(run.shots):
            raise BadInput(_mixed_rows(engine, site, len(x), len(run.shots)))
        key = (context.timestep, site)
        # A scheduler may repeat a timestep; the first call at it counts.
        if context.timestep not in run.timesteps or context.half == "unconditional" or key in recorded:
            return
        recorded[key] = Activations(site=site, values=x, shots=_at(run.shots, context.timestep), grid=context.grid)
        if stop and len(recorded) == size:
            raise StopForward

    with ExitStack() as hooks:
        for target in sites:
            hooks.enter_context(hook_site(engine.tracker, target, partial(record, site=target.site)))
        with suppress(StopForward):
            yield recorded
    missing = [target for target in sites for timestep in run.timesteps if (timestep, target.site) not in recorded]
    if missing:
        raise DifflexError(f"The site '{missing[0].site}' has no activations: {missing[0].path} is not called at a kept step.")


def _at(shots: Iterable[Shot], timestep: float) -> tuple[Shot, ...]:
    return tuple(replace(shot, timestep=timestep) for shot in shots)


def in_order(
    engine: Engine, recorded: Recorded, sites: Sequence[SiteModule], finite: FiniteCheck | None = None
) -> Iterator[Activations]:
    """Empty `recorded` in the order of steps and sites; raise an error if values are not finite, by `finite` if it has begun."""
    order = [target.site for target in sites]
    passed = finite is not None and finite.passed()
    for timestep, site in sorted(recorded, key=lambda key: (-key[0], order.index(key[1]))):
        activations = recorded.pop((timestep, site))
        if not passed and not _is_finite(activations.values):
            raise NonFinite(_non_finite_message(engine, activations, sites[order.index(site)].path))
        yield activations


def _mixed_rows(engine: Engine, site: Site, rows: int, shots: int) -> str:
    return (
        f"The site '{site}' has {rows} rows for {shots} shots, and difflex cannot tell which row belongs to which shot: "
        f"{type(engine.diffusers).__name__} has no row in the table of families. Harvest it without guidance (guidance=0), which "
        "computes two halves."
    )


def _is_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite: the sum tells it, each value is tested only if the sum itself overflows."""
    return bool(torch.isfinite(values.sum(dtype=torch.float32))) or bool(torch.isfinite(values).all())


def _non_finite_message(engine: Engine, activations: Activations, path: str) -> str:
    shot = activations.shots[int((~torch.isfinite(activations.values)).flatten(1).any(1).nonzero()[0])]
    source = shot.image if shot.image is not None else repr(shot.prompt)
    return (
        f"Activations that are not finite at the site '{activations.site}' (block {path}), shot {source}, seed {shot.seed}, "
        f"timestep {shot.timestep:g}. {_origin(engine, shot)}Try another precision: fp16 overflows where bf16 does not."
    )


def _origin(engine: Engine, shot: Shot) -> str:
    """Say which block returns the first value that is not finite, by running `shot` once more."""
    if shot.image is not None:
        return ""
    paths: list[str] = []

    def detect(x: Float[Tensor, "batch token width"], context: HookContext, path: str) -> None:
        if not _is_finite(x):
            paths.append(path)
            raise StopForward

    with ExitStack() as hooks, suppress(StopForward):
        for target in map(engine.sites.locate, engine.sites.blocks):
            hooks.enter_context(hook_site(engine.tracker, target, partial(detect, path=target.path)))
        engine.run([replace(shot, timestep=None)])
    return f"They first arise in {paths[0]}. " if paths else ""


def predictions(engine: Engine, shots: Iterable[Shot], site: SiteModule, edits: Edits, batch: int) -> Iterator[EditOutcomes]:
    """Yield the predictions of the denoiser at `shots`, plain and under each edit: for each batch of runs, each kept step."""
    for _, outcomes in map_runs(engine, shots, batch, lambda run: predict(engine, run, _hooks(engine, site, edits))):
        yield from outcomes


def _hooks(engine: Engine, site: SiteModule, edits: Edits) -> Hooks:
    return {name: partial(hook_site, engine.tracker, site, edit, "conditional") for name, edit in edits.items()}


def edited_images(engine: Engine, shots: Iterable[Shot], site: SiteModule, edits: Edits, batch: int) -> Iterator[EditOutcomes]:
    """Yield the images of `shots`, plain and with each edit made at every step; pixels between 0 and 1."""

    def generate(run: Run) -> EditOutcomes:
        edited = {}
        for name, hook in _hooks(engine, site, edits).items():
            with hook():
                edited[name] = engine.pixels(run.shots)
        return EditOutcomes(run.shots, engine.pixels(run.shots), edited)

    # Shots of one run that differ in their timestep have one image.
    finished = dict.fromkeys(replace(shot, timestep=None) for shot in shots)
    for _, outcomes in map_runs(engine, finished, batch, generate):
        yield outcomes


def predict(engine: Engine, run: Run, hooks: Hooks, gradients: bool = False) -> list[EditOutcomes]:
    """Return the predictions at each kept timestep of a run, which ends after the last of them.

    After the denoiser's call at a kept step, it is called again with the very same arguments under each edit: all predictions
    are for the same noisy images. The run itself continues with the plain one.
    """
    outcomes: dict[float, EditOutcomes] = {}
    repeating = False

    def repeat(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> None:
        nonlocal repeating
        call = engine.tracker.call
        # A scheduler may repeat a timestep; the first call at it counts.
        if repeating or call.timestep not in run.timesteps or call.timestep in outcomes or call.halves == ("unconditional",):
            return
        repeating, edited = True, {}
        try:
            for name, hook in hooks.items():
                with hook():
                    edited[name] = _prediction(engine, call, module(*args, **kwargs))
        finally:
            repeating = False
        outcomes[call.timestep] = EditOutcomes(_at(run.shots, call.timestep), _prediction(engine, call, output), edited)
        if len(outcomes) == len(run.timesteps):
            raise StopForward

    with engine.tracker.tracking(), engine.denoiser.register_forward_hook(repeat, with_kwargs=True), suppress(StopForward):
        engine.run(run.shots, run.noised, gradients)
    if missing := [timestep for timestep in run.timesteps if timestep not in outcomes]:
        raise DifflexError(
            f"The pipeline never calls its denoiser at timestep {missing[0]:g}: there is no prediction to compare."
        )
    return [outcomes[timestep] for timestep in sorted(outcomes, reverse=True)]


def _prediction(engine: Engine, call: DenoiserCall, output: object) -> Float[Tensor, "shot ..."]:
    """Return the prediction of the conditional half, without the variances that some denoisers predict too."""
    whole = output if isinstance(output, Tensor) else output[0]  # pyright: ignore[reportIndexIssue]
    assert isinstance(whole, Tensor)
    conditional = whole.chunk(len(call.halves))[-1]
    with_variances = conditional.ndim == 4 and engine.config("in_channels") == conditional.shape[1] / 2
    return (conditional.chunk(2, dim=1)[0] if with_variances else conditional).clone()
