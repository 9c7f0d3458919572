"""Metrics against closed forms, evaluations of planted dictionaries, effects on models that are plain functions."""

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path
from weakref import WeakSet

import pytest
import torch
from fake_harvest import FakeHarvest, fake_shots
from torch import Tensor
from torch.nn import functional as F

from difflex.dictionaries import SAE, Dictionary, DictionaryOrigin, Neurons, Normalisation, SAEWeights, fingerprint
from difflex.dictionaries.normalisation import VectorMoments
from difflex.errors import BadInput, BrokenFile, NonFinite
from difflex.evaluation import EditedModel, Evaluation, EvaluationConfig, evaluate, evaluate_study
from difflex.evaluation.effect import Edits, ModelEffect, ReplacementEffect, measure_effects, sample_shots
from difflex.evaluation.reconstruction import JointMoments, ReconstructionMetrics
from difflex.records import ActivationBatch, EditOutcomes, Shot, Site, Split
from difflex.store import RecordingConfig, Store, record
from difflex.store.reading import SplitBatches
from difflex.study import DictionaryRef, Study

SITE = Site("double.1")
WIDTH, TIMESTEPS = 8, (1000.0, 500.0, 250.0)
SHOT = Shot(model="planted", pixels=(8, 8), steps=3, guidance=0.0, split="held-out")


def gaussian(tokens: int = 2000, offset: float = 0.0, seed: int = 0) -> Tensor:
    points = torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return points * torch.arange(1, WIDTH + 1) + offset


def shot(number: int) -> Shot:
    return replace(SHOT, seed=number, timestep=TIMESTEPS[number % len(TIMESTEPS)])


def batches(x: Tensor, size: int = 300, split: Split = "held-out") -> Iterator[ActivationBatch]:
    numbers = torch.arange(len(x)) // 7
    parts = zip(x.float().split(size), numbers.split(size), strict=True)
    return SplitBatches((ActivationBatch(values, shots, torch.zeros_like(shots)) for values, shots in parts), split)


def planted_sae(normalisation: Normalisation | None = None, k: int = 3, dead: int = 0) -> SAE:
    """Return an SAE whose features are both directions of each axis, and `dead` features that never fire."""
    axes = torch.cat([torch.eye(WIDTH), -torch.eye(WIDTH), torch.eye(WIDTH)[torch.arange(dead) % WIDTH]])
    bias = torch.zeros(len(axes))
    bias[2 * WIDTH :] = -1e6
    return SAE(
        kind="topk",
        k=k,
        origin=DictionaryOrigin(site=SITE),
        normalisation=normalisation or Normalisation.identity(WIDTH),
        weights=SAEWeights(encoder=axes, decoder=axes.clone(), bias=torch.zeros(WIDTH), encoder_bias=bias),
    )


def whitened(x: Tensor) -> Normalisation:
    moments = VectorMoments(WIDTH, covariance=True)
    moments.add(x)
    return moments.normalisation("whiten")


def direct_metrics(x: Tensor, y: Tensor) -> ReconstructionMetrics:
    """Return the metrics by their textbook formulas, on all of the data at once."""
    correlation = torch.stack([torch.corrcoef(torch.stack([a, b]))[0, 1] for a, b in zip(x.T, y.T, strict=True)])
    return ReconstructionMetrics(
        fvu=float((x - y).square().sum() / (x - x.mean(0)).square().sum()),
        fvu_raw=float((x - y).square().sum() / x.square().sum()),
        r2=float(correlation.square().mean()),
        ev=float((1 - (x - y).var(0) / x.var(0)).mean()),
        cosine=float(F.cosine_similarity(x, y).mean()),
    )


def metrics_of(x: Tensor, y: Tensor) -> ReconstructionMetrics:
    return JointMoments.of(x, y).metrics()


def assert_close(actual: ReconstructionMetrics | None, expected: ReconstructionMetrics | None, tolerance: float = 1e-9) -> None:
    assert actual is not None and expected is not None
    assert vars(actual) == pytest.approx(vars(expected), rel=tolerance, abs=tolerance)


def test_a_perfect_reconstruction_has_perfect_metrics():
    x = gaussian()
    assert_close(metrics_of(x, x), ReconstructionMetrics(fvu=0.0, fvu_raw=0.0, r2=1.0, ev=1.0, cosine=1.0))


@pytest.mark.parametrize("a", [0.1, 0.5, 2.0, -1.0])
def test_only_r2_ignores_scale(a: float):
    x = gaussian()
    x = x - x.mean(0)
    error = (1 - a) ** 2
    assert_close(
        metrics_of(x, a * x), ReconstructionMetrics(fvu=error, fvu_raw=error, r2=1.0, ev=1 - error, cosine=math.copysign(1, a))
    )


def test_only_fvu_depends_on_an_offset():
    x = gaussian()
    metrics = metrics_of(x, x + 5)
    assert metrics.fvu == pytest.approx(25 * x.numel() / float((x - x.mean(0)).square().sum()))
    assert metrics.ev == pytest.approx(1) and metrics.r2 == pytest.approx(1)


def test_the_mean_explains_no_variance_but_most_of_the_length():
    x = gaussian(offset=50.0)
    metrics = metrics_of(x, x.mean(0).expand_as(x))
    assert metrics.fvu == pytest.approx(1, abs=1e-12) and metrics.r2 == 0.0 and metrics.ev == pytest.approx(0, abs=1e-12)
    assert metrics.fvu_raw is not None and metrics.fvu_raw < 0.02


def test_constant_axes_are_left_out():
    x = gaussian(offset=0.3)
    wide = torch.cat([x, torch.full((len(x), 2), 0.7, dtype=x.dtype)], dim=1)
    noisy = wide + 0.1 * torch.randn(wide.shape, generator=torch.Generator().manual_seed(3))
    metrics, narrow = metrics_of(wide, noisy), metrics_of(x, noisy[:, :WIDTH])
    assert metrics.r2 == pytest.approx(narrow.r2) and metrics.ev == pytest.approx(narrow.ev)
    constant = metrics_of(torch.ones(9, 2), torch.zeros(9, 2))
    assert (constant.fvu, constant.fvu_raw, constant.r2, constant.ev) == (None, 1.0, None, None)


@pytest.mark.parametrize("offset", [0.0, 1e2, 1e6])
def test_merged_batches_equal_the_direct_formula_at_any_offset(offset: float):
    x = gaussian(offset=offset)
    y = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    parts = [JointMoments.of(a, b) for a, b in zip(x.split([1, 2, 997, 1000]), y.split([1, 2, 997, 1000]), strict=True)]
    assert_close(reduce(JointMoments.merge, parts).metrics(), direct_metrics(x, y), 1e-6 if offset == 1e6 else 1e-9)


def test_an_evaluation_equals_the_direct_formula_in_both_spaces():
    x = gaussian(3001, offset=100.0)
    normalisation = whitened(x)
    dictionary = planted_sae(normalisation)
    evaluation = evaluate(dictionary, batches(x), shot)
    y = dictionary.decode(dictionary.encode(x.float()))
    assert_close(evaluation.overall.model_space, direct_metrics(x.float().double(), y.double()), 1e-5)
    z = normalisation.apply(x.float())
    assert_close(evaluation.overall.normalised_space, direct_metrics(z.double(), normalisation.apply(y).double()), 1e-4)
    assert evaluation.tokens == 3001 and evaluation.dictionary == "double.1/topk-16-k3"


def test_each_timestep_equals_an_evaluation_of_its_tokens_alone():
    x, dictionary = gaussian(), planted_sae(whitened(gaussian()))
    evaluation = evaluate(dictionary, batches(x), shot)
    assert list(evaluation.timesteps) == sorted(TIMESTEPS, reverse=True)
    for timestep, quality in evaluation.timesteps.items():
        here = torch.tensor([TIMESTEPS[row // 7 % len(TIMESTEPS)] == timestep for row in range(len(x))])
        alone = evaluate(dictionary, batches(x[here]), lambda _, at=timestep: replace(SHOT, timestep=at))
        assert quality.tokens == int(here.sum()) and quality.l0 == alone.overall.l0
        assert_close(quality.model_space, alone.overall.model_space, 1e-6)
        assert_close(quality.normalised_space, alone.overall.normalised_space, 1e-6)


def test_batch_size_does_not_change_the_evaluation():
    x, dictionary = gaussian(), planted_sae(whitened(gaussian()))
    large, small = (evaluate(dictionary, batches(x, size), shot) for size in (2000, 11))
    assert_close(large.overall.model_space, small.overall.model_space, 1e-6)
    assert (large.density, large.dead, large.overall.l0) == (small.density, small.dead, small.overall.l0)


def test_evaluation_reads_no_more_tokens_than_requested():
    remaining = batches(gaussian(), 300)
    evaluation = evaluate(planted_sae(), remaining, shot, tokens=700)
    assert evaluation.tokens == 700 and sum(quality.tokens for quality in evaluation.timesteps.values()) == 700
    assert len(next(remaining).values) == 300  # the fourth; the third was cut


def test_dead_features_are_counted_and_densities_binned():
    x = torch.zeros(1000, WIDTH)
    x[:, 0] = 1.0  # at every token
    x[:100, 1] = 1.0  # at a tenth of them
    x[:3, 2] = -1.0  # the other way, at three
    evaluation = evaluate(planted_sae(dead=5), batches(x), shot)
    assert (
        evaluation.size == 2 * WIDTH + 5
        and evaluation.dead == evaluation.size - 3
        and evaluation.dead_share == evaluation.dead / evaluation.size
    )
    counts = dict(zip(evaluation.edges, evaluation.density, strict=False))
    assert {edge: count for edge, count in counts.items() if count} == {-0.25: 1, -1.0: 1, -2.75: 1}
    assert evaluation.overall.l0 == pytest.approx(1.103) and evaluation.overall.negative == 0


def test_only_positive_codes_count_as_firing():
    site = Site("double.1", "neurons")
    neurons = Neurons(width=WIDTH, k=2, origin=DictionaryOrigin(site=site))
    x = torch.zeros(10, WIDTH)
    x[:, 0], x[:, 1] = 1.0, -3.0
    evaluation = evaluate(neurons, batches(x), shot)
    assert evaluation.dead == WIDTH - 1 and evaluation.overall.l0 == 2 and evaluation.overall.negative == 0.5
    assert evaluation.overall.normalised_space is None and evaluation.overall.model_space.fvu_raw == 0


def test_a_dictionary_without_normalisation_has_one_space():
    assert evaluate(planted_sae(), batches(gaussian()), shot).overall.normalised_space is None


def test_training_rows_are_refused():
    with pytest.raises(BadInput, match="'held-out'"):
        evaluate(planted_sae(), batches(gaussian(), split="train"), shot)


def test_invalid_evaluations_are_refused():
    x = gaussian()
    with pytest.raises(BadInput, match="0 tokens"):
        evaluate(planted_sae(), batches(x), shot, tokens=0)
    with pytest.raises(BadInput, match="no held-out tokens"):
        evaluate(planted_sae(), iter(()), shot)
    with pytest.raises(BadInput, match=r"takes activations \[token, 8\]"):
        evaluate(planted_sae(), batches(x[:, :5]), shot)
    x[1234, 2] = torch.nan
    with pytest.raises(NonFinite, match=r"activations for double\.1/topk-16-k3 hold NaN"):
        evaluate(planted_sae(), batches(x), shot)
    broken = planted_sae()
    broken.weights.decoder[0] = torch.nan
    with pytest.raises(NonFinite, match="The reconstruction by"):
        evaluate(broken, batches(gaussian()), shot)


def outcomes(edits: Edits, x: Tensor) -> Iterator[EditOutcomes]:
    """Run a model that predicts the sum of its tokens."""
    for i, values in enumerate(x.split(2)):
        edited = {name: edit(values, None).sum(1) for name, edit in edits.items()}
        yield EditOutcomes((shot(2 * i), shot(2 * i + 1)), values.sum(1), edited)


def images(edits: Edits, x: Tensor) -> Iterator[EditOutcomes]:
    def to_images(values: Tensor) -> Tensor:
        return values.sigmoid().mean(1)[:, :1, None, None].expand(-1, 3, 16, 16)

    for outcome in outcomes({}, x):
        yield outcome._replace(plain=to_images(x), edited={name: to_images(edit(x, None)) for name, edit in edits.items()})


def test_a_perfect_dictionary_has_no_effect_and_zero_ablation_the_full_one():
    x = gaussian(4 * 6).view(4, 6, WIDTH).float()
    (effect,) = measure_effects([planted_sae(k=WIDTH)], torch.zeros(WIDTH), lambda edits: outcomes(edits, x))
    assert effect.shots == 4 and effect.images == 0 and effect.image_error is None and effect.psnr is None
    assert effect.prediction.reconstruction < 1e-12
    assert effect.prediction.zero == pytest.approx(1) and effect.prediction.mean == pytest.approx(1)
    assert effect.prediction.of_zero < 1e-12 and effect.prediction.of_mean < 1e-12


def test_effects_have_closed_forms_for_a_linear_model():
    x = gaussian(4 * 6, offset=3.0).view(4, 6, WIDTH).float()
    mean, dictionary = x.mean((0, 1)), planted_sae(k=3)
    (effect,) = measure_effects([dictionary], mean, lambda edits: outcomes(edits, x))
    plain = x.sum(1).double()
    error = (x - dictionary.decode(dictionary.encode(x.flatten(0, 1))).view(x.shape)).sum(1).double()
    rows = {"reconstruction": error, "mean": plain - 6 * mean.double(), "zero": plain}
    for name, change in rows.items():
        share = float(change.square().sum() / plain.square().sum())
        assert getattr(effect.prediction, name) == pytest.approx(share, rel=1e-4)
    first = float(error[[0, 3]].square().sum() / plain[[0, 3]].square().sum())  # shots 0 and 3 are of one timestep
    assert effect.timesteps[1000.0].reconstruction == pytest.approx(first, rel=1e-4)


def test_images_are_compared_by_psnr_ssim_and_other_measures():
    x = gaussian(2 * 6).view(2, 6, WIDTH).float()
    (effect,) = measure_effects(
        [planted_sae(k=WIDTH)],
        torch.zeros(WIDTH),
        lambda edits: outcomes(edits, x),
        lambda edits: images(edits, x),
        measures={"largest": lambda edited, plain: (edited - plain).abs().amax((1, 2, 3))},
    )
    assert effect.images == 2 and effect.psnr is not None and effect.image_error is not None
    assert effect.psnr.reconstruction > 100 > effect.psnr.zero == pytest.approx(-10 * math.log10(effect.image_error.zero))
    assert effect.similarity["ssim"].reconstruction == pytest.approx(1) and effect.similarity["ssim"].zero < 1
    assert effect.similarity["largest"].zero > effect.similarity["largest"].reconstruction
    plain, zero = (values.sigmoid().mean(1)[:, 0] for values in (x, torch.zeros_like(x)))
    distances = 255 * (plain - zero).abs()
    assert effect.similarity["manhattan"].zero == pytest.approx(float(distances.mean()), rel=1e-4)
    assert effect.medians["manhattan"].zero == pytest.approx(float(distances.mean()), rel=1e-4), "of two images"
    assert effect.medians["largest"].zero > 0 and "squared error" not in effect.medians


def test_effects_do_not_depend_on_the_other_dictionaries():
    x = gaussian(4 * 6).view(4, 6, WIDTH).float()
    both = [planted_sae(k=2), planted_sae(k=4)]

    def effects(dictionaries: list[SAE]) -> list[ModelEffect]:
        return measure_effects(dictionaries, x.mean((0, 1)), lambda edits: outcomes(edits, x), lambda edits: images(edits, x))

    assert effects(both) == [*effects(both[:1]), *effects(both[1:])]
    assert effects(both)[0].prediction.reconstruction > effects(both)[1].prediction.reconstruction


def test_one_dictionary_at_a_time_is_on_the_gpu(monkeypatch: pytest.MonkeyPatch):
    x, both, alive, counts = gaussian(4 * 6).view(4, 6, WIDTH).float(), [planted_sae(k=2), planted_sae(k=4)], WeakSet(), []

    def to(dictionary: SAE, _: torch.device) -> SAE:
        counts.append(len(alive))
        alive.add(copied := SAE.from_state(dictionary.state()))
        return copied

    monkeypatch.setattr(SAE, "to", to)
    monkeypatch.setattr("difflex.evaluation.effect.find_device", lambda: torch.device("meta"))
    measure_effects(both, x.mean((0, 1)), lambda edits: outcomes(edits, x), lambda edits: images(edits, x))
    assert len(counts) == 8 and not any(counts)


def test_no_shots_and_nan_predictions_are_errors():
    x = gaussian(2 * 6).view(2, 6, WIDTH).float()
    with pytest.raises(BadInput, match="no shots"):
        measure_effects([planted_sae()], torch.zeros(WIDTH), lambda _: ())
    with pytest.raises(NonFinite, match=r"With mean in the place of double\.1 the predictions of the model hold NaN"):
        measure_effects([planted_sae()], torch.full((WIDTH,), torch.nan), lambda edits: outcomes(edits, x))


def test_nan_images_are_an_error():
    x = gaussian(2 * 6).view(2, 6, WIDTH).float()

    def nan_images(edits: Edits) -> Iterator[EditOutcomes]:
        for outcome in images(edits, x):
            yield outcome._replace(edited={name: torch.nan * image for name, image in outcome.edited.items()})

    with pytest.raises(NonFinite, match=r"With reconstruction 0 by double\.1/topk-16-k3 in .* the images of the model hold NaN"):
        measure_effects([planted_sae()], torch.zeros(WIDTH), lambda edits: outcomes(edits, x), nan_images)


def test_relative_effects_are_nan_if_the_ablation_changes_nothing():
    nothing = ReplacementEffect(reconstruction=0.0, mean=0.0, zero=0.0)
    assert math.isnan(nothing.of_mean) and math.isnan(nothing.of_zero)


def test_sampled_shots_are_reproducible_distinct_and_sorted_by_timestep():
    shots = sample_shots(batches(gaussian()), shot, 20)
    assert shots == sample_shots(batches(gaussian()), shot, 20) and len({sample.seed for sample in shots}) == 20
    timesteps = [sample.timestep or 0.0 for sample in shots]
    assert timesteps == sorted(timesteps, reverse=True) and set(timesteps) == set(TIMESTEPS)
    assert shots != sample_shots(batches(gaussian()), shot, 20, seed=1)
    assert len(sample_shots(batches(gaussian(70)), shot, 20)) == 10  # all of them


def test_shots_of_given_images_are_not_sampled():
    assert sample_shots(batches(gaussian()), lambda number: replace(shot(number), image="a.png", noise=0.5), 20) == []


def evaluated(dictionary: str = "") -> Evaluation:
    x = gaussian(2 * 6).view(2, 6, WIDTH).float()
    evaluation = evaluate(
        planted_sae(whitened(gaussian())), batches(gaussian()), shot, fingerprint=dictionary, data="a Gaussian, seed 0"
    )
    (effect,) = measure_effects(
        [planted_sae()], torch.zeros(WIDTH), lambda edits: outcomes(edits, x), lambda edits: images(edits, x)
    )
    return replace(evaluation, effect=effect)


def test_evaluations_survive_saving_and_loading(tmp_path: Path):
    path = tmp_path / "evaluation" / "double.1" / "topk.json"
    for evaluation in (evaluated(), replace(evaluated(), effect=None), evaluate(planted_sae(), batches(gaussian()), shot)):
        assert Evaluation.load(evaluation.save(path)) == evaluation
    assert [each.name for each in path.parent.iterdir()] == ["topk.json"]
    assert next(iter(json.loads(path.read_text()))) == "format"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"format": 1}, "format 1; this version of difflex reads format 2"),
        ({"colour": "red"}, "cannot be read as results of difflex evaluate"),
        ({"overall": {"tokens": 3}}, "cannot be read as results of difflex evaluate"),
        ({"timesteps": [1]}, "cannot be read as results of difflex evaluate"),
        ({"effect": {"shots": 1}}, "cannot be read as results of difflex evaluate"),
    ],
)
def test_files_that_are_not_evaluations_are_refused(tmp_path: Path, change: Mapping[str, object], complaint: str):
    path = evaluated().save(tmp_path / "one.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "checksum": None, **change}))
    with pytest.raises(BrokenFile, match=f"one.json .*{complaint}"):
        Evaluation.load(path)


def test_truncated_and_missing_files_are_refused(tmp_path: Path):
    path = evaluated().save(tmp_path / "one.json")
    path.write_text(path.read_text()[:-20])
    with pytest.raises(BrokenFile, match="not JSON"):
        Evaluation.load(path)
    with pytest.raises(BadInput, match="difflex evaluate makes it"):
        Evaluation.load(tmp_path / "other.json")


def test_an_evaluation_detects_a_changed_dictionary(tmp_path: Path):
    folder = planted_sae().save(tmp_path / "dictionary")
    evaluation = evaluated(fingerprint(folder))
    assert evaluation.is_of(folder)
    planted_sae().save(folder)  # the same again
    assert evaluation.is_of(folder)
    planted_sae(k=4).save(folder)  # the same tensors, other codes
    assert not evaluation.is_of(folder)
    changed = planted_sae()
    changed.weights.decoder[0] *= 1.001
    changed.save(folder)
    assert not evaluation.is_of(folder)
    with pytest.raises(BadInput, match="holds no dictionary"):
        fingerprint(tmp_path)


def test_a_saved_dictionary_has_the_same_evaluation(tmp_path: Path):
    dictionary = planted_sae(whitened(gaussian()))
    again = Dictionary.load(dictionary.save(tmp_path / "dictionary"))
    assert evaluate(again, batches(gaussian()), shot) == evaluate(dictionary, batches(gaussian()), shot)


def harvest(study: Study, shots: Iterable[Shot]) -> None:
    record(study.activations, shots, [SITE], FakeHarvest(width=WIDTH), RecordingConfig(progress=False))


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """Return a study with activations and two dictionaries."""
    study = Study.begin(tmp_path / "study", "fake")
    harvest(study, fake_shots(200))
    for k in (2, 4):
        planted_sae(k=k).save(study.dictionary(SITE, f"topk-16-k{k}"))
    return study


def summing_model(calls: list[int]) -> Callable[[Site, Sequence[Shot]], EditedModel]:
    """Return a model on fixed shots, which adds the number of requested shots to `calls`."""
    x = gaussian(4 * 6).view(4, 6, WIDTH).float()

    def model(_: Site, shots: Sequence[Shot]) -> EditedModel:
        calls.append(len(shots))
        return EditedModel(lambda edits: outcomes(edits, x), None)

    return model


def test_only_missing_and_outdated_evaluations_are_measured(study: Study):
    calls: list[int] = []

    def up_to_date(shots: int = 4) -> list[bool]:
        results = evaluate_study(study, EvaluationConfig(shots=shots), summing_model(calls), progress=False)
        return [result.up_to_date for result in results.values()]

    assert up_to_date() == [False, False] and calls == [4]  # one call for both dictionaries
    assert up_to_date() == up_to_date(shots=0) == up_to_date(shots=3) == [True, True] and calls == [4]
    study.evaluation(SITE, "topk-16-k2").unlink()
    assert up_to_date() == [False, True] and calls == [4, 4]
    planted_sae(k=3).save(study.dictionary(SITE, "topk-16-k4"))
    assert up_to_date() == [True, False] and calls == [4, 4, 4]
    shutil.rmtree(study.activations)
    harvest(study, fake_shots(200, word="heart"))
    assert up_to_date() == [False, False]
    tokens = Store.open(study.stores()[SITE]).count("held-out")
    data = Evaluation.load(study.evaluation(SITE, "topk-16-k2")).data
    assert data.startswith(f"{tokens} of {tokens} held-out tokens of double.1 of fake, seed 0, ")


def test_a_missing_effect_is_measured_later_and_the_rest_is_kept(study: Study):
    ref = DictionaryRef(SITE, "topk-16-k2")
    before, after = (
        evaluate_study(study, EvaluationConfig(shots=shots), summing_model([]), progress=False)[ref].evaluation
        for shots in (0, 32)
    )
    assert before.effect is None and after.effect is not None
    assert replace(after, effect=None) == before and Evaluation.load(study.evaluation(*ref)) == after


def test_effects_are_skipped_with_a_warning_if_shots_are_of_given_images(study: Study):
    shutil.rmtree(study.activations)
    harvest(study, (replace(shot, image="a.png", noise=0.5) for shot in fake_shots(200)))
    with pytest.warns(UserWarning, match="of given images"):
        results = evaluate_study(study, EvaluationConfig(), summing_model([]), progress=False)
    assert all(result.evaluation.effect is None for result in results.values())
