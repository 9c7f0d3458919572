"""Dictionaries of other tools with what these compute from them, and dictionaries of our own to write for them."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from difflex.choices import SAEKind
from difflex.dictionaries import ITDA, SAE, Dictionary, DictionaryOrigin, Normalisation, SAEWeights
from difflex.dictionaries.itda import AtomProvenance
from difflex.interchange import read_dictionary
from difflex.records import ActivationBatch, Site

FROZEN = Path(__file__).parent / "interchange_files"
"""Made by benchmarks/peers/interchange.py."""
SITE = Site("double.1")
WIDTH, SIZE, K = 8, 24, 4


class ComputedCodes(NamedTuple):
    """What a tool computes from `x`."""

    x: Tensor
    codes: Tensor
    """Dense."""
    y: Tensor


def computed(folder: Path) -> ComputedCodes:
    """What the tool that wrote `folder` computes."""
    tensors = load_file(folder / "computed.safetensors")
    return ComputedCodes(tensors["x"], tensors["codes"], tensors["y"])


def cases(root: Path) -> list[Path]:
    """The folders of dictionaries in `root`."""
    return sorted(path.parent for path in root.glob("*/case.json"))


def note(folder: Path) -> dict:
    """The format of a case, and the k that its files do not tell."""
    return json.loads((folder / "case.json").read_text())


def read_case(folder: Path, **arguments: object) -> Dictionary:
    """Read a case; where no k is known it is counted on the inputs."""
    x = computed(folder).x
    unknown = torch.zeros(len(x), dtype=torch.long)

    def activations() -> Iterator[ActivationBatch]:
        yield ActivationBatch(x, unknown, unknown)

    return read_dictionary(folder, site=SITE, k=note(folder).get("k"), activations=activations, **arguments)  # pyright: ignore[reportArgumentType]


def dense(dictionary: Dictionary, x: Tensor) -> Tensor:
    """All codes of `x`, most of them zero."""
    codes = dictionary.encode(x)
    return torch.zeros(len(x), dictionary.size).scatter_add_(1, codes.indices, codes.values)


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def differences(dictionary: Dictionary, answer: ComputedCodes) -> tuple[float, float]:
    """The differences of codes and reconstructions."""
    y = dictionary.decode(dictionary.encode(answer.x))
    return difference(dense(dictionary, answer.x), answer.codes), difference(y, answer.y)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def whitening(width: int = WIDTH) -> Normalisation:
    basis = torch.linalg.qr(rand(width, width, seed=4)).Q
    return Normalisation(method="whiten", mean=rand(width, seed=5), scale=rand(width, seed=6).abs() + 0.5, basis=basis)


def our_sae(kind: SAEKind = "topk", normalisation: Normalisation | None = None, **changes: object) -> SAE:
    """An SAE with every optional part."""
    weights = SAEWeights(
        encoder=rand(SIZE, WIDTH, seed=1),
        decoder=F.normalize(rand(SIZE, WIDTH, seed=2), dim=1),
        bias=0.3 * rand(WIDTH, seed=3),
        pre_bias=0.1 * rand(WIDTH, seed=8),
        encoder_bias=0.2 * rand(SIZE, seed=9),
        thresholds=None if kind == "topk" else torch.full((SIZE,), 1.5),
    )
    sae = SAE(
        kind=kind,
        k=K,
        origin=DictionaryOrigin(site=SITE, model="mini-flux"),
        normalisation=whitening() if normalisation is None else normalisation,
        weights=replace(weights, **{name: value for name, value in changes.items() if name != "relu"}),  # pyright: ignore[reportArgumentType]
        relu=changes.get("relu", True) is True,
    )
    return sae


def our_itda(pursuit: str = "positive-matching", normalisation: Normalisation | None = None) -> ITDA:
    centred = Normalisation(method="standardise", mean=rand(WIDTH, seed=5), scale=torch.ones(WIDTH))
    return ITDA(
        k=K,
        origin=DictionaryOrigin(site=SITE, model="mini-flux"),
        normalisation=centred if normalisation is None else normalisation,
        atoms=F.normalize(rand(SIZE, WIDTH, seed=2), dim=1),
        provenance=AtomProvenance(shots=torch.arange(SIZE), tokens=torch.arange(SIZE)),
        pursuit=pursuit,  # pyright: ignore[reportArgumentType]
    )


def fae_file(folder: Path) -> Path:
    """Write a flat file as of fae: a whitening matrix in bf16, moments of the rotated input."""
    folder.mkdir(parents=True)
    basis, means = torch.linalg.qr(rand(WIDTH, WIDTH, seed=4)).Q.bfloat16().float(), 3 * rand(WIDTH, seed=5)
    squares = means.square() + rand(WIDTH, seed=7).abs() + 0.01
    info = {"whitening_matrix": basis, "feature_means": means, "feature_square_means": squares}
    biases = {"b_pre": rand(WIDTH, seed=8), "b_post": rand(WIDTH, seed=9), "b_mid": torch.zeros(SIZE)}
    weights = {**biases, "W_enc": rand(WIDTH, SIZE, seed=6), "W_dec": rand(SIZE, WIDTH, seed=10)}
    flat = {f"info.{name}": x for name, x in info.items()} | {f"sae_params.{name}": x for name, x in weights.items()}
    save_file({name: x.contiguous() for name, x in flat.items()}, folder / "fae.safetensors")
    return folder


WRITTEN: dict[str, tuple[str, Dictionary]] = {
    "saelens-topk": ("saelens", our_sae()),
    "saelens-batchtopk": ("saelens", our_sae("batchtopk")),
    "saelens-jumprelu": ("saelens", our_sae("jumprelu", thresholds=rand(SIZE, seed=7).abs())),
    "saelens-matryoshka": ("saelens", our_sae("matryoshka")),
    "saelens-itda": ("saelens", our_itda()),
    "sparsify-topk": ("sparsify", our_sae()),
    "dictionary-learning-topk": ("dictionary-learning", our_sae()),
    "dictionary-learning-batchtopk": ("dictionary-learning", our_sae("batchtopk")),
    "dictionary-learning-jumprelu": ("dictionary-learning", our_sae("jumprelu", thresholds=rand(SIZE, seed=7).abs())),
    "dictionary-learning-matryoshka": ("dictionary-learning", our_sae("matryoshka")),
    "overcomplete-topk": (
        "overcomplete",
        our_sae(normalisation=Normalisation.identity(WIDTH), bias=torch.zeros(WIDTH), pre_bias=None),
    ),
    "overcomplete-jumprelu": (
        "overcomplete",
        our_sae("jumprelu", Normalisation.identity(WIDTH), bias=torch.zeros(WIDTH), pre_bias=None),
    ),
}
"""Dictionaries of ours that a tool of the peers' environment can hold exactly, with its format."""
