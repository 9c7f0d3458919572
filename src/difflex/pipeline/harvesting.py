"""What runs yield: activations at sites, final images, and predictions of the denoiser under edits."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from difflex.errors import BadInput, DifflexError, NonFinite
from difflex.pipeline.calls import DenoiserCall, StopForward
from difflex.pipeline.engine import Engine, Run, map_runs
from difflex.pipeline.sites import SiteFunction, SiteModule, hook_site, on_copies
from difflex.records import Activations, EditOutcomes, HookContext, Shot, Site

__all__ = ["ImageBatch", "activations_of", "edited_images", "harvest", "harvest_with_images", "predictions", "recording"]

Edits = Mapping[str, SiteFunction]


class SiteOutput(NamedTuple):
    """The activations of a site at one step."""

    values: Float[Tensor, "shot token width"]
    grid: tuple[int, int] | None


SiteOutputs = dict[tuple[float, Site], SiteOutput]
"""By timestep and site."""


class ImageBatch(NamedTuple):
    """Images and the activations of the runs that generated them."""

    images: tuple[Image.Image, ...]
    activations: tuple[Activations, ...]
    """Of all these images, at each kept step and site."""


def harvest(
    engine: Engine, shots: Iterable[Shot], sites: Sequence[SiteModule], batch: int, progress: bool
) -> Iterator[Activations]:
    """Yield the activations of `sites` at `shots`: for each batch of runs, each kept step, each site."""
    check_sites(sites)

    def record(run: Run) -> SiteOutputs:
        with recording(engine, run, sites, stop=True) as outputs:
            engine.run(run.shots)
        return outputs

    with tqdm(unit=" tokens", unit_scale=True, disable=None if progress else True, desc="harvest") as bar:
        for run, outputs in map_runs(engine, shots, batch, record):
            bar.update(sum(output.values.shape[:2].numel() for (_, site), output in outputs.items() if site == sites[0].site))
            yield from activations_of(engine, run.shots, outputs, sites)


def harvest_with_images(engine: Engine, shots: Iterable[Shot], sites: Sequence[SiteModule], batch: int) -> Iterator[ImageBatch]:
    """Yield the images of `shots` and the activations of `sites` at the kept steps, batch by batch."""
    check_sites(sites)

    def record(run: Run) -> tuple[SiteOutputs, list[Image.Image]]:
        with recording(engine, run, sites, stop=False) as outputs:
            images = engine.images(run.shots)
        return outputs, images

    for run, (outputs, images) in map_runs(engine, shots, batch, record):
        yield ImageBatch(tuple(images), tuple(activations_of(engine, run.shots, outputs, sites)))


def check_sites(sites: Sequence[SiteModule]) -> None:
    """Raise an error if there are no sites."""
    if not sites:
        raise BadInput("No site is given to harvest. Give at least one; `sites` lists them.")


@contextmanager
def recording(engine: Engine, run: Run, sites: Sequence[SiteModule], stop: bool) -> Iterator[SiteOutputs]:
    """Record the outputs of `sites` at the timesteps of `run` within the block.

    `stop`: end the run, and the block, as soon as everything is recorded.
    """
    outputs: SiteOutputs = {}
    size = len(run.timesteps) * len(sites)

    def recorder(site: Site) -> SiteFunction:
        def record(x: Float[Tensor, "batch token width"], context: HookContext) -> None:
            if len(x) != len(run.shots):
                raise BadInput(_mixed_rows(engine, site, len(x), len(run.shots)))
            key = (context.timestep, site)
            # A scheduler may repeat a timestep; the first call at it counts.
            if context.timestep not in run.timesteps or context.half == "unconditional" or key in outputs:
                return
            # A copy: the model may go on to write into its own tensor, and a view would keep the other stream alive.
            outputs[key] = SiteOutput(x.clone(memory_format=torch.contiguous_format), context.grid)
            if stop and len(outputs) == size:
                raise StopForward

        return record

    with ExitStack() as hooks:
        for target in sites:
            hooks.enter_context(hook_site(engine.tracker, target, recorder(target.site)))
        with suppress(StopForward):
            yield outputs
    missing = [target for target in sites for timestep in run.timesteps if (timestep, target.site) not in outputs]
    if missing:
        raise DifflexError(f"The site '{missing[0].site}' has no activations: {missing[0].path} is not called at a kept step.")


def activations_of(
    engine: Engine, shots: Sequence[Shot], outputs: SiteOutputs, sites: Sequence[SiteModule]
) -> Iterator[Activations]:
    """Take the recorded `outputs` in the order of steps and sites; raise an error if values are not finite."""
    targets = {target.site: target for target in sites}
    order = list(targets)
    for timestep, site in sorted(outputs, key=lambda key: (-key[0], order.index(key[1]))):
        output = outputs.pop((timestep, site))
        here = tuple(replace(shot, timestep=timestep) for shot in shots)
        if not _is_finite(output.values):
            raise NonFinite(_non_finite_message(engine, output.values, here, targets[site]))
        yield Activations(site=site, values=output.values, shots=here, grid=output.grid)


def _mixed_rows(engine: Engine, site: Site, rows: int, shots: int) -> str:
    return (
        f"The site '{site}' has {rows} rows for {shots} shots, and difflex cannot tell which row belongs to which shot: "
        f"{type(engine.diffusers).__name__} has no row in the table of families. Harvest it without guidance (guidance=0), which "
        "computes two halves."
    )


def _is_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite: the sum tells it, each value is tested only if the sum itself overflows."""
    return bool(torch.isfinite(values.sum(dtype=torch.float32))) or bool(torch.isfinite(values).all())


def _non_finite_message(engine: Engine, values: Tensor, shots: Sequence[Shot], target: SiteModule) -> str:
    shot = shots[int((~torch.isfinite(values)).flatten(1).any(1).nonzero()[0])]
    source = shot.image if shot.image is not None else repr(shot.prompt)
    return (
        f"Activations that are not finite at the site '{target.site}' (block {target.path}), shot {source}, seed {shot.seed}, "
        f"timestep {shot.timestep:g}. {_origin(engine, shot)}Try another precision: fp16 overflows where bf16 does not."
    )


def _origin(engine: Engine, shot: Shot) -> str:
    """Say which block returns the first value that is not finite, by running `shot` once more."""
    if shot.image is not None:
        return ""
    paths: list[str] = []

    def detector(path: str) -> SiteFunction:
        def detect(x: Float[Tensor, "batch token width"], context: HookContext) -> None:
            if not _is_finite(x):
                paths.append(path)
                raise StopForward

        return detect

    with ExitStack() as hooks, suppress(StopForward):
        for target in map(engine.sites.locate, engine.sites.blocks):
            hooks.enter_context(hook_site(engine.tracker, target, detector(target.path)))
        engine.run([replace(shot, timestep=None)])
    return f"They first arise in {paths[0]}. " if paths else ""


def predictions(engine: Engine, shots: Iterable[Shot], site: SiteModule, edits: Edits, batch: int) -> Iterator[EditOutcomes]:
    """Yield the predictions of the denoiser at `shots`, plain and under each edit: for each batch of runs, each kept step."""
    for _, outcomes in map_runs(engine, shots, batch, lambda run: _predict(engine, run, site, edits)):
        yield from outcomes


def edited_images(engine: Engine, shots: Iterable[Shot], site: SiteModule, edits: Edits, batch: int) -> Iterator[EditOutcomes]:
    """Yield the images of `shots`, plain and with each edit made at every step; pixels between 0 and 1."""

    def generate(run: Run) -> EditOutcomes:
        edited = {}
        for name, edit in edits.items():
            with hook_site(engine.tracker, site, on_copies(edit), "conditional"):
                edited[name] = _pixels(engine, run)
        return EditOutcomes(run.shots, _pixels(engine, run), edited)

    # Shots of one run that differ in their timestep have one image.
    finished = dict.fromkeys(replace(shot, timestep=None) for shot in shots)
    for _, outcomes in map_runs(engine, finished, batch, generate):
        yield outcomes


def _pixels(engine: Engine, run: Run) -> Float[Tensor, "image channel row column"]:
    pixels = engine.run(run.shots, output_type="pt")
    assert isinstance(pixels, Tensor)
    return pixels


def _predict(engine: Engine, run: Run, site: SiteModule, edits: Edits) -> list[EditOutcomes]:
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
            for name, edit in edits.items():
                with hook_site(engine.tracker, site, on_copies(edit), "conditional"):
                    edited[name] = prediction(engine, call, module(*args, **kwargs))
        finally:
            repeating = False
        here = tuple(replace(shot, timestep=call.timestep) for shot in run.shots)
        outcomes[call.timestep] = EditOutcomes(here, prediction(engine, call, output), edited)
        if len(outcomes) == len(run.timesteps):
            raise StopForward

    with (
        engine.tracker.tracking(),
        engine.denoiser.register_forward_hook(repeat, with_kwargs=True),
        suppress(StopForward),
    ):
        engine.run(run.shots)
    if missing := [timestep for timestep in run.timesteps if timestep not in outcomes]:
        raise DifflexError(
            f"The pipeline never calls its denoiser at timestep {missing[0]:g}: there is no prediction to compare."
        )
    return [outcomes[timestep] for timestep in sorted(outcomes, reverse=True)]


def prediction(engine: Engine, call: DenoiserCall, output: object) -> Float[Tensor, "shot ..."]:
    """Return the prediction of the conditional half, without the variances that some denoisers predict too."""
    whole = output if isinstance(output, Tensor) else output[0]  # pyright: ignore[reportIndexIssue]
    assert isinstance(whole, Tensor)
    conditional = whole.chunk(len(call.halves))[-1]
    with_variances = conditional.ndim == 4 and engine.config("in_channels") == conditional.shape[1] / 2
    return (conditional.chunk(2, dim=1)[0] if with_variances else conditional).clone()
