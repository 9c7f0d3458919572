"""`load`: from a name to a `Pipeline`."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import nn

from difflex.distributed import Ranks, join_process_group
from difflex.errors import BadInput, UnknownName
from difflex.pipeline.engine import Engine
from difflex.pipeline.families import Family, family_of
from difflex.pipeline.loading import DTYPES, ModelSource, Precision, check_weights, fetch, find, plan_of, read_card, read_pipeline
from difflex.pipeline.memory import WeightPlacement, check_fits, dense_dtype
from difflex.pipeline.pipeline import Pipeline
from difflex.pipeline.plans import PLANS, PipelinePlan
from difflex.pipeline.quantisation import for_card, quantise, read_denoiser, read_text_encoder
from difflex.pipeline.sharded import shard
from difflex.pipeline.untrained import build_parts, build_untrained

__all__ = ["load"]


def load(
    name: str | Path,
    precision: str | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    offload: bool = False,
    untrained: int | None = None,
    offline: bool = False,
    sharded: bool = False,
) -> Pipeline:
    """The model `name`: one inside the package, a folder, or a hub name OWNER/NAME.

    `precision` is bf16, fp16, fp32 or nf4 (fp32 on a CPU and bf16 on a GPU, unless asked); nf4 quantises the denoiser's blocks
    and the large text encoder. `offload` keeps on the card only the part at work. `untrained` gives the denoiser random weights
    of that seed, a control for what training adds; of a hub model, whose files are then not fetched, all other parts too.
    `sharded` shares the denoiser over the processes of torchrun. `offline` takes hub models from the cache alone.
    """
    place = _place(device)
    precision = _precision(precision, place)
    if offload and place.type != "cuda":
        warnings.warn(f"offload=True has no effect: the model is on {place}, not on a card.", stacklevel=2)
        offload = False
    if sharded:
        join_process_group(place)
    source, plan = _planned(name, revision, offline, untrained is not None)
    denoiser = "unet" if "unet" in plan.parts else "transformer"
    family = family_of(plan.pipeline, denoiser)
    check_fits(source.name, plan, family, place, WeightPlacement(precision, offload, Ranks().world_size if sharded else 1))
    if untrained is None:
        source = fetch(source, offline)
        pipeline = _read(source, plan, precision, family, place)
    else:
        pipeline = _built(source, plan, precision, family, place, untrained)
        source = source._replace(revision=f"untrained-{untrained}")
    pipeline.set_progress_bar_config(disable=True)
    engine = Engine(pipeline, family, read_card(source.folder, family, plan))
    _settle_on(engine, place, precision, offload, sharded)
    return Pipeline(engine, source, precision)


def _place(asked: str | torch.device | None) -> torch.device:
    try:
        place = torch.device(asked or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise BadInput(f"The device '{asked}' does not exist. Say cpu, cuda, or cuda:N for the card of that number.") from error
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise BadInput(
            f"The device '{asked}' is not there: torch finds {torch.cuda.device_count()} cards. Leave it out, or say cpu."
        )
    return place


def _precision(asked: str | None, place: torch.device) -> Precision:
    if asked is None:
        return "fp32" if place.type == "cpu" else "bf16"
    for known in get_args(Precision):
        if asked == known:
            return known
    raise UnknownName.among("The precision", asked, get_args(Precision))


def _planned(name: str | Path, revision: str | None, offline: bool, untrained: bool) -> tuple[ModelSource, PipelinePlan]:
    """Where the model is and what it is made of; an untrained FLUX.1 needs no file."""
    if untrained and str(name) in PLANS:
        return ModelSource(str(name), None, None), PLANS[str(name)]
    source = find(name, revision)
    return source, plan_of(source, offline)


def _read(
    source: ModelSource, plan: PipelinePlan, precision: Precision, family: Family, place: torch.device, **given: nn.Module
) -> DiffusionPipeline:
    """The pipeline with its trained weights; `given` parts are not read."""
    assert source.folder is not None
    if precision != "nf4":
        return read_pipeline(source.folder, DTYPES[precision], **given)
    dtype, heavy = dense_dtype(place), [part for part in (family.denoiser, family.large_text) if part in plan.parts]
    heavy = [part for part in heavy if part not in given]
    if place.type == "cuda":
        return read_pipeline(source.folder, dtype, quantization_config=for_card(heavy, dtype), **given)
    check_weights(source.folder)
    # The denoiser first and alone: it is never whole beside anything else.
    read: Mapping[str, object] = {
        part: read_denoiser(source.folder / part, plan.parts[part].kind, dtype)
        if part == family.denoiser
        else read_text_encoder(source.folder / part, plan.parts[part].kind, dtype)
        for part in heavy
    }
    return read_pipeline(source.folder, dtype, **given, **read)


def _built(
    source: ModelSource, plan: PipelinePlan, precision: Precision, family: Family, place: torch.device, seed: int
) -> DiffusionPipeline:
    """The pipeline with a denoiser of random weights, made where it will run; all other parts too where no file is at hand."""
    dtype = dense_dtype(place) if precision == "nf4" else DTYPES[precision]

    def made(name: str, part: nn.Module) -> nn.Module:
        return quantise(part, dtype) if precision == "nf4" and name in (family.denoiser, family.large_text) else part

    if source.folder is None:
        return build_untrained(plan, seed, dtype, place, None, made)
    alone = build_parts({family.denoiser: plan.parts[family.denoiser]}, seed, dtype, place, made)
    return _read(source, plan, precision, family, place, **alone)


def _settle_on(engine: Engine, place: torch.device, precision: Precision, offload: bool, sharded: bool) -> None:
    """Nothing; the parts are where they will be used."""
    if sharded:
        shard(engine.denoiser, place)
        engine.sharded = True
        for name, part in engine.diffusers.components.items():
            if isinstance(part, nn.Module) and name != engine.family.denoiser:
                part.to(place)
    elif offload:
        engine.diffusers.enable_model_cpu_offload(device=place)
    elif place.type != "cpu" or precision != "nf4":
        engine.diffusers.to(place)
