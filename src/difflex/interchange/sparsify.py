"""sparsify (EleutherAI/sparsify) and SAeUron, which began as a copy of it: `cfg.json` and `sae.safetensors`."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, final

from difflex.dictionaries import SAE, Dictionary
from difflex.errors import BadInput
from difflex.files import Json
from difflex.interchange.base import FittedDictionary, ForeignDictionary, WritableFormat, encoder_bias, foreign_sae, plain_sae
from difflex.interchange.source import ForeignSource
from difflex.interchange.writing import write_config
from difflex.tensors import write_plain_tensors

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
SAEURON = ("batch_topk", "sample_topk", "input_unit_norm")
"""The settings that only SAeUron has."""


class SparsifyFormat(WritableFormat):
    """The format of sparsify 1."""

    name, tool = "sparsify", "sparsify"
    own_settings: ClassVar[dict[str, Json]] = {"skip_connection": False, "transcode": False, "activation": "topk"}
    """The settings of this tool alone."""

    def matches(self, source: ForeignSource) -> bool:
        return source.has(CONFIG, WEIGHTS) and not {*SAEURON, "target_l0"} & source.json(CONFIG).entries.keys()

    def read(self, source: ForeignSource) -> ForeignDictionary:
        config, tensors = source.json(CONFIG), source.tensors(WEIGHTS)
        if config.flag("transcode", False) or config.flag("skip_connection", False) or "W_skip" in tensors.names:
            raise BadInput(
                f"{config.path}: a transcoder predicts one site from another and is not a dictionary of a single site."
            )
        if (activation := config.get("activation", "topk")) != "topk":
            raise BadInput(f"{config.path}: the activation {str(activation)[:60]} cannot be read. topk can.")
        if config.flag("input_unit_norm", False):
            raise BadInput(f"{config.path}: input_unit_norm depends on each token and cannot be read.")
        encoder = tensors.matrix("encoder.weight")
        size, width = encoder.shape
        make = foreign_sae(
            "topk",
            encoder=encoder,
            decoder=tensors.matrix("W_dec"),
            bias=tensors.vector("b_dec", width),
            encoder_bias=tensors.vector("encoder.bias", size),
        )
        return ForeignDictionary(make=make, k=config.count("k"), model_class="topk", config=config.entries)

    def fit(self, dictionary: Dictionary, approximate: bool) -> FittedDictionary:
        return plain_sae(dictionary, self, approximate, thresholds=False)

    def write(self, dictionary: Dictionary, folder: Path) -> list[Path]:
        assert isinstance(dictionary, SAE)
        weights = dictionary.weights
        tensors = {"encoder.weight": weights.encoder, "encoder.bias": encoder_bias(dictionary)}
        tensors |= {"W_dec": weights.decoder, "b_dec": weights.bias}
        entries = {
            "expansion_factor": max(1, dictionary.size // dictionary.width),
            "normalize_decoder": False,
            "num_latents": dictionary.size,
            "k": dictionary.k,
            "multi_topk": False,
            **self.own_settings,
            "d_in": dictionary.width,
        }
        return [write_plain_tensors(folder / WEIGHTS, tensors), write_config(folder / CONFIG, entries)]


@final
class SAeUronFormat(SparsifyFormat):
    """The format of SAeUron: that of sparsify with settings of its own. Its SAEs are read as it reads them itself: as topk."""

    name, tool = "saeuron", "SAeUron"
    own_settings: ClassVar[dict[str, Json]] = dict.fromkeys(SAEURON, False)

    def matches(self, source: ForeignSource) -> bool:
        return source.has(CONFIG, WEIGHTS) and bool({*SAEURON} & source.json(CONFIG).entries.keys())
