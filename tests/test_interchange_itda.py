"""The two published ITDA formats, tried on files with the same names, keys and shapes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from difflex.dictionaries import ITDA
from difflex.errors import BadInput, BrokenFile, DifflexError
from difflex.interchange import read_dictionary
from difflex.records import Site

WIDTH, SIZE, ROOM = 24, 50, 64
SITE = Site("double.18")


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def read(folder: Path, **arguments: str) -> ITDA:
    itda = read_dictionary(folder, site=SITE, **arguments)  # pyright: ignore[reportArgumentType]
    assert isinstance(itda, ITDA)
    return itda


def flux(folder: Path, config: dict | None = None, tensors: dict | None = None) -> Path:
    """Write a folder as flux-saes-gpu does: with more rows than atoms, the rest never written."""
    atoms = torch.full((ROOM, WIDTH), torch.nan)
    atoms[:SIZE] = F.normalize(rand(SIZE, WIDTH), dim=1)
    mean, std = rand(WIDTH, seed=1), rand(WIDTH, seed=2).abs() + 0.5
    folder.mkdir(exist_ok=True)
    stored = {
        "xs": atoms.bfloat16(),
        "ys": atoms.bfloat16().clone(),
        "mean_x": mean,
        "mean_y": mean.clone(),
        "std_x": std,
        "std_y": std.clone(),
        "weight": torch.empty(WIDTH, WIDTH),
    }
    save_file({**stored, **(tensors or {})}, folder / "sae.safetensors")
    entries = {
        "d_model": WIDTH,
        "target_l0": 5,
        "loss_threshold": 0.6,
        "add_error": False,
        "subtract_mean": True,
        "fvu_loss": True,
        "start_size": 16,
        "error_k": None,
        "skip_connection": False,
        "preprocessing_steps": 1,
        "normalize": True,
        "max_add": None,
        "dictionary_size": SIZE,
        "steps": 100,
    }
    (folder / "cfg.json").write_text(json.dumps({**entries, **(config or {})}))
    return folder


def leask(folder: Path, metadata: str = "", **tensors: Tensor) -> Path:
    """Write a folder as the authors of ITDA do."""
    folder.mkdir(exist_ok=True)
    torch.save(tensors.get("atoms", F.normalize(rand(SIZE, WIDTH), dim=1)), folder / "atoms.pt")
    torch.save(
        tensors.get("indices", torch.stack([torch.arange(SIZE) * 3, torch.arange(SIZE) % 7], 1)), folder / "atom_indices.pt"
    )
    plain = (
        f"activation_dim: {WIDTH}\nbatch_size: 16\ndataset: monology/pile-uncopyrighted\ndevice: cuda\nk: 6\nlayer: 12\n"
        "lm_name: EleutherAI/pythia-70m\nloss_threshold: 0.01\nmax_dict_size: 40960\nseed: 0\nseq_len: 128\nsteps: 4000\n"
        "submodule_name: null\nwandb_name: ''\n"
    )
    (folder / "metadata.yaml").write_text(plain + metadata)
    return folder


def plain_flux_reconstruction(x: Tensor, folder: Path) -> Tensor:
    """Reconstruct as published: normalise, run gradient pursuit with weights cut at zero, decode."""
    from safetensors.torch import load_file

    stored = {name: tensor.double() for name, tensor in load_file(folder / "sae.safetensors").items()}
    atoms = F.normalize(stored["xs"][:SIZE], dim=1)
    z = x.double() / stored["std_x"] - stored["mean_x"]
    weights = torch.zeros(len(z), SIZE, dtype=torch.float64)
    chosen = torch.zeros(len(z), SIZE, dtype=torch.bool)
    for _ in range(5):
        residual = z - weights @ atoms
        correlations = residual @ atoms.T
        chosen[torch.arange(len(z)), correlations.argmax(1)] = True
        gradient = correlations * chosen
        c = gradient @ atoms
        weights = (weights + ((c * residual).sum(1) / (c * c).sum(1))[:, None] * gradient).clamp_min(0)
    return (weights @ stored["ys"][:SIZE] + stored["mean_y"]) * stored["std_y"]


def test_a_flux_dictionary_reconstructs_as_published(tmp_path: Path):
    itda = read(flux(tmp_path), model="black-forest-labs/FLUX.1-schnell")
    assert (itda.size, itda.width, itda.k, itda.pursuit) == (SIZE, WIDTH, 5, "gradient")
    x = 3 * rand(20, WIDTH, seed=5)
    expected = plain_flux_reconstruction(x, tmp_path)
    torch.testing.assert_close(itda.decode(itda.encode(x)).double(), expected, atol=2e-2, rtol=0)
    assert itda.patch(3) is None


def test_without_subtract_mean_the_mean_is_not_used(tmp_path: Path):
    itda = read(flux(tmp_path, {"subtract_mean": False}))
    assert not itda.constant.any()


def test_a_language_model_dictionary_reconstructs_as_published(tmp_path: Path):
    itda = read(leask(tmp_path))
    assert (itda.size, itda.k, itda.pursuit) == (SIZE, 6, "matching")
    atoms, x = F.normalize(rand(SIZE, WIDTH), dim=1), rand(20, WIDTH, seed=5)
    residual = x.clone()
    for _ in range(6):
        correlations = residual @ atoms.T
        best = correlations.abs().argmax(1)
        residual -= correlations.gather(1, best[:, None]) * atoms[best]
    torch.testing.assert_close(itda.decode(itda.encode(x)), x - residual, atol=1e-4, rtol=0)
    patch = itda.patch(10)
    assert patch is not None and (patch.number, patch.token, patch.shot) == (30, 3, None)
    imported = itda.origin.training["imported"]
    assert isinstance(imported, dict) and imported["format"] == "itda"
    assert imported["config"] == {
        "activation_dim": WIDTH,
        "batch_size": 16,
        "dataset": "monology/pile-uncopyrighted",
        "device": "cuda",
        "k": 6,
        "layer": 12,
        "lm_name": "EleutherAI/pythia-70m",
        "loss_threshold": 0.01,
        "max_dict_size": 40960,
        "seed": 0,
        "seq_len": 128,
        "steps": 4000,
        "submodule_name": None,
        "wandb_name": "",
    }


def test_a_foreign_dictionary_can_be_saved_and_loaded(tmp_path: Path):
    itda = read(leask(tmp_path / "theirs"))
    back = type(itda).load(itda.save(tmp_path / "ours"))
    assert torch.equal(back.encode(rand(9, WIDTH)).values, itda.encode(rand(9, WIDTH)).values)


@pytest.mark.parametrize(
    ("config", "tensors"),
    [
        ({"skip_connection": True}, {}),
        ({}, {"ys": F.normalize(rand(ROOM, WIDTH, seed=9), dim=1)}),
        ({}, {"mean_y": rand(WIDTH, seed=9)}),
        ({}, {"std_y": torch.full((WIDTH,), 9.0)}),
    ],
)
def test_outputs_that_differ_from_the_atoms_are_refused(tmp_path: Path, config: dict, tensors: dict):
    with pytest.raises(BadInput, match=r"outputs of the atoms .* \(ys, mean_y, std_y, skip_connection\) differ"):
        read(flux(tmp_path, config, tensors))


def test_damaged_files_are_refused(tmp_path: Path):
    cases = {
        "says 99 atoms, xs has 64": flux(tmp_path / "a", {"dictionary_size": 99}),
        "target_l0 is None": flux(tmp_path / "b", {"target_l0": None}),
        "std_x is not positive": flux(tmp_path / "c", {}, {"std_x": torch.zeros(WIDTH), "std_y": torch.zeros(WIDTH)}),
        "row 0 of atoms has norm 2": leask(tmp_path / "d", atoms=2 * F.normalize(rand(SIZE, WIDTH), dim=1)),
        "do not fit together": leask(tmp_path / "e", indices=torch.zeros(3, 2).long()),
        "not a plain": leask(tmp_path / "f", metadata="nested:\n  deep: 1\n"),
    }
    for message, folder in cases.items():
        with pytest.raises(BrokenFile, match=message):
            read(folder)
    (tmp_path / "a" / "sae.safetensors").write_bytes(b"no")
    with pytest.raises(BrokenFile, match="more than it can have"):
        read(tmp_path / "a")
    (tmp_path / "d" / "atoms.pt").write_bytes(b"no")
    with pytest.raises(BrokenFile, match="cannot be read as tensors"):
        read(tmp_path / "d")
    with pytest.raises(BadInput, match="no dictionary of a known format"):
        read(tmp_path)


def test_claims_that_no_file_can_keep_are_refused_before_memory_is_taken(tmp_path: Path):
    deep = "x: " + "[" * 100_000
    cases = {
        "says 1000000000000 atoms": flux(tmp_path / "a", {"dictionary_size": 10**12}),
        "k 1000000000000 does not fit": flux(tmp_path / "b", {"target_l0": 10**12}),
        "as a view of other numbers": leask(tmp_path / "c", atoms=torch.ones(1, 1).expand(10**7, 10**7)),
        "k is -3": leask(tmp_path / "d", metadata="k: -3\n"),
        "xs is of torch.int64, not of floating-point numbers": flux(tmp_path / "e", {}, {"xs": torch.ones(ROOM, WIDTH).long()}),
        "is of torch.int64": leask(tmp_path / "f", atoms=torch.ones(SIZE, WIDTH).long()),
        "is of torch.float32": leask(tmp_path / "g", indices=torch.full((SIZE, 2), torch.nan)),
        "more than a configuration can": leask(tmp_path / "h", metadata=deep * 20),
    }
    for message, folder in cases.items():
        with pytest.raises(BrokenFile, match=message):
            read(folder)
    assert read(leask(tmp_path / "i", metadata=deep)).size == SIZE
    (tmp_path / "a" / "cfg.json").write_text("[" * 100_000)
    with pytest.raises(BrokenFile, match="cannot be read as JSON"):
        read(tmp_path / "a")
    nan = {name: torch.full((WIDTH,), torch.nan) for name in ("mean_x", "mean_y")}
    with pytest.raises(DifflexError):
        read(flux(tmp_path / "j", {}, nan))


@pytest.mark.parametrize(
    "tensors",
    [{"mean_x": torch.zeros(7)}, {"std_x": torch.ones(WIDTH, 1)}, {"ys": torch.zeros(9, WIDTH)}, {"xs": torch.zeros(ROOM)}],
)
def test_tensors_whose_shapes_do_not_fit_together_are_refused(tmp_path: Path, tensors: dict):
    with pytest.raises(BrokenFile, match=r"do not fit together|has the shape"):
        read(flux(tmp_path / "flux", tensors=tensors))


def test_metadata_that_is_not_text_is_refused(tmp_path: Path):
    folder = leask(tmp_path / "leask")
    (folder / "metadata.yaml").write_bytes(bytes(range(128, 256)))
    with pytest.raises(BrokenFile, match=r"metadata\.yaml cannot be read as text"):
        read(folder)
