"""`difflex evaluate` on a study with dictionaries."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from difflex.cli import main
from difflex.commands import evaluation as verb
from difflex.dictionaries import SAE, DictionaryOrigin, Normalisation, SAEWeights
from difflex.dictionaries.files import FORMAT
from difflex.evaluation import Evaluation
from difflex.files import folder_lock, stored_checksum
from difflex.records import Shot, Site
from difflex.tensors import read_tensors, write_tensors
from difflex.testing import tiny_clip, tiny_folder

SITE = "double.1:update"
LABELS = ("topk-64-k3", "topk-64-k12")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a study with two dictionaries of one site, and an unfinished one."""
    root = tmp_path_factory.mktemp("evaluate")
    model = tiny_folder("flux", root / "tiny-flux")
    (root / "prompts.txt").write_text("\n".join(f"star {number}" for number in range(80)))
    words = ["harvest", str(model), "--prompts", str(root / "prompts.txt"), "--out", str(root / "study"), "--pixels", "16x24"]
    assert main([*words, "--site", SITE, "single.0", "--batch", "8"]) == 0
    flags = ["--site", SITE, "--k", "3,12", "--size", "64", "--batch", "64", "--tokens", "3000"]
    assert main(["train", str(root / "study"), *flags]) == 0
    place = root / "study" / "dictionaries" / "double.1+update"
    shutil.copytree(place / LABELS[0], place / "growing-itda-to-64-k3")
    return root / "study"


@pytest.fixture
def study(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "study"))


def evaluation(study: Path, label: str) -> Path:
    return study / "evaluation" / "double.1+update" / f"{label}.json"


def test_every_dictionary_is_evaluated_once(study: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["evaluate", str(study), "--effect-shots", "4"]) == 0
    output = capsys.readouterr().out
    assert "up to date" not in output and "growing" not in output
    header, *lines = output.splitlines()
    assert [line.split()[0] for line in lines] == [f"{SITE}/{label}" for label in LABELS]
    for column in ("FVU", "r2", "EV", "dead", "v / mean", "PSNR", "SSIM"):
        assert column in header
    few, many = (Evaluation.load(evaluation(study, label)) for label in LABELS)
    assert few.is_of(study / "dictionaries" / "double.1+update" / LABELS[0]) and few.dictionary == f"{SITE}/{LABELS[0]}"
    assert few.overall.l0 <= 3 < many.overall.l0 and len(few.timesteps) == 2
    assert few.overall.model_space.fvu is not None and many.overall.model_space.fvu is not None
    assert many.overall.model_space.fvu < few.overall.model_space.fvu and many.overall.normalised_space is not None
    assert few.effect is not None and few.effect.shots == 4 and 1 <= few.effect.images <= 4
    assert 0 < few.effect.prediction.of_mean < 1.5 and 0.5 < few.effect.similarity["ssim"].reconstruction <= 1
    before = evaluation(study, LABELS[0]).read_bytes()
    assert main(["evaluate", str(study), "--effect-shots", "4"]) == 0
    again = capsys.readouterr().out
    assert again.count("up to date") == 2 and again.endswith(output) and evaluation(study, LABELS[0]).read_bytes() == before


def test_only_selected_dictionaries_are_evaluated_and_no_model_is_loaded_without_effect(
    study: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(verb, "load_study_model", None)
    assert main(["evaluate", str(study), "--dictionary", f"{SITE}/{LABELS[1]}", "--effect-shots", "0", "--tokens", "50"]) == 0
    assert not evaluation(study, LABELS[0]).exists()
    saved = Evaluation.load(evaluation(study, LABELS[1]))
    assert saved.tokens == 50 and saved.effect is None
    assert main(["evaluate", str(study), "--site", SITE, "--effect-shots", "0", "--tokens", "50"]) == 0
    assert capsys.readouterr().out.count("up to date") == 1 and evaluation(study, LABELS[0]).exists()


def test_an_effect_is_added_to_an_evaluation_without_one(study: Path):
    words = ["evaluate", str(study), "--dictionary", f"{SITE}/{LABELS[0]}"]
    assert main([*words, "--effect-shots", "0"]) == 0
    before = Evaluation.load(evaluation(study, LABELS[0]))
    assert main([*words, "--effect-shots", "2"]) == 0
    after = Evaluation.load(evaluation(study, LABELS[0]))
    assert after.effect is not None and after.overall == before.overall
    assert main([*words, "--effect-shots", "0"]) == 0 == main([*words, "--effect-shots", "1"])  # the effect is kept
    assert Evaluation.load(evaluation(study, LABELS[0])) == after


def test_other_settings_replace_an_evaluation_only_if_asked(study: Path, capsys: pytest.CaptureFixture[str]):
    words, path = ["evaluate", str(study), "--dictionary", f"{SITE}/{LABELS[0]}"], evaluation(study, LABELS[0])
    assert main([*words, "--effect-shots", "1"]) == 0
    before = path.read_bytes()
    assert main([*words, "--effect-shots", "2", "--tokens", "50"]) == 0
    assert "an effect at 1 shots, which has other settings. --replace" in capsys.readouterr().out and path.read_bytes() == before
    assert main([*words, "--effect-shots", "2", "--tokens", "50", "--replace"]) == 0
    record = Evaluation.load(path)
    assert record.overall.tokens == 50 and record.effect is not None and record.effect.shots == 2


def test_image_measures_are_added_and_loaded_only_if_missing(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    clip = f"clip:{tiny_clip(tmp_path / 'clip')}"
    words, path = ["evaluate", str(study), "--dictionary", f"{SITE}/{LABELS[0]}", "--offline"], evaluation(study, LABELS[0])
    assert main([*words, "--effect-shots", "3"]) == 0
    before = Evaluation.load(path).effect
    capsys.readouterr()
    assert main([*words, "--effect-shots", "2", "--measure", clip]) == 0
    assert clip in capsys.readouterr().out.splitlines()[0]
    after = Evaluation.load(path).effect
    # Measured at as many shots as before, although fewer were requested.
    assert before is not None and after is not None and after.shots == before.shots == 3
    assert after.similarity["ssim"] == before.similarity["ssim"]
    assert 0 < after.similarity[clip].reconstruction <= 1 + 1e-6 and after.similarity[clip].zero < 1
    shutil.rmtree(tmp_path / "clip")
    assert main([*words, "--effect-shots", "2", "--measure", clip]) == 0
    assert "up to date" in capsys.readouterr().out


def test_a_changed_dictionary_is_evaluated_again(study: Path, capsys: pytest.CaptureFixture[str]):
    words, path = ["evaluate", str(study), "--site", SITE, "--effect-shots", "0"], evaluation(study, LABELS[0])
    assert main(words) == 0
    before, folder = Evaluation.load(path), study / "dictionaries" / "double.1+update" / LABELS[0]
    rewrite(folder, {"k": 5})
    os.utime(folder / "config.json", (0, 0))  # the time of a file says nothing
    capsys.readouterr()
    assert main(words) == 0
    assert capsys.readouterr().out.count("up to date") == 1
    assert Evaluation.load(path).overall.l0 > before.overall.l0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dictionary", f"{SITE}/topk-64-k4"], f"nearest: {SITE}/topk-64-k3"),
        (["--dictionary", SITE], "The dictionary 'double.1:update' is unknown"),
        (["--site", "double.7"], "The site 'double.7' is unknown"),
        (["--site", "single.0"], "The site 'single.0' is unknown"),
        (["--site", "a:b:c"], "is not a site"),
        (["--measure", "clap:it"], "The measure 'clap:it' is unknown"),
        (["--measure", "lpips", "--effect-shots", "0"], "an effect at 0 shots generates none"),
    ],
)
def test_invalid_flags_are_refused(finished: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str):
    assert main(["evaluate", str(finished), *flags]) == 2
    assert message in capsys.readouterr().err


def error_message(study: Path, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(["evaluate", str(study), "--effect-shots", "0"]) == 2
    return capsys.readouterr().err


def test_a_study_without_dictionaries_is_refused(study: Path, capsys: pytest.CaptureFixture[str]):
    shutil.rmtree(study / "dictionaries")
    assert "has no dictionaries yet" in error_message(study, capsys)


def test_a_dictionary_without_activations_is_refused(study: Path, capsys: pytest.CaptureFixture[str]):
    place = study / "dictionaries"
    (place / "double.1+update").rename(place / "double.0")
    assert "The site 'double.0' is unknown" in (message := error_message(study, capsys)) and "harvest it" in message


def test_a_dictionary_of_another_width_is_refused(study: Path, capsys: pytest.CaptureFixture[str]):
    axes = torch.eye(8)
    weights = SAEWeights(encoder=axes, decoder=axes.clone(), bias=torch.zeros(8))
    normalisation, origin = Normalisation.identity(8), DictionaryOrigin(site=Site.parse(SITE))
    narrow = SAE(kind="topk", k=2, origin=origin, normalisation=normalisation, weights=weights)
    narrow.save(study / "dictionaries" / "double.1+update" / narrow.label)
    assert "topk-8-k2 is of width 8" in (message := error_message(study, capsys)) and "are of width 32" in message


def test_a_dictionary_with_nan_is_refused_and_nothing_is_saved(study: Path, capsys: pytest.CaptureFixture[str]):
    folder = study / "dictionaries" / "double.1+update" / LABELS[0]
    tensors = read_tensors(folder / "dictionary.safetensors", FORMAT, "").tensors
    tensors["decoder"].fill_(torch.nan)
    path = write_tensors(folder / "dictionary.safetensors", FORMAT, tensors)
    rewrite(folder, {"sha256": stored_checksum(path, "")})
    assert f"In {path} the tensor 'decoder' holds NaN or infinity" in error_message(study, capsys)
    assert not evaluation(study, LABELS[0]).exists()


def rewrite(folder: Path, change: dict) -> None:
    """Change entries of `config.json` as by hand: a file without a checksum is read as it is."""
    content = {name: value for name, value in json.loads((folder / "config.json").read_text()).items() if name != "checksum"}
    (folder / "config.json").write_text(json.dumps({**content, **change}))


def test_two_evaluations_of_a_site_at_once_are_refused_unless_all_is_up_to_date(study: Path, capsys: pytest.CaptureFixture[str]):
    with folder_lock(evaluation(study, LABELS[0]).parent):
        assert "Another process is writing in" in error_message(study, capsys)
    assert main(["evaluate", str(study), "--effect-shots", "0"]) == 0
    with folder_lock(evaluation(study, LABELS[0]).parent):
        assert main(["evaluate", str(study), "--effect-shots", "0"]) == 0


def test_activations_without_held_out_rows_are_refused(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    prompts = [prompt for prompt in (f"star {number}" for number in range(9)) if Shot.split_of(prompt) == "train"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    model, other = json.loads((study / "study.json").read_text())["model"], tmp_path / "other"
    words = ["harvest", model, "--prompts", str(tmp_path / "prompts.txt"), "--out", str(other), "--pixels", "16x24"]
    assert main([*words, "--site", SITE]) == 0
    shutil.copytree(study / "dictionaries", other / "dictionaries")
    assert "has no rows of the split 'held-out'" in error_message(other, capsys)


def test_an_evaluation_of_another_format_is_refused(study: Path, capsys: pytest.CaptureFixture[str]):
    path = evaluation(study, LABELS[0])
    path.parent.mkdir(parents=True)
    path.write_text('{"format": 99}')
    assert "is of format 99" in error_message(study, capsys)
