"""Figures against closed forms, evaluations against planted dictionaries, effects against models that are functions."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from difflex.dictionaries import SAE, Dictionary, DictionaryOrigin, Neurons, Normalisation, SAEWeights, fingerprint
from difflex.dictionaries.normalisation import VectorMoments
from difflex.errors import BadInput, BrokenFile, NonFinite
from difflex.evaluation import EditedModel, Evaluation, evaluate
from difflex.evaluation.effect import Edits, measure_effects, sample_shots
from difflex.evaluation.image_similarity import ssim
from difflex.evaluation.reconstruction import JointMoments
from difflex.evaluation.record import ModelEffect, ReconstructionMetrics, ReplacementEffect
from difflex.evaluation.run import HeldOutData, evaluate_all
from difflex.records import ActivationBatch, EditOutcomes, Shot, Site, Split
from difflex.store.reading import SplitBatches

WIDTH, TIMESTEPS = 8, (1000.0, 500.0, 250.0)
SHOT = Shot(model="planted", pixels=(8, 8), steps=3, guidance=0.0, split="held-out")


def cloud(tokens: int = 2000, offset: float = 0.0, seed: int = 0) -> Tensor:
    points = torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return points * torch.arange(1, WIDTH + 1) + offset


def shot(number: int) -> Shot:
    return replace(SHOT, seed=number, timestep=TIMESTEPS[number % len(TIMESTEPS)])


def batches(x: Tensor, size: int = 300, split: Split = "held-out") -> Iterator[ActivationBatch]:
    numbers = torch.arange(len(x)) // 7
    parts = zip(x.float().split(size), numbers.split(size), strict=True)
    return SplitBatches((ActivationBatch(values, shots, torch.zeros_like(shots)) for values, shots in parts), split)


def autoencoder(normalisation: Normalisation | None = None, k: int = 3, dead: int = 0) -> SAE:
    """Features that are the axes, both ways along each, and `dead` ones that no token excites."""
    axes = torch.cat([torch.eye(WIDTH), -torch.eye(WIDTH), torch.eye(WIDTH)[torch.arange(dead) % WIDTH]])
    bias = torch.zeros(len(axes))
    bias[2 * WIDTH :] = -1e6
    return SAE(
        kind="topk",
        k=k,
        origin=DictionaryOrigin(site=Site("double.1")),
        normalisation=normalisation or Normalisation.identity(WIDTH),
        weights=SAEWeights(encoder=axes, decoder=axes.clone(), bias=torch.zeros(WIDTH), encoder_bias=bias),
    )


def whitened(x: Tensor) -> Normalisation:
    moments = VectorMoments(WIDTH, covariance=True)
    moments.add(x)
    return moments.normalisation("whiten")


def plainly(x: Tensor, y: Tensor) -> ReconstructionMetrics:
    """The formulas as they are written, on all of the data at once."""
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


def assert_near(one: ReconstructionMetrics | None, other: ReconstructionMetrics | None, tolerance: float = 1e-9) -> None:
    assert one is not None and other is not None
    assert vars(one) == pytest.approx(vars(other), rel=tolerance, abs=tolerance)


def test_a_perfect_reconstruction_leaves_nothing():
    x = cloud()
    assert_near(metrics_of(x, x), ReconstructionMetrics(fvu=0.0, fvu_raw=0.0, r2=1.0, ev=1.0, cosine=1.0))


@pytest.mark.parametrize("a", [0.1, 0.5, 2.0, -1.0])
def test_r2_is_blind_to_a_scale_that_the_others_see(a: float):
    x = cloud()
    x = x - x.mean(0)
    left = (1 - a) ** 2
    assert_near(
        metrics_of(x, a * x), ReconstructionMetrics(fvu=left, fvu_raw=left, r2=1.0, ev=1 - left, cosine=math.copysign(1, a))
    )


def test_an_offset_is_seen_by_fvu_alone():
    x = cloud()
    found = metrics_of(x, x + 5)
    assert found.fvu == pytest.approx(25 * x.numel() / float((x - x.mean(0)).square().sum()))
    assert found.ev == pytest.approx(1) and found.r2 == pytest.approx(1)


def test_the_mean_alone_explains_no_variance_but_most_of_the_length():
    x = cloud(offset=50.0)
    found = metrics_of(x, x.mean(0).expand_as(x))
    assert found.fvu == pytest.approx(1, abs=1e-12) and found.r2 == 0.0 and found.ev == pytest.approx(0, abs=1e-12)
    assert found.fvu_raw is not None and found.fvu_raw < 0.02


def test_axes_that_do_not_vary_are_left_out():
    x = cloud(offset=0.3)
    wide = torch.cat([x, torch.full((len(x), 2), 0.7, dtype=x.dtype)], dim=1)
    noisy = wide + 0.1 * torch.randn(wide.shape, generator=torch.Generator().manual_seed(3))
    found, narrow = metrics_of(wide, noisy), metrics_of(x, noisy[:, :WIDTH])
    assert found.r2 == pytest.approx(narrow.r2) and found.ev == pytest.approx(narrow.ev)
    still = metrics_of(torch.ones(9, 2), torch.zeros(9, 2))
    assert (still.fvu, still.fvu_raw, still.r2, still.ev) == (None, 1.0, None, None)


@pytest.mark.parametrize("offset", [0.0, 1e2, 1e6])
def test_merged_batches_give_the_plain_formula_whatever_the_mean(offset: float):
    x = cloud(offset=offset)
    y = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    parts = [JointMoments.of(a, b) for a, b in zip(x.split([1, 2, 997, 1000]), y.split([1, 2, 997, 1000]), strict=True)]
    assert_near(reduce(JointMoments.merge, parts).metrics(), plainly(x, y), 1e-6 if offset == 1e6 else 1e-9)


def test_an_evaluation_is_the_plain_formula_in_both_spaces():
    x = cloud(3001, offset=100.0)
    normalisation = whitened(x)
    dictionary = autoencoder(normalisation)
    found = evaluate(dictionary, batches(x), shot)
    y = dictionary.decode(dictionary.encode(x.float()))
    assert_near(found.overall.model_space, plainly(x.float().double(), y.double()), 1e-5)
    z = normalisation.apply(x.float())
    assert_near(found.overall.normalised_space, plainly(z.double(), normalisation.apply(y).double()), 1e-4)
    assert found.tokens == 3001 and found.dictionary == "double.1/topk-16-k3"


def test_each_timestep_is_what_its_tokens_alone_would_give():
    x, dictionary = cloud(), autoencoder(whitened(cloud()))
    found = evaluate(dictionary, batches(x), shot)
    assert list(found.timesteps) == sorted(TIMESTEPS, reverse=True)
    for timestep, quality in found.timesteps.items():
        here = torch.tensor([TIMESTEPS[row // 7 % len(TIMESTEPS)] == timestep for row in range(len(x))])
        alone = evaluate(dictionary, batches(x[here]), lambda _, at=timestep: replace(SHOT, timestep=at))
        assert quality.tokens == int(here.sum()) and quality.l0 == alone.overall.l0
        assert_near(quality.model_space, alone.overall.model_space, 1e-6)
        assert_near(quality.normalised_space, alone.overall.normalised_space, 1e-6)


def test_how_rows_are_batched_changes_nothing():
    x, dictionary = cloud(), autoencoder(whitened(cloud()))
    one, many = (evaluate(dictionary, batches(x, size), shot) for size in (2000, 11))
    assert_near(one.overall.model_space, many.overall.model_space, 1e-6)
    assert (one.density, one.dead, one.overall.l0) == (many.density, many.dead, many.overall.l0)


def test_no_more_tokens_are_taken_than_asked_and_no_more_batches():
    left = batches(cloud(), 300)
    found = evaluate(autoencoder(), left, shot, tokens=700)
    assert found.tokens == 700 and sum(quality.tokens for quality in found.timesteps.values()) == 700
    assert len(next(left).values) == 300  # the fourth; the third was cut


def test_planted_dead_features_are_counted_and_densities_binned():
    x = torch.zeros(1000, WIDTH)
    x[:, 0] = 1.0  # at every token
    x[:100, 1] = 1.0  # at a tenth of them
    x[:3, 2] = -1.0  # the other way, at three
    found = evaluate(autoencoder(dead=5), batches(x), shot)
    assert found.size == 2 * WIDTH + 5 and found.dead == found.size - 3 and found.dead_share == found.dead / found.size
    counts = dict(zip(found.edges, found.density, strict=False))
    assert {edge: count for edge, count in counts.items() if count} == {-0.25: 1, -1.0: 1, -2.75: 1}
    assert found.overall.l0 == pytest.approx(1.103) and found.overall.negative == 0


def test_a_feature_fires_where_it_is_positive_only():
    site = Site("double.1", "neurons")
    neurons = Neurons(width=WIDTH, k=2, origin=DictionaryOrigin(site=site))
    x = torch.zeros(10, WIDTH)
    x[:, 0], x[:, 1] = 1.0, -3.0
    found = evaluate(neurons, batches(x), shot)
    assert found.dead == WIDTH - 1 and found.overall.l0 == 2 and found.overall.negative == 0.5
    assert found.overall.normalised_space is None and found.overall.model_space.fvu_raw == 0


def test_a_dictionary_that_normalises_nothing_has_one_space():
    assert evaluate(autoencoder(), batches(cloud()), shot).overall.normalised_space is None


def test_rows_to_train_on_are_refused():
    with pytest.raises(BadInput, match="'held-out'"):
        evaluate(autoencoder(), batches(cloud(), split="train"), shot)


def test_what_cannot_be_evaluated_is_said():
    x = cloud()
    with pytest.raises(BadInput, match="0 tokens"):
        evaluate(autoencoder(), batches(x), shot, tokens=0)
    with pytest.raises(BadInput, match="no held-out tokens"):
        evaluate(autoencoder(), iter(()), shot)
    with pytest.raises(BadInput, match=r"takes activations \[token, 8\]"):
        evaluate(autoencoder(), batches(x[:, :5]), shot)
    x[1234, 2] = torch.nan
    with pytest.raises(NonFinite, match=r"activations for double\.1/topk-16-k3 hold NaN"):
        evaluate(autoencoder(), batches(x), shot)
    broken = autoencoder()
    broken.weights.decoder[0] = torch.nan
    with pytest.raises(NonFinite, match="The reconstruction by"):
        evaluate(broken, batches(cloud()), shot)


def outcomes(edits: Edits, x: Tensor) -> Iterator[EditOutcomes]:
    """What a model would give that predicts the sum of its tokens, and draws it."""
    for i, values in enumerate(x.split(2)):
        edited = {name: edit(values, None).sum(1) for name, edit in edits.items()}
        yield EditOutcomes((shot(2 * i), shot(2 * i + 1)), values.sum(1), edited)


def images(edits: Edits, x: Tensor) -> Iterator[EditOutcomes]:
    def drawn(values: Tensor) -> Tensor:
        return values.sigmoid().mean(1)[:, :1, None, None].expand(-1, 3, 16, 16)

    for outcome in outcomes({}, x):
        yield outcome._replace(plain=drawn(x), edited={name: drawn(edit(x, None)) for name, edit in edits.items()})


def test_the_effect_of_a_perfect_dictionary_is_none_and_zero_ablation_takes_all():
    x = cloud(4 * 6).view(4, 6, WIDTH).float()
    (found,) = measure_effects([autoencoder(k=WIDTH)], torch.zeros(WIDTH), lambda edits: outcomes(edits, x))
    assert found.shots == 4 and found.images == 0 and found.image_error is None and found.psnr is None
    assert found.prediction.reconstruction < 1e-12
    assert found.prediction.zero == pytest.approx(1) and found.prediction.mean == pytest.approx(1)
    assert found.prediction.of_zero < 1e-12 and found.prediction.of_mean < 1e-12


def test_effects_have_closed_forms_for_a_linear_model():
    x = cloud(4 * 6, offset=3.0).view(4, 6, WIDTH).float()
    mean, dictionary = x.mean((0, 1)), autoencoder(k=3)
    (found,) = measure_effects([dictionary], mean, lambda edits: outcomes(edits, x))
    plain = x.sum(1).double()
    left = (x - dictionary.decode(dictionary.encode(x.flatten(0, 1))).view(x.shape)).sum(1).double()
    rows = {"reconstruction": left, "mean": plain - 6 * mean.double(), "zero": plain}
    for name, change in rows.items():
        share = float(change.square().sum() / plain.square().sum())
        assert getattr(found.prediction, name) == pytest.approx(share, rel=1e-4)
    first = float(left[[0, 3]].square().sum() / plain[[0, 3]].square().sum())  # shots 0 and 3 are of one timestep
    assert found.timesteps[1000.0].reconstruction == pytest.approx(first, rel=1e-4)


def test_images_are_compared_by_psnr_ssim_and_whatever_else_is_asked():
    x = cloud(2 * 6).view(2, 6, WIDTH).float()
    (found,) = measure_effects(
        [autoencoder(k=WIDTH)],
        torch.zeros(WIDTH),
        lambda edits: outcomes(edits, x),
        lambda edits: images(edits, x),
        measures={"largest": lambda edited, plain: (edited - plain).abs().amax((1, 2, 3))},
    )
    assert found.images == 2 and found.psnr is not None and found.image_error is not None
    assert found.psnr.reconstruction > 100 > found.psnr.zero == pytest.approx(-10 * math.log10(found.image_error.zero))
    assert found.similarity["ssim"].reconstruction == pytest.approx(1) and found.similarity["ssim"].zero < 1
    assert found.similarity["largest"].zero > found.similarity["largest"].reconstruction


def test_dictionaries_measured_together_have_the_effects_they_have_alone():
    x = cloud(4 * 6).view(4, 6, WIDTH).float()
    both = [autoencoder(k=2), autoencoder(k=4)]

    def measured(dictionaries: list[SAE]) -> list[ModelEffect]:
        return measure_effects(dictionaries, x.mean((0, 1)), lambda edits: outcomes(edits, x), lambda edits: images(edits, x))

    assert measured(both) == [*measured(both[:1]), *measured(both[1:])]
    assert measured(both)[0].prediction.reconstruction > measured(both)[1].prediction.reconstruction


def test_a_model_without_shots_or_with_nan_is_an_error():
    x = cloud(2 * 6).view(2, 6, WIDTH).float()
    with pytest.raises(BadInput, match="no shots"):
        measure_effects([autoencoder()], torch.zeros(WIDTH), lambda _: ())
    with pytest.raises(NonFinite, match=r"With mean in the place of double\.1 the predictions of the model hold NaN"):
        measure_effects([autoencoder()], torch.full((WIDTH,), torch.nan), lambda edits: outcomes(edits, x))


def test_images_of_nan_are_an_error():
    x = cloud(2 * 6).view(2, 6, WIDTH).float()

    def spoilt(edits: Edits) -> Iterator[EditOutcomes]:
        for each in images(edits, x):
            yield each._replace(edited={name: torch.nan * image for name, image in each.edited.items()})

    with pytest.raises(NonFinite, match=r"With reconstruction 0 by double\.1/topk-16-k3 in .* the images of the model hold NaN"):
        measure_effects([autoencoder()], torch.zeros(WIDTH), lambda edits: outcomes(edits, x), spoilt)


def test_an_ablation_that_changes_nothing_has_no_share():
    nothing = ReplacementEffect(reconstruction=0.0, mean=0.0, zero=0.0)
    assert math.isnan(nothing.of_mean) and math.isnan(nothing.of_zero)


def test_some_shots_are_the_same_each_time_distinct_and_by_timestep():
    found = sample_shots(batches(cloud()), shot, 20)
    assert found == sample_shots(batches(cloud()), shot, 20) and len({each.seed for each in found}) == 20
    timesteps = [each.timestep or 0.0 for each in found]
    assert timesteps == sorted(timesteps, reverse=True) and set(timesteps) == set(TIMESTEPS)
    assert found != sample_shots(batches(cloud()), shot, 20, seed=1)
    assert len(sample_shots(batches(cloud(70)), shot, 20)) == 10  # all there are


def test_shots_of_given_images_cannot_be_walked_again():
    assert sample_shots(batches(cloud()), lambda number: replace(shot(number), image="a.png", noise=0.5), 20) == []


def test_ssim_of_flat_images_has_a_closed_form():
    a, b = 0.25, 0.75
    flat = (2 * a * b + 0.01**2) / (a * a + b * b + 0.01**2)
    found = ssim(torch.full((2, 3, 16, 12), a), torch.full((2, 3, 16, 12), b))
    assert found.tolist() == pytest.approx([flat, flat])


def test_ssim_is_the_published_formula_window_by_window():
    x, y = torch.rand(2, 1, 1, 13, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    bell = torch.exp(-((torch.arange(11) - 5.0) ** 2) / (2 * 1.5**2)).double()
    window = torch.outer(bell, bell) / bell.sum() ** 2
    values = []
    for row, column in [(row, column) for row in range(3) for column in range(2)]:
        a, b = (image[0, 0, row : row + 11, column : column + 11] for image in (x, y))
        m, n = (window * a).sum(), (window * b).sum()
        spread = (window * (a - m) ** 2).sum() + (window * (b - n) ** 2).sum()
        together = (window * (a - m) * (b - n)).sum()
        values.append((2 * m * n + 1e-4) / (m * m + n * n + 1e-4) * (2 * together + 9e-4) / (spread + 9e-4))
    assert float(ssim(x, y)) == pytest.approx(float(torch.stack(values).mean()))
    assert float(ssim(x, x)) == pytest.approx(1) and float(ssim(x, 1 - x)) < 0


def test_images_too_small_for_a_window_are_refused():
    with pytest.raises(BadInput, match="10 x 40"):
        ssim(torch.zeros(1, 3, 10, 40), torch.zeros(1, 3, 10, 40))


def evaluated(of: str = "") -> Evaluation:
    x = cloud(2 * 6).view(2, 6, WIDTH).float()
    found = evaluate(autoencoder(whitened(cloud())), batches(cloud()), shot, fingerprint=of, data="a cloud, seed 0")
    (changed,) = measure_effects(
        [autoencoder()], torch.zeros(WIDTH), lambda edits: outcomes(edits, x), lambda edits: images(edits, x)
    )
    return replace(found, effect=changed)


def test_an_evaluation_is_read_as_it_was_saved(tmp_path: Path):
    path = tmp_path / "evaluation" / "double.1" / "topk.json"
    for found in (evaluated(), replace(evaluated(), effect=None), evaluate(autoencoder(), batches(cloud()), shot)):
        assert Evaluation.load(found.save(path)) == found
    assert [each.name for each in path.parent.iterdir()] == ["topk.json"]
    assert next(iter(json.loads(path.read_text()))) == "format"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"format": 1}, "format 1; this version of difflex reads format 2"),
        ({"colour": "red"}, "cannot be read as an evaluation"),
        ({"overall": {"tokens": 3}}, "cannot be read as an evaluation"),
        ({"timesteps": [1]}, "cannot be read as an evaluation"),
        ({"effect": {"shots": 1}}, "cannot be read as an evaluation"),
    ],
)
def test_files_that_are_no_evaluation_are_named(tmp_path: Path, change: Mapping[str, object], complaint: str):
    path = evaluated().save(tmp_path / "one.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(BrokenFile, match=f"one.json .*{complaint}"):
        Evaluation.load(path)


def test_a_file_cut_short_or_absent_is_named(tmp_path: Path):
    path = evaluated().save(tmp_path / "one.json")
    path.write_text(path.read_text()[:-20])
    with pytest.raises(BrokenFile, match="not JSON"):
        Evaluation.load(path)
    with pytest.raises(BadInput, match="has not been evaluated"):
        Evaluation.load(tmp_path / "other.json")


def test_a_dictionary_that_has_changed_since_is_told(tmp_path: Path):
    folder = autoencoder().save(tmp_path / "dictionary")
    found = evaluated(fingerprint(folder))
    assert found.is_of(folder)
    autoencoder().save(folder)  # the same again
    assert found.is_of(folder)
    autoencoder(k=4).save(folder)  # the same tensors, other codes
    assert not found.is_of(folder)
    changed = autoencoder()
    changed.weights.decoder[0] *= 1.001
    changed.save(folder)
    assert not found.is_of(folder)
    with pytest.raises(BadInput, match="holds no dictionary"):
        fingerprint(tmp_path)


def test_a_saved_dictionary_is_worth_what_it_was(tmp_path: Path):
    dictionary = autoencoder(whitened(cloud()))
    again = Dictionary.load(dictionary.save(tmp_path / "dictionary"))
    assert evaluate(again, batches(cloud()), shot) == evaluate(dictionary, batches(cloud()), shot)


def held_out(data: str = "tokens of a cloud") -> HeldOutData:
    rows = 2000
    return HeldOutData(
        data=data, batches=lambda: batches(cloud(rows)), shot=shot, tokens=rows, shots=286, mean=torch.zeros(WIDTH)
    )


def test_what_holds_is_kept_and_only_what_lacks_is_measured(tmp_path: Path):
    two = {autoencoder(k=k).save(tmp_path / f"k{k}"): tmp_path / f"k{k}.json" for k in (2, 4)}
    first, second = two
    x, asked = cloud(4 * 6).view(4, 6, WIDTH).float(), []

    def model(shots: Sequence[Shot]) -> EditedModel:
        asked.append(len(shots))
        return EditedModel(lambda edits: outcomes(edits, x), None)

    def kept(source: HeldOutData | None = None, shots: int = 4) -> list[bool]:
        return [each.up_to_date for each in evaluate_all(two, source or held_out(), model, shots=shots, progress=False).values()]

    assert kept() == [False, False] and asked == [4]  # the model is asked once for both
    assert kept() == kept(shots=0) == kept(shots=3) == [True, True] and asked == [4]
    two[first].unlink()
    assert kept() == [False, True] and asked == [4, 4]
    autoencoder(k=3).save(second)
    assert kept() == [True, False] and asked == [4, 4, 4]
    assert kept(held_out("tokens of another cloud")) == [False, False]
    assert Evaluation.load(two[first]).data == "2000 of tokens of another cloud"


def test_an_effect_that_was_left_out_is_measured_later_and_the_rest_is_kept(tmp_path: Path):
    folder, path = autoencoder().save(tmp_path / "dictionary"), tmp_path / "evaluation.json"
    x = cloud(4 * 6).view(4, 6, WIDTH).float()
    before = evaluate_all({folder: path}, held_out(), progress=False)[folder].evaluation
    after = evaluate_all(
        {folder: path}, held_out(), lambda _: EditedModel(lambda edits: outcomes(edits, x), None), progress=False
    )[folder]
    assert before.effect is None and after.evaluation.effect is not None
    assert replace(after.evaluation, effect=None) == before and Evaluation.load(path) == after.evaluation


def test_shots_of_images_have_no_effect_and_it_is_said(tmp_path: Path):
    folder = autoencoder().save(tmp_path / "dictionary")
    source = replace(held_out(), shot=lambda number: replace(shot(number), image="a.png", noise=0.5))
    with pytest.warns(UserWarning, match="of given images"):
        made = evaluate_all({folder: tmp_path / "one.json"}, source, lambda _: EditedModel(lambda _: (), None), progress=False)
    assert made[folder].evaluation.effect is None
