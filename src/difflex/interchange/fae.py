"""fae (neverix/fae), the SAEs of FLUX.1 of arXiv 2505.24360 (`nev/flux1-saes`), after `sae_params` and `info` were saved flat.

Its checkpoints are trees of Orbax, which only Orbax reads; docs/interchange.md shows the lines that save one as a flat file.
"""

from __future__ import annotations

from typing import final

import torch

from difflex.dictionaries import SAE, Dictionary, DictionaryOrigin, Normalisation, SAEWeights
from difflex.errors import BrokenFile
from difflex.interchange.base import ForeignDictionary, ForeignFormat
from difflex.interchange.source import ForeignSource

WEIGHTS = "fae.safetensors"
CLIP, VARIANCE_FLOOR = 10.0, 1e-6
"""How it clips its normalised input, and the smallest variance that it divides by."""


@final
class FaeFormat(ForeignFormat):
    """The format of fae, which is read and not written: `z = clip((x wm - m) / s)`, then the k largest scores of any sign."""

    name, tool = "fae", "fae"

    def matches(self, source: ForeignSource) -> bool:
        return source.has(WEIGHTS)

    def read(self, source: ForeignSource) -> ForeignDictionary:
        tensors = source.tensors(WEIGHTS)
        encoder, decoder = tensors.matrix("sae_params.W_enc").T.float(), tensors.matrix("sae_params.W_dec").float()
        if encoder.shape != decoder.shape:
            raise BrokenFile(
                f"{tensors.path}: W_enc {[*encoder.T.shape]} and W_dec {[*decoder.shape]} do not fit. Copy it again."
            )
        width = encoder.shape[1]
        means, squares = (tensors.vector(f"info.{name}", width).double() for name in ("feature_means", "feature_square_means"))
        pre_bias, post_bias = (tensors.vector(f"sae_params.{name}", width) for name in ("b_pre", "b_post"))
        scale = (squares - means.square()).clamp_min(VARIANCE_FLOOR).sqrt()
        basis = tensors.matrix("info.whitening_matrix").double()
        if basis.shape != (width, width):
            raise BrokenFile(f"{tensors.path}: the whitening matrix is {[*basis.shape]}, not {[width, width]}. Copy it again.")
        inverse, failed = torch.linalg.inv_ex(basis)
        if failed.any():
            raise BrokenFile(f"{tensors.path}: the whitening matrix has no inverse. Copy it again.")
        # Its matrix is rounded to bf16 and not quite orthogonal: the mean that is subtracted and the one that is added differ.
        # The bias makes up for it in the reconstruction, and the pre-bias in the scores.
        mean = means @ inverse
        shift = ((means @ basis.T - mean) @ inverse.T / scale).float()
        weights = SAEWeights(encoder=encoder, decoder=decoder, bias=post_bias + shift, pre_bias=pre_bias + shift)
        normalisation = Normalisation(
            method="whiten", mean=mean.float(), scale=scale.float(), basis=basis.float().contiguous(), clip=CLIP
        )

        def make(origin: DictionaryOrigin, k: int) -> Dictionary:
            return SAE(kind="topk", k=k, origin=origin, normalisation=normalisation, weights=weights, relu=False)

        return ForeignDictionary(make=make, k=None, model_class="SAE", config={})
