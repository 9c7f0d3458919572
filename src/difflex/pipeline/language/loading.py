"""`load_language`: from the name of a causal language model to a `LanguagePipeline`."""

import os
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from difflex.devices import find_device
from difflex.errors import BadInput, BrokenFile, DifflexError, UnknownName
from difflex.pipeline.components import ComponentPlan, PipelinePlan, build_components
from difflex.pipeline.families import Family
from difflex.pipeline.language.engine import LanguageEngine
from difflex.pipeline.language.model import LanguagePipeline
from difflex.pipeline.loading import WeightPlacement, check_fits, check_precision, quantise
from difflex.pipeline.sources import CONFIG, COPY_AGAIN, SMALL_MODEL, check_finite, check_whole, find_source, first_line
from difflex.pipeline.weights import compute_dtype
from difflex.quiet import hide_progress_bars, quiet

MODEL = "model"
FAMILY = Family(name="language", denoiser=MODEL)


def load_language(
    name: str | Path,
    precision: str | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    untrained: int | None = None,
    offline: bool = False,
) -> LanguagePipeline:
    """Load the causal language model `name`: one inside the package, a folder, or a hub model OWNER/NAME.

    `precision` is bf16, fp16, fp32 or nf4 (default: fp32 on a CPU, bf16 on a GPU); nf4 quantises the linear layers of the blocks.
    `untrained` gives the model random weights of that seed, as a control. `offline` takes hub models from the local cache only.
    Only weights in safetensors files are read, and no code of the model's repository is run.
    """
    device = find_device(device)
    chosen = check_precision(precision, device)
    source = find_source(name, revision, CONFIG, "a language model of transformers")
    place, options = (
        os.fspath(source.folder or source.name),
        {"revision": revision, "local_files_only": offline or bool(source.folder)},
    )
    try:
        with quiet("transformers"):
            config = AutoConfig.from_pretrained(place, **options)
            tokenizer = AutoTokenizer.from_pretrained(place, **options)
    except Exception as error:  # readers of transformers and tokenizers: each has its own errors
        raise _unreadable(source.name, source.folder, offline, error) from error
    plan = PipelinePlan("", {MODEL: ComponentPlan("transformers", _model_class(source.name, config), config.to_dict())}, {})
    check_fits(source.name, plan, FAMILY, device, WeightPlacement(chosen, False, 1))
    dtype = compute_dtype(chosen, device)
    if untrained is None:
        model = _read(source.name, place, options, source.folder, dtype, offline)
        revision = None if source.folder else getattr(model.config, "_commit_hash", None) or revision
    else:
        model = build_components(plan.components, untrained, dtype, device, lambda _, component: component)[MODEL]
        revision = f"untrained-{untrained}"
    module = cast(nn.Module, model).to(device)
    module = quantise(module, dtype) if chosen == "nf4" else module
    model = cast(PreTrainedModel, module.eval().requires_grad_(False))
    check_whole(source.name, {MODEL: model})
    check_finite(source.name, {MODEL: model})
    with quiet("transformers"):
        engine = LanguageEngine(model, cast(PreTrainedTokenizerBase, tokenizer))
    return LanguagePipeline(engine, source.name, revision, chosen)


def _model_class(name: str, config: Any) -> str:
    """Return the class of the model, which must be a causal language model of transformers itself."""
    classes = [kind for kind in config.architectures or () if hasattr(transformers, kind)]
    if not classes or type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        listed = ", ".join(config.architectures or ()) or config.model_type
        raise BadInput(f"'{name}' is a {listed}, not a causal language model of transformers {transformers.__version__}.")
    return classes[0]


def _read(
    name: str, place: str, options: dict[str, Any], folder: Path | None, dtype: torch.dtype, offline: bool
) -> PreTrainedModel:
    small = folder is not None and sum(path.stat().st_size for path in folder.glob("*.safetensors")) < SMALL_MODEL
    try:
        with quiet("transformers"), hide_progress_bars() if small else nullcontext(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            loaded = AutoModelForCausalLM.from_pretrained(
                place, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
            )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise _unreadable(name, folder, offline, error) from error
    model, report = cast("tuple[PreTrainedModel, dict[str, Any]]", loaded)
    if missing := sorted(report["missing_keys"]):
        raise BrokenFile(f"The files of the model '{name}' do not hold the weights {missing[0]}. {COPY_AGAIN}")
    return model


def _unreadable(name: str, folder: Path | None, offline: bool, error: Exception) -> DifflexError:
    if folder is not None:
        return BrokenFile(f"The language model in {folder} cannot be read: {first_line(error)}. {COPY_AGAIN}")
    where = "the local cache of the hub" if offline else "the hub"
    return UnknownName(f"The language model '{name}' could not be read from {where}: {first_line(error)}.")
