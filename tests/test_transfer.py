"""Dictionaries at each step of a run: explained variance, overlap of adjacent steps, other models."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from difflex.cli import main
from difflex.dictionaries import SAE, Dictionary, DictionaryOrigin, Normalisation, SAEWeights
from difflex.errors import BadInput
from difflex.evaluation.transfer import TransferResults, mean_cosine, measure_transfer
from difflex.records import Activations, Codes, Shot, Site
from difflex.study import Study
from difflex.testing import tiny_folder

SITE, WIDTH, IMAGES, TOKENS = Site("double.1"), 6, 12, 5
LABEL = "topk-32-k4"


def dictionary(k: int = 2) -> Dictionary:
    decoder = F.normalize(torch.randn(10, WIDTH, generator=torch.Generator().manual_seed(0)), dim=1)
    weights = SAEWeights(encoder=decoder, decoder=decoder, bias=torch.zeros(WIDTH), encoder_bias=torch.zeros(10), thresholds=None)
    normalisation = Normalisation.identity(WIDTH)
    return SAE(kind="topk", k=k, origin=DictionaryOrigin(site=SITE), normalisation=normalisation, weights=weights, relu=True)


def activations(steps: Tensor, batch: int) -> Iterator[Activations]:
    """Those of `steps` [step, image, token, width], all steps of a batch after one another."""
    for start in range(0, steps.shape[1], batch):
        for number, values in enumerate(steps[:, start : start + batch]):
            shots = tuple(
                Shot(model="m", prompt=f"p{start + i}", pixels=(8, 8), steps=2, guidance=0.0, timestep=1000.0 - number)
                for i in range(len(values))
            )
            yield Activations(site=SITE, values=values, shots=shots, grid=None)


def dense(codes: Codes) -> Tensor:
    return torch.zeros(len(codes.values), 10).scatter_add(1, codes.indices, codes.values)


def test_the_overlap_is_the_mean_cosine_of_codes():
    x, y = torch.randn(2, 300, WIDTH, generator=torch.Generator().manual_seed(1))
    codes, others = dictionary().encode(x), dictionary(4).encode(y)
    expected = F.cosine_similarity(dense(codes), dense(others)).mean()
    assert mean_cosine(codes, others) == pytest.approx(float(expected), abs=1e-6)
    assert mean_cosine(codes, codes) == pytest.approx(1)
    assert mean_cosine(codes, Codes(torch.zeros(300, 2), torch.zeros(300, 2).long())) == 0


def test_explained_variance_is_that_of_each_step_and_equal_steps_overlap_in_full():
    steps = torch.randn(1, IMAGES, TOKENS, WIDTH, generator=torch.Generator().manual_seed(2)).expand(2, -1, -1, -1).clone()
    steps[1] *= 3
    results = measure_transfer(activations(steps, 4), {"d": dictionary()})["d"]
    assert [step.timestep for step in results] == [1000.0, 999.0] and results[0].overlap is None
    for step, values in zip(results, steps.flatten(1, 2), strict=True):
        error = values - dictionary().decode(dictionary().encode(values))
        assert step.ev is not None and step.tokens == IMAGES * TOKENS
        assert step.ev.value == pytest.approx(float((1 - error.var(0) / values.var(0)).mean()), abs=1e-5)
        assert step.ev.low < step.ev.value < step.ev.high
    last = results[1]
    assert last.overlap is not None and last.chance is not None
    assert last.overlap == pytest.approx((1.0, 1.0, 1.0)), "a code does not turn with the length of an activation"
    assert last.chance < 0.7


def test_results_do_not_depend_on_the_batch_and_another_width_is_refused():
    steps = torch.randn(2, IMAGES, TOKENS, WIDTH, generator=torch.Generator().manual_seed(3))
    one, six = (measure_transfer(activations(steps, batch), {"d": dictionary()})["d"][1] for batch in (1, 6))
    assert one.overlap == pytest.approx(six.overlap) and one.ev == pytest.approx(six.ev)
    assert one.chance is None
    with pytest.raises(BadInput, match="width 6"):
        measure_transfer(activations(steps[..., :3], 1), {"d": dictionary()})


def test_a_study_is_measured_at_the_steps_of_its_model_and_of_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    models = [tiny_folder("flux", tmp_path / name, seed, {"pixels": [[16, 24]]}) for seed, name in enumerate(("own", "other"))]
    (tmp_path / "prompts.txt").write_text("\n".join(f"star {number}" for number in range(40)))
    study = tmp_path / "study"
    prompts = ["--prompts", str(tmp_path / "prompts.txt")]
    assert main(["harvest", str(models[0]), *prompts, "--out", str(study), "--site", str(SITE), "--steps", "1"]) == 0
    sizes = ["--k", "4", "--size", "32", "--tokens", "500", "--batch", "64"]
    assert main(["train", str(study), "--site", str(SITE), *sizes]) == 0
    assert main(["transfer", str(study), "--steps", "3", "--images", "3"]) == 0
    assert main(["transfer", str(study), "--images", "2", "--seeds", "5:7"]) == 0
    words = ["transfer", str(study), "--model", str(models[1]), *prompts, "--images", "4", "--batch", "3"]
    assert main(words) == 0
    assert "overlap" in (output := capsys.readouterr().out) and "measured" in output
    assert main(words) == 0
    assert "up to date" in capsys.readouterr().out
    files = Study.open(study).transfers()
    assert files == [Study.open(study).transfer(SITE, LABEL, name) for name in ("other-2", "own-1-seeds-5-7", "own-3")]
    other, _, own = map(TransferResults.load, files)
    assert (own.is_of_own_model, other.is_of_own_model) == (True, False)
    assert len(own.steps) == 3 and len(other.steps) == 2 and other.inputs.images == 4
    wide = tiny_folder("sd3", tmp_path / "wide")
    for model, message in ((str(wide), "is unknown"), (str(tmp_path / "none"), "none")):
        assert main(["transfer", str(study), "--model", model]) == 2
        assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert main(["transfer", str(study), "--revision", "main"]) == 2
