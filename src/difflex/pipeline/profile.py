"""`foresee`: what a model will show at sites and what its passes cost, from its configs alone: nothing is loaded or fetched."""

import inspect
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from difflex.errors import BadInput, UnknownName
from difflex.pipeline.calls import DenoiserCall
from difflex.pipeline.families import FAMILIES, Family, family_of
from difflex.pipeline.loading import ModelDefaults, find, plan_of, read_card
from difflex.pipeline.plans import PLANS, PipelinePlan
from difflex.pipeline.sites import SiteMap, SiteModule
from difflex.pipeline.table import shapes_of
from difflex.records import Shot, Site

__all__ = ["ModelProfile", "foresee"]

CLIP_LENGTH = 77


class ModelProfile(NamedTuple):
    """What a model will show and cost. Costs are floating-point operations for one image."""

    shot: Shot
    """A run of it, without prompt and seed."""
    shapes: Mapping[Site, tuple[int, int]]
    """Tokens and width at each site asked for, patterns resolved."""
    reached: float
    """A step that ends at the last of the sites; of two halves that are called one after another it is the first."""
    step: float
    """A whole step; both halves under guidance."""
    prompt: float
    """Encoding a prompt."""
    decoded: float
    """From latents to an image; about as much the other way."""


@cache
def foresee(
    name: str,
    sites: tuple[str, ...],
    revision: str | None = None,
    steps: int | None = None,
    pixels: tuple[int, int] | None = None,
    guidance: float | None = None,
) -> ModelProfile:
    """What the model `name` will show at `sites` (all blocks, if none is named); an error where its configs are not here."""
    source = None if name in PLANS else find(name, revision)
    plan = PLANS[name] if source is None else plan_of(source, offline=True)
    family = family_of(plan.pipeline, "unet" if "unet" in plan.parts else "transformer")
    if not family.blocks:
        known = ", ".join(each.name for each in FAMILIES)
        raise UnknownName(f"How the denoiser of a {plan.pipeline} is called is not known. Known families: {known}.")
    card = read_card(source.folder if source else None, family, plan)
    shot = Shot(
        model=name,
        revision=revision,
        pixels=pixels or _usual_size(plan, family, card),
        steps=steps or card.steps,
        guidance=float(card.guidance if guidance is None else guidance),
    )
    denoised = _denoised(plan, family, card, shot, sites)
    halves = 2 if _is_guided(plan, family, shot.guidance) else 1
    return ModelProfile(
        shot=shot,
        shapes=denoised.shapes,
        reached=(1 if family.guidance == "separate" else halves) * denoised.reached,
        step=halves * denoised.step,
        prompt=_encoding(plan, family, card),
        decoded=_decoding(plan, shot),
    )


class DenoiserProfile(NamedTuple):
    """What one call of the denoiser shows and costs."""

    shapes: Mapping[Site, tuple[int, int]]
    reached: float
    step: float


@torch.no_grad()
def _denoised(plan: PipelinePlan, family: Family, card: ModelDefaults, shot: Shot, names: Sequence[str]) -> DenoiserProfile:
    """Asked of a denoiser without weights, for which every operation yields a shape and computes nothing."""
    twin = plan.parts[family.denoiser].weightless()
    assert twin is not None, "a denoiser has weights"
    twin.eval()
    given, call = _given(twin, plan, family, card, shot)
    located = _located(SiteMap(twin, family), names)
    passed = [0]
    with FlopCounterMode(display=False) as counter, ExitStack() as stack:

        def count(*_: object) -> None:
            passed.append(counter.get_total_flops())

        for each in located:
            stack.callback(each.module.register_forward_hook(count).remove)
        shapes = shapes_of(twin, located, call, (), given)
    missing = [str(each.site) for each in located if each.site not in shapes]
    if missing and names:
        raise BadInput(f"The site '{missing[0]}' gives no tokens. Name another; difflex sites lists them.")
    found = {each.site: (shapes[each.site][1], shapes[each.site][2]) for each in located if each.site in shapes}
    return DenoiserProfile(found, max(passed), counter.get_total_flops())


def _located(sites: SiteMap, names: Sequence[str]) -> list[SiteModule]:
    every = [Site(name, "residual", stream) for name in sites.blocks for stream in sites.streams(name)]
    return sites.expand(names or every)


def _given(
    twin: nn.Module, plan: PipelinePlan, family: Family, card: ModelDefaults, shot: Shot
) -> tuple[dict[str, object], DenoiserCall]:
    """What the denoiser is called with, shapes alone, and what is known of the call."""
    config, factor = _PartConfig(plan, family.denoiser), _factor(plan)
    rows, columns = (side // factor for side in shot.pixels)
    packed = family.latents != "plain"
    patch = 2 if packed else int(config("patch_size") or 1)
    grid, length = (rows // patch, columns // patch), _text_length(plan, family, card)
    tokens, axes = grid[0] * grid[1], len(config("axes_dims_rope") or ())
    width = config("caption_channels") or config("joint_attention_dim") or config("cross_attention_dim")
    latents = (1, tokens, config("in_channels")) if packed else (1, config("in_channels"), rows, columns)
    known: dict[str, tuple[Any, ...] | None] = {
        "hidden_states": latents,
        "sample": latents,
        "encoder_hidden_states": (1, length, width),
        "pooled_projections": (1, config("pooled_projection_dim")),
        "timestep": (1,),
        "img_ids": (tokens, axes),
        "txt_ids": (length, axes),
        "guidance": (1,) if config("guidance_embeds") else None,
    }
    accepted = inspect.signature(type(twin).forward).parameters
    tensors = {name: torch.empty(shape, device="meta") for name, shape in known.items() if shape and name in accepted}
    extra = {"added_cond_kwargs": _conditions(config)} if "added_cond_kwargs" in accepted else {}
    call = DenoiserCall(step=0, timestep=0.0, halves=(None,), shots=None, text_tokens=length, grid=grid)
    return {**tensors, **extra, "return_dict": False}, call


class _PartConfig(NamedTuple):
    """The config of a part."""

    plan: PipelinePlan
    part: str

    def __call__(self, entry: str) -> Any:
        return self.plan.entry(f"{self.part}.{entry}")


def _conditions(config: _PartConfig) -> dict[str, Tensor | None]:
    """What a U-Net of SDXL's kind is told besides; PixArt asks for what may be None."""
    if config("addition_embed_type") != "text_time":
        return {"resolution": None, "aspect_ratio": None}
    times = 6
    pooled = config("projection_class_embeddings_input_dim") - times * config("addition_time_embed_dim")
    return {"text_embeds": torch.empty(1, pooled, device="meta"), "time_ids": torch.empty(1, times, device="meta")}


def _factor(plan: PipelinePlan) -> int:
    """The side of the patch of an image that becomes one latent, in pixels."""
    channels = plan.entry("vae.block_out_channels")
    assert isinstance(channels, (list, tuple)), "an autoencoder has levels"
    return 2 ** (len(channels) - 1)


def _usual_size(plan: PipelinePlan, family: Family, card: ModelDefaults) -> tuple[int, int]:
    if card.pixels:
        return card.pixels[0]
    sample = plan.entry(f"{family.denoiser}.sample_size") or 128
    height, width = (sample, sample) if isinstance(sample, int) else (int(side) for side in sample)  # pyright: ignore[reportGeneralTypeIssues]
    return height * _factor(plan), width * _factor(plan)


def _text_length(plan: PipelinePlan, family: Family, card: ModelDefaults) -> int:
    """Tokens of text that the denoiser sees; SD3 lays those of CLIP before those of T5."""
    if family.text_length is None:
        return CLIP_LENGTH
    return (card.text_length or family.text_length) + (CLIP_LENGTH if "text_encoder_3" in plan.parts else 0)


def _is_guided(plan: PipelinePlan, family: Family, guidance: float) -> bool:
    """Whether the denoiser computes two halves, conditional and unconditional."""
    folded = family.folded and (plan.entry(f"{family.denoiser}.{family.folded}") or plan.settings.get(family.folded))
    return family.guidance != "none" and guidance > 1 and not folded


def _encoding(plan: PipelinePlan, family: Family, card: ModelDefaults) -> float:
    """Two operations for each weight of a text encoder's products and each token."""
    length, operations = card.text_length or family.text_length or CLIP_LENGTH, 0.0
    for name, part in plan.parts.items():
        encoder = part.weightless() if name.startswith("text_encoder") else None
        layers = [] if encoder is None else [layer for layer in encoder.modules() if isinstance(layer, nn.Linear)]
        tokens = CLIP_LENGTH if part.kind.startswith("CLIP") else length
        operations += 2.0 * tokens * sum(layer.weight.numel() for layer in layers)
    return operations


@torch.no_grad()
def _decoding(plan: PipelinePlan, shot: Shot) -> float:
    autoencoder: Any = plan.parts["vae"].weightless()
    rows, columns = (side // _factor(plan) for side in shot.pixels)
    channels = _PartConfig(plan, "vae")("latent_channels")
    with FlopCounterMode(display=False) as counter:
        autoencoder.eval().decode(torch.empty(1, channels, rows, columns, device="meta"))
    return float(counter.get_total_flops())
