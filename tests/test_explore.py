"""The Python interface: a model, its activations, a dictionary, its features, edits and images, in a line each."""

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from other_device import other_device
from sample_study import new_study, write_book, write_dictionary, write_matches

import difflex
from difflex.cli import main
from difflex.errors import DifflexError
from difflex.evaluation.concepts import Concept
from difflex.evaluation.concepts.results import ConceptMatches
from difflex.explore.activations import SiteActivations
from difflex.explore.dictionary import Feature, FeatureDictionary
from difflex.explore.model import Model
from difflex.explore.tables import ConceptTable
from difflex.testing import tiny_folder

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")

PROMPTS = [f"a {colour} {shape}" for colour in ("red", "blue", "green") for shape in ("star", "dot", "ring", "bar")]
SITE = "double.1"
DEFAULTS = {"pixels": [[16, 24]], "steps": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder("flux", tmp_path_factory.mktemp("model"), defaults=DEFAULTS)


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return difflex.load(folder)


@pytest.fixture(scope="module")
def activations(model: Model) -> SiteActivations:
    return model.activations(PROMPTS, SITE, progress=False)


@pytest.fixture(scope="module")
def sae(activations: SiteActivations) -> FeatureDictionary:
    return difflex.train_sae(activations, size=24, k=4, batch=128)


@pytest.fixture(scope="module")
def feature(sae: FeatureDictionary) -> Feature:
    """The feature that fires most often."""
    with sae.workspace.book(sae.ref) as book:
        [row] = book.features("density", descending=True, limit=1)
    return sae.feature(row.feature)


def pixels(image) -> bytes:
    return image.image.tobytes()


def test_activations_know_where_each_row_is_from(activations: SiteActivations):
    assert len(activations) == len(PROMPTS) * 2 * 24 and activations.width == 32 and activations.prompts == PROMPTS
    batch = activations.sample(5)
    assert batch.values.shape == (5, 32)
    assert activations.shot(int(batch.shots[0])).prompt in PROMPTS
    assert "576 rows of width 32" in repr(activations) and "a red star" in activations._repr_html_()


def test_more_seeds_add_to_the_activations_in_a_folder(model: Model, tmp_path: Path):
    rows = len(model.activations(PROMPTS, SITE, seeds=range(1), out=tmp_path / "study", progress=False))
    more = model.activations(PROMPTS, SITE, seeds=range(3), out=tmp_path / "study", progress=False)
    assert len(more) == 3 * rows and {more.shot(number).seed for number in range(6 * len(PROMPTS))} == {0, 1, 2}


def test_a_study_without_a_folder_is_gone_with_its_objects(model: Model):
    activations = model.activations(["a star"], ["double.0", "single.*"], steps=1, progress=False)
    assert list(activations) == ["double.0", "single.0", "single.1", "single.2"]
    folder = activations["double.0"].folder
    assert folder.is_dir()
    del activations
    gc.collect()
    assert not folder.exists()


def test_a_dictionary_is_trained_once_and_codes_activations(sae: FeatureDictionary, activations: SiteActivations):
    assert (sae.name, sae.size, sae.k) == ("double.1/topk-24-k4", 24, 4)
    x = activations.sample(6).values
    assert sae.encode(x).values.shape == (6, 4) and sae.decode(sae.encode(x)).shape == (6, 32)
    config = sae.workspace.study.dictionary(*sae.ref) / "config.json"
    before = config.stat().st_mtime_ns
    assert difflex.train_sae(activations, size=24, k=4, batch=128).name == sae.name
    assert config.stat().st_mtime_ns == before
    assert "24 features" in repr(sae) and "1,5" in sae._repr_html_()  # three times 504 or so training tokens


def test_a_search_makes_a_book_and_finds_features_by_captions(activations: SiteActivations, capsys: pytest.CaptureFixture[str]):
    sae = difflex.train_sae(activations, size=20, k=3, batch=128)
    assert "It has no book yet" in sae._repr_html_()
    found = sae.search("zebra")
    assert found == [] and "Making the book of double.1/topk-20-k3" in capsys.readouterr().out
    sae.search("red star")
    assert "Making" not in capsys.readouterr().out
    assert "book" not in sae._repr_html_() and sae._repr_html_().count("<img") == 8


def test_a_feature_shows_its_images_with_a_map(feature: Feature, sae: FeatureDictionary):
    assert 0 < feature.density <= 1 and feature.peak > 0
    assert [example.feature for example in feature.examples] == [feature.number] * len(feature.examples)
    html = feature._repr_html_()
    assert f"feature {feature.number}" in html and html.count("data:image/webp;base64,") == 8 and len(html) < 200_000
    assert repr(feature).startswith(f"<feature {feature.number} of {sae.name}")


def test_a_label_is_a_concept_an_explanation_or_what_captions_share(tmp_path: Path):
    study, name = new_study(tmp_path), "double.1/topk-12-k4"
    write_dictionary(study, name)
    write_book(study, name, explained={8: ("dark areas", 0.9)}, captions={4: "two red rings", 8: "two red rings"})
    open_study = difflex.open_study(tmp_path)

    def labels() -> list[str]:
        workspace, ref = open_study.workspace, study.find_dictionary(name)
        return [Feature(FeatureDictionary(workspace, ref), number).label for number in (1, 4, 8)]

    assert labels()[1:] == ["captions say two and red", "dark areas"]
    write_matches(study, name, (0.93, 0.8, 0.7, 0.6), per_concept=1)
    assert labels()[0] == "blue (AP 0.80)"


def test_an_edited_image_is_shown_beside_the_unedited_one(model: Model, feature: Feature, tmp_path: Path):
    images = model.generate(["a star", "a dot"], seed=3, edits=feature * 4)
    plain = model.generate(["a star", "a dot"], seed=3)
    assert list(map(pixels, images)) != list(map(pixels, plain))
    assert list(map(pixels, images.unedited)) == list(map(pixels, plain)) and plain.unedited is plain
    assert images.grid().width > images.grid(unedited=False).width
    assert images.save(tmp_path / "grid.png").is_file() and images._repr_html_().count("<img") == 1
    assert f"2 images of 16 x 24 pixels by {model.name}, feature {feature.number} x 4" in repr(images)


def test_the_same_image_under_several_edits_is_a_strip(model: Model, feature: Feature, tmp_path: Path):
    strip = model.compare(["a star", "a dot"], [feature * 2, [feature * 4]], seed=3)
    assert [images.edits for images in strip] == [f"feature {feature.number} x 2", f"feature {feature.number} x 4"]
    assert pixels(strip[0].unedited[1]) == pixels(model.generate("a dot", seed=4)[0]) and len(strip[1]) == 2
    assert strip.grid().width > strip[1].grid().width and strip._repr_html_().count("<img") == 1
    assert strip.save(tmp_path / "strip.png").is_file() and "under other edits: feature" in repr(strip)
    assert model.compare("a star", {"weak": feature * 1, "steps": (feature * 1).at(steps=(0, 1))}).titles == ["weak", "steps"]
    assert "no images" in model.compare("a star", [])._repr_html_()


def test_marked_images_of_a_feature_show_themselves(feature: Feature):
    blue = feature.images(3, style="blue")
    assert blue._repr_html_().count("<img") == 3 and repr(blue) == "<3 images>"
    assert [image.tobytes() for image in blue] != [image.tobytes() for image in feature.images(3)]


def test_features_are_edited_by_arithmetic(model: Model, feature: Feature, activations: SiteActivations):
    other = difflex.train_sae(activations, size=20, k=3, batch=128).feature(3)
    both = feature * 2 + -other
    assert [(edit.dictionary, edit.strength) for edit in both.edits] == [("topk-24-k4", 2.0), ("topk-20-k3", -1.0)]
    assert [edit.strength for edit in (both * 0.5).edits] == [1.0, -0.5] and len((0 + both).edits) == 2
    [left, _] = both.at(region=(0, 0, 0.5, 1), steps=(0, 1)).edits
    assert left.region == (0, 0, 0.5, 1) and left.steps == (0, 1)
    assert str(feature.edit(3.0, region=(0, 0, 1, 1), steps=(0, 2))) == f"feature {feature.number} x 3 in a region, steps 0:2"
    assert feature.edit(operation="ablate").edits[0].operation == "ablate"
    assert 0 < feature.edit().edits[0].strength == feature.stats.strength
    edited = {pixels(model.generate("a star", edits=edits)[0]) for edits in (both, [feature * 2, -other], feature, ())}
    assert len(edited) == 3


def test_a_study_in_a_folder_is_open_to_commands_and_resumes(model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "study"
    assert len(model.activations(PROMPTS, SITE, tokens=300, out=out, progress=False)) == 336
    difflex.train_sae(model.activations(PROMPTS, SITE, out=out), size=24, k=4, batch=128).collect(8)
    capsys.readouterr()
    assert main(["features", str(out)]) == 0 and "of 24 features" in capsys.readouterr().out
    study = difflex.open_study(out)
    study.collect()
    assert capsys.readouterr().out == ""  # there is a book
    study.collect(4)
    assert "Making the book of double.1/topk-24-k4: where features fire in 4 images" in capsys.readouterr().out
    evaluations = study.evaluate(shots=0)
    assert evaluations["double.1/topk-24-k4"].size == 24 and "topk-24-k4" in repr(evaluations)
    assert "<th" in evaluations._repr_html_() and "FVU" in evaluations._repr_html_()
    assert study.dictionary("double.1/topk-24-k4").feature(3).number == 3
    assert [each.name for each in study.dictionaries] == ["double.1/topk-24-k4"] and len(study.activations(SITE)) == 576
    assert study.search("zebra") == [] and "topk-24-k4" in repr(study) and "topk-24-k4" in study._repr_html_()
    assert study.model.generate("a star", edits=study.dictionary().feature(3) * 1)[0].shot.steps == 2


def test_itda_grows_in_a_line(activations: SiteActivations):
    itda = difflex.grow_itda(activations, size=16, k=3, threshold=0.2)
    assert itda.name.startswith("double.1/itda-") and itda.size <= 16


def test_a_dictionary_is_evaluated(sae: FeatureDictionary):
    evaluation = sae.evaluate(shots=0)
    assert evaluation.overall.l0 == pytest.approx(4, abs=1) and evaluation.size == 24


def test_a_model_and_its_images_show_themselves(model: Model):
    assert "5 blocks, fp32 on cpu" in repr(model) and "16 x 24 pixels, 2 steps" in model._repr_html_()
    assert isinstance(model, difflex.Pipeline)


def test_steering_works_with_the_model_on_another_device(folder: Path, sae: FeatureDictionary, feature: Feature):
    expected = difflex.load(folder).generate("a star", edits=feature * 3)
    elsewhere = difflex.load(folder)
    with other_device() as device:
        elsewhere.diffusers.to(device)
        images = elsewhere.generate("a star", edits=feature * 3)
        x = torch.ones(2, 32).to(device)
        assert sae.encode(x).values.device == sae.decode(sae.encode(x)).device == device
    difference = torch.tensor(list(pixels(images[0])), dtype=torch.int) - torch.tensor(list(pixels(expected[0])), dtype=torch.int)
    assert difference.abs().max() <= 1


Objects = tuple[Model, SiteActivations, FeatureDictionary]
MISTAKES: dict[str, tuple[Callable[[Objects], object], str]] = {
    "unknown site": (lambda at: at[0].activations(PROMPTS, "doubel.1"), "'doubel.1' is unknown; nearest: double.1"),
    "pattern": (
        lambda at: at[0].activations(PROMPTS, "double.*"),
        r"stands for double.0, double.1. Name one site, or give a list",
    ),
    "prompt for a list": (lambda at: at[0].activations("a red star", SITE), "If that is a prompt, give a list of prompts"),
    "no prompts": (lambda at: at[0].activations([], SITE), "There are no prompts. Give a list"),
    "endless": (lambda at: at[0].activations("captions", SITE), "say how many tokens to store, as in tokens=200_000"),
    "seeds": (lambda at: at[0].activations(PROMPTS, SITE, seeds=(0, 5)), "do not follow one another"),
    "k above size": (lambda at: difflex.train_sae(at[1], size=8, k=16, batch=64), "k 16 does not fit a dictionary of size 8"),
    "no size": (lambda at: difflex.train_sae(at[1], size=0), "with size=0 is not possible"),
    "few tokens": (lambda at: difflex.train_sae(at[1]), r"fewer than the 1,024 of one update. Harvest more prompts; an image"),
    "not activations": (lambda at: difflex.train_sae([1, 2]), "trained on the activations of one site, not on"),  # pyright: ignore
    "feature out of range": (lambda at: at[2].feature(24), "has no feature 24: they are numbered from 0 to 23"),
    "not an edit": (lambda at: at[0].generate("a star", edits=[3]), "3 is not an edit. Give features"),  # pyright: ignore
    "sum of no features": (lambda at: at[0].generate("a star", edits=sum([])), "0 is not an edit. Give features"),  # pyright: ignore
    "region": (lambda at: (at[2].feature(1) * 1).at(region=(0, 1)), "is not a region. Write"),  # pyright: ignore
    "nothing found": (lambda at: at[2].search("zebra")[0], "No feature fits 'zebra'. Try another word"),
    "no words": (lambda at: at[2].search(" "), "nothing to search for"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_answered_by_a_sentence(mistake: str, model: Model, activations: SiteActivations, sae: FeatureDictionary):
    act, message = MISTAKES[mistake]
    with pytest.raises(DifflexError, match=message):
        act((model, activations, sae))


def test_a_feature_of_another_model_is_refused_before_an_image_is_made(tmp_path: Path, feature: Feature):
    other = difflex.load(tiny_folder("flux", tmp_path / "other", seed=1, defaults=DEFAULTS))
    with pytest.raises(DifflexError, match=r"was made for .*, but the model is .*other"):
        other.generate("a star", edits=feature * 1)


@pytest.mark.parametrize("family", ["sdxl", "sd3", pytest.param("pixart", marks=pytest.mark.slow)])
def test_every_family_is_harvested_trained_and_steered_alike(family: str, tmp_path: Path):
    model = difflex.load(tiny_folder(family, tmp_path / family, defaults={"steps": 1}))
    site = next(row.site for row in model.sites() if row.site.stream == "image")
    sae = difflex.train_sae(model.activations(PROMPTS, site, progress=False), size=24, k=4, batch=64)
    assert sae.feature(1)._repr_html_()
    assert model.generate("a star", edits=sae.feature(1) * 2).unedited[0].shot.prompt == "a star"


def test_dictionaries_are_compared_by_concept(tmp_path: Path):
    study, names = new_study(tmp_path), ("double.1/topk-12-k4", "double.2/topk-12-k4")
    for name, aps in zip(names, ((0.9, 0.2, 0.7, 0.6), (0.5, 0.8, 0.1, 0.1)), strict=True):
        write_dictionary(study, name)
        write_matches(study, name, aps, rare=(Concept("orange", "colour"),))
    dictionaries = difflex.open_study(tmp_path).dictionaries
    table = ConceptTable({each: ConceptMatches.load(study.concepts(*each.ref)) for each in dictionaries})
    assert table.concepts == {"colour": ["red", "blue"], "shape": ["star", "ring"]}
    assert [(each.dictionary.name, each.reason) for each in table["blue"]] == [
        (names[1], "detects blue, AP 0.80"),
        (names[0], "detects blue, AP 0.20"),
    ]
    html = table._repr_html_()
    assert (
        "<b>0.65</b></td>" in html and "double.1<" in html and "4 concepts" in html and "Too rare in these images: orange" in html
    )
    assert "0.55" in repr(table).splitlines()[1]
    with pytest.raises(DifflexError, match=r"'orange' is unknown.*Too rare in these images: orange"):
        table["orange"]


def test_a_search_for_a_matched_concept_needs_no_book(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    study, name = new_study(tmp_path), "double.1/topk-12-k4"
    write_dictionary(study, name)
    write_matches(study, name, (0.9, 0.2, 0.7, 0.6))
    assert difflex.open_study(tmp_path).dictionary(name).search("red")[0].reason == "detects red, AP 0.90"
    assert capsys.readouterr().out == ""
