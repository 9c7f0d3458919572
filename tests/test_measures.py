"""`difflex measure`: measures of features, in a made world where each is known, and on a tiny SDXL."""

import shutil
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from sample_study import CONCEPTS, new_study, write_matches
from torch import Tensor
from torch.nn import functional as F

import difflex
from difflex.cli import main
from difflex.commands.effects import model_functions
from difflex.dictionaries import SAE, DictionaryOrigin, Normalisation, SAEWeights, fingerprint
from difflex.effects import ModelFunctions
from difflex.effects.drawn_world import caption_pairs, caption_region
from difflex.effects.inputs import to_images
from difflex.errors import BadInput, UnknownName
from difflex.features import Book, BookInfo, BookWriter, ImageAlbum
from difflex.features.entries import Example, FeatureStats, ImageFile, TokenMap
from difflex.features.explanations import Explanation
from difflex.measures import FeatureMeasures, MeasureConfig, measure_features, measures_table, running
from difflex.measures.image_aspects import ASPECTS, SimilarityMatrix, region_change
from difflex.measures.records import FeatureValue, MeasureEstimate
from difflex.miniature import draw
from difflex.records import HookContext, Rectangle, Shot, Site
from difflex.steering import SteeringHook
from difflex.steering.features import FeatureScales
from difflex.store import Store
from difflex.study import Study
from difflex.testing import tiny_clip, tiny_folder

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")
SITE, LABEL = Site("double.1"), "topk-5-k5"
PLACE = f"{SITE}/{LABEL}"
WIDTH, GRID, PIXELS, TOPS, PEAK = 32, 8, 64, 4, 2.0
RED, BLUE, _, CHECKER, INVISIBLE = range(5)
CONFIG = MeasureConfig(features=tuple(range(5)), images=TOPS)


def paint(x: Tensor) -> Tensor:
    """The images of activations: coordinates 0 to 2 are red, green and blue, 3 is a pattern, the others are invisible."""
    grown = x[..., :4].movedim(2, 1).unflatten(2, (GRID, GRID))
    grown = F.interpolate(grown, scale_factor=PIXELS // GRID, mode="nearest")
    checker = (torch.arange(PIXELS)[:, None] + torch.arange(PIXELS)) % 2 * 2.0 - 1
    return (0.5 + 0.15 * grown[:, :3] + 0.1 * grown[:, 3:] * checker).clamp(0, 1)


class PaintedWorld:
    """A model whose activations are zero, but for the red coordinate in images of captions that say red."""

    def __init__(self, calls: float = float("inf")) -> None:
        self.calls = calls

    def generate(
        self, prompts: Sequence[str], seed: int, steps: int | None, hooks: Sequence[SteeringHook]
    ) -> Sequence[Image.Image]:
        self.calls -= 1
        if self.calls < 0:
            raise KeyboardInterrupt
        x = torch.zeros(len(prompts), GRID * GRID, WIDTH)
        x[["red" in prompt for prompt in prompts], :, RED] = PEAK
        shots = tuple(
            Shot(model="mini-flux", prompt=prompt, seed=seed + i, pixels=(PIXELS, PIXELS), steps=1, guidance=0.0)
            for i, prompt in enumerate(prompts)
        )
        for hook in hooks:
            edited = hook.change(x, HookContext(0, 1.0, None, shots, (GRID, GRID)))
            x = x if edited is None else edited
        return list(to_images(paint(x)))

    def functions(self) -> ModelFunctions:
        unused: dict[str, Any] = {field.name: str for field in fields(ModelFunctions)}
        return ModelFunctions(**{**unused, "generate": self.generate, "parameters": 1})


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study of the painted world: feature 0 is red, and its top images are drawn scenes with red objects."""
    study = new_study(tmp_path_factory.mktemp("painted"))
    axes = torch.eye(WIDTH)[[0, 1, 2, 3, 9]]
    weights = SAEWeights(encoder=axes, decoder=axes, bias=torch.zeros(WIDTH))
    origin = DictionaryOrigin(site=SITE, model=study.model, revision=None)
    SAE(kind="topk", k=5, origin=origin, normalisation=Normalisation.identity(WIDTH), weights=weights).save(
        study.dictionary(SITE, LABEL)
    )
    sample = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(0))
    scales = FeatureScales(peaks=torch.full((5,), PEAK), means=torch.ones(5), norm=2.0, ceiling=9.0, sample=sample)
    scales.save(study.scales(SITE, LABEL), fingerprint(study.dictionary(SITE, LABEL)))
    write_matches(study, PLACE, (0.9, 0.8, 0.7, 0.6), per_concept=1)
    write_drawn_book(study)
    return study.folder


@pytest.fixture
def study(shared: Path, tmp_path: Path) -> Study:
    return Study.open(shutil.copytree(shared, tmp_path / "study"))


def write_drawn_book(study: Study) -> None:
    """Write a book in which each feature has four drawn scenes; it fires at the red objects in those of the first."""
    scenes = draw(range(60))
    reds = scenes.on_tokens("red", GRID)
    is_red = (reds >= 0.5).sum((1, 2)) >= 4
    red, others = is_red.nonzero()[:TOPS, 0].tolist(), (~is_red).nonzero()[: 4 * TOPS, 0].tolist()
    images = [ImageAlbum(study.images).add(image)[0] for image in to_images(scenes.images[red + others])]
    maps = [(reds[scene].flatten() >= 0.5).nonzero()[:, 0].tolist() for scene in red] + [[9, 10]] * 4 * TOPS
    shots = [
        Shot(model=study.model, prompt=scenes.captions[scene], pixels=(PIXELS, PIXELS), steps=1, guidance=0.0)
        for scene in red + others
    ]
    info = BookInfo(
        dictionary=PLACE,
        kind="topk",
        size=5,
        k=5,
        fingerprint=fingerprint(study.dictionary(SITE, LABEL)),
        model=study.model,
        data="made",
        grid=(GRID, GRID),
        tokens=64 * 20,
        shots={"train": 20},
        images=20,
    )
    with BookWriter.open(study.book(SITE, LABEL), info) as writer:
        writer.add_images(ImageFile(number, *file) for number, file in enumerate(images))
        writer.add_shots((number, number, shot) for number, shot in enumerate(shots))
        writer.add_features(
            FeatureStats(feature=f, firings=8, shots=8, density=0.25, peak=PEAK, mean=1.0, area=0.25) for f in range(5)
        )
        writer.add_examples(
            Example(
                feature=number // TOPS,
                kind="top",
                split="train",
                rank=number % TOPS,
                shot=number,
                peak=PEAK,
                map=TokenMap(tuple(tokens), (PEAK,) * len(tokens)),
            )
            for number, tokens in enumerate(maps)
        )


def measured(study: Study, config: MeasureConfig = CONFIG, world: PaintedWorld | None = None, **more: object) -> FeatureMeasures:
    world = world or PaintedWorld()
    [result] = measure_features(study, [PLACE], config, world.functions, **more)  # pyright: ignore[reportArgumentType]
    return result.measures


def of(record: FeatureMeasures, measure: str, feature: int) -> FeatureValue:
    return next(value for value in record.values[measure] if value.feature == feature)


def test_each_measure_finds_what_was_planted(study: Study):
    record = measured(study)
    assert all(record.is_complete(measure) for measure in record.values) and record.missing == {}
    # 0.5 norms of 2 add 1 to the red coordinate, and so 0.15 to one of three channels.
    red, pattern, nothing = (
        [of(record, name, f) for name in ("colour", "locality", "texture")] for f in (RED, CHECKER, INVISIBLE)
    )
    assert [part.value for part in red] == [pytest.approx(0.15 / 3, abs=2e-3), 1.0, pytest.approx(0, abs=1e-6)]
    assert pattern[2].value == pytest.approx(1.0, abs=1e-3) and [part.value for part in nothing] == [0.0, 0.5, 0.0]
    assert 0 < red[0].baseline < red[0].value and red[0].baseline == pytest.approx(red[0].value, rel=0.9)
    assert of(record, "sensitivity", RED).value == 1.0 and of(record, "sensitivity", RED).baseline <= 0.5
    assert of(record, "sensitivity", BLUE).value == 0.0
    known = of(record, "known-specificity", RED)
    assert known.value > 0.4 and known.baseline < known.value
    estimate = record.estimates["colour"]
    assert estimate.value.size == 5 and estimate.value.low <= estimate.value.value <= estimate.value.high
    assert "known-causality" in measures_table([record])
    assert FeatureMeasures.load(study.measures(SITE, LABEL)) == record


def test_a_killed_run_continues_with_the_same_bytes_and_is_kept_when_it_is_done(study: Study, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(running, "BATCH", 2)
    path, config = study.measures(SITE, LABEL), replace(CONFIG, features=(RED, BLUE, CHECKER))
    whole = measured(study, config)
    content = path.read_bytes()
    path.unlink()
    with pytest.raises(KeyboardInterrupt):
        measured(study, config, PaintedWorld(calls=5))
    begun = FeatureMeasures.load(path)
    assert begun.done == {"specificity": 3, "known-specificity": 3, "sensitivity": 3, "causality": 2, "known-causality": 2}
    assert measured(study, config) == whole and path.read_bytes() == content
    assert measured(study, config, PaintedWorld(calls=0)) == whole  # no image is made


def test_measures_that_another_similarity_does_not_change_are_kept(study: Study, tmp_path: Path):
    known = ("known-specificity", "colour")
    whole = measured(study, only=known)
    clip = f"clip:{tiny_clip(tmp_path / 'clip')}"
    other = measured(study, MeasureConfig(features=CONFIG.features, images=TOPS, similarity=clip), only=("specificity",))
    assert other.values["colour"] == whole.values["colour"]
    assert other.values["specificity"] != whole.values["specificity"] and "causality" not in other.values
    assert other.values["known-specificity"] == whole.values["known-specificity"]


def test_features_are_sampled_by_seed_and_measured_alone(study: Study):
    record = measured(study, MeasureConfig(sample=2, images=TOPS, seed=1), only=("texture",))
    assert len(record.features) == 2 and list(record.values) == ["texture", "colour", "locality"]
    assert measured(study, MeasureConfig(sample=2, images=TOPS, seed=1), only=("texture",)) == record


def test_what_cannot_be_measured_is_said(study: Study):
    study.concepts(SITE, LABEL).unlink()
    record = measured(study, only=("sensitivity",))
    assert set(record.missing) == {"known-specificity", "known-causality", "sensitivity"}
    assert "difflex explain" in record.missing["sensitivity"] and record.missing["sensitivity"] in measures_table([record])
    with Book.edit(study.book(SITE, LABEL)) as book:
        for feature, text in ((RED, "red things"), (BLUE, "blue things"), (CHECKER, "a pattern")):
            book.add_explanation(Explanation(feature=feature, backend="made", protocol="heldout", text=text), scores=[])
    record = measured(study, only=("sensitivity",))  # other inputs: all is measured again
    assert of(record, "sensitivity", RED) == FeatureValue(RED, 1.0, 0.0)
    assert {value.feature for value in record.values["sensitivity"]} == {RED, BLUE, CHECKER}


def test_bad_settings_are_refused(study: Study):
    with pytest.raises(BadInput, match="2 to 256 images"):
        MeasureConfig(images=1)
    with pytest.raises(UnknownName, match="psnr"):
        MeasureConfig(similarity="psnr")
    with pytest.raises(UnknownName, match="has 0 top images"):
        measured(study, MeasureConfig(features=(7,), images=TOPS))
    with pytest.raises(BadInput, match="have 5 top images"):
        measured(study, MeasureConfig(images=5))


def test_the_change_of_a_region_has_a_closed_form():
    region, plain = Rectangle(0.25, 0.25, 0.75, 0.75), torch.zeros(1, 3, 64, 64)
    edited = plain.clone()
    edited[:, :, 16:48, 16:48], edited[:, :, :16] = 0.4, 0.1
    change = region_change(edited, plain, region)
    outside = 0.1 * 16 * 64 / (64 * 64 - 32 * 32)
    assert change.colour == pytest.approx(0.4) and change.texture == pytest.approx(0, abs=1e-9)
    assert change.locality == pytest.approx(0.4 / (0.4 + outside))


def test_each_aspect_is_zero_between_equal_images_and_largest_for_its_own_change():
    images = draw(range(12)).images
    assert all(float(distance(images, images).abs().max()) < 1e-9 for distance in ASPECTS.values())
    changed = {
        "composition": images.flip(2),
        "colour": images * torch.tensor([1.0, 0.6, 0.4]).view(3, 1, 1),
        "style": images + 0.1 * ((torch.arange(64)[:, None] + torch.arange(64)) % 2 - 0.5),
    }
    unrelated = {name: distance(images, images.roll(1, 0)).mean() for name, distance in ASPECTS.items()}
    for name, edited in changed.items():
        relative = {own: float(distance(edited, images).mean() / unrelated[own]) for own, distance in ASPECTS.items()}
        assert relative[name] > 0.4
        if name != "composition":  # a flip moves all details too
            assert max(relative, key=lambda own: relative[own]) == name
    shifted = images.roll(1, 3)
    assert float(ASPECTS["composition"](shifted, images).mean()) < 0.2 * float(ASPECTS["detail"](shifted, images).mean())


def test_similarities_are_highest_on_the_diagonal():
    images = draw(range(3)).images
    matrix = SimilarityMatrix("ssim")(images, F.interpolate(images, scale_factor=2, mode="nearest"))
    assert matrix.shape == (3, 3) and bool((matrix.argmax(1) == torch.arange(3)).all())


def test_an_estimate_is_paired():
    estimate = MeasureEstimate.of([FeatureValue(i, i + 0.5, float(i)) for i in range(10)])
    assert estimate.gain[:3] == (0.5, 0.5, 0.5) and estimate.value.high > estimate.value.low


def test_features_of_an_update_of_sdxl_are_measured_by_a_clip(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model, study = tiny_folder("sdxl", tmp_path / "tiny-sdxl"), tmp_path / "study"
    (tmp_path / "prompts.txt").write_text("\n".join(f"star {number}" for number in range(60)))
    words = ["harvest", str(model), "--prompts", str(tmp_path / "prompts.txt"), "--out", str(study), "--site", "down.2.1:update"]
    assert main(words) == 0
    assert (
        main(["train", str(study), "--site", "down.2.1:update", "--k", "8", "--size", "32", "--tokens", "2000", "--batch", "64"])
        == 0
    )
    assert main(["collect", str(study), "--images", "24"]) == 0
    capsys.readouterr()
    flags = ["--sample", "2", "--images", "3", "--measure", f"clip:{tiny_clip(tmp_path / 'clip')}", "--offline"]
    assert main(["measure", str(study), *flags]) == 0
    output = capsys.readouterr().out
    assert "down.2.1:update/topk-32-k8: 2 features\n" in output and "Run difflex explain" in output
    record = FeatureMeasures.load(Study.open(study).measures("down.2.1:update", "topk-32-k8"))
    assert set(record.estimates) == {"specificity", "causality", "texture", "colour", "locality"}
    assert record.estimates["colour"].value.value > 0
    assert main(["measure", str(study), *flags]) == 0
    assert "2 features, as before" in capsys.readouterr().out
    assert main(["measure", str(study), "--dictionary", "down.2.1", "up.0.0", "--images", "3", "1"]) == 2


@pytest.mark.slow
def test_a_feature_of_mini_flux_that_is_planted_to_be_red_is_specific_changes_colour_and_draws_red_alone(tmp_path: Path):
    folder, site = tmp_path / "study", Site("double.2")
    words = ["harvest", "mini-flux", "--prompts", "captions", "--tokens", "6400", "--site", str(site), "--out", str(folder)]
    assert main(words) == 0
    study = Study.open(folder)
    pipe = difflex.load("mini-flux")
    pairs = caption_pairs("red", 24)
    [contrast] = model_functions(pipe).contrasts(site, pairs, region=lambda shot: caption_region(shot.prompt, "colour"))
    red = F.normalize(contrast.direction, dim=0)
    values = next(iter(Store.open(study.stores()[site]).batches(2000, seed=0))).values.float()
    noise = torch.randn(1, len(values), generator=torch.Generator().manual_seed(0)) @ (values - values.mean(0))
    rows = torch.cat([red[None], F.normalize(noise, dim=1)])
    bias = -torch.quantile(values @ rows.T, 0.95, dim=0)  # each fires at one token of twenty
    weights = SAEWeights(encoder=rows, decoder=rows, bias=torch.zeros(len(red)), encoder_bias=bias)
    origin = DictionaryOrigin(site=site, model="mini-flux", revision=None)
    planted = SAE(kind="topk", k=2, origin=origin, normalisation=Normalisation.identity(len(red)), weights=weights)
    place = f"{site}/{planted.label}"
    planted.save(study.dictionary(site, planted.label))
    assert main(["collect", str(folder), "--drawn-world", "--images", "300", "--noise", "0.5"]) == 0
    write_matches(study, place, (0.9, 0.1), concepts=CONCEPTS[:2], per_concept=1)
    assert main(["measure", str(folder), "0", "1"]) == 0
    record = FeatureMeasures.load(study.measures(site, planted.label))
    red_one, random_one = ({name: of(record, name, feature) for name in record.values} for feature in (0, 1))
    assert red_one["known-specificity"].value > 0.8 > 0.4 > random_one["known-specificity"].value
    assert red_one["sensitivity"].value > red_one["sensitivity"].baseline
    assert red_one["known-causality"].value > 0.5 > red_one["known-causality"].baseline
    assert red_one["colour"].value > 1.5 * max(red_one["colour"].baseline, random_one["colour"].value)
    assert red_one["texture"].value < 0.1
