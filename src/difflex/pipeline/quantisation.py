"""nf4: the linear layers of the denoiser's blocks and of the large text encoder in four bits, on a card or on a CPU."""

import os
import re
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.quantizers.pipe_quant_config import PipelineQuantizationConfig
from torch import nn

from difflex.errors import MissingExtra
from difflex.quiet import quiet

__all__ = ["for_card", "four_bit_layers", "quantise", "read_denoiser", "read_text_encoder"]

REPEATED = re.compile(r"(^|\.)\d+(\.|$)")


def for_card(parts: list[str], dtype: torch.dtype) -> PipelineQuantizationConfig:
    """What makes diffusers read `parts` in nf4, computing in `dtype`; it needs a card."""
    _bitsandbytes()
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    return PipelineQuantizationConfig("bitsandbytes_4bit", settings, components_to_quantize=parts)


def read_text_encoder(folder: Path, kind: str, dtype: torch.dtype) -> nn.Module:
    """The text encoder in `folder` in nf4, computing in `dtype`; transformers does this on a CPU too."""
    library = _bitsandbytes()
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    model = getattr(transformers, kind).from_pretrained(os.fspath(folder), quantization_config=config, dtype=dtype)
    for module in model.modules():
        if isinstance(module, library.nn.Linear4bit):
            _unpacked_if_odd(module)
    return model


def read_denoiser(folder: Path, kind: str, dtype: torch.dtype) -> nn.Module:
    """The denoiser in `folder` in nf4, computing in `dtype`; on a CPU diffusers itself does not do this."""
    _bitsandbytes()
    with quiet("diffusers"):
        model = getattr(diffusers, kind).from_pretrained(os.fspath(folder), dtype=dtype, local_files_only=True)
    return quantise(model, dtype)


def four_bit_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers that four bits hold, by path: the linear ones of the repeated blocks, but for what the class keeps exact."""
    exact = getattr(model, "_keep_in_fp32_modules", None) or ()  # T5's `wo`, as transformers itself has it
    layers = ((path, layer) for path, layer in model.named_modules() if isinstance(layer, nn.Linear) and REPEATED.search(path))
    return {path: layer for path, layer in layers if not set(path.split(".")) & set(exact)}


def quantise(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """`model`, the linear layers of its repeated blocks now in nf4 and computing in `dtype`; each is freed as it is replaced."""
    library = _bitsandbytes()
    layers = four_bit_layers(model)
    for path in list(layers):
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, _four_bit(library, layers.pop(path), dtype))
    return model


def _four_bit(library: Any, layer: nn.Linear, dtype: torch.dtype) -> nn.Module:
    place = layer.weight.device
    # On the meta device the layer itself takes no memory; moving its weight is what quantises it.
    made = library.nn.Linear4bit(
        layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=dtype, quant_type="nf4", device="meta"
    )
    made.weight = library.nn.Params4bit(layer.weight.data.cpu(), requires_grad=False, quant_type="nf4").to(place)
    made.bias = layer.bias
    _unpacked_if_odd(made)
    return made.eval()


def _unpacked_if_odd(layer: Any) -> None:
    """On a CPU with AVX-512 bitsandbytes 0.50 packs the weights in tiles, and fails where they do not fill whole ones."""
    if layer.in_features % 64 or layer.out_features % 32:
        layer.support_avx512bf16_for_cpu = False


def _bitsandbytes() -> Any:
    if find_spec("bitsandbytes") is None:
        raise MissingExtra.of("bitsandbytes", "nf4", "precision='nf4'")
    with warnings.catch_warnings(), quiet("bitsandbytes"):
        warnings.simplefilter("ignore")  # of old names in torch
        import bitsandbytes
    return bitsandbytes
