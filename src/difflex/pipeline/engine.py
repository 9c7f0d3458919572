"""Runs of a diffusers pipeline: one call for a batch of shots, and the batches of many shots."""

import gc
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from itertools import groupby, islice
from typing import NamedTuple, NoReturn, Protocol, TypeVar, cast, final

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from difflex.distributed import Ranks
from difflex.errors import BadInput, NonFinite, OutOfMemory
from difflex.pipeline.calls import CallTracker, DiffusionTracker, RunContext, StopForward
from difflex.pipeline.families import Family
from difflex.pipeline.prompts import PromptEncoder
from difflex.pipeline.sites import SiteMap
from difflex.pipeline.sources import ModelDefaults, check_text_length
from difflex.records import Shot

Item = TypeVar("Item")
Result = TypeVar("Result")
Arguments = tuple[tuple[object, ...], dict[str, object]]
ADVICE = "Load the model with precision='nf4' or offload=True, or use fewer pixels or a smaller batch."


class BatchEngine(Protocol):
    """What `map_batches` needs to know of an engine."""

    sharded: bool
    max_batch: int | None

    @property
    def tracker(self) -> CallTracker: ...


@final
class Engine:
    """A diffusers pipeline with its family, defaults, prompt encoder, call tracker and sites."""

    def __init__(self, diffusers: DiffusionPipeline, family: Family, defaults: ModelDefaults) -> None:
        self.diffusers = diffusers
        self.family = family
        self.defaults = defaults
        self.encoder = PromptEncoder(diffusers, family, defaults.text_length)
        self.tracker = DiffusionTracker(diffusers, family)
        self.sites = SiteMap(self.denoiser, family)
        self.sharded = False
        """Whether the denoiser is sharded over ranks; then all ranks must call it equally often."""
        self.max_batch: int | None = None
        """The largest batch to try, once a larger one did not fit into memory."""
        self.offloaded = False
        """Whether only the component that computes is on the GPU."""
        self.text_length: int | None = None
        """Tokens of a prompt in new shots; None for the model's default."""
        self._default_pixels: tuple[int, int] | None = None
        self._timesteps: dict[tuple[tuple[int, int], int, float], tuple[float, ...]] = {}

    @property
    def denoiser(self) -> nn.Module:
        """The component that is called once per step."""
        return self.diffusers.components[self.family.denoiser]

    @property
    def device(self) -> torch.device:
        """Where the pipeline computes; a component that is offloaded is elsewhere until it is called."""
        return self.diffusers._execution_device

    @property
    def token_pixels(self) -> int:
        """Pixels of an image along each side of one token of the denoiser's input."""
        patch = 2 if self.family.latents != "plain" else int(cast(int, self.config("patch_size") or 1))
        return self.diffusers.vae_scale_factor * patch

    @property
    def default_pixels(self) -> tuple[int, int]:
        return self._default_pixels or self.defaults.default_pixels(self.config("sample_size"), self.diffusers.vae_scale_factor)

    def set_defaults(self, pixels: tuple[int, int] | None, steps: int | None, guidance: float | None) -> None:
        """Replace the settings of a run that names none; None leaves one as it is."""
        self._default_pixels = pixels or self._default_pixels
        steps, guidance = steps or self.defaults.steps, self.defaults.guidance if guidance is None else guidance
        self.defaults = replace(self.defaults, steps=steps, guidance=guidance)

    def set_text_length(self, length: int | None) -> None:
        """Let the model read `length` tokens of each prompt, padding included; None for its default."""
        length = None if length is None else check_text_length(length, self.family)
        self.text_length = None if length == self.defaults.text_length else length

    def config(self, entry: str) -> object:
        """Return an entry of the denoiser's config, or else of the pipeline's; None if neither has it."""
        value = dict(cast(ConfigMixin, self.denoiser).config).get(entry)
        return dict(self.diffusers.config).get(entry) if value is None else value

    def is_guided(self, guidance: float) -> bool:
        """Whether the denoiser computes a conditional and an unconditional half."""
        return self.family.is_guided(guidance, self.config)

    def run(
        self, shots: Sequence[Shot], timestep: float | None = None, gradients: bool = False, **arguments: object
    ) -> list[Image.Image] | Tensor:
        """Call the pipeline for `shots`, which differ in prompt and seed only; return images, or latents if requested."""
        self.tracker.check_idle()
        guided = self.is_guided(shots[0].guidance)
        prompts = self.encoder([shot.prompt for shot in shots], guided, shots[0].text_length)
        unconditional = prompts.get("negative_prompt_embeds")
        context = RunContext(tuple(shots), guided, timestep, unconditional if isinstance(unconditional, Tensor) else None)
        # Each class of diffusers has its own `__call__`, the base has none.
        pipeline = cast(Callable[..., tuple[list[Image.Image] | Tensor]], self.diffusers)
        if gradients:  # which diffusers' decorator switches off
            pipeline = partial(inspect.unwrap(type(pipeline).__call__), pipeline)
        with self.tracker.claimed():
            outer, self.tracker.run = self.tracker.run, context
            try:
                with torch.set_grad_enabled(gradients):
                    return pipeline(**prompts, **self._settings(shots, guided), **arguments, return_dict=False)[0]
            except BaseException:
                self._release()
                raise
            finally:
                self.tracker.run = outer

    def images(self, shots: Sequence[Shot]) -> list[Image.Image]:
        """Generate the images of `shots`, which differ in prompt and seed only."""
        with self._finite(shots):
            images = self.run(shots)
        assert isinstance(images, list)
        return images

    def pixels(self, shots: Sequence[Shot], gradients: bool = False) -> Float[Tensor, "image channel row column"]:
        """Generate the images of `shots` as pixels between 0 and 1, with `gradients` with respect to what hooks add."""
        with self._finite(shots):
            pixels = self.run(shots, gradients=gradients, output_type="pt")
        assert isinstance(pixels, Tensor)
        return pixels

    @contextmanager
    def _finite(self, shots: Sequence[Shot]) -> Iterator[None]:
        """Raise an error at the end of the block if values in it were not finite: the image would be black, in silence."""
        finite: dict[str, list[Tensor]] = {"denoiser": [], "decoder": []}

        def check(name: str, output: object) -> None:
            x = output if isinstance(output, Tensor) else output[0]  # pyright: ignore[reportIndexIssue]
            finite[name].append(torch.isfinite(x).all())  # compared at the end: on a GPU nothing waits for it

        with ExitStack() as hooks, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "invalid value encountered in cast", RuntimeWarning)  # of NaN to pixels
            decoder = getattr(self.diffusers.components.get("vae"), "decoder", None)
            for name, module in (("denoiser", self.denoiser), ("decoder", decoder)):
                if isinstance(module, nn.Module):
                    hooks.enter_context(module.register_forward_hook(lambda _, __, output, name=name: check(name, output)))
            yield
        flags = {name: torch.stack(values).tolist() if values else [] for name, values in finite.items()}
        if not all(map(all, flags.values())):
            raise NonFinite(_non_finite(shots, flags["denoiser"]))

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

    def _release(self) -> None:
        """Undo what a run that ends early leaves behind: offloaded components on the GPU, and gathered shards."""
        self.diffusers.maybe_free_model_hooks()
        for module in self.denoiser.modules() if self.sharded else ():
            if isinstance(module, FSDPModule):
                module.reshard()

    def shard(self, device: torch.device) -> None:
        """Shard the denoiser over all ranks, block by block, and move all other components to `device`.

        A block's weights are gathered before it computes, so activations equal those of the whole model, bit for bit.
        """
        if device.type == "cuda":
            torch.cuda.set_device(device)
        mesh = Ranks().mesh(device.type)
        for child in self.denoiser.children():
            for block in child.children() if isinstance(child, nn.ModuleList) else ():
                fully_shard(block, mesh=mesh)
        fully_shard(self.denoiser, mesh=mesh)
        self.sharded = True
        for name, component in self.diffusers.components.items():
            if isinstance(component, nn.Module) and name != self.family.denoiser:
                component.to(device)

    def timesteps(self, shot: Shot) -> tuple[float, ...]:
        """Return the scheduler's timesteps in a run like `shot`."""
        key = (shot.pixels, shot.steps, shot.guidance)
        if key not in self._timesteps:
            self.first_call(replace(shot, prompt="", timestep=None, image=None, noise=None))
            self._timesteps[key] = tuple(map(float, self.diffusers.components["scheduler"].timesteps))
        return self._timesteps[key]

    def first_call(self, shot: Shot) -> Arguments:
        """Return the arguments of the denoiser at the first step of a run like `shot`, without computing the denoiser."""
        calls: list[Arguments] = []

        def stop(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> NoReturn:
            calls.append((args, kwargs))
            raise StopForward

        with (
            self.tracker.claimed(),
            self.denoiser.register_forward_pre_hook(stop, with_kwargs=True),
            suppress(StopForward),
        ):
            self.run([shot])
        return calls[0]


def _non_finite(shots: Sequence[Shot], calls: Sequence[bool]) -> str:
    """Say where values that are not finite arose; `calls` holds for each call of the denoiser whether its output was finite."""
    first = shots[0]
    place = "when the latents are decoded"
    if not all(calls):
        place = f"from step {calls.index(False) * first.steps // len(calls)} of {first.steps} on (they count from 0)"
    others = f" and {len(shots) - 1} more" if len(shots) > 1 else ""
    return (
        f"The values of '{first.model}' in {first.precision} are not finite {place}, so there is no image of {first.prompt!r} "
        f"(seed {first.seed}){others}. fp16 overflows where bf16 and fp32 do not; an edit may be too strong."
    )


class Run(NamedTuple):
    """One call of the pipeline: shots that differ in prompt and seed only, and the timesteps to keep."""

    shots: tuple[Shot, ...]
    """Without timesteps."""
    timesteps: tuple[float, ...]
    """In the order of the shots that ask for them."""

    @property
    def noised(self) -> float | None:
        """For images noised to a level, its timestep, which replaces the scheduler's."""
        return None if self.shots[0].image is None else self.timesteps[0]


def map_runs(
    engine: Engine, shots: Iterable[Shot], batch: int, function: Callable[[Run], Result]
) -> Iterator[tuple[Run, Result]]:
    """Yield the runs that `shots` describe, at most `batch` shots each, with the result of `function` for each."""
    for _, alike in groupby(_single_runs(engine, shots), key=_batch_key):
        runs = _encode_ahead(engine, alike, batch)
        for part, result in map_batches(engine, lambda part: function(_merge(part)), runs, batch, split=True):
            yield _merge(part), result


def map_batches(
    engine: BatchEngine, function: Callable[[Sequence[Item]], Result], items: Iterable[Item], size: int, split: bool = False
) -> Iterator[tuple[Sequence[Item], Result]]:
    """Yield batches of `items` with the result of `function` for each. When memory runs out, halve the batch size for good.

    `split`: divide the items over the ranks if the denoiser is sharded; all ranks call `function` equally often.
    """
    ranks = Ranks() if split and engine.sharded else Ranks(0, 1)
    waiting, source = [], iter(items)
    while True:
        size = min(size, engine.max_batch or size)
        waiting += islice(source, max(0, size * ranks.world_size - len(waiting)))
        part = waiting[: size * ranks.world_size]
        if not part:
            return
        own = part[ranks.rank :: ranks.world_size]
        try:
            # A rank without items repeats the work of the first rank and drops the result.
            with engine.tracker.claimed():
                result = function(own or part[:1])
        except torch.OutOfMemoryError as error:
            _halve_batch(engine, len(part), error)
            continue
        waiting = waiting[size * ranks.world_size :]
        if own:
            yield own, result


def _halve_batch(engine: BatchEngine, size: int, error: torch.OutOfMemoryError) -> None:
    if size == 1 or engine.sharded:
        raise OutOfMemory(f"A batch of {size} does not fit into the memory of the GPU. {ADVICE}") from error
    error.__traceback__ = None  # it holds the tensors of the failed run
    gc.collect()
    torch.cuda.empty_cache()
    engine.max_batch = size // 2
    warnings.warn(
        f"A batch of {size} does not fit into the memory of the GPU: continuing with {size // 2}.",
        stacklevel=4,
    )


def _single_runs(engine: Engine, shots: Iterable[Shot]) -> Iterator[Run]:
    """Group neighbours that differ in their timestep only into runs of one shot."""
    for shot, group in groupby(shots, key=lambda shot: replace(shot, timestep=None)):
        if shot.image is not None:
            raise BadInput(
                f"The shot of the image '{shot.image}' does not hold the image itself. Pass that to harvest_images, "
                f"with noise={shot.noise}, seed={shot.seed} and prompts={shot.prompt!r}."
            )
        timesteps, kept_timesteps = engine.timesteps(shot), []
        for member in group:
            kept_timesteps += timesteps if member.timestep is None else [_nearest(member.timestep, timesteps)]
        yield Run((shot,), tuple(dict.fromkeys(kept_timesteps)))


def _merge(runs: Sequence[Run]) -> Run:
    return Run(tuple(run.shots[0] for run in runs), runs[0].timesteps)


def _batch_key(run: Run) -> tuple[object, ...]:
    """Return what runs must share to be one batch."""
    shot = run.shots[0]
    return shot.pixels, shot.steps, shot.guidance, shot.text_length, run.timesteps


def _encode_ahead(engine: Engine, runs: Iterator[Run], batch: int) -> Iterator[Run]:
    """Encode the prompts of `runs` some batches ahead where that is cheap."""
    while chunk := list(islice(runs, batch * engine.encoder.batches_ahead(batch))):
        with engine.tracker.claimed():
            engine.encoder.encode([run.shots[0].prompt for run in chunk], chunk[0].shots[0].text_length)
        yield from chunk


def _nearest(timestep: float, timesteps: Sequence[float]) -> float:
    nearest = min(timesteps, key=lambda candidate: abs(candidate - timestep))
    if abs(nearest - timestep) > 0.5:
        listed = ", ".join(f"{candidate:g}" for candidate in timesteps)
        raise BadInput(f"A run of {len(timesteps)} steps has no timestep {timestep:g}. Its timesteps are: {listed}.")
    return nearest


def shots_of_rank(shots: Iterable[Shot], ranks: Ranks | None = None) -> Iterator[Shot]:
    """Yield the shots of this rank when each rank of torchrun holds a whole model: every n-th run with all its timesteps."""
    ranks = ranks or Ranks()
    for _, group in islice(groupby(shots, key=lambda shot: replace(shot, timestep=None)), ranks.rank, None, ranks.world_size):
        yield from group
