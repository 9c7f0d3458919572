"""`load`: from the name of a model to a `Pipeline`, in four bits (nf4) on request, if its weights fit into memory."""

import os
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, get_args

import diffusers
import torch
import transformers
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.quantizers.pipe_quant_config import PipelineQuantizationConfig
from torch import nn

from difflex.choices import Precision
from difflex.devices import find_device, free_memory
from difflex.distributed import Ranks, join_process_group
from difflex.errors import MissingExtra, OutOfMemory, UnknownName
from difflex.pipeline.components import PLANS, PipelinePlan, build_components, build_untrained
from difflex.pipeline.engine import Engine
from difflex.pipeline.families import Family, family_of
from difflex.pipeline.pipeline import Pipeline
from difflex.pipeline.sources import (
    ModelSource,
    check_finite,
    check_weights,
    check_whole,
    fetch,
    find,
    plan_of,
    read_defaults,
    read_pipeline,
)
from difflex.pipeline.weights import MemoryNeed, compute_dtype, count_weights, four_bit_layers
from difflex.quiet import quiet

HEADROOM = 1.1
"""Room for activations, buffers and the allocator, as a factor on the weights."""


def load(
    name: str | Path,
    precision: str | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    offload: bool = False,
    untrained: int | None = None,
    offline: bool = False,
    sharded: bool = False,
    text_length: int | None = None,
) -> Pipeline:
    """Load the model `name`: one inside the package, a folder, or a hub model OWNER/NAME.

    `precision` is bf16, fp16, fp32, nf4 or auto (default: fp32 on a CPU, bf16 on a GPU); nf4 quantises the denoiser's blocks
    and the large text encoder; auto is as `choose_precision` says. `offload` keeps only the active component on the GPU.
    `untrained` gives the denoiser random weights of that seed, as a control for the effect of training; for a hub model, whose
    files are then not downloaded, all components. `sharded` shards the denoiser over the processes of torchrun. `offline` takes
    hub models from the local cache only. `text_length` is the number of tokens of a prompt that the model reads, padding
    included: by default 256 for FLUX.1 schnell, as its authors do, and 512 for other FLUX models.
    """
    device = find_device(device)
    if precision == "auto":
        choice = choose_precision(name, device, revision, offload or (False if sharded else None), untrained, offline, sharded)
        precision, offload = choice.precision, choice.offload
    precision = check_precision(precision, device)
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
    engine.set_text_length(text_length)
    check_whole(source.name, pipeline.components)
    if not sharded and not offload and (device.type != "cpu" or precision != "nf4"):
        pipeline.to(device)
    check_finite(source.name, pipeline.components)  # on the GPU where possible: there it takes no time
    if sharded:
        engine.shard(device)
    elif offload:
        pipeline.enable_model_cpu_offload(device=device)
        engine.offloaded = True
    return Pipeline(engine, source.name, source.revision, precision)


class PrecisionFit(NamedTuple):
    """How a model fits into memory."""

    precision: Precision
    offload: bool


def choose_precision(
    name: str | Path,
    device: str | torch.device | None = None,
    revision: str | None = None,
    offload: bool | None = None,
    untrained: int | None = None,
    offline: bool = False,
    sharded: bool = False,
    reserve: int = 0,
    report: Callable[[str], None] = print,
) -> PrecisionFit:
    """Return the first of bf16, bf16 with offload, nf4 and nf4 with offload that fits into free memory, and report the sizes.

    On a CPU it is fp32. `offload` allows only choices with or without it; `reserve` are bytes to leave free for other work. If
    nothing fits, the last choice is returned, which `load` refuses.
    """
    device = find_device(device)
    if device.type != "cuda":
        report(f"Precision auto: fp32, on {device}.")
        return PrecisionFit("fp32", False)
    _, plan = _find(name, revision, offline, str(name) in PLANS and (untrained is not None or not Path(name).is_dir()))
    family = family_of(plan.pipeline, plan.denoiser)
    need, free, needs = count_weights(plan, family), free_memory(device) - reserve, list[str]()
    fits = [PrecisionFit("bf16", False), PrecisionFit("bf16", True), PrecisionFit("nf4", False), PrecisionFit("nf4", True)]
    for fit in (fits := [fit for fit in fits if offload in (None, fit.offload)]):
        size = _needed_bytes(need, family, device, WeightPlacement(*fit, Ranks().world_size if sharded else 1))
        needs.append(f"{_format(size)} in {_shown(fit)}")
        if size <= free:
            break
    else:
        fit = fits[-1]
    kept = f" besides {_format(reserve)} for other work" if reserve else ""
    sizes = f"needs {', '.join(needs)}, and {device} has {_format(max(0, free))} free{kept}"
    report(f"Precision auto: {_shown(fit)}. The model '{name}' {sizes}.")
    return fit


def _shown(fit: PrecisionFit) -> str:
    return f"{fit.precision} with offload" if fit.offload else fit.precision


def check_precision(name: str | None, device: torch.device) -> Precision:
    """Return the precision called `name`, by default fp32 on a CPU and bf16 elsewhere."""
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


def read_quantised(folder: Path, plan: PipelinePlan, names: Sequence[str], device: torch.device) -> dict[str, Any]:
    """Return the arguments with which diffusers reads a pipeline whose components `names` are in nf4.

    On a GPU diffusers quantises by itself. On a CPU the components are read here, the denoiser first and alone.
    """
    library, dtype = _bitsandbytes(), compute_dtype("nf4", device)
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    if device.type == "cuda":
        config = PipelineQuantizationConfig("bitsandbytes_4bit", settings, components_to_quantize=list(names))
        return {"quantization_config": config}
    components: dict[str, Any] = {}
    for name in names:
        kind, path = plan.components[name].kind, os.fspath(folder / name)
        if plan.components[name].library == "diffusers":
            with quiet("diffusers"):
                model = getattr(diffusers, kind).from_pretrained(path, dtype=dtype, local_files_only=True)
            components[name] = quantise(model, dtype)
        else:
            config = transformers.BitsAndBytesConfig(**settings)
            components[name] = getattr(transformers, kind).from_pretrained(path, quantization_config=config, dtype=dtype)
            for module in components[name].modules():
                if isinstance(module, library.nn.Linear4bit):
                    _disable_packing_if_odd(module)
    return components


def quantise(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Replace the linear layers of the repeated blocks of `model` by nf4 layers that compute in `dtype`, one by one."""
    library = _bitsandbytes()
    layers = four_bit_layers(model)
    for path in list(layers):
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, _four_bit_layer(library, layers.pop(path), dtype))
    return model


def _four_bit_layer(library: Any, layer: nn.Linear, dtype: torch.dtype) -> nn.Module:
    device = layer.weight.device
    # On the meta device the new layer takes no memory; moving its weight to the device quantises it.
    quantised = library.nn.Linear4bit(
        layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=dtype, quant_type="nf4", device="meta"
    )
    quantised.weight = library.nn.Params4bit(layer.weight.data.cpu(), requires_grad=False, quant_type="nf4").to(device)
    quantised.bias = layer.bias
    _disable_packing_if_odd(quantised)
    return quantised.eval()


def _disable_packing_if_odd(layer: Any) -> None:
    """Disable the tiles that bitsandbytes 0.50 packs weights in on CPUs with AVX-512, where the weights do not fill them."""
    if layer.in_features % 64 or layer.out_features % 32:
        layer.support_avx512bf16_for_cpu = False


def _bitsandbytes() -> Any:
    if find_spec("bitsandbytes") is None:
        raise MissingExtra.of("bitsandbytes", "nf4", "precision='nf4'")
    with warnings.catch_warnings(), quiet("bitsandbytes"):
        warnings.simplefilter("ignore")  # it uses old names of torch
        import bitsandbytes
    return bitsandbytes


class WeightPlacement(NamedTuple):
    """The options that decide how much memory the weights take."""

    precision: Precision
    offload: bool
    ranks: int
    """Number of GPUs that the denoiser is sharded over."""


def check_fits(name: str, plan: PipelinePlan, family: Family, device: torch.device, placement: WeightPlacement) -> None:
    """Raise an error that names an option under which the model fits, if it does not fit into the free memory."""
    free, need = free_memory(device), count_weights(plan, family)
    if _needed_bytes(need, family, device, placement) <= free:
        return
    sizes, peak = need.bytes(placement.precision, device), need.peak(placement.precision, device)
    total = sum(sizes.values())
    listed = ", ".join(f"{part} {_format(size)}" for part, size in sorted(sizes.items(), key=lambda entry: -entry[1]))
    while_loading = f", {_format(peak)} while it is loaded" if peak > total else ""
    raise OutOfMemory(
        f"The model '{name}' needs {_format(total)} in {placement.precision} ({listed}){while_loading}, "
        f"and {device} has {_format(free)} free. {_advice(need, family, device, placement, free)}"
    )


def _advice(need: MemoryNeed, family: Family, device: torch.device, placement: WeightPlacement, free: int) -> str:
    """Name the first option under which the model fits."""
    gpu = device.type == "cuda"
    options = {
        f"precision='{name}'": placement._replace(precision=name) for name in ("bf16", "nf4") if name != placement.precision
    }
    if gpu:
        options["offload=True"] = placement._replace(offload=True)
        options["precision='nf4', offload=True"] = WeightPlacement("nf4", True, placement.ranks)
    for option, changed in options.items():
        if _needed_bytes(need, family, device, changed) <= free:
            return f"It would fit with {option}."
    for ranks in (2, 4, 8, 16):
        if gpu and _needed_bytes(need, family, device, placement._replace(ranks=ranks)) <= free:
            return f"It would fit on {ranks} such GPUs: torchrun --nproc-per-node {ranks}, with sharded=True."
    return "No option makes it fit: use a larger machine or a smaller model."


def _needed_bytes(need: MemoryNeed, family: Family, device: torch.device, placement: WeightPlacement) -> int:
    """Return the peak bytes on one device: the largest component if offloaded, a part of the denoiser if sharded."""
    sizes = need.bytes(placement.precision, device)
    if placement.offload:
        return round(HEADROOM * max(sizes.values()))
    elsewhere = sizes.get(family.denoiser, 0) * (1 - 1 / placement.ranks)
    return round(HEADROOM * (need.peak(placement.precision, device) - elsewhere))


def _format(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
