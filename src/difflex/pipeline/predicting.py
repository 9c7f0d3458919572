"""What a model makes of shots where a site is edited: the denoiser's prediction at their timestep, or the finished image."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from jaxtyping import Float
from torch import Tensor, nn

from difflex.errors import DifflexError
from difflex.pipeline.calls import DenoiserCall
from difflex.pipeline.engine import Engine, StopForward
from difflex.pipeline.harvesting import HarvestRun, runs
from difflex.pipeline.hooks import Visit, on_copies, visiting
from difflex.pipeline.sites import SiteModule
from difflex.records import EditOutcomes, Shot

__all__ = ["images", "prediction", "predictions"]

Edits = Mapping[str, Visit]


def predictions(engine: Engine, shots: Iterable[Shot], located: SiteModule, edits: Edits, batch: int) -> Iterator[EditOutcomes]:
    """What the denoiser predicts at `shots`: for each batch of runs, each kept step."""

    def work(passes: Sequence[HarvestRun]) -> list[EditOutcomes]:
        return _predict(engine, passes, located, edits)

    for _, found in runs(engine, shots, batch, work):
        yield from found


def images(engine: Engine, shots: Iterable[Shot], located: SiteModule, edits: Edits, batch: int) -> Iterator[EditOutcomes]:
    """The images that runs of `shots` end in, the edit made at every step; pixels between 0 and 1."""

    def work(passes: Sequence[HarvestRun]) -> EditOutcomes:
        shots, edited = tuple(each.shot for each in passes), {}
        for name, fn in edits.items():
            with visiting(engine.clock, located, on_copies(fn), "conditional"):
                edited[name] = _draw(engine, shots)
        return EditOutcomes(shots, _draw(engine, shots), edited)

    # Shots of one run that differ in their timestep end in one image.
    finished = dict.fromkeys(replace(shot, timestep=None) for shot in shots)
    for _, outcomes in runs(engine, finished, batch, work):
        yield outcomes


def _draw(engine: Engine, shots: Sequence[Shot]) -> Float[Tensor, "image channel row column"]:
    drawn = engine.run(shots, output_type="pt")
    assert isinstance(drawn, Tensor)
    return drawn


def _predict(engine: Engine, passes: Sequence[HarvestRun], located: SiteModule, edits: Edits) -> list[EditOutcomes]:
    """The predictions at each kept timestep of one run, which stops after the last of them.

    When the denoiser has answered at a kept step it is asked again, with the very same arguments, under each edit: all answers
    are to the same noisy images. The run itself goes on with the plain one.
    """
    found: dict[float, EditOutcomes] = {}
    shots, timesteps, asking = [each.shot for each in passes], passes[0].timesteps, False

    def answered(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> None:
        nonlocal asking
        call = engine.clock.call
        # A scheduler may repeat a timestep; the shot stands for the first call at it.
        if asking or call.timestep not in timesteps or call.timestep in found or call.halves == ("unconditional",):
            return
        asking, edited = True, {}
        try:
            for name, fn in edits.items():
                with visiting(engine.clock, located, on_copies(fn), "conditional"):
                    edited[name] = prediction(engine, call, module(*args, **kwargs))
        finally:
            asking = False
        here = tuple(replace(shot, timestep=call.timestep) for shot in shots)
        found[call.timestep] = EditOutcomes(here, prediction(engine, call, output), edited)
        if len(found) == len(timesteps):
            raise StopForward

    with engine.clock.watching():
        handle = engine.denoiser.register_forward_hook(answered, with_kwargs=True)
        try:
            engine.run(shots)
        finally:
            handle.remove()
    if missing := [timestep for timestep in timesteps if timestep not in found]:
        raise DifflexError(f"The pipeline never called its denoiser at timestep {missing[0]:g}: there is nothing to compare.")
    return [found[timestep] for timestep in sorted(found, reverse=True)]


def prediction(engine: Engine, call: DenoiserCall, output: object) -> Float[Tensor, "shot ..."]:
    """What the denoiser predicts for the conditional half, without the variances that some predict beside it."""
    whole = output if isinstance(output, Tensor) else output[0]  # pyright: ignore[reportIndexIssue]
    assert isinstance(whole, Tensor)
    conditional = whole.chunk(len(call.halves))[-1]
    with_variances = conditional.ndim == 4 and engine.config("in_channels") == conditional.shape[1] / 2
    return (conditional.chunk(2, dim=1)[0] if with_variances else conditional).clone()
