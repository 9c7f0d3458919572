"""Dictionaries of tools that are no package, against what their formulas compute from the files, in plain PyTorch."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from interchange_cases import SITE, WIDTH, dense, difference, fae_file, our_itda, our_sae, rand, whitening
from safetensors.torch import load_file
from torch import Tensor

from difflex.dictionaries import Dictionary, Normalisation
from difflex.interchange import read_dictionary, write_dictionary

Formula = Callable[[Path, Tensor], tuple[Tensor, Tensor]]
"""Dense codes and the reconstruction of `x`, from the files in a folder."""


def k_largest(scores: Tensor, k: int) -> Tensor:
    top = scores.topk(k)
    return torch.zeros_like(scores).scatter_(1, top.indices, top.values)


def unbox(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    """OpenAI's SAE: the k largest scores, cut at zero."""
    state = torch.load(folder / "state_dict.pth", weights_only=True)["state_dict"]
    scores = (x - state["pre_bias"]) @ state["encoder.weight"].T + state["latent_bias"]
    codes = k_largest(scores, json.loads((folder / "config.json").read_text())["k"]).relu()
    return codes, codes @ state["decoder.weight"].T + state["pre_bias"]


def saeuron(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    """The k largest of each token, as it loads an SAE for use."""
    state = load_file(folder / "sae.safetensors")
    scores = ((x - state["b_dec"]) @ state["encoder.weight"].T + state["encoder.bias"]).relu()
    codes = k_largest(scores, json.loads((folder / "cfg.json").read_text())["k"])
    return codes, codes @ state["W_dec"] + state["b_dec"]


def leask(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    """Signed matching pursuit."""
    atoms = torch.load(folder / "atoms.pt", weights_only=True)
    k = int(next(line for line in (folder / "metadata.yaml").read_text().splitlines() if line.startswith("k:"))[2:])
    codes, rest, rows = torch.zeros(len(x), len(atoms)), x.clone(), torch.arange(len(x))
    for _ in range(k):
        products = rest @ atoms.T
        best = products.abs().argmax(1)
        codes[rows, best] += products[rows, best]
        rest -= products[rows, best, None] * atoms[best]
    return codes, codes @ atoms


def flux(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient pursuit; an atom whose weight is cut at zero leaves the support."""
    state, config = load_file(folder / "sae.safetensors"), json.loads((folder / "cfg.json").read_text())
    atoms, partners = (state[name][: config["dictionary_size"]] for name in ("xs", "ys"))
    z = x / state["std_x"] - state["mean_x"]
    codes = torch.zeros(len(x), len(atoms))
    for _ in range(config["target_l0"]):
        rest = z - codes @ atoms
        products = rest @ atoms.T
        support = (codes != 0).scatter(1, products.argmax(1, keepdim=True), True)
        gradient = products * support
        change = gradient @ atoms
        step = (change * rest).sum(1, keepdim=True) / change.square().sum(1, keepdim=True).clamp_min(1e-3)
        codes = (codes + step * gradient).relu()
    return codes, (codes @ partners + state["mean_y"]) * state["std_y"]


def fae(folder: Path, x: Tensor, k: int = 4) -> tuple[Tensor, Tensor]:
    """The k largest scores of any sign, of the whitened and clipped input."""
    stored = {name.partition(".")[2]: each.double() for name, each in load_file(folder / "fae.safetensors").items()}
    means, basis = stored["feature_means"], stored["whitening_matrix"]
    std = (stored["feature_square_means"] - means.square()).clamp_min(1e-6).sqrt()
    z = ((x.double() @ basis - means) / std).clamp(-10, 10)
    codes = k_largest((z - stored["b_post"] + stored["b_pre"]) @ stored["W_enc"], k)
    return codes.float(), (((codes @ stored["W_dec"] + stored["b_post"]) * std + means) @ basis.T).float()


CASES: dict[str, tuple[Dictionary, Formula]] = {
    "sdxl-unbox": (our_sae(), unbox),
    "saeuron": (our_sae(), saeuron),
    "itda": (our_itda("matching", Normalisation.identity(WIDTH)), leask),
    "itda-flux": (our_itda("gradient", replace(whitening(), method="standardise", basis=None)), flux),
}
"""Dictionaries of ours for each format, and its formula."""


def difference_of(dictionary: Dictionary, x: Tensor, expected: tuple[Tensor, Tensor]) -> tuple[float, float]:
    return difference(dense(dictionary, x), expected[0]), difference(dictionary.decode(dictionary.encode(x)), expected[1])


@pytest.mark.parametrize("format", CASES)
def test_what_is_written_and_read_computes_by_the_formula(format: str, tmp_path: Path):
    (dictionary, formula), x = CASES[format], rand(256, WIDTH, seed=20)
    write_dictionary(dictionary, format, tmp_path / "out")
    expected = formula(tmp_path / "out", x)
    written = difference_of(dictionary, x, expected)
    read = difference_of(read_dictionary(tmp_path / "out", site=SITE), x, expected)
    assert max(*written, *read) < 1e-6


def test_a_fae_sae_is_read_by_the_formula(tmp_path: Path):
    x, folder = 20 * rand(256, WIDTH, seed=20), fae_file(tmp_path / "fae")
    read = difference_of(read_dictionary(folder, site=SITE, k=4), x, fae(folder, x))
    assert max(read) < 1e-6
