"""Matching to concepts: scores against scikit-learn and planted features; features are chosen on training images only."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score, jaccard_score
from torch import Tensor

from difflex.errors import BadInput, BrokenFile, NonFinite
from difflex.evaluation.concepts import Concept, ConceptsConfig, LabelFolder, label, match
from difflex.evaluation.concepts.detection import (
    FeatureFirings,
    absorbing_features,
    average_precision,
    combine_features,
    dense_average_precision,
    detection_scores,
    split_features,
    unrelated_concepts,
)
from difflex.evaluation.concepts.labels import (
    TOKEN_FIELDS,
    LabelledActivations,
    LabelledImage,
    LabelledSource,
    LabelledStream,
    token_labels,
)
from difflex.evaluation.concepts.matching import FeatureMethod, principal_axes, random_directions
from difflex.evaluation.concepts.probe import LinearProbe
from difflex.evaluation.concepts.results import ConceptMatches, MatchingConfig, MatchInputs, matches_table
from difflex.evaluation.concepts.sources import grid_shares
from difflex.records import Activations, Codes, Shot, Site

SITE = Site("double.1")
SHOT = Shot(model="planted", pixels=(8, 8), steps=1, guidance=0.0)
CONCEPTS = (Concept("red", "colour"), Concept("blue", "colour"), Concept("star", "shape"), Concept("ring", "shape"))
TOKENS, IMAGES = 4000, 200


def firings(dense: Tensor) -> FeatureFirings:
    """Return the firings of a dense matrix [token, size]."""
    return FeatureFirings.from_dense(dense.T)


def planted(seed: int = 0, held_out_share: int = 4) -> LabelledActivations:
    """Return activations whose first coordinates are the concepts; the others are noise."""
    generator = torch.Generator().manual_seed(seed)
    colour, shape = torch.randint(5, (TOKENS,), generator=generator), torch.randint(6, (TOKENS,), generator=generator)
    truth = torch.stack([colour == 0, colour == 1, shape == 0, shape == 1]).to(torch.int8)
    values = torch.rand(TOKENS, 8, generator=generator) * 0.1
    values[:, :4] += truth.T * (1 + torch.rand(TOKENS, 4, generator=generator))
    images = torch.arange(TOKENS) // (TOKENS // IMAGES)
    return LabelledActivations(
        site=SITE,
        concepts=CONCEPTS,
        values=values,
        truth=truth,
        images=images,
        noise=torch.where(torch.arange(TOKENS) % 2 == 0, 0.25, 0.5),
        held_out=images % held_out_share == 0,
    )


def coordinates(labelled: LabelledActivations, threshold: float = 0.5) -> FeatureMethod:
    """Return a method with one feature per coordinate, which fires above `threshold`."""

    def encode(x: Tensor) -> Codes:
        return Codes(x * (x > threshold), torch.arange(x.shape[1]).expand_as(x))

    return FeatureMethod(site=labelled.site, label="coordinates-8-k8", size=labelled.values.shape[1], encode=encode)


@pytest.mark.parametrize("ties", [False, True])
def test_average_precision_equals_scikit_learn_with_ties_and_silent_tokens(ties: bool):
    generator = torch.Generator().manual_seed(1)
    dense = torch.rand(90, 6, generator=generator) * (torch.rand(90, 6, generator=generator) < torch.linspace(0.05, 0.9, 6))
    dense = (dense * 4).ceil() if ties else dense
    truth = torch.where(torch.rand(3, 90, generator=generator) < 0.3, 1, 0).to(torch.int8)
    truth[:, :20] -= (torch.rand(3, 20, generator=generator) < 0.5).to(torch.int8)  # some are ignored
    truth = truth.clamp_min(-1)
    scores = detection_scores(firings(dense), truth)
    for feature in range(6):
        for concept in range(3):
            is_labelled = truth[concept] >= 0
            target, ranked = truth[concept, is_labelled].numpy(), dense[is_labelled, feature]
            assert float(scores.ap[feature, concept]) == pytest.approx(average_precision_score(target, ranked.numpy()), abs=1e-5)
            cuts = {float(cut): jaccard_score(target, (ranked >= cut).numpy()) for cut in ranked[ranked > 0].unique()}
            assert float(scores.iou[feature, concept]) == pytest.approx(max(cuts.values(), default=0), abs=1e-5)


def test_blocks_of_any_size_give_the_same_scores(monkeypatch: pytest.MonkeyPatch):
    generator = torch.Generator().manual_seed(2)
    dense = torch.rand(200, 30, generator=generator) * (
        torch.rand(200, 30, generator=generator) < torch.rand(30, generator=generator)
    )
    truth = (torch.rand(7, 200, generator=generator) < 0.3).to(torch.int8)
    expected = detection_scores(firings(dense), truth)
    monkeypatch.setattr("difflex.evaluation.concepts.detection.BLOCK", 500)
    for name, values in vars(detection_scores(firings(dense), truth)).items():
        torch.testing.assert_close(values, getattr(expected, name))


def test_a_feature_that_is_the_concept_has_ap_1_and_a_random_one_the_base_rate():
    labelled = planted()
    dense = torch.cat([labelled.truth.T.float(), torch.rand(TOKENS, 1, generator=torch.Generator().manual_seed(3))], dim=1)
    scores = detection_scores(firings(dense), labelled.truth)
    assert torch.equal(scores.ap[:4].diagonal(), torch.ones(4)) and torch.equal(scores.iou[:4].diagonal(), torch.ones(4))
    torch.testing.assert_close(scores.ap[4], labelled.truth.float().mean(1), atol=0.03, rtol=0)
    silent = detection_scores(firings(torch.zeros(TOKENS, 1)), labelled.truth)
    torch.testing.assert_close(silent.ap[0], labelled.truth.float().mean(1))


def test_given_thresholds_are_used():
    dense = torch.tensor([[3.0], [2.0], [1.0], [0.0]])
    truth = torch.tensor([[1, 1, 0, 1]], dtype=torch.int8)
    scores = detection_scores(firings(dense), truth, torch.tensor([[3.0]]))
    assert (float(scores.iou), float(scores.precision), float(scores.recall)) == (pytest.approx(1 / 3), 1.0, pytest.approx(1 / 3))
    assert float(detection_scores(firings(dense), truth, torch.tensor([[9.0]])).iou) == 0.0
    assert float(detection_scores(firings(dense), truth).iou) == pytest.approx(2 / 3)


@pytest.mark.parametrize("levels", [3, 1000])
def test_dense_rankings_have_the_average_precision_of_their_firings(levels: int):
    generator = torch.Generator().manual_seed(levels)
    dense = (torch.rand(6, 500, generator=generator) * levels).round() * (torch.rand(6, 500, generator=generator) < 0.4)
    truth = torch.randint(-1, 2, (500,), generator=generator).to(torch.int8)
    labelled, scores = truth >= 0, detection_scores(FeatureFirings.from_dense(dense), truth[None])
    for row, ap in zip(dense[:, labelled], scores.ap[:, 0], strict=True):
        own = dense_average_precision(row, truth[labelled] == 1)
        assert own == pytest.approx(float(ap), abs=1e-6)
        assert own == pytest.approx(average_precision_score(truth[labelled] == 1, row), abs=1e-6)


def test_image_weights_count_as_copies():
    labelled = planted()
    tokens, values = firings(labelled.values).of_feature(5)
    weights = torch.tensor([[0.0, 1.0, 3.0]]).repeat(1, IMAGES)[:, :IMAGES]
    ap = average_precision(tokens, values, labelled.truth[1], labelled.images, weights)
    times = weights[0, labelled.images].long()
    copies = average_precision_score(
        labelled.truth[1].repeat_interleave(times).numpy(), labelled.values[:, 5].repeat_interleave(times).numpy()
    )
    assert float(ap) == pytest.approx(copies, abs=1e-4)


def test_features_that_equal_concepts_are_detected_with_narrow_intervals():
    labelled = planted()
    [matches] = match(labelled, [coordinates(labelled)], MatchingConfig(bootstrap_samples=50))
    overall = matches.levels[0]
    assert [level.noise for level in matches.levels] == [None, 0.25, 0.5]
    assert [result.best.features for result in overall.results] == [(0,), (1,), (2,), (3,)]
    assert all(result.best.ap.low > 0.99 and result.segmenting.iou > 0.99 for result in overall.results)
    assert all(result.combined.features == result.best.features for result in overall.results)
    assert overall.coverage == (1.0, 1.0, 1.0) == overall.coverage_of_findable
    assert overall.monosemanticity > 0.9 and not any(
        result.split_features or result.absorbing_features for result in overall.results
    )
    assert matches.features.concepts[:4] == (0, 1, 2, 3) and min(matches.features.ap[:4]) > 0.99


def test_the_clearest_level_is_where_the_probe_finds_the_most_concepts():
    labelled = planted()
    noise = torch.randn(labelled.values.shape, generator=torch.Generator().manual_seed(5))
    is_noisy = (labelled.noise == 0.5)[:, None]
    [matches] = match(
        LabelledActivations(**{**vars(labelled), "values": torch.where(is_noisy, noise, labelled.values)}),
        [coordinates(labelled)],
        MatchingConfig(bootstrap_samples=20),
    )
    assert matches.clearest_level.noise == 0.25 and matches.levels[0].noise is None


def test_random_and_principal_axes_have_k_active_features_and_low_coverage():
    labelled = planted()
    mixed = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(4))).Q
    labelled = LabelledActivations(**{**vars(labelled), "values": labelled.values @ mixed})
    axes, random = principal_axes(labelled, 2), random_directions(labelled, 20, 2)
    assert (axes.label, random.label) == ("pca-16-k2", "random-20-k2")
    codes = random.encode(labelled.values)
    assert codes.values.shape == (TOKENS, 2) and bool((codes.values > 0).all()) and int(codes.indices.max()) < 20
    assert not torch.equal(random.encode(-labelled.values).indices, codes.indices)
    for matches in match(labelled, [axes, random], MatchingConfig(bootstrap_samples=20)):
        assert matches.levels[0].coverage.value < 1 and min(result.probe.value for result in matches.levels[0].results) > 0.95


def test_a_feature_that_fits_only_training_images_scores_low():
    labelled = planted()
    memorised = (labelled.truth[2] == 1) & ~labelled.held_out
    values = torch.cat([0.4 * labelled.truth[2, :, None] + memorised[:, None], labelled.values[:, 4:]], dim=1)
    values[:, 0] = torch.where(labelled.held_out, torch.rand(TOKENS, generator=torch.Generator().manual_seed(5)), values[:, 0])
    labelled = LabelledActivations(**{**vars(labelled), "values": values})
    [matches] = match(labelled, [coordinates(labelled, 0.0)], MatchingConfig(bootstrap_samples=20))
    star = matches.levels[0].results[2]
    assert star.best.features == (0,) and star.best.ap.value < star.chance + 0.1 and star.segmenting.iou < 0.5


def test_the_probe_finds_separable_concepts_and_nothing_in_noise():
    labelled = planted()
    held_out = labelled.held_out
    noise = torch.rand(TOKENS, 8, generator=torch.Generator().manual_seed(6))
    logits, of_noise = (
        LinearProbe.fit(x[~held_out], labelled.truth[:, ~held_out], 1e-4).logits(x).T for x in (labelled.values, noise)
    )
    for concept in range(4):
        assert average_precision_score(labelled.truth[concept, held_out].numpy(), logits[concept, held_out].numpy()) > 0.99
    assert average_precision_score(labelled.truth[0, held_out].numpy(), of_noise[0, held_out].numpy()) < 0.35


def shared(parts: list[list[int]]) -> tuple[FeatureFirings, Tensor]:
    """Return features that each fire at some tenths of a concept's tokens, and the concept: every fifth token."""
    truth = (torch.arange(TOKENS) % 5 == 0).to(torch.int8)
    tenth = torch.arange(TOKENS) // 5 % 10
    dense = torch.stack([sum(((tenth == part) & (truth == 1)).float() for part in tenths) for tenths in parts], dim=1)  # pyright: ignore[reportArgumentType, reportCallIssue]
    return firings(dense), truth


def test_a_concept_shared_by_several_features_is_split():
    fires, truth = shared([[0, 1, 2], [3, 4, 5], [6, 7, 8], [0]])
    scores = detection_scores(fires, truth[None])
    assert split_features(fires, truth, scores, 0) == (0, 1, 2)
    assert absorbing_features(fires, truth, scores, 0, 0) == ()
    assert set(combine_features(fires, truth, scores.ap[:, 0], 4)) == {0, 1, 2}


def test_a_concept_with_a_complete_feature_is_not_split():
    fires, truth = shared([[0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [0, 1, 2], [3, 4, 5]])
    scores = detection_scores(fires, truth[None])
    assert split_features(fires, truth, scores, 0) == () and absorbing_features(fires, truth, scores, 0, 0) == ()
    assert combine_features(fires, truth, scores.ap[:, 0], 4) == (0,)


def test_a_specific_feature_that_silences_the_general_one_is_absorbing():
    fires, truth = shared([[0, 1, 2, 3, 4, 5, 6, 7], [8, 9], [0, 1]])
    scores = detection_scores(fires, truth[None])
    assert absorbing_features(fires, truth, scores, 0, 0) == (1,)
    assert split_features(fires, truth, scores, 0) == ()


def test_overlapping_concepts_of_one_group_are_related():
    concepts = (Concept("car", "thing"), Concept("wheel", "thing"), Concept("tree", "thing"), Concept("red", "colour"))
    truth = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 1, 0], [1, 1, 1, 0, 0]], dtype=torch.int8)
    unrelated = unrelated_concepts(concepts, truth)
    assert not unrelated[0, 1] and unrelated[0, 2] and unrelated[0, 3] and not unrelated.diagonal().any()


def test_a_feature_with_two_meanings_is_less_monosemantic():
    labelled = planted()
    labelled.values[:, 0] = torch.maximum(labelled.values[:, 0], labelled.values[:, 2])
    [matches] = match(labelled, [coordinates(labelled)], MatchingConfig(bootstrap_samples=20))
    red, blue, *_ = matches.levels[0].results
    assert red.unrelated == "star" and red.monosemanticity < 0.3 and blue.monosemanticity > 0.9


def test_masks_become_shares_and_partly_covered_tokens_are_ignored():
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[0, :4, :4], mask[0, 4:6, 4:8] = True, True
    mask[0, 0, 4] = True
    shares = grid_shares(mask, 2, 2)
    assert shares.flatten().tolist() == [1.0, 0.0625, 0.0, 0.5]
    assert token_labels(shares.flatten(1)).tolist() == [[1, -1, 0, 1]]
    assert token_labels(shares.flatten(1), absent_below=0.5).tolist() == [[1, 0, 0, 1]]
    with pytest.raises(BadInput, match=r"absent up to a share of 0\.6"):
        ConceptsConfig(absent_below=0.6)


def images(count: int = 6) -> list[LabelledImage]:
    return [
        LabelledImage(
            Image.new("RGB", (8, 8)), f"p{i}", f"prompt {i}", lambda rows, columns, i=i: torch.full((2, rows, columns), i / 5)
        )
        for i in range(count)
    ]


def harvesting(grid: tuple[int, int] | None = (2, 3), bad: bool = False):
    """Return a harvest at two noise levels, in batches of two images."""

    def harvest(images: Iterable, prompts: Iterable[str], names: Iterable[str]) -> Iterator[Activations]:
        inputs = list(zip(images, prompts, names, strict=True))
        for start in range(0, len(inputs), 2):
            for noise in (0.25, 0.5):
                batch = inputs[start : start + 2]
                shots = tuple(
                    Shot(
                        **{
                            **vars(SHOT),
                            "image": name,
                            "prompt": prompt,
                            "noise": noise,
                            "split": "held-out" if "3" in name else "train",
                        }
                    )
                    for _, prompt, name in batch
                )
                values = torch.full((len(batch), 6, 4), torch.nan if bad else noise)
                yield Activations(site=SITE, values=values, shots=shots, grid=grid)

    return harvest


def test_tokens_are_labelled_with_the_masks_of_their_image():
    labelled = label(images(), harvesting(), CONCEPTS[:2])[SITE]
    assert labelled.values.shape == (72, 4) and labelled.noise_levels == [0.25, 0.5]
    for image in range(6):
        tokens = labelled.images == image
        assert tokens.sum() == 12 and set(labelled.truth[:, tokens].flatten().tolist()) == {
            0 if image == 0 else 1 if image > 2 else -1
        }
        assert bool(labelled.held_out[tokens].all()) == (image == 3)
    assert torch.equal(labelled.values[:, 0], labelled.noise)


def test_activations_without_a_grid_nan_and_repeated_names_are_refused():
    with pytest.raises(BadInput, match="has no grid"):
        label(images(), harvesting(None), CONCEPTS[:2])
    with pytest.raises(NonFinite, match="'p0' hold NaN"):
        label(images(), harvesting(bad=True), CONCEPTS[:2])
    with pytest.raises(BadInput, match="No image was given"):
        label([], harvesting(), CONCEPTS[:2])
    with pytest.raises(BadInput, match="Two images are called 'p0'"):
        label(images(1) * 2, harvesting(), CONCEPTS[:2])


def test_a_stream_that_is_not_kept_gives_the_same_matches_as_activations_in_memory(monkeypatch: pytest.MonkeyPatch):
    labelled, config = planted(), MatchingConfig(bootstrap_samples=5)
    readings = []

    def harvest() -> Iterator[LabelledActivations]:
        readings.append(1)
        for part in torch.arange(TOKENS).split(700):
            columns = {name: getattr(labelled, name)[part] for name in TOKEN_FIELDS}
            yield replace(labelled, truth=labelled.truth[:, part], **columns)

    def methods(source: LabelledSource) -> Iterator[FeatureMethod]:
        yield coordinates(labelled)
        yield from (make(source, k=2) for make in (principal_axes, partial(random_directions, size=20)))

    expected = match(labelled, methods(labelled), config)
    for room, method_bytes, most in ((10**9, 0, 1), (0, 10**9, 4), (0, 0, 6)):
        readings.clear()
        monkeypatch.setattr("difflex.evaluation.concepts.matching.METHOD_BYTES", method_bytes)
        stream = LabelledStream(harvest, room)
        assert stream.is_kept == bool(room) and stream.width == 8
        assert match(stream, methods(stream), config) == expected
        assert len(readings) == most
    with pytest.raises(BadInput, match="No image was given"):
        _ = LabelledStream(lambda: iter(()), 0).labels


def test_rare_concepts_are_left_out_and_too_few_images_refused():
    labelled = planted()
    labelled.truth[3, labelled.images > 7] = 0
    [matches] = match(labelled, [coordinates(labelled)], MatchingConfig(bootstrap_samples=5))
    assert matches.rare_concepts == (CONCEPTS[3],) and matches.concepts == CONCEPTS[:3]
    assert "too rare: ring" in matches_table([matches])
    with pytest.raises(BadInput, match="No concept is shown in 99 held-out images"):
        match(labelled, [coordinates(labelled)], MatchingConfig(min_images=99))
    with pytest.raises(BadInput, match=r"is a method for double\.2"):
        match(labelled, [FeatureMethod(site=Site("double.2"), label="x", size=1, encode=coordinates(labelled).encode)])


def test_matches_survive_saving_and_loading(tmp_path: Path):
    labelled = planted()
    [matches] = match(labelled, [coordinates(labelled)], MatchingConfig(bootstrap_samples=5))
    config = ConceptsConfig(pixels=(64, 96), noise=(0.5,), matching=MatchingConfig(bootstrap_samples=5))
    matches = replace(matches, inputs=MatchInputs(model="planted", revision=None, images="planted", config=config))
    matches.save(tmp_path / "concepts" / "one.json")
    assert ConceptMatches.load(tmp_path / "concepts" / "one.json") == matches
    entries = json.loads((tmp_path / "concepts" / "one.json").read_text())
    assert next(iter(entries)) == "format"
    (tmp_path / "one.json").write_text(json.dumps({**entries, "format": 9}))
    with pytest.raises(BrokenFile, match="is of format 9"):
        ConceptMatches.load(tmp_path / "one.json")
    (tmp_path / "one.json").write_text("{")
    with pytest.raises(BrokenFile, match="is not JSON"):
        ConceptMatches.load(tmp_path / "one.json")


def folder(tmp_path: Path, entries: object, labels: Image.Image, name: str = "a") -> Path:
    for part in ("images", "labels"):
        (tmp_path / part).mkdir(exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "images" / f"{name}.jpg")
    (tmp_path / "images" / f"{name}.txt").write_text("a red thing\n")
    labels.save(tmp_path / "labels" / f"{name}.png")
    (tmp_path / "labels.json").write_text(json.dumps(entries))
    return tmp_path


def quarters(values: Sequence[int | tuple[int, int, int]], mode: str, side: int = 8) -> Image.Image:
    """Return a label map of four squares."""
    small = Image.new(mode, (2, 2))
    for i, value in enumerate(values):
        small.putpixel((i % 2, i // 2), value)
    return small.resize((side, side), Image.Resampling.NEAREST)


def test_label_maps_give_the_shares_of_concepts(tmp_path: Path):
    entries = {"1": "star", "2": {"name": "sky", "group": "background"}, "7": "star"}
    opened = LabelFolder.open(folder(tmp_path, entries, quarters([1, 2, 0, 7], "L")))
    assert opened.concepts == (Concept("star", "object"), Concept("sky", "background"))
    [image] = opened.labelled_images(5)
    assert (image.name, image.prompt) == ("a.jpg", "a red thing")
    assert image.shares(2, 2).flatten(1).tolist() == [[1, 0, 0, 1], [0, 1, 0, 0]]
    [fitted] = opened.labelled_images(5, (16, 8))
    assert fitted.image.size == (8, 16) and fitted.shares(2, 1).shape == (2, 2, 1)


@pytest.mark.parametrize("name", ["labels/a.png", "images/a.jpg", "images/a.txt", "labels.json"])
def test_a_label_folder_is_identified_by_content_and_not_by_time(name: str, tmp_path: Path):
    opened = LabelFolder.open(folder(tmp_path, {"1": "star"}, quarters([1, 0, 0, 1], "L")))
    before, times = opened.fingerprint(1), (tmp_path / name).stat()
    os.utime(tmp_path / name, ns=(0, 0))
    assert opened.fingerprint(1) == before
    content = bytearray((tmp_path / name).read_bytes())
    content[-3] ^= 1
    (tmp_path / name).write_bytes(content)
    os.utime(tmp_path / name, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert opened.fingerprint(1) != before


@pytest.mark.parametrize("entries", [{"9" * 5000: "star"}, {"3000000000": "star"}, {"1": "st\0ar"}, {"1": "st\ud800ar"}])
def test_odd_numbers_and_names_of_labels_are_refused(entries: dict[str, str], tmp_path: Path):
    with pytest.raises(BadInput, match=r"labels\.json holds"):
        LabelFolder.open(folder(tmp_path, entries, quarters([1, 0, 0, 1], "L")))


def test_a_prompt_that_is_not_text_is_refused(tmp_path: Path):
    opened = LabelFolder.open(folder(tmp_path, {"1": "star"}, quarters([1, 0, 0, 1], "L")))
    (tmp_path / "images" / "a.txt").write_bytes(b"\xff\xfe star")
    with pytest.raises(BadInput, match=r"a\.txt is not text"):
        list(opened.labelled_images(1))


def test_coco_panoptic_is_read(tmp_path: Path):
    entries = {
        "images": [{"id": 4, "file_name": "a.jpg"}],
        "annotations": [
            {
                "image_id": 4,
                "file_name": "a.png",
                "segments_info": [{"id": 258, "category_id": 1}, {"id": 65536, "category_id": 9}],
            }
        ],
        "categories": [
            {"id": 1, "name": "person", "supercategory": "person"},
            {"id": 9, "name": "sky-other", "supercategory": "sky"},
        ],
    }
    [image] = LabelFolder.open(
        folder(tmp_path, entries, quarters([(2, 1, 0), (0, 0, 1), (0, 0, 0), (2, 1, 0)], "RGB"))
    ).labelled_images(1)
    assert image.shares(2, 2).flatten(1).tolist() == [[1, 0, 0, 1], [0, 1, 0, 0]]


def test_incomplete_label_folders_are_refused(tmp_path: Path):
    with pytest.raises(BadInput, match="holds no image"):
        LabelFolder.open(tmp_path)
    folder(tmp_path, {"1": "star"}, quarters([1, 1, 1, 1], "L", 16))
    with pytest.raises(BadInput, match="is 8x8, its label map 16x16"):
        list(LabelFolder.open(tmp_path).labelled_images(1))
    (tmp_path / "labels" / "a.png").unlink()
    with pytest.raises(BadInput, match=r"has no label map .*a\.png"):
        LabelFolder.open(tmp_path)
    folder(tmp_path, {"one": "star"}, quarters([1, 1, 1, 1], "L"))
    with pytest.raises(BadInput, match="'one': 'star', which is not a number with a name"):
        LabelFolder.open(tmp_path)
    folder(tmp_path, {"annotations": [], "categories": [{}]}, quarters([1, 1, 1, 1], "L"))
    with pytest.raises(BadInput, match="is not COCO panoptic"):
        LabelFolder.open(tmp_path)
    (tmp_path / "labels.json").write_text("[")
    with pytest.raises(BrokenFile, match="is not JSON"):
        LabelFolder.open(tmp_path)
    (tmp_path / "labels.json").unlink()
    with pytest.raises(BadInput, match="the meaning of the numbers"):
        LabelFolder.open(tmp_path)
