"""`load`: from the name of a model to a `Pipeline`."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import nn

from difflex.choices import Precision
from difflex.devices import find_device
from difflex.distributed import Ranks, join_process_group
from difflex.errors import UnknownName
from difflex.pipeline.components import PLANS, PipelinePlan, build_components, build_untrained
from difflex.pipeline.engine import Engine
from difflex.pipeline.families import family_of
from difflex.pipeline.pipeline import Pipeline
from difflex.pipeline.precision import WeightPlacement, check_fits, compute_dtype, quantise, read_quantised
from difflex.pipeline.sources import ModelSource, check_weights, fetch, find, plan_of, read_defaults, read_pipeline

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
    """Load the model `name`: one inside the package, a folder, or a hub model OWNER/NAME.

    `precision` is bf16, fp16, fp32 or nf4 (default: fp32 on a CPU, bf16 on a GPU); nf4 quantises the denoiser's blocks and the
    large text encoder. `offload` keeps only the active component on the GPU. `untrained` gives the denoiser random weights of
    that seed, as a control for the effect of training; for a hub model, whose files are then not downloaded, all components.
    `sharded` shards the denoiser over the processes of torchrun. `offline` takes hub models from the local cache only.
    """
    device = find_device(device)
    precision = _check_precision(precision, device)
    if offload and device.type != "cuda":
        warnings.warn(f"offload=True has no effect: the model is on {device}, not on a GPU.", stacklevel=2)
        offload = False
    if sharded:
        join_process_group(device)
    source, plan = _find(name, revision, offline, untrained is not None)
    family = family_of(plan.pipeline, plan.denoiser)
    check_fits(source.name, plan, family, device, WeightPlacement(precision, offload, Ranks().world_size if sharded else 1))
    dtype, large = compute_dtype(precision, device), (family.denoiser, family.large_text) if precision == "nf4" else ()
    if untrained is None:
        source = fetch(source, offline)
        assert source.folder is not None
        pipeline = _read(source.folder, plan, dtype, device, large)
    else:
        pipeline = _build(source.folder, plan, dtype, device, large, family.denoiser, untrained)
        source = source._replace(revision=f"untrained-{untrained}")
    pipeline.set_progress_bar_config(disable=True)
    engine = Engine(pipeline, family, read_defaults(source.folder, family, plan))
    if sharded:
        engine.shard(device)
    elif offload:
        pipeline.enable_model_cpu_offload(device=device)
    elif device.type != "cpu" or precision != "nf4":
        pipeline.to(device)
    return Pipeline(engine, source, precision)


def _check_precision(name: str | None, device: torch.device) -> Precision:
    if name is None:
        return "fp32" if device.type == "cpu" else "bf16"
    for precision in get_args(Precision):
        if name == precision:
            return precision
    raise UnknownName.among("The precision", name, get_args(Precision))


def _find(name: str | Path, revision: str | None, offline: bool, untrained: bool) -> tuple[ModelSource, PipelinePlan]:
    """Return the source and the plan of a model; an untrained FLUX.1 needs no file."""
    if untrained and str(name) in PLANS:
        return ModelSource(str(name), None, None), PLANS[str(name)]
    source = find(name, revision)
    return source, plan_of(source, offline)


def _read(
    folder: Path, plan: PipelinePlan, dtype: torch.dtype, device: torch.device, large: Sequence[str], **components: nn.Module
) -> DiffusionPipeline:
    """Read the pipeline with its trained weights, those of `large` components in nf4, except for the `components` given."""
    names = [name for name in large if name in plan.components and name not in components]
    check_weights(folder)
    quantised = read_quantised(folder, plan, names, device) if names else {}
    return read_pipeline(folder, dtype, **components, **quantised)


def _build(
    folder: Path | None,
    plan: PipelinePlan,
    dtype: torch.dtype,
    device: torch.device,
    large: Sequence[str],
    denoiser: str,
    seed: int,
) -> DiffusionPipeline:
    """Build the pipeline around a denoiser with random weights; without files, all its components have random weights."""

    def quantise_large(name: str, component: nn.Module) -> nn.Module:
        return quantise(component, dtype) if name in large else component

    if folder is None:
        return build_untrained(plan, seed, dtype, device, quantise_large)
    components = build_components({denoiser: plan.components[denoiser]}, seed, dtype, device, quantise_large)
    return _read(folder, plan, dtype, device, large, **components)
