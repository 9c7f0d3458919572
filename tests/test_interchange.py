"""Dictionaries in the formats of other tools: what is read computes as there, what is written comes back, the rest is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fake_harvest import SITES, FakeHarvest, fake_shots
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
    fae_file,
    note,
    our_itda,
    our_sae,
    rand,
    read_case,
    whitening,
)
from safetensors.torch import load_file, save_file

from difflex.cli import main
from difflex.dictionaries import ITDA, SAE, CodeStatistics, Dictionary, Normalisation
from difflex.dictionary_config import read_config
from difflex.errors import BadInput, BrokenFile, DifflexError, UnknownName
from difflex.interchange import FORMATS, compare_reconstructions, detect_format, read_dictionary, write_dictionary
from difflex.records import ActivationBatch
from difflex.store import RecordingConfig, record
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
    k = K if dictionary.kind == "jumprelu" or format == "overcomplete" else None
    back, x = read_dictionary(tmp_path / "out", site=SITE, k=k), rand(64, WIDTH, seed=20)
    assert (back.kind, back.k) == (dictionary.kind, dictionary.k)
    assert difference(dense(back, x), dense(dictionary, x)) < 1e-6
    assert difference(back.decode(back.encode(x)), dictionary.decode(dictionary.encode(x))) < 1e-6


def test_the_statistics_of_codes_and_excluded_features_stay_with_the_dictionary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    files, out = tmp_path / "files", tmp_path / "study"
    write_dictionary(our_sae(), "sdxl-unbox", files)
    mean = rand(SIZE).abs()
    torch.save(mean, files / "mean.pt")
    words = ["import", str(files), "--site", "double.1", "--model", "acme/flux", "--out", str(out), "--exclude"]
    assert main([*words, f"0,{SIZE}"]) == 2 and f"has no feature {SIZE} to exclude" in capsys.readouterr().err
    assert main([*words, "7,0"]) == 0
    [ref] = Study.open(out).dictionaries()
    folder = Study.open(out).dictionary(*ref)
    statistics = CodeStatistics.load(folder)
    assert statistics is not None and torch.equal(statistics.mean, mean) and statistics.std is None
    assert read_config(folder).excluded == {0, 7}
    assert main([*words, "7"]) == 2 and "imported with another --exclude" in capsys.readouterr().err
    (folder / "code_statistics.safetensors").write_bytes((folder / "code_statistics.safetensors").read_bytes()[:-1])
    assert main(["verify", str(out)]) == 2 and "Delete it, and import the dictionary again" in capsys.readouterr().out
    (folder / "code_statistics.safetensors").unlink()
    assert main([*words, "0,7"]) == 0 and CodeStatistics.load(folder) is not None
    torch.save(mean[1:], files / "mean.pt")
    assert main([*words, "0,7"]) == 2 and "mean.pt" in capsys.readouterr().err
    torch.save(-mean, files / "mean.pt")
    assert main([*words, "0,7"]) == 2 and "not below 0" in capsys.readouterr().err
    Dictionary.load(folder).save(folder)
    assert CodeStatistics.load(folder) is not None
    our_sae("jumprelu").save(folder)
    assert CodeStatistics.load(folder) is None


def test_a_fae_sae_computes_by_its_formula(tmp_path: Path):
    sae, x = read_dictionary(fae_file(tmp_path / "fae"), site=SITE, k=K), 20 * rand(64, WIDTH, seed=20)
    assert detect_format(tmp_path / "fae").name == "fae"
    stored = {name.partition(".")[2]: x.double() for name, x in load_file(tmp_path / "fae" / "fae.safetensors").items()}
    means, basis = stored["feature_means"], stored["whitening_matrix"]
    std = (stored["feature_square_means"] - means.square()).clamp_min(1e-6).sqrt()
    z = ((x.double() @ basis - means) / std).clamp(-10, 10)
    assert (z.abs() == 10).any()
    top = ((z - stored["b_post"] + stored["b_pre"]) @ stored["W_enc"]).topk(K)
    codes = torch.zeros(64, SIZE, dtype=torch.float64).scatter_(1, top.indices, top.values)
    y = ((codes @ stored["W_dec"] + stored["b_post"]) * std + means) @ basis.T
    assert difference(dense(sae, x), codes) < 1e-6 and difference(sae.decode(sae.encode(x)), y) < 1e-6
    with pytest.raises(BadInput, match="read, not written"):
        write_dictionary(sae, "fae", tmp_path / "out")


@pytest.mark.parametrize(
    ("format", "pursuit", "normalisation"),
    [
        ("itda", "matching", Normalisation.identity(WIDTH)),
        ("itda-flux", "gradient", replace(whitening(), method="standardise", basis=None)),
    ],
)
def test_itda_formats_hold_an_itda_dictionary(format: str, pursuit: str, normalisation: Normalisation, tmp_path: Path):
    itda = our_itda(pursuit, normalisation)
    write_dictionary(itda, format, tmp_path / "out")
    back, x = read_dictionary(tmp_path / "out", site=SITE), rand(40, WIDTH, seed=5)
    assert isinstance(back, ITDA) and (back.k, back.pursuit) == (K, pursuit)
    assert difference(dense(back, x), dense(itda, x)) < 1e-5
    assert format == "itda-flux" or back.patch(3) is not None


@pytest.mark.parametrize("format", ["saelens", "dictionary-learning", "sdxl-unbox"])
def test_an_export_that_was_killed_is_completed_and_another_is_refused(format: str, tmp_path: Path):
    files = write_dictionary(our_sae(), format, tmp_path / "out").files
    contents = [path.read_bytes() for path in files]
    files[-1].unlink()
    (tmp_path / "out" / ".partial").mkdir()
    assert write_dictionary(our_sae(), format, tmp_path / "out").files == files
    assert [path.read_bytes() for path in files] == contents and len([*(tmp_path / "out").iterdir()]) == len(files)
    with pytest.raises(BadInput, match="is not empty"):
        write_dictionary(our_sae(bias=torch.ones(WIDTH)), format, tmp_path / "out")
    assert [path.read_bytes() for path in files] == contents


@pytest.mark.parametrize(
    ("dictionary", "format", "reason"),
    [
        (our_sae(normalisation=replace(whitening(), clip=2.0)), "saelens", "cannot clip its input"),
        (our_sae(relu=False), "sdxl-unbox", "no negative codes"),
        (our_sae("jumprelu"), "sparsify", "keeps those over a threshold"),
        (our_sae(), "overcomplete", "no decoder bias"),
        (our_itda("orthogonal"), "saelens", "by the pursuit 'orthogonal'"),
        (our_itda(normalisation=whitening()), "saelens", "scales or turns the space"),
        (our_itda("gradient", whitening()), "itda-flux", "the normalisation 'whiten'"),
        (our_itda("orthogonal"), "itda", "by the pursuit 'matching'"),
    ],
)
def test_what_cannot_be_expressed_is_refused_or_approximated(dictionary: Dictionary, format: str, reason: str, tmp_path: Path):
    with pytest.raises(BadInput, match=reason):
        write_dictionary(dictionary, format, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    result = write_dictionary(dictionary, format, tmp_path / "out", approximate=True)
    assert any(reason in sentence for sentence in result.approximations)
    back, x = read_dictionary(tmp_path / "out", site=SITE, k=K if format == "overcomplete" else None), rand(40, WIDTH, seed=5)
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


def test_overcomplete_files_of_other_classes_are_refused_with_the_reason(tmp_path: Path):
    state = torch.load(FROZEN / "overcomplete-TopKSAE" / "state_dict.pt", weights_only=True)
    pursuit = {name: tensor for name, tensor in state.items() if name.startswith("dictionary.")}
    cases = {"rounds its codes": {**state, "Q": torch.linspace(0, 1, 4)}, "an MpSAE or an OMPSAE": pursuit}
    cases |= {
        "not linear": {**state, "encoder.blocks.0.weight": torch.ones(2, 2)},
        "is not of a TopKSAE": {"x": torch.ones(2, 2)},
    }
    for reason, tensors in cases.items():
        torch.save(tensors, tmp_path / "state_dict.pt")
        with pytest.raises(BadInput, match=reason):
            read_dictionary(tmp_path, site=SITE, k=K)


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
    words = ["import", str(FROZEN / "saelens-topk"), "--site", "double.1", "--model", "acme/flux", "--out", str(folder / "study")]
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


def test_the_site_is_compared_with_a_model_that_is_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["import", str(FROZEN / "saelens-topk"), "--model", "mini-flux", "--out", str(tmp_path / "new"), "--site"]
    for site, reason in (("double.99", "nearest: "), ("double.1", "wide, not 8"), ("double.1:neurons", "wide, not 8")):
        assert main([*words, site]) == 2 and reason in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_importing_again_is_up_to_date_and_another_needs_a_label(study: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["import", str(FROZEN / "saelens-topk"), "--site", "double.1", "--out", str(study)]) == 0
    assert "up to date" in capsys.readouterr().out
    assert main(["import", str(FROZEN / "saelens-topk-rescaled"), "--site", "double.1", "--out", str(study)]) == 2
    assert "Name this one with --label" in capsys.readouterr().err
    for label, code in (("../x", 2), ("other", 0)):
        words = ["import", str(FROZEN / "saelens-topk-rescaled"), "--site", "double.1", "--out", str(study), "--label", label]
        assert main(words) == code


def test_stored_activations_tell_k_and_measure_approximations(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    study = Study.begin(tmp_path / "study", "fake")
    config = RecordingConfig(batch=4, progress=False)
    record(study.activations, fake_shots(40), SITES[0], FakeHarvest(width=WIDTH), config)
    words = ["import", str(FROZEN / "saelens-jumprelu"), "--site", "double.1", "--out", str(study.folder)]
    assert main(words) == 0
    [ref] = study.dictionaries()
    assert 1 < Dictionary.load(study.dictionary(*ref)).k < SIZE
    assert main(["export", str(study.folder), str(ref), "--to", "sparsify", "--out", str(tmp_path / "out"), "--approximate"]) == 0
    assert "held-out tokens the reconstruction leaves" in capsys.readouterr().out
    assert main(["import", str(FROZEN / "saelens-jumprelu"), "--site", "single.0:update", "--out", str(study.folder)]) == 2


def test_a_repository_of_the_hub_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []

    def snapshot(*arguments: object) -> Path:
        asked.append(arguments)
        return FROZEN

    monkeypatch.setattr("difflex.hub.snapshot", snapshot)
    words = ["import", "somebody/saes/saelens-topk", "--site", "double.1", "--model", "acme/flux", "--out", str(tmp_path)]
    assert main([*words, "--revision", "v1", "--offline"]) == 0
    assert asked == [("somebody/saes", "v1", True, ["saelens-topk/*"])]
    [ref] = Study.open(tmp_path).dictionaries()
    imported = Dictionary.load(Study.open(tmp_path).dictionary(*ref)).origin.training["imported"]
    assert isinstance(imported, dict) and imported["source"] == f"somebody/saes/saelens-topk at {FROZEN.name}"


def test_an_import_names_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["import", str(FROZEN / "saelens-jumprelu"), "--site", "double.1", "--out", str(tmp_path / "new")]
    for more, reason in ([], "Name the model"), (["--model", "acme/flux"], "name the average with --k"):
        assert main([*words, *more]) == 2
        assert reason in capsys.readouterr().err and not (tmp_path / "new").exists()
    assert main(["import", str(FROZEN), "--site", "double.1", "--model", "acme/flux", "--out", str(tmp_path / "new")]) == 2
    assert "It has the folders" in capsys.readouterr().err


def test_an_exported_dictionary_is_imported_again(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    name = f"double.1/topk-{SIZE}-k{K}-saelens"
    assert main(["export", str(study), name, "--to", "sdxl-unbox", "--out", str(tmp_path / "out")]) == 0
    answer = computed(FROZEN / "saelens-topk")
    assert max(differences(read_dictionary(tmp_path / "out", site=SITE), answer)) < 1e-6
    assert main(["export", str(study), name, "--to", "sdxl-unbox", "--out", str(tmp_path / "out")]) == 0  # the same again
    assert main(["export", str(study), name, "--to", "sparsify", "--out", str(tmp_path / "out")]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert main(["export", str(study), name, "--to", "overcomplete", "--out", str(tmp_path / "o"), "--approximate"]) == 0
    assert "The difference is unknown" in capsys.readouterr().out


def test_every_format_has_a_name_of_its_own():
    assert len({format.name for format in FORMATS}) == len(FORMATS)
