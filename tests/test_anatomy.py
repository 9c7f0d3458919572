"""The anatomy of activations: norms, spectra and figures of planted activations."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from difflex.errors import BadInput, BrokenFile
from difflex.evaluation.anatomy import Anatomy, AnatomyInputs, heat_map, measure_anatomy, spectra_figure
from difflex.records import Activations, Shot, Site

SHOT = Shot(model="planted", pixels=(8, 8), steps=2, guidance=0.0)
WIDTH = 12


def activations(values: Tensor, site: str = "double.0", timestep: float = 1000.0) -> Activations:
    shots = tuple(replace(SHOT, seed=seed, timestep=timestep) for seed in range(len(values)))
    return Activations(site=Site.parse(site), values=values, shots=shots, grid=None)


def cloud(deviations: Tensor, rotation: Tensor, mean: float = 0.0, parts: int = 3) -> list[Activations]:
    """Return 20 000 points with known standard deviations along the rows of `rotation`."""
    points = torch.randn(4, 5000, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = ((points * deviations) @ rotation + mean).float()
    return [activations(part) for part in values.chunk(parts)]


def rotation() -> Tensor:
    return torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q


DEVIATIONS = torch.tensor([30.0, 10.0, *[1.0] * (WIDTH - 2)], dtype=torch.float64)


def test_norms_are_means_over_tokens_by_site_and_timestep():
    values = torch.zeros(2, 3, 4)
    values[0, :, 0], values[1, :, 1] = 3.0, 5.0
    anatomy = measure_anatomy(
        [activations(values), activations(2 * values, timestep=500.0), activations(values[:1], "single.1:text")]
    )
    assert anatomy.norms == {
        Site("double.0"): {1000.0: 4.0, 500.0: 8.0},
        Site("single.1", stream="text"): {1000.0: 3.0},
    }


def test_a_planted_spectrum_is_recovered_under_a_large_offset():
    shape = measure_anatomy(cloud(DEVIATIONS, rotation(), mean=500.0)).shapes[Site("double.0")]
    torch.testing.assert_close(torch.tensor(shape.variances[:2]), torch.tensor([900.0, 100.0]), rtol=0.05, atol=0)
    torch.testing.assert_close(torch.tensor(shape.variances[2:]), torch.ones(WIDTH - 2), rtol=0.1, atol=0)
    assert shape.components_for_90 == 2 and shape.tokens == 20_000
    assert abs(shape.share(1) - 900 / 1010) < 0.01
    assert abs(shape.offset - 500 * WIDTH**0.5 / 1010**0.5) < 1


def test_alignments_distinguish_coordinate_axes_from_other_directions():
    along = measure_anatomy(cloud(DEVIATIONS, torch.eye(WIDTH, dtype=torch.float64))).shapes[Site("double.0")]
    across = measure_anatomy(cloud(DEVIATIONS, rotation())).shapes[Site("double.0")]
    assert along.alignments[0] > 0.99 and across.alignments[0] < 0.7
    (first, ratio, _), (second, *_), *_ = along.outliers
    assert (first, second) == (0, 1) and 800 < ratio < 1000


def test_batch_size_does_not_change_the_spectrum():
    whole, parts = (measure_anatomy(cloud(DEVIATIONS, rotation(), 3.0, batches)).shapes[Site("double.0")] for batches in (1, 4))
    torch.testing.assert_close(torch.tensor(whole.variances), torch.tensor(parts.variances), rtol=1e-9, atol=1e-9)


def test_spectra_are_measured_only_at_given_sites():
    values = torch.randn(2, 3, 4)
    anatomy = measure_anatomy([activations(values), activations(values, "double.1")], spectra=[Site("double.1")])
    assert list(anatomy.shapes) == [Site("double.1")] and len(anatomy.norms) == 2


def test_anatomies_survive_saving_and_loading(tmp_path: Path):
    inputs = AnatomyInputs(
        model="planted",
        revision=None,
        precision=None,
        pixels=(8, 8),
        steps=2,
        guidance=0.0,
        prompts="none",
        max_prompts=4,
        sites=(Site("double.0"),),
        spectra=(Site("double.0"), Site("single.1", stream="text")),
    )
    anatomy = replace(measure_anatomy(cloud(DEVIATIONS, rotation())), inputs=inputs)
    anatomy.save(tmp_path / "anatomy.json")
    assert Anatomy.load(tmp_path / "anatomy.json") == anatomy
    (tmp_path / "anatomy.json").write_text('{"format": 7}')
    with pytest.raises(BrokenFile, match=r"anatomy\.json is of format 7"):
        Anatomy.load(tmp_path / "anatomy.json")


def test_figures_show_larger_norms_brighter_and_one_curve_per_site():
    values = torch.randn(2, 30, WIDTH)
    anatomy = measure_anatomy([activations(values), activations(100 * values, "double.1"), activations(values, "double.0:text")])
    image = heat_map(anatomy)
    left, top = image.width, 0
    rows = {sum(image.getpixel((x, y))) for x in range(left) for y in range(top, image.height)}  # pyright: ignore[reportArgumentType, reportCallIssue]
    assert {13 + 8 + 60, 245 + 235 + 150} <= rows  # both ends of the ramp
    colours = {colour for _, colour in spectra_figure(anatomy).getcolors(1 << 20) or ()}
    assert {(0, 0x72, 0xB2), (0xD5, 0x5E, 0), (0, 0x9E, 0x73)} <= colours and (0xCC, 0x79, 0xA7) not in colours


def test_missing_activations_and_streams_are_refused():
    with pytest.raises(BadInput, match="No activations"):
        measure_anatomy([])
    with pytest.raises(BadInput, match="text stream"):
        heat_map(measure_anatomy([activations(torch.randn(1, 3, 4))]), "text")
