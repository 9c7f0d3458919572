"""Activations at several sites in one pass, with their shots; the pass stops after the last site needed, or ends in images."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import groupby, islice
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from difflex.errors import BadInput, DifflexError, NonFinite
from difflex.pipeline.engine import Engine, StopForward
from difflex.pipeline.hooks import Visit, visiting
from difflex.pipeline.sites import SiteModule
from difflex.records import Activations, HookContext, Shot, Site

__all__ = ["FinishedBatch", "HarvestRun", "SiteOutput", "collect", "finish", "harvest", "runs", "yielded"]


class SiteOutput(NamedTuple):
    """What a site showed at a step."""

    values: Float[Tensor, "shot token width"]
    grid: tuple[int, int] | None


class HarvestRun(NamedTuple):
    """A run of the pipeline and the steps of it that are kept."""

    shot: Shot
    """Without a timestep."""
    timesteps: tuple[float, ...]
    """In the order of the shots that asked for them."""


class FinishedBatch(NamedTuple):
    """Images, and what was seen on the way to them."""

    images: tuple[Image.Image, ...]
    activations: tuple[Activations, ...]
    """Of all these images, at each kept step and site."""


Found = dict[tuple[float, Site], SiteOutput]
Result = TypeVar("Result")


def harvest(
    engine: Engine, shots: Iterable[Shot], sites: Sequence[SiteModule], batch: int, progress: bool
) -> Iterator[Activations]:
    """The activations of `sites` at `shots`: for each batch of runs, each kept step, each site."""

    def work(passes: Sequence[HarvestRun]) -> Found:
        return collect(engine, [each.shot for each in passes], passes[0].timesteps, sites)

    if not sites:
        raise BadInput("No site was named to harvest. Name at least one; `sites` lists them.")
    with tqdm(unit=" tokens", unit_scale=True, disable=None if progress else True, desc="harvest") as bar:
        for passes, found in runs(engine, shots, batch, work):
            bar.update(
                sum(seen.values.shape[0] * seen.values.shape[1] for (_, site), seen in found.items() if site == sites[0].site)
            )
            yield from yielded(engine, [each.shot for each in passes], found, sites)


def finish(engine: Engine, shots: Iterable[Shot], sites: Sequence[SiteModule], batch: int) -> Iterator[FinishedBatch]:
    """The images that the runs of `shots` end in, and the activations of `sites` at the kept steps, batch by batch."""

    def work(passes: Sequence[HarvestRun]) -> tuple[Found, tuple[Image.Image, ...]]:
        shots, found = [each.shot for each in passes], Found()
        with _watched(engine, shots, passes[0].timesteps, sites, found, to_the_end=True):
            images = engine.run(shots)
        assert isinstance(images, list)
        return found, tuple(images)

    if not sites:
        raise BadInput("No site was named to harvest. Name at least one; `sites` lists them.")
    for passes, (found, images) in runs(engine, shots, batch, work):
        yield FinishedBatch(images, tuple(yielded(engine, [each.shot for each in passes], found, sites)))


def runs(
    engine: Engine, shots: Iterable[Shot], batch: int, work: Callable[[Sequence[HarvestRun]], Result]
) -> Iterator[tuple[Sequence[HarvestRun], Result]]:
    """The runs that `shots` ask for, in batches of the same settings, with what `work` makes of each batch."""
    for _, alike in groupby(_passes(engine, shots), key=_settings):
        yield from engine.batches(work, _encoded(engine, alike, batch), batch, shared=True)


def collect(
    engine: Engine,
    shots: Sequence[Shot],
    timesteps: Sequence[float],
    sites: Sequence[SiteModule],
    timestep: float | None = None,
    **extra: object,
) -> Found:
    """What one run shows at `sites` at the kept `timesteps`; it stops as soon as everything is seen."""
    found: Found = {}
    with _watched(engine, shots, timesteps, sites, found):
        engine.run(shots, timestep, **extra)
    return found


@contextmanager
def _watched(
    engine: Engine,
    shots: Sequence[Shot],
    timesteps: Sequence[float],
    sites: Sequence[SiteModule],
    found: Found,
    to_the_end: bool = False,
) -> Iterator[None]:
    """A block in which a run of `shots` fills `found`, and is stopped by that unless it is to go `to_the_end`."""

    def looking(site: Site) -> Visit:
        def look(x: Float[Tensor, "batch token width"], moment: HookContext) -> None:
            if len(x) != len(shots):
                raise BadInput(_mixed(engine, site, len(x), len(shots)))
            # A scheduler may repeat a timestep; the shot stands for the first call at it.
            if moment.timestep not in timesteps or moment.half == "unconditional" or (moment.timestep, site) in found:
                return
            # A copy: the model may go on to write into its own tensor, and a view would keep the other stream alive.
            found[moment.timestep, site] = SiteOutput(x.clone(memory_format=torch.contiguous_format), moment.grid)
            if len(found) == len(timesteps) * len(sites) and not to_the_end:
                raise StopForward

        return look

    with ExitStack() as stack:
        for located in sites:
            stack.enter_context(visiting(engine.clock, located, looking(located.site)))
        yield
    missing = [located for located in sites for kept in timesteps if (kept, located.site) not in found]
    if missing:
        raise DifflexError(
            f"The site '{missing[0].site}' was not met: the pipeline never called {missing[0].path} at the step asked."
        )


def yielded(engine: Engine, shots: Sequence[Shot], found: Found, sites: Sequence[SiteModule]) -> Iterator[Activations]:
    """`found` in the order of steps and sites, each with its shots; values that are not finite are an error."""
    paths = {located.site: located for located in sites}
    for timestep, site in sorted(found, key=lambda key: (-key[0], list(paths).index(key[1]))):
        seen = found.pop((timestep, site))
        here = tuple(replace(shot, timestep=timestep) for shot in shots)
        if not _is_finite(seen.values):
            raise NonFinite(_complaint(engine, seen.values, here, paths[site]))
        yield Activations(site=site, values=seen.values, shots=here, grid=seen.grid)


def _mixed(engine: Engine, site: Site, rows: int, shots: int) -> str:
    return (
        f"The site '{site}' shows {rows} rows for {shots} shots: which of them are whose is not known, as "
        f"{type(engine.diffusers).__name__} has no row in the table of families. Harvest it without guidance (guidance=0), which "
        "computes two halves."
    )


def _passes(engine: Engine, shots: Iterable[Shot]) -> Iterator[HarvestRun]:
    """The runs that `shots` ask for: neighbours that differ in their timestep alone share one."""
    for shot, alike in groupby(shots, key=lambda shot: replace(shot, timestep=None)):
        if shot.image is not None:
            raise BadInput(
                f"The shot of the image '{shot.image}' does not hold the image itself. Give that to harvest_images, "
                f"with noise={shot.noise}, seed={shot.seed} and prompts={shot.prompt!r}."
            )
        known = engine.timesteps(shot)
        asked = [known if one.timestep is None else (_nearest(one.timestep, known),) for one in alike]
        yield HarvestRun(shot, tuple(dict.fromkeys(timestep for timesteps in asked for timestep in timesteps)))


def _encoded(engine: Engine, passes: Iterator[HarvestRun], batch: int) -> Iterator[HarvestRun]:
    """`passes`, their prompts encoded some batches ahead where that is cheap."""
    while chunk := list(islice(passes, batch * engine.encoder.ahead(batch))):
        engine.encoder.encode([each.shot.prompt for each in chunk])
        yield from chunk


def _settings(each: HarvestRun) -> tuple[object, ...]:
    """What must be the same for runs to share a batch."""
    shot = each.shot
    return shot.pixels, shot.steps, shot.guidance, each.timesteps


def _nearest(timestep: float, known: Sequence[float]) -> float:
    nearest = min(known, key=lambda one: abs(one - timestep))
    if abs(nearest - timestep) > 0.5:
        listed = ", ".join(f"{one:g}" for one in known)
        raise BadInput(f"A run of {len(known)} steps does not pass timestep {timestep:g}. It passes: {listed}.")
    return nearest


def _is_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite: told by the sum, and by a look at each only where the sum itself overflows."""
    return bool(torch.isfinite(values.sum(dtype=torch.float32))) or bool(torch.isfinite(values).all())


def _complaint(engine: Engine, values: Tensor, shots: Sequence[Shot], located: SiteModule) -> str:
    wrong = int((~torch.isfinite(values)).flatten(1).any(1).nonzero()[0])
    shot = shots[wrong]
    what = shot.image if shot.image is not None else repr(shot.prompt)
    return (
        f"Activations that are not finite at the site '{located.site}' (block {located.path}), shot {what}, seed {shot.seed}, "
        f"timestep {shot.timestep:g}. {_origin(engine, shot)}Try another precision: fp16 overflows where bf16 does not."
    )


def _origin(engine: Engine, shot: Shot) -> str:
    """Which block gave the first value that is not finite; found by one more run, since it cannot be told afterwards."""
    if shot.image is not None:
        return ""
    first: list[SiteModule] = []

    def looking(located: SiteModule) -> Visit:
        def look(x: Float[Tensor, "batch token width"], moment: HookContext) -> None:
            if not _is_finite(x):
                first.append(located)
                raise StopForward

        return look

    with ExitStack() as stack:
        for name in engine.sites.blocks:
            located = engine.sites.locate(name)
            stack.enter_context(visiting(engine.clock, located, looking(located)))
        engine.run([replace(shot, timestep=None)])
    return f"They first arise in {first[0].path}. " if first else ""
