"""sdxl-unbox (surkovv/sdxl-unbox) and other tools after openai/sparse_autoencoder: `config.json` and `state_dict.pth`."""

from __future__ import annotations

from pathlib import Path
from typing import final

import torch

from difflex.dictionaries import SAE, CodeStatistics, Dictionary
from difflex.errors import NonFinite
from difflex.interchange.base import FittedDictionary, ForeignDictionary, WritableFormat, encoder_bias, foreign_sae, plain_sae
from difflex.interchange.source import ForeignSource
from difflex.interchange.writing import write_config, write_plain_pickle

CONFIG, WEIGHTS = "config.json", "state_dict.pth"
MEAN, STD = "mean.pt", "std.pt"
"""Of the codes of each feature where it fires; its SAE of FLUX.1 has no `std.pt`."""


@final
class SDXLUnboxFormat(WritableFormat):
    """The format of sdxl-unbox, of its SAE of FLUX.1's double.18 and of the OpenAI code that they follow."""

    name, tool = "sdxl-unbox", "sdxl-unbox"

    def matches(self, source: ForeignSource) -> bool:
        return source.has(CONFIG, WEIGHTS)

    def read(self, source: ForeignSource) -> ForeignDictionary:
        config, tensors = source.json(CONFIG), source.tensors(WEIGHTS)
        prefix = "state_dict." if "state_dict.encoder.weight" in tensors.names else ""
        encoder = tensors.matrix(f"{prefix}encoder.weight")
        size, width = encoder.shape
        make = foreign_sae(
            "topk",
            encoder=encoder,
            decoder=tensors.matrix(f"{prefix}decoder.weight").T,
            bias=tensors.vector(f"{prefix}pre_bias", width),
            encoder_bias=tensors.vector(f"{prefix}latent_bias", size),
        )
        return ForeignDictionary(make=make, k=config.count("k"), model_class="topk", config=config.entries)

    def read_statistics(self, source: ForeignSource, size: int) -> CodeStatistics | None:
        mean, std = (source.tensors(name).vector("", size) if source.has(name) else None for name in (MEAN, STD))
        if mean is None:
            return None
        try:
            return CodeStatistics(mean=mean, std=std)
        except NonFinite as error:
            raise NonFinite(f"{source.path}/{MEAN} and {STD} cannot be used: {error} Copy them again.") from error

    def fit(self, dictionary: Dictionary, approximate: bool) -> FittedDictionary:
        return plain_sae(dictionary, self, approximate, thresholds=False)

    def write(self, dictionary: Dictionary, folder: Path) -> list[Path]:
        assert isinstance(dictionary, SAE)
        weights = dictionary.weights
        state = {
            "pre_bias": weights.bias,
            "latent_bias": encoder_bias(dictionary),
            "stats_last_nonzero": torch.zeros(dictionary.size, dtype=torch.int64),
            "encoder.weight": weights.encoder,
            "decoder.weight": weights.decoder.T,
        }
        entries = {"n_dirs_local": dictionary.size, "d_model": dictionary.width, "k": dictionary.k}
        entries |= {"auxk": None, "dead_steps_threshold": 0}
        return [write_plain_pickle(folder / WEIGHTS, {"state_dict": state}), write_config(folder / CONFIG, entries)]
