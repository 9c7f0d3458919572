"""Dictionaries in the formats of other tools: what is read computes as there, what is written comes back, the rest is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from interchange_cases import (
    FROZEN,
    SITE,
    SIZE,
    WIDTH,
    WRITTEN,
    K,
    cases,
    computed,
    dense,
    difference,
    differences,
    note,
    our_itda,
    our_sae,
    rand,
    read_case,
)
from safetensors.torch import load_file, save_file

from difflex.cli import main
from difflex.dictionaries import SAE, Dictionary
from difflex.errors import BadInput, BrokenFile, DifflexError, UnknownName
from difflex.interchange import FORMATS, compare_reconstructions, detect_format, read_dictionary, write_dictionary
from difflex.records import ActivationBatch
from difflex.study import Study


@pytest.mark.parametrize("folder", cases(FROZEN), ids=lambda folder: folder.name)
def test_what_a_tool_wrote_computes_as_there(folder: Path, tmp_path: Path):
    assert detect_format(folder).name == note(folder)["format"]
    dictionary, answer = read_case(folder), computed(folder)
    assert max(differences(dictionary, answer)) < 1e-6
    read_case(folder, keep_halves=True).save(tmp_path)
    assert max(differences(Dictionary.load(tmp_path), answer)) < 1e-6


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_written_comes_back(name: str, tmp_path: Path):
    format, dictionary = WRITTEN[name]
    result = write_dictionary(dictionary, format, tmp_path / "out")
    assert not result.approximations and all(path.is_file() for path in result.files)
    assert detect_format(tmp_path / "out").name == format
    back = read_dictionary(tmp_path / "out", site=SITE, k=K if format == "overcomplete" else None)
    x = rand(40, WIDTH, seed=5)
    assert difference(dense(back, x), dense(result.written, x)) < 1e-5
    batch = ActivationBatch(x, torch.zeros(40, dtype=torch.long), torch.zeros(40, dtype=torch.long))
    measured = compare_reconstructions(dictionary, result.written, [batch])
    assert measured.tokens == 40 and 0 < measured.difference < 10


def test_neurons_and_itda_are_refused_where_only_saes_fit(tmp_path: Path):
    with pytest.raises(BadInput, match="is no SAE"):
        write_dictionary(our_itda(), "sparsify", tmp_path / "out", approximate=True)
    with pytest.raises(BadInput, match="is no ITDA dictionary"):
        write_dictionary(our_sae(), "itda", tmp_path / "out", approximate=True)
    with pytest.raises(UnknownName, match="nearest: saelens"):
        write_dictionary(our_sae(), "saelense", tmp_path / "out")


def changed(folder: Path, case: str, **entries: object) -> Path:
    """Return a copy of a frozen case with other entries in its configuration."""
    shutil.copytree(FROZEN / case, folder)
    path = next(path for path in (folder / "cfg.json", folder / "config.json") if path.exists())
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))
    return folder


@pytest.mark.parametrize(
    ("case", "entries", "reason"),
    [
        ("saelens-topk", {"normalize_activations": "layer_norm"}, "depends on each token"),
        ("saelens-topk", {"architecture": "transcoder"}, "the architecture transcoder cannot be read"),
        ("saelens-topk", {"reshape_activations": "hook_z"}, "heads of an attention layer"),
        ("saelens-matching-pursuit", {"residual_threshold": 0.1}, "stops at a residual_threshold"),
        ("sparsify-topk", {"transcode": True}, "predicts one site from another"),
        ("sparsify-topk", {"activation": "groupmax"}, "the activation groupmax cannot be read"),
        ("sparsify-topk", {"input_unit_norm": True}, "input_unit_norm depends on each token"),
        ("dictionary-learning-AutoEncoder", {"trainer": {"dict_class": "IdentityDict"}}, "the class IdentityDict cannot be read"),
    ],
)
def test_what_no_dictionary_here_can_compute_is_refused(case: str, entries: dict, reason: str, tmp_path: Path):
    with pytest.raises(BadInput, match=reason):
        read_dictionary(changed(tmp_path / "copy", case, **entries), site=SITE)


def test_shards_are_read_and_one_outside_of_the_folder_is_refused(tmp_path: Path):
    folder = Path(shutil.copytree(FROZEN / "saelens-topk", tmp_path / "copy"))
    weights = load_file(folder / "sae_weights.safetensors")
    (folder / "sae_weights.safetensors").unlink()
    places = {name: f"part-{number % 2}.safetensors" for number, name in enumerate(sorted(weights))}
    for part in set(places.values()):
        save_file({name: weights[name] for name in weights if places[name] == part}, folder / part)
    index = folder / "sae_weights.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    assert max(differences(read_case(folder), computed(folder))) < 1e-6
    index.write_text(json.dumps({"weight_map": {"W_enc": "../secret.safetensors"}}))
    with pytest.raises(BrokenFile, match="outside of the folder"):
        read_case(folder)


class Trap:
    """What runs code if it is unpickled."""

    def __reduce__(self) -> tuple:
        return (print, ("the trap has run",))


def test_pickles_claims_and_numbers_that_are_none_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = Path(shutil.copytree(FROZEN / "dictionary-learning-BatchTopKSAE", tmp_path / "copy"))
    state = torch.load(folder / "ae.pt", weights_only=True)
    torch.save({**state, "x": Trap()}, folder / "ae.pt")
    with pytest.raises(BrokenFile, match=r"cannot be read as tensors of torch\.save"):
        read_case(folder)
    assert "trap" not in capsys.readouterr().out
    torch.save({**state, "b_dec": torch.zeros(1).expand(10**12)}, folder / "ae.pt")
    with pytest.raises(BrokenFile, match="as a view of other numbers"):
        read_case(folder)
    torch.save({**state, "encoder.weight": torch.full((SIZE, WIDTH), torch.nan)}, folder / "ae.pt")
    with pytest.raises(DifflexError, match="holds NaN or infinity"):
        read_case(folder)
    torch.save(state, folder / "ae.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(BrokenFile, match="cannot be read as tensors"):
        read_case(folder)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study with one imported dictionary."""
    folder = tmp_path_factory.mktemp("study")
    words = ["import", str(FROZEN / "saelens-topk"), "--site", "double.1", "--model", "mini-flux", "--out", str(folder / "study")]
    assert main(words) == 0
    return folder / "study"


def test_an_imported_dictionary_keeps_and_shows_its_origin(study: Path, capsys: pytest.CaptureFixture[str]):
    [ref] = Study.open(study).dictionaries()
    assert str(ref) == f"double.1/topk-{SIZE}-k{K}-saelens"
    sae = Dictionary.load(Study.open(study).dictionary(*ref))
    imported = sae.origin.training["imported"]
    assert isinstance(sae, SAE) and isinstance(imported, dict)
    assert (imported["format"], imported["class"], imported["version"]) == ("saelens", "topk", "6.54.12")
    assert main(["status", str(study)]) == 0
    assert f"double.1/topk-{SIZE}-k{K}-saelens, imported from SAELens: " in capsys.readouterr().out


def test_importing_again_is_up_to_date_and_another_needs_a_label(study: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["import", str(FROZEN / "saelens-topk"), "--site", "double.1", "--out", str(study)]) == 0
    assert "up to date" in capsys.readouterr().out
    assert main(["import", str(FROZEN / "saelens-topk-rescaled"), "--site", "double.1", "--out", str(study)]) == 2
    assert "Name this one with --label" in capsys.readouterr().err
    for label, code in (("../x", 2), ("other", 0)):
        words = ["import", str(FROZEN / "saelens-topk-rescaled"), "--site", "double.1", "--out", str(study), "--label", label]
        assert main(words) == code


def test_an_import_names_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["import", str(FROZEN / "saelens-jumprelu"), "--site", "double.1", "--out", str(tmp_path / "new")]
    for more, reason in ([], "Name the model"), (["--model", "mini-flux"], "name the average with --k"):
        assert main([*words, *more]) == 2
        assert reason in capsys.readouterr().err and not (tmp_path / "new").exists()
    assert main(["import", str(FROZEN), "--site", "double.1", "--model", "mini-flux", "--out", str(tmp_path / "new")]) == 2
    assert "It has the folders" in capsys.readouterr().err


def test_an_exported_dictionary_is_imported_again(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    name = f"double.1/topk-{SIZE}-k{K}-saelens"
    assert main(["export", str(study), name, "--to", "sdxl-unbox", "--out", str(tmp_path / "out")]) == 0
    answer = computed(FROZEN / "saelens-topk")
    assert max(differences(read_dictionary(tmp_path / "out", site=SITE), answer)) < 1e-6
    assert main(["export", str(study), name, "--to", "sdxl-unbox", "--out", str(tmp_path / "out")]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert main(["export", str(study), name, "--to", "overcomplete", "--out", str(tmp_path / "o"), "--approximate"]) == 0
    assert "The difference is unknown" in capsys.readouterr().out


def test_every_format_has_a_name_of_its_own():
    assert len({format.name for format in FORMATS}) == len(FORMATS)
