"""`difflex concepts` on studies with dictionaries."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from difflex import devices
from difflex.cli import main
from difflex.dictionaries import SAE, Dictionary, DictionaryOrigin, Neurons, Normalisation, SAEWeights
from difflex.evaluation.concepts import Concept, drawn_concepts, drawn_images, drawn_source
from difflex.evaluation.concepts.results import ConceptMatches
from difflex.miniature import draw
from difflex.records import Site
from difflex.study import Study, StudySettings

SITE = Site("double.0")
FEW = ["--images", "160", "--noise", "0.25"]


def random_sae(seed: int, k: int = 4, size: int = 24) -> Dictionary:
    directions = torch.nn.functional.normalize(torch.randn(size, 192, generator=torch.Generator().manual_seed(seed)), dim=1)
    weights = SAEWeights(encoder=directions, decoder=directions.clone(), bias=torch.zeros(192), encoder_bias=torch.zeros(size))
    origin = DictionaryOrigin(site=SITE, model="mini-flux")
    return SAE(kind="topk", k=k, origin=origin, normalisation=Normalisation.identity(192), weights=weights)


@pytest.fixture
def study(tmp_path: Path) -> Study:
    study = Study.begin(tmp_path / "study", "mini-flux")
    random_sae(0).save(study.dictionary(SITE, "topk-24-k4"))
    return study


def test_scenes_are_labelled_images():
    [image, *_] = drawn_images(3)
    scenes = draw([int(image.name.removeprefix("drawn:"))])
    assert image.prompt == scenes.captions[0] and image.image.size == (64, 64)
    shares = image.shares(8, 8)
    for number, concept in enumerate(drawn_concepts()):
        assert torch.equal(shares[number], scenes.on_tokens(concept.name, 8)[0])
    assert image.shares(4, 16).shape == (len(drawn_concepts()), 4, 16)


def test_images_whose_activations_do_not_fit_into_memory_are_refused(
    study: Study, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(devices, "free_memory", lambda device: 10**9)
    assert main(["concepts", str(study.folder), "--images", "1000000", "--batch", "2"]) == 2
    error = capsys.readouterr().err
    assert "The labels and codes of 1,000,000 images at 3 noise levels at double.0:neurons take 59.9 GB of memory" in error


def test_the_drawn_world_is_drawn_at_the_size_of_the_study(study: Study, capsys: pytest.CaptureFixture[str]):
    [small], [large] = drawn_images(1), drawn_images(1, pixels=128)
    assert large.image.size == (128, 128) and large.prompt == small.prompt
    torch.testing.assert_close(large.shares(8, 8), small.shares(8, 8), atol=0.2, rtol=0)
    assert drawn_source(4).name in drawn_source(4, (256, 256)).name != drawn_source(4).name
    study.keep_settings(StudySettings(pixels=(96, 64)))
    assert main(["concepts", str(study.folder), *FEW]) == 2
    assert "The drawn world has no images of 96 x 64 pixels" in capsys.readouterr().err
    assert main(["collect", str(study.folder), "--drawn-world", "--images", "3"]) == 2
    assert "The drawn world has no images of 96 x 64 pixels" in capsys.readouterr().err


def test_dictionaries_and_baselines_are_matched_once_and_again_after_a_change(study: Study, capsys: pytest.CaptureFixture[str]):
    words, own = ["concepts", str(study.folder), *FEW], study.concepts(SITE, "topk-24-k4")
    assert main([*words, "--no-baselines"]) == 0
    assert list(study.folder.glob("concepts/*/*.json")) == [own]
    before = own.read_bytes()
    assert main(words) == 0 and own.read_bytes() == before
    output = capsys.readouterr().out
    assert (
        f"{own}: matched" in output and f"{own}: up to date" in output and "a linear probe" in output and "AP by group" in output
    )
    files = {path.relative_to(study.folder / "concepts").as_posix() for path in study.folder.glob("concepts/*/*.json")}
    assert files == {
        "double.0/topk-24-k4.json",
        "double.0/pca-384-k4.json",
        "double.0/random-24-k4.json",
        "double.0+neurons/neurons-k4.json",
    }
    matches = ConceptMatches.load(own)
    assert matches.fingerprint and matches.site == SITE and len(matches.levels) == 1
    stamps = {path: path.stat().st_mtime_ns for path in study.folder.glob("concepts/*/*.json")}
    random_sae(1).save(study.dictionary(SITE, "topk-24-k4"))
    assert main(words) == 0
    output = capsys.readouterr().out
    assert f"{own}: matched" in output and output.count("up to date") == 3
    changed = [path.name for path, stamp in stamps.items() if path.stat().st_mtime_ns != stamp]
    assert changed == ["topk-24-k4.json"]
    assert main([*words[:-1], "0.25", "--dictionary", f"{SITE}/topk-24-k4"]) == 0
    assert capsys.readouterr().out.count("up to date") == 4


def test_few_images_are_enough_where_half_of_them_are_held_out(study: Study):
    words = ["concepts", str(study.folder), "--images", "60", "--noise", "0.25", "--no-baselines"]
    assert main(words) == 2, "a tenth of 60 images cannot show any concept often enough"
    assert main([*words, "--held-out", "0.5"]) == 0
    matches = ConceptMatches.load(study.concepts(SITE, "topk-24-k4"))
    assert matches.inputs is not None and matches.inputs.config.held_out == 0.5
    assert len(matches.concepts) > 4


def test_a_label_folder_and_an_untrained_control_are_matched(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "mine"
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True)
    scenes = draw(range(200))
    for i, scene in enumerate(drawn_images(200, 0)):
        scene.image.save(folder / "images" / f"{i:03}.png")
        Image.fromarray((1 + (scenes.slots[i] >= 0)).byte().numpy()).save(folder / "labels" / f"{i:03}.png")
    (folder / "labels.json").write_text(json.dumps({"1": "ground", "2": {"name": "thing", "group": "figure"}}))
    control = Study.begin(tmp_path / "control", "mini-flux", "untrained-0")
    random_sae(0).save(control.dictionary(SITE, "topk-24-k4"))
    words = ["concepts", str(control.folder), "--folder", str(folder), "--images", "200", "--noise", "0.3", "--empty-prompts"]
    assert main([*words, "--pixels", "64"]) == 0
    output = capsys.readouterr().out
    assert "figure" in output
    matches = ConceptMatches.load(control.concepts(SITE, "topk-24-k4"))
    assert matches.inputs is not None and matches.inputs.revision == "untrained-0" and matches.inputs.config.empty_prompts
    assert matches.concepts == (Concept("ground", "object"), Concept("thing", "figure"))
    ground, thing = matches.levels[0].results
    assert 1 > ground.chance > 0.6 > thing.chance > 0, (
        "tokens fully covered by ground are common, tokens fully covered by a thing are rare"
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--site", "double.1"], "The site 'double.1' is unknown; nearest: double.0"),
        (["--dictionary", f"{SITE}/topk-24-k5"], "The dictionary 'double.0/topk-24-k5' is unknown; nearest: double.0/topk-24-k4"),
        (["--images", "10", "--noise", "0.25"], "Give more images, or hold out half of them: --held-out 0.5"),
        (["--folder", "nowhere"], "nowhere/images holds no image"),
        (["--held-out", "1"], "1 of the images cannot be held out"),
        (["--present-above", "0.2", "--absent-below", "0.3", *FEW], "absent up to a share of 0.3"),
    ],
)
def test_invalid_flags_are_refused(study: Study, flags: list, message: str, capsys):
    assert main(["concepts", str(study.folder), *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_study_without_dictionaries_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    Study.begin(tmp_path, "mini-flux")
    assert main(["concepts", str(tmp_path)]) == 2
    assert "has no dictionaries yet" in capsys.readouterr().err


def test_neurons_that_are_a_dictionary_of_the_study_are_not_repeated_as_a_baseline(
    study: Study, capsys: pytest.CaptureFixture[str]
):
    inner = Site(SITE.path, "neurons")
    origin = DictionaryOrigin(site=inner, model=study.model, revision=study.revision)
    Neurons(width=768, k=4, origin=origin).save(study.dictionary(inner, "neurons-768-k4"))
    assert main(["concepts", str(study.folder), *FEW]) == 0
    assert [path.stem for path in study.folder.glob("concepts/*/neurons-*.json")] == ["neurons-768-k4"]
    output = capsys.readouterr().out
    assert "neurons-768-k4" in output and "neurons-k4" not in output
