"""Shapes, costs and memory of a model, by a copy of its denoiser without weights: the table of sites and `profile_model`."""

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple, cast

import torch
from diffusers.configuration_utils import ConfigMixin
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from difflex.errors import BadInput, BrokenFile, DifflexError, UnknownName
from difflex.pipeline.calls import DenoiserCall
from difflex.pipeline.components import PLANS, PipelinePlan
from difflex.pipeline.engine import Engine
from difflex.pipeline.families import FAMILIES, Family, family_of
from difflex.pipeline.sites import SiteMap, SiteModule, apply_at_site
from difflex.pipeline.sources import COPY_AGAIN, ModelDefaults, check_text_length, find, first_line, plan_of, read_defaults
from difflex.pipeline.weights import MemoryNeed, count_weights
from difflex.quiet import quiet
from difflex.records import STREAMS, HookContext, Kind, Shot, Site

CLIP_LENGTH = 77
AT_ONCE = 3.5
"""How many of its largest outputs a model has in memory at once; for FLUX.1 measured on a GPU, by batches of 1 to 64 images."""

SHAPES = dict[str, dict[Site, tuple[int, int]]]()
"""Tokens and width at the sites of models, by their configs and the shapes of their arguments."""


class SiteRow(NamedTuple):
    """A row of the table of sites: a block and one of its streams."""

    site: Site
    path: str
    width: int
    tokens: int
    kinds: tuple[Kind, ...]
    neurons: int | None
    """Width of the `neurons`, if the block has any."""


def site_rows(engine: Engine, shot: Shot, pattern: str = "*") -> list[SiteRow]:
    """Return a row for each block and stream whose name matches `pattern` (both streams if it names none), in a run like `shot`.

    For a model of an unknown family, the rows are the outermost of the repeated modules that return tokens.
    """
    engine.sites.expand([] if pattern == "*" else [pattern])  # an unknown site is refused before the model runs
    with engine.tracker.tracking():
        args, kwargs = engine.first_call(shot)
        call = engine.tracker.call
    return _rows(_without_weights(engine.denoiser, kwargs), engine.family, pattern, call, args, kwargs)


def config_site_rows(
    name: str,
    revision: str | None = None,
    pixels: tuple[int, int] | None = None,
    pattern: str = "*",
    offline: bool = False,
    text_length: int | None = None,
) -> list[SiteRow]:
    """Return the rows of `site_rows` for the model `name` by its configs, all that is downloaded; none for an unknown family."""
    profiler = _Profiler.of(name, revision, offline, text_length)
    if not profiler.family.blocks:
        return []
    with _fitting_configs(name):
        copy = profiler.without_weights()
        shot = Shot(model=name, pixels=profiler.checked(pixels), steps=1, guidance=0.0)
        kwargs, call = profiler.arguments(copy, shot)
        return _rows(copy, profiler.family, pattern, call, (), kwargs)


@contextmanager
def _fitting_configs(name: str) -> Iterator[None]:
    """Turn what a model of any configs raises when it is built and called into an error that names the configs."""
    try:
        yield
    except DifflexError:
        raise
    except Exception as error:
        raise BrokenFile(f"The configs of the model '{name}' do not fit each other: {first_line(error)}. {COPY_AGAIN}") from error


def _rows(
    copy: nn.Module, family: Family, pattern: str, call: DenoiserCall, args: tuple[object, ...], kwargs: dict[str, object]
) -> list[SiteRow]:
    """Return the rows of the table of sites by a call of a denoiser without weights."""
    sites = SiteMap(copy, family)
    matches = [module.site for module in sites.expand([pattern])] if pattern != "*" else []
    names = [site.path for site in matches] or list(sites.blocks) or sites.repeated()
    streams = {site.stream for site in matches} if ":" in pattern else set(STREAMS)
    candidates = [site for site in _sites_of(sites, dict.fromkeys(names)) if site.stream in streams and site.kind != "update"]
    others = [site for site in candidates if site.path not in sites.blocks]
    leaves = [tuple(leaf.shape) if isinstance(leaf, Tensor) else leaf for leaf in pytree.tree_leaves((args, kwargs))]
    if (key := str((type(copy), cast(ConfigMixin, copy).config, leaves, others))) not in SHAPES:
        SHAPES[key] = _shapes(copy, sites.expand([*_sites_of(sites, sites.blocks), *others]), call, args, kwargs)
    shapes = SHAPES[key]
    neurons = {(site.path, site.stream): width for site, (_, width) in shapes.items() if site.kind == "neurons"}
    rows = [
        SiteRow(
            site=site,
            path=sites.locate(site).path,
            width=shapes[site][1],
            tokens=shapes[site][0],
            kinds=sites.kinds(site.path, site.stream),
            neurons=neurons.get((site.path, site.stream)),
        )
        for site in candidates
        if site.kind == "residual" and site in shapes
    ]
    if not rows:
        raise BadInput(
            f"'{pattern}' returns no tokens: one tensor of [batch, token, width], or an image, is needed. Use another module."
        )
    if sites.blocks or matches:
        return rows
    return [row for row in rows if not any(row.path.startswith(f"{other.path}.") for other in rows)]


def _sites_of(sites: SiteMap, names: Iterable[str]) -> list[Site]:
    """Return the sites of the blocks or modules `names`."""
    return [Site(name, kind, stream) for name in names for stream in sites.streams(name) for kind in sites.kinds(name, stream)]


def _without_weights(denoiser: nn.Module, kwargs: dict[str, object]) -> nn.Module:
    """Copy the denoiser to the meta device, on which every operation yields a shape and computes nothing."""
    with torch.device("meta"):
        mixin = cast(ConfigMixin, denoiser)
        copy = cast(nn.Module, type(mixin).from_config(mixin.config))
    text = kwargs["encoder_hidden_states"]
    with quiet("diffusers.models.modeling_utils"):
        return copy.to(text.dtype).eval() if isinstance(text, Tensor) else copy.eval()


@torch.no_grad()
def _shapes(
    copy: nn.Module, targets: Sequence[SiteModule], call: DenoiserCall, args: tuple[object, ...], kwargs: dict[str, object]
) -> dict[Site, tuple[int, int]]:
    """Return tokens and width at each site, except for those without tokens: the last joint block of SD3 returns no text."""
    shapes: dict[Site, tuple[int, int]] = {}

    def keep(x: Tensor, context: HookContext, site: Site) -> None:
        shapes[site] = (x.shape[1], x.shape[2])

    def hook(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object, target: SiteModule) -> None:
        with suppress(BadInput):
            apply_at_site(target, call, args, kwargs, output, partial(keep, site=target.site))

    with ExitStack() as hooks:
        for target in targets:
            hooks.enter_context(target.module.register_forward_hook(partial(hook, target=target), with_kwargs=True))
        args, kwargs = pytree.tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
        copy(*args, **kwargs)
    return shapes


class ModelProfile(NamedTuple):
    """The shapes at the sites of a model, and its costs in floating-point operations for one image."""

    shot: Shot
    """The settings of a run, without prompt and seed."""
    shapes: Mapping[Site, tuple[int, int]]
    """Tokens and width at each site."""
    partial_step: float
    """A step that ends at the last of the sites; if the halves are computed one after the other, in the first of them."""
    step: float
    """A whole step, with both halves under guidance."""
    prompt: float
    """Encoding a prompt."""
    decode: float
    """Decoding latents into an image; encoding one costs about as much."""
    weights: MemoryNeed
    values: int
    """Numbers that the denoiser holds at once for an image, with both halves under guidance."""
    decoded_values: int
    """Numbers that decoding an image holds at once."""


@cache
def profile_model(
    name: str,
    sites: tuple[str, ...],
    revision: str | None = None,
    steps: int | None = None,
    pixels: tuple[int, int] | None = None,
    guidance: float | None = None,
    text_length: int | None = None,
) -> ModelProfile:
    """Profile the model `name` at `sites` (default: all blocks) from its configs; nothing is loaded or downloaded."""
    with _fitting_configs(name):
        profiler = _Profiler.of(name, revision, offline=True, text_length=text_length)
        plan, family, _ = profiler
        if not family.blocks:
            known = ", ".join(family.name for family in FAMILIES)
            raise UnknownName(f"difflex does not know how to call the denoiser of a {plan.pipeline}. Known families: {known}.")
        shot = Shot(
            model=name,
            revision=revision,
            text_length=text_length,
            pixels=pixels or profiler.default_pixels,
            steps=steps or profiler.defaults.steps,
            guidance=float(profiler.defaults.guidance if guidance is None else guidance),
        )
        alike = replace(shot, steps=1, guidance=0.0)  # neither changes a single pass
        costs, targets = _costs_at(alike, sites)
        halves = 2 if family.is_guided(shot.guidance, profiler.config) else 1
        return ModelProfile(
            shot=shot,
            shapes={site: costs.shapes[site] for site in targets},
            partial_step=(1 if family.guidance == "separate" else halves) * max(costs.operations[site] for site in targets),
            step=halves * costs.step,
            prompt=costs.prompt,
            decode=costs.decode,
            weights=costs.weights,
            values=round(AT_ONCE * costs.largest * (1 if family.guidance == "separate" else halves)),
            decoded_values=round(AT_ONCE * costs.decoded),
        )


class _Costs(NamedTuple):
    """What a run like a shot costs, whatever is done at the sites."""

    sites: SiteMap
    shapes: Mapping[Site, tuple[int, int]]
    """Tokens and width at every site of every block, where it has any."""
    operations: Mapping[Site, float]
    """Operations up to the end of the module of each site."""
    step: float
    largest: int
    """Numbers in the largest output of a layer of the denoiser."""
    prompt: float
    decode: float
    decoded: int
    """Numbers in the largest output of a layer while an image is decoded."""
    weights: MemoryNeed


def _costs_at(shot: Shot, names: tuple[str, ...]) -> tuple[_Costs, list[Site]]:
    """Return the costs of `shot` and the sites of `names` (default: all blocks); once for any sites of blocks."""
    costs = _costs(shot)
    residual = [site for site in costs.shapes if site.kind == "residual"]
    sites = [target.site for target in costs.sites.expand(names)] if names else residual
    if others := tuple(site for site in sites if site not in costs.operations):  # smooth ones, and modules that are no blocks
        costs = _costs(shot, others)
    if missing := [site for site in sites if site not in costs.shapes]:
        raise BadInput(f"The site '{missing[0]}' returns no tokens or has no update. Use another one; difflex sites lists them.")
    return costs, sites


@lru_cache(64)
@torch.no_grad()
def _costs(shot: Shot, others: tuple[Site, ...] = ()) -> _Costs:
    """Call the denoiser with hooks at all sites of its blocks and at `others`."""
    profiler = _Profiler.of(shot.model, shot.revision, True, shot.text_length)
    copy = profiler.without_weights()
    kwargs, call = profiler.arguments(copy, shot)
    sites, operations = SiteMap(copy, profiler.family), dict[Site, float]()
    targets = sites.expand([*_sites_of(sites, sites.blocks), *others])
    with FlopCounterMode(display=False) as counter, _largest_output(copy) as largest, ExitStack() as hooks:

        def count(*_: object, site: Site) -> None:
            operations[site] = counter.get_total_flops()

        for target in targets:
            hooks.enter_context(target.module.register_forward_hook(partial(count, site=target.site)))
        shapes = _shapes(copy, targets, call, (), kwargs)
    prompt, weights = profiler.prompt(), count_weights(profiler.plan, profiler.family)
    return _Costs(sites, shapes, operations, counter.get_total_flops(), max(largest), prompt, *profiler.decode(shot), weights)


class _Profiler(NamedTuple):
    """A model without its weights."""

    plan: PipelinePlan
    family: Family
    defaults: ModelDefaults

    @classmethod
    def of(cls, name: str, revision: str | None, offline: bool, text_length: int | None) -> "_Profiler":
        """Read the configs of the model `name`; those of FLUX.1 are in the package."""
        source = None if name in PLANS else find(name, revision)
        plan = PLANS[name] if source is None else plan_of(source, offline)
        family = family_of(plan.pipeline, plan.denoiser)
        defaults = read_defaults(source.folder if source else None, family, plan)
        if text_length is not None:
            defaults = replace(defaults, text_length=check_text_length(text_length, family))
        return cls(plan, family, defaults)

    def without_weights(self) -> nn.Module:
        """Build the denoiser without weights."""
        copy = self.plan.components[self.family.denoiser].without_weights()
        assert copy is not None, "a denoiser has weights"
        return copy.eval()

    def checked(self, pixels: tuple[int, int] | None) -> tuple[int, int]:
        """Return `pixels`, by default the model's own, if the model can generate images of this size."""
        pixels = pixels or self.default_pixels
        self.defaults.check_pixels(pixels, self._vae_scale * self._patch)
        return pixels

    def config(self, entry: str) -> Any:
        """Return an entry of the denoiser's config, or else of the pipeline's."""
        return self.plan.config(f"{self.family.denoiser}.{entry}") or self.plan.settings.get(entry)

    @property
    def default_pixels(self) -> tuple[int, int]:
        return self.defaults.default_pixels(self.config("sample_size"), self._vae_scale)

    def arguments(self, copy: nn.Module, shot: Shot) -> tuple[dict[str, object], DenoiserCall]:
        """Return the arguments of a call of the denoiser, as shapes, and the call."""
        config = self.config
        rows, columns = (side // self._vae_scale for side in shot.pixels)
        packed = self.family.latents != "plain"
        grid, length = (rows // self._patch, columns // self._patch), self._text_tokens
        tokens, axes = grid[0] * grid[1], len(config("axes_dims_rope") or ())
        width = config("caption_channels") or config("joint_attention_dim") or config("cross_attention_dim")
        latents = (1, tokens, config("in_channels")) if packed else (1, config("in_channels"), rows, columns)
        shapes: dict[str, tuple[Any, ...] | None] = {
            "hidden_states": latents,
            "sample": latents,
            "encoder_hidden_states": (1, length, width),
            "pooled_projections": (1, config("pooled_projection_dim")),
            "timestep": (1,),
            "img_ids": (tokens, axes),
            "txt_ids": (length, axes),
            "guidance": (1,) if config("guidance_embeds") else None,
        }
        accepted = inspect.signature(type(copy).forward).parameters
        tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items() if shape and name in accepted}
        conditions = {"added_cond_kwargs": self._conditions()} if "added_cond_kwargs" in accepted else {}
        call = DenoiserCall(step=0, timestep=0.0, halves=(None,), shots=None, text_tokens=length, grid=grid)
        return {**tensors, **conditions, "return_dict": False}, call

    def _conditions(self) -> dict[str, Tensor | None]:
        """Return the further conditions of a U-Net like SDXL's, or those of PixArt, which may be None."""
        if self.config("addition_embed_type") != "text_time":
            return {"resolution": None, "aspect_ratio": None}
        times = 6
        pooled = self.config("projection_class_embeddings_input_dim") - times * self.config("addition_time_embed_dim")
        return {"text_embeds": torch.empty(1, pooled, device="meta"), "time_ids": torch.empty(1, times, device="meta")}

    @property
    def _vae_scale(self) -> int:
        """Pixels of an image along each side of one latent."""
        channels = self.plan.config("vae.block_out_channels")
        assert isinstance(channels, (list, tuple)), "a VAE has levels"
        return 2 ** (len(channels) - 1)

    @property
    def _patch(self) -> int:
        """Latents along each side of a token of the denoiser's input."""
        return 2 if self.family.latents != "plain" else int(self.config("patch_size") or 1)

    @property
    def _text_tokens(self) -> int:
        """Tokens of text in the denoiser's input; SD3 concatenates those of CLIP and T5."""
        if self.family.text_length is None:
            return CLIP_LENGTH
        clip = CLIP_LENGTH if "text_encoder_3" in self.plan.components else 0
        return (self.defaults.text_length or self.family.text_length) + clip

    def prompt(self) -> float:
        """Return two operations for each token and each weight of the linear layers of the text encoders."""
        length, operations = self.defaults.text_length or self.family.text_length or CLIP_LENGTH, 0.0
        for name, component in self.plan.components.items():
            encoder = component.without_weights() if name.startswith("text_encoder") else None
            layers = [] if encoder is None else [layer for layer in encoder.modules() if isinstance(layer, nn.Linear)]
            tokens = CLIP_LENGTH if component.kind.startswith("CLIP") else length
            operations += 2.0 * tokens * sum(layer.weight.numel() for layer in layers)
        return operations

    @torch.no_grad()
    def decode(self, shot: Shot) -> tuple[float, int]:
        """Return the operations of decoding an image, and the largest output on the way."""
        vae: Any = self.plan.components["vae"].without_weights()
        channels: Any = self.plan.config("vae.latent_channels")
        shape = (1, channels, *(side // self._vae_scale for side in shot.pixels))
        with FlopCounterMode(display=False) as counter, _largest_output(vae) as largest:
            vae.eval().decode(torch.empty(shape, device="meta"))
        return float(counter.get_total_flops()), max(largest)


@contextmanager
def _largest_output(model: nn.Module) -> Iterator[list[int]]:
    """Give a list to which every layer of `model` adds the numbers of its output."""
    sizes = [0]

    def note(module: nn.Module, args: object, output: object) -> None:
        sizes.append(output.numel() if isinstance(output, Tensor) else 0)

    layers = [module for module in model.modules() if not any(module.children())]
    with ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.register_forward_hook(note))
        yield sizes
