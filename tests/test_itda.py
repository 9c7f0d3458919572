"""ITDA: atoms are data, no atom is added without need, and no growth is lost by a kill."""

import json
import math
import multiprocessing
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from jaxtyping import TypeCheckError
from other_device import other_device
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from difflex.choices import PursuitName
from difflex.dictionaries import Dictionary, DictionaryOrigin, Normalisation
from difflex.dictionaries.files import write_files
from difflex.dictionaries.itda import ITDA, AtomProvenance, GrowthConfig, cluster_atoms, paper_config, remove_similar
from difflex.dictionaries.normalisation import estimate_normalisation
from difflex.dictionaries.pursuit import RULES, AtomSet, run_pursuit
from difflex.distributed import Ranks
from difflex.errors import BadInput, BrokenFile, NonFinite, OutOfMemory, StaleWork, UnknownName
from difflex.files import folder_lock
from difflex.records import ActivationBatch, Shot, Site
from difflex.store.reading import SplitBatches
from difflex.training.itda import GrowthData, GrowthInterval, GrowthWork, expected_over_threshold, grow
from difflex.training.itda import grower as grower_module
from difflex.training.itda.grower import AtomGrower
from difflex.training.itda.state import HoldOut, ThresholdTrial, expected_work, growth_exponent, is_settled, next_threshold

WIDTH, BATCH, TOKENS = 16, 64, 1024
ORIGIN = DictionaryOrigin(site=Site("double.18"), model="mini-flux")
CPU = torch.device("cpu")
PURSUITS = pytest.mark.parametrize("pursuit", RULES)


def cloud(count: int, seed: int = 0) -> Tensor:
    """Sparse mixtures of 40 directions, far from the origin, with axes of different spread."""
    fixed = torch.Generator().manual_seed(99)
    directions = F.normalize(torch.randn(40, WIDTH, generator=fixed), dim=1)
    generator = torch.Generator().manual_seed(seed)
    fires = torch.rand(count, 40, generator=generator) < 0.08
    amounts = fires * (0.5 + torch.rand(count, 40, generator=generator))
    noise = 0.05 * torch.randn(count, WIDTH, generator=generator)
    return (amounts @ directions + noise) * torch.linspace(1, 3, WIDTH) + 5


def rows(number: int, size: int = BATCH) -> ActivationBatch:
    """Batch `number`: token t of shot s is row s * 8 + t of the stream."""
    place = torch.arange(number * size, (number + 1) * size)
    return ActivationBatch(cloud(size, seed=number + 1), place // 8, place % 8)


def shot(number: int) -> Shot:
    return Shot(model="mini-flux", prompt=f"prompt {number}", seed=number, pixels=(64, 64), steps=4, guidance=1.0)


def stream(start: int, size: int = BATCH, tokens: int = TOKENS):
    return (rows(number, size) for number in range(start, tokens // size))


def source(**changes: object) -> GrowthData:
    return replace(GrowthData(batches=stream, tokens=TOKENS, data="cloud", shot=shot), **changes)


def growth(**changes: object) -> GrowthConfig:
    return replace(GrowthConfig(k=4, threshold=0.25, size=400, batch=BATCH, holdout=0), **changes)


def grown(folder: Path, **changes: object) -> ITDA:
    return grow({folder: growth(**changes)}, source(), origin=ORIGIN)[folder]


def normalised() -> Normalisation:
    return estimate_normalisation((batch.values for batch in stream(0)), "standardise")


def unexplained_share(z: Tensor, atoms: Tensor, pursuit: PursuitName, k: int = 4) -> Tensor:
    """The unexplained share of every row of `z`, by products alone."""
    return run_pursuit(AtomSet(atoms), RULES[pursuit], z, k).residual_energy / z.square().sum(1)


def all_rows() -> Tensor:
    return torch.cat([batch.values for batch in stream(0)])


@PURSUITS
@pytest.mark.parametrize("by_gram", [True, False])
def test_every_token_is_under_the_threshold_once_its_batch_was_added(
    pursuit: PursuitName, by_gram: bool, monkeypatch: pytest.MonkeyPatch
):
    if by_gram:
        monkeypatch.setattr("difflex.dictionaries.pursuit.WIDTH_PER_GRAM_ROW", 0)
    grower = AtomGrower(growth(pursuit=pursuit), 0.25, WIDTH, CPU, Ranks())
    assert (grower.backend.gram is not None) == by_gram or pursuit in ("matching", "positive-matching")
    normalisation = normalised()
    for batch in stream(0):
        z = normalisation.apply(batch.values)
        grower.add_batch(batch._replace(values=z))
        assert float(unexplained_share(z, grower.atoms.rows, pursuit).max()) <= 0.25 * (1 + 1e-4)
    assert 20 < grower.size < TOKENS // 2


@PURSUITS
def test_every_atom_was_over_the_threshold_when_it_was_added(pursuit: PursuitName):
    grower = AtomGrower(growth(pursuit=pursuit), 0.25, WIDTH, CPU, Ranks())
    for batch in stream(0):
        grower.add_batch(batch._replace(values=normalised().apply(batch.values)))
    atoms = grower.atoms.rows
    for place in range(grower.size):
        assert float(unexplained_share(atoms[place : place + 1], atoms[:place], pursuit)) > 0.25 * (1 - 1e-4)


def test_an_atom_is_a_row_of_the_data_and_knows_its_shot_and_token(tmp_path: Path):
    itda = grown(tmp_path)
    z = F.normalize(itda.normalisation.apply(all_rows()), dim=1)
    torch.testing.assert_close(itda.atoms, z[itda.provenance.shots * 8 + itda.provenance.tokens])
    patch = itda.patch(7)
    assert patch is not None
    assert patch.shot == shot(patch.number)
    assert 0 <= patch.token < 8


@pytest.mark.parametrize(("pursuit", "add"), [("orthogonal", "point"), ("gradient", "residual"), ("matching", "point")])
def test_growth_and_codes_on_another_device_mix_no_devices(tmp_path: Path, pursuit: PursuitName, add: str):
    data, settings = source(tokens=TOKENS // 4), growth(pursuit=pursuit, size=60, holdout=0.2, add=add)
    here = grow({tmp_path / "here": settings}, data, origin=ORIGIN)[tmp_path / "here"]
    with other_device() as device:
        there = grow({tmp_path / "there": settings}, data, origin=ORIGIN, device=device)[tmp_path / "there"]
        codes = [part.cpu() for part in there.encode(cloud(30, seed=500).to(device))]
        assert there.backend.half and there.size > 20
    loaded = Dictionary.load(tmp_path / "there")
    assert isinstance(loaded, ITDA) and torch.equal(here.provenance.shots, loaded.provenance.shots)
    torch.testing.assert_close(loaded.atoms, here.atoms)
    torch.testing.assert_close(codes[0], here.encode(cloud(30, seed=500)).values, atol=1e-4, rtol=0)


def test_growth_on_a_gpu_waits_for_it_by_pursuits_not_by_tokens(monkeypatch: pytest.MonkeyPatch):
    pursuits: list[int] = []
    run = grower_module.run_pursuit
    monkeypatch.setattr(grower_module, "run_pursuit", lambda *args, **words: (pursuits.append(0), run(*args, **words))[1])
    z, counter = normalised().apply(cloud(256)), WaitCounter()
    with other_device() as device:
        grower = AtomGrower(growth(size=200), 0.25, WIDTH, device, Ranks())
        places = torch.arange(256).to(device)
        rows = ActivationBatch(z.to(device), places, places)
        with counter:
            grower.add_batch(rows)
        again = AtomGrower(growth(size=200), 0.25, WIDTH, device, Ranks())
        again.restore(grower.atoms_from(0))
        halves = [each.atoms.half.cpu()[: grower.size] for each in (grower, again)]  # pyright: ignore
    assert torch.equal(*halves) and bool(halves[0].any(1).all())
    assert grower.size > 50 and counter.waits < 12 * len(pursuits) < 256


class WaitCounter(TorchDispatchMode):
    """Counts the operations whose results the host waits for."""

    waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        self.waits += name in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique_dim", "_unique2")
        return func(*args, **(kwargs or {}))


def test_copies_within_a_batch_become_one_atom():
    normalisation = normalised()
    values = normalisation.apply(cloud(20)).repeat(3, 1)
    values += 1e-3 * torch.randn(values.shape, generator=torch.Generator().manual_seed(0))
    grower = AtomGrower(growth(threshold=0.05), 0.05, WIDTH, CPU, Ranks())
    grower.add_batch(ActivationBatch(values, torch.arange(60), torch.zeros(60).long()))
    cosines = grower.atoms.rows @ grower.atoms.rows.T - torch.eye(grower.size)
    assert float(cosines.max()) < 0.97
    assert grower.size <= 20


def test_held_out_rows_are_refused(tmp_path: Path):
    with pytest.raises(BadInput, match="'held-out', 'train' is needed"):
        grow({tmp_path: growth()}, source(batches=lambda start: SplitBatches(stream(start), "held-out")), origin=ORIGIN)


def test_growth_does_not_depend_on_scale():
    normalisation = normalised()
    small, large = (AtomGrower(growth(), 0.25, WIDTH, CPU, Ranks()) for _ in range(2))
    for batch in stream(0):
        z = normalisation.apply(batch.values)
        small.add_batch(batch._replace(values=z))
        large.add_batch(batch._replace(values=z * 2.0 ** (torch.arange(BATCH) % 12)[:, None]))
    assert torch.equal(small.shots[: small.size], large.shots[: large.size])


def test_the_grown_gram_matrix_is_that_of_the_atoms(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("difflex.dictionaries.pursuit.WIDTH_PER_GRAM_ROW", 0)
    grower = AtomGrower(growth(), 0.25, WIDTH, CPU, Ranks())
    for batch in stream(0):
        grower.add_batch(batch._replace(values=normalised().apply(batch.values)))
    atoms = grower.atoms
    assert atoms.gram is not None and atoms.gram.size == grower.size
    torch.testing.assert_close(atoms.gram.rows(torch.arange(grower.size)), atoms.rows @ atoms.rows.T, atol=1e-5, rtol=0)


def test_growth_ends_at_the_size_limit_or_when_nothing_new_comes(tmp_path: Path):
    assert grown(tmp_path / "full", size=30).size == 30
    reports = []
    same = source(batches=lambda start: (rows(0) for _ in range(start, 1000)), tokens=10**6)
    grow({tmp_path / "idle": growth(patience=200)}, same, origin=ORIGIN, on_progress=reports.append)
    assert reports[-1].interval.tokens == 5 * BATCH  # the batch that brings the atoms, then 4 that bring none: over 200 tokens


def test_the_work_of_a_growth_is_foreseen_and_adds_up(tmp_path: Path):
    reports: list[GrowthWork] = []
    growths = {tmp_path / str(size): growth(size=size, threshold=None) for size in (20, 40)}
    grow(growths, source(), origin=ORIGIN, on_progress=lambda progress: reports.append(progress.work()))
    done = [report.done for report in reports]
    assert done == sorted(done) and done[0] > 0 and all(report.expected >= 0 for report in reports)
    assert reports[-1].expected < 0.05 * done[-1]


# Sizes that mini-flux's double.2:smooth gave (k 16, 100,000 tokens), by threshold.
SIZES = {0.3: 301, 0.15: 1329, 0.1337: 1688, 0.1269: 1878, 0.1217: 2048}


def true_size(threshold: float) -> float:
    """The size at a threshold, between those measured by a power of it."""
    near = sorted(SIZES, key=lambda known: abs(math.log(known / threshold)))[:2]
    exponent = math.log(SIZES[near[0]] / SIZES[near[1]]) / math.log(near[1] / near[0])
    return SIZES[near[0]] * (near[0] / threshold) ** exponent


@pytest.mark.parametrize("size", [400, 1000, 2048])
def test_a_threshold_is_found_in_three_passes_and_foreseen_from_the_first_tenth_on(size: int):
    tokens, trials, forecasts = 100_000, list[ThresholdTrial](), list[GrowthWork]()
    config = GrowthConfig(size=size, threshold=None, holdout=0)
    while not is_settled(trials, size):
        threshold, curve = next_threshold(trials, size), list[GrowthInterval]()
        for now in range(1000, tokens + 1, 1000):
            curve.append(GrowthInterval(now, 0, min(size, round(true_size(threshold) * (now / tokens) ** 0.25))))
            forecasts.append(expected_work(config, tokens, trials, threshold, curve))
            if curve[-1].size == size:
                break
        trials.append(
            ThresholdTrial(threshold, curve[-1].size, curve[-1].tokens / tokens, growth_exponent(curve, curve[-1].tokens))
        )
    total = forecasts[-1].done
    assert len(trials) <= 3
    assert all(abs(sum(work) / total - 1) < 0.3 for work in forecasts if work.done > 0.1 * total)


def test_the_work_of_a_pass_with_a_threshold_is_that_of_its_tokens():
    curve = [GrowthInterval(1000, 0, 100), GrowthInterval(2000, 0, 151)]
    config = GrowthConfig(size=4096, threshold=0.3)
    work = expected_work(config, 20_000, (), 0.3, curve)
    assert work.done / sum(work) == pytest.approx(0.1, rel=0.3)
    full = expected_work(replace(config, size=151), 20_000, (), 0.3, curve)
    assert full.done > 2000 and full.expected == pytest.approx(10_000, rel=0.2), (
        "the hold-out is measured on 1,000 tokens, a tenth of those to come"
    )
    assert expected_work(config, 20_000, (), 0.3, ()).expected > 20_000


def test_restricted_growth_adds_only_the_worst_explained_tokens():
    grower = AtomGrower(growth(max_per_batch=3), 0.25, WIDTH, CPU, Ranks())
    normalisation = normalised()
    for batch in stream(0):
        z, before = normalisation.apply(batch.values), grower.atoms.rows
        worst = int(unexplained_share(z, before, "orthogonal").argmax())
        grower.add_batch(batch._replace(values=z))
        added = grower.shots[len(before) : grower.size] * 8 + grower.tokens[len(before) : grower.size]
        assert len(added) <= 3
        assert not len(before) or int(added[0]) % BATCH == worst


def test_the_residual_can_be_added_instead_of_the_point():
    grower = AtomGrower(growth(add="residual"), 0.25, WIDTH, CPU, Ranks())
    normalisation = normalised()
    for batch in stream(0):
        grower.add_batch(batch._replace(values=normalisation.apply(batch.values)))
    z = F.normalize(normalisation.apply(all_rows()), dim=1)
    matches = (grower.atoms.rows * z[grower.shots[: grower.size] * 8 + grower.tokens[: grower.size]]).sum(1)
    assert float(matches[-10:].max()) < 0.95
    # A residual has nothing in common with what already explained the token: atoms are less alike than points are.
    points = AtomGrower(growth(), 0.25, WIDTH, CPU, Ranks())
    for batch in stream(0):
        points.add_batch(batch._replace(values=normalisation.apply(batch.values)))
    likeness = [(g.atoms.rows @ g.atoms.rows.T).abs().mean() for g in (grower, points)]
    assert likeness[0] < likeness[1]


def test_remove_similar_leaves_no_similar_atoms_and_keeps_their_patches(tmp_path: Path):
    itda = grown(tmp_path)
    pruned = remove_similar(itda, 0.6)
    cosines = pruned.atoms @ pruned.atoms.T - torch.eye(pruned.size)
    assert 10 < pruned.size < itda.size
    assert float(cosines.max()) <= 0.6
    for feature in (0, pruned.size - 1):
        [same] = (itda.atoms == pruned.atoms[feature]).all(1).nonzero()[:, 0].tolist()
        assert itda.patch(same) == pruned.patch(feature)


def test_cluster_centres_are_nearer_to_the_atoms_than_as_many_atoms(tmp_path: Path):
    itda = grown(tmp_path)
    clustered = cluster_atoms(itda, 20)
    assert clustered.size == 20
    torch.testing.assert_close(clustered.atoms.norm(dim=1), torch.ones(20))
    assert (itda.atoms @ clustered.atoms.T).amax(1).mean() > (itda.atoms @ itda.atoms[:20].T).amax(1).mean()
    assert torch.equal(cluster_atoms(itda, 20).atoms, clustered.atoms)
    nearest = (itda.atoms @ clustered.atoms[3]).argmax()
    assert clustered.patch(3) == itda.patch(int(nearest))
    for call in (lambda: cluster_atoms(itda, 10**6), lambda: remove_similar(itda, 1.5)):
        with pytest.raises(BadInput):
            call()


def test_a_sweep_in_one_pass_gives_the_same_dictionaries_as_single_runs(tmp_path: Path):
    reads: list[int] = []

    def counted(start: int):
        reads.append(start)
        return stream(start)

    sweep = {tmp_path / f"both-{threshold}": growth(threshold=threshold) for threshold in (0.2, 0.4)}
    together = grow(sweep, source(batches=counted), origin=ORIGIN)
    assert reads == [0, 0]  # the statistics, then one pass
    for (folder, both), threshold in zip(together.items(), (0.2, 0.4), strict=True):
        alone = grown(tmp_path / f"alone-{threshold}", threshold=threshold)
        assert torch.equal(both.atoms, alone.atoms), folder


def test_the_search_finds_the_threshold_that_fills_the_size(tmp_path: Path):
    itda = grown(tmp_path, threshold=None, size=60)
    assert 59 <= itda.size <= 60
    threshold = itda.origin.training["threshold"]
    assert isinstance(threshold, float)
    again = grown(tmp_path / "again", threshold=threshold, size=60)
    assert torch.equal(again.atoms, itda.atoms)
    assert not list((tmp_path / "training").glob("atoms-*"))


def test_a_label_contains_the_requested_size_even_if_there_are_fewer_atoms(tmp_path: Path):
    dictionaries = {size: grown(tmp_path / str(size), threshold=None, size=size) for size in (60, 91, 150)}
    assert any(itda.size < size for size, itda in dictionaries.items())
    assert all(itda.label == f"itda-{size}-k4-out0" for size, itda in dictionaries.items())
    small = grown(tmp_path / "threshold", size=4000)
    assert small.size < 4000 and small.label == f"itda-{small.size}-k4-over0.25-out0"


def test_saving_and_loading_keeps_codes_and_patches(tmp_path: Path):
    itda = grown(tmp_path)
    loaded = Dictionary.load(tmp_path)
    assert isinstance(loaded, ITDA)
    x = cloud(30, seed=500)
    for before, after in zip(itda.encode(x), loaded.encode(x), strict=True):
        assert torch.equal(before, after)
    assert loaded.patch(5) == itda.patch(5)
    assert loaded.name == f"double.18/itda-{itda.size}-k4-over0.25-out0"
    assert loaded.origin.training["curve"] == itda.origin.training["curve"]


def test_codes_come_strongest_first_and_decode_to_the_explained_part(tmp_path: Path):
    itda = grown(tmp_path)
    x = cloud(50, seed=500)
    codes = itda.encode(x)
    assert (codes.values.abs().diff(dim=1) <= 0).all()
    z, decoded = (itda.normalisation.apply(values) for values in (x, itda.decode(codes)))
    torch.testing.assert_close((z - decoded).square().sum(1) / z.square().sum(1), itda.unexplained(x), atol=1e-4, rtol=1e-3)


def test_an_activation_that_is_an_atom_is_reconstructed_exactly(tmp_path: Path):
    itda = grown(tmp_path)
    x = all_rows()[itda.provenance.shots * 8 + itda.provenance.tokens]
    torch.testing.assert_close(itda.decode(itda.encode(x)), x, atol=1e-4, rtol=0)
    assert torch.equal(itda.encode(x).indices[:, 0], torch.arange(itda.size))


def test_the_curve_extrapolates_a_power_law():
    share = lambda size: 3.0 * size**-0.5  # noqa: E731
    curve = [GrowthInterval(n * 1000, 0, 100 * n, 1000, round(1000 * share(max(1, 100 * (n - 1))))) for n in range(1, 401)]
    assert expected_over_threshold(curve) == pytest.approx(share(40_000), rel=0.01)
    assert expected_over_threshold([GrowthInterval(100, 0, 5, 10, 0), GrowthInterval(200, 0, 5, 10, 0)]) == 0
    assert expected_over_threshold([GrowthInterval(100, 90, 5)]) is None


def images(numbers: Tensor) -> Tensor:
    """Tokens that are all like the others of their image, and a little like those of images of the same kind."""
    look = torch.stack([torch.randn(WIDTH, generator=torch.Generator().manual_seed(int(n))) for n in numbers])
    kind = torch.stack([torch.randn(WIDTH, generator=torch.Generator().manual_seed(10**6 + int(n) % 40)) for n in numbers])
    return kind + 0.35 * look


@pytest.mark.parametrize("shuffled", [False, True])
def test_the_curve_predicts_new_images_in_any_order(tmp_path: Path, shuffled: bool):
    count, per_image = 1500, 16
    shots = torch.arange(count).repeat_interleave(per_image)
    if shuffled:
        shots = shots[torch.randperm(len(shots), generator=torch.Generator().manual_seed(0))]
    values = images(torch.arange(count))[shots]
    values += 0.05 * torch.randn(values.shape, generator=torch.Generator().manual_seed(1))
    parts = [ActivationBatch(values[part], shots[part], part) for part in torch.arange(len(shots)).split(BATCH)]
    whole = source(batches=lambda start: iter(parts[start:]), tokens=len(shots))
    [itda] = grow({tmp_path: growth(k=2, threshold=0.05, size=4000, holdout=0.3)}, whole, origin=ORIGIN).values()
    expected = itda.origin.training["expected_over_threshold"]
    assert isinstance(expected, float)
    over = (itda.unexplained(images(torch.arange(count, count + 1000))) > 0.05).float().mean()
    assert 0.02 < float(over) < 0.8
    assert float(over) == pytest.approx(expected, rel=0.15)


def test_no_atom_is_of_a_held_out_prompt(tmp_path: Path):
    twins = source(shot=lambda number: replace(shot(number // 2), seed=number))
    [itda] = grow({tmp_path: growth(holdout=0.3)}, twins, origin=ORIGIN).values()
    curve = [GrowthInterval(*interval) for interval in itda.origin.training["curve"]]  # pyright: ignore
    held_out = HoldOut(twins.shot).mask(torch.arange(TOKENS // 8), 0.3)
    assert 0.1 < float(held_out.float().mean()) < 0.5 and torch.equal(held_out[::2], held_out[1::2])
    assert sum(interval.holdout_tokens for interval in curve) == 8 * int(held_out.sum())
    assert not held_out[itda.provenance.shots].any()


def test_a_dictionary_that_is_full_early_is_measured_on_later_tokens(tmp_path: Path):
    [itda] = grow({tmp_path: growth(size=40, holdout=0.3)}, source(), origin=ORIGIN).values()
    expected = itda.origin.training["expected_over_threshold"]
    over = (itda.unexplained(cloud(4000, seed=900)) > 0.25).float().mean()
    assert isinstance(expected, float) and expected < 0.9
    assert float(over) == pytest.approx(expected, rel=0.2)


def test_new_tokens_are_over_the_threshold_as_often_as_the_curve_predicts(tmp_path: Path):
    def noisy(number: int, size: int = BATCH) -> ActivationBatch:
        noise = 0.3 * torch.randn(size, WIDTH, generator=torch.Generator().manual_seed(number))
        return ActivationBatch(cloud(size, seed=number + 1) + noise, torch.full((size,), number), torch.arange(size))

    whole = source(batches=lambda start: map(noisy, range(start, 128)), tokens=128 * BATCH)
    [itda] = grow({tmp_path: growth(size=4000, threshold=0.02, holdout=0.2)}, whole, origin=ORIGIN).values()
    expected = itda.origin.training["expected_over_threshold"]
    assert isinstance(expected, float) and 0.2 < expected < 0.6
    over = (itda.unexplained(torch.cat([noisy(9000 + i, 1024).values for i in range(16)])) > 0.02).float().mean()
    assert float(over) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("memory", [10**6, 10**12])
def test_equal_growths_have_equal_bytes_whatever_memory_is_free(tmp_path: Path, memory: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("difflex.dictionaries.pursuit.WIDTH_PER_GRAM_ROW", 0)
    grown(tmp_path / "whole")
    started(tmp_path / "cut")
    monkeypatch.setattr("difflex.training.itda.growing.free_memory", lambda device: memory)
    grown(tmp_path / "cut")
    assert same(tmp_path / "whole", tmp_path / "cut")
    assert "memory" not in (tmp_path / "cut" / "config.json").read_text()
    assert "a Gram matrix in float32" in (tmp_path / "cut" / "training" / "state.json").read_text()


def same(first: Path, second: Path) -> bool:
    """Return whether two folders hold the same files, byte for byte."""
    files = [{path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")} for folder in (first, second)]
    assert Path("training/state.json") in files[0]
    return files[0] == files[1]


def test_a_growth_that_cannot_fit_the_memory_is_refused_with_what_it_needs(tmp_path: Path):
    message = r"up to 1,000,000,000,000 atoms of width 16 .* takes 80,000.0 GB of memory, and .* GB are free on cpu"
    with pytest.raises(OutOfMemory, match=message):
        grown(tmp_path, size=10**12)


def test_a_pursuit_without_memory_for_its_gram_matrix_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("difflex.dictionaries.pursuit.WIDTH_PER_GRAM_ROW", 0)
    itda, x = grown(tmp_path), cloud(30, seed=500)
    expected = itda.encode(x)
    monkeypatch.setattr("difflex.dictionaries.itda.free_memory", lambda device: 1000)
    with pytest.warns(UserWarning, match="without a Gram matrix, which needs"):
        codes = itda.to("cpu").encode(x)
    torch.testing.assert_close(codes.values, expected.values, atol=1e-4, rtol=0)


def snapshot(folder: Path) -> dict[Path, tuple[bytes, int]]:
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*.*")}


def test_a_finished_growth_changes_no_file_and_reads_no_data(tmp_path: Path):
    first, before = grown(tmp_path), snapshot(tmp_path)
    again = grow({tmp_path: growth()}, source(batches=unreadable), origin=ORIGIN)[tmp_path]
    assert snapshot(tmp_path) == before
    assert again.origin == first.origin and torch.equal(again.atoms, first.atoms)


def unreadable(start: int) -> Iterator[ActivationBatch]:
    raise AssertionError("no data are needed")


def test_a_damaged_state_does_not_touch_a_finished_dictionary(tmp_path: Path):
    grown(tmp_path)
    state = tmp_path / "training" / "state.json"
    state.write_bytes(state.read_bytes().replace(b"true", b"null"))
    before = snapshot(tmp_path)
    with pytest.raises(BrokenFile, match=r"state\.json.*The dictionary in .* is finished and intact: move .*training alone away"):
        grown(tmp_path)
    assert snapshot(tmp_path) == before
    state.unlink()
    grow({tmp_path: growth()}, source(batches=unreadable), origin=ORIGIN)


def test_a_damaged_dictionary_is_not_overwritten(tmp_path: Path):
    grown(tmp_path)
    path = tmp_path / "dictionary.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)
    before = snapshot(tmp_path)
    with pytest.raises(BrokenFile, match=path.name):
        grown(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(BrokenFile, match=r"of a growth that has ended, but .* holds no dictionary"):
        grown(tmp_path)
    del before[tmp_path / "config.json"]
    assert snapshot(tmp_path) == before


def test_a_growth_in_a_folder_in_use_is_refused_at_once(tmp_path: Path):
    with folder_lock(tmp_path / "a"), pytest.raises(BadInput, match="Another process is writing"):
        grow({tmp_path / "a": growth()}, source(batches=unreadable), origin=ORIGIN)
    with folder_lock(tmp_path / "a"):
        grown(tmp_path / "b")


def started(folder: Path) -> Path:
    """The state of a growth that was stopped on its way."""

    def cut(start: int) -> Iterator[ActivationBatch]:
        yield from (rows(number) for number in range(start, 9))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        grow({folder: growth()}, source(batches=cut), origin=ORIGIN, checkpoint_every=2)
    return folder / "training" / "state.json"


@pytest.mark.parametrize(
    "change",
    [
        {"parts": {}},
        {"backend": {}},
        {"curve": [[1]]},
        {"trials": 3},
        {"curve": []},
        {"batches": -1},
        {"batches": "2"},
        {"threshold": None},
        {"threshold": 10**400},
        {"idle_tokens": float("nan")},
        {"parts": {"../atoms-0-9.safetensors": "x"}},
        {"parts": {"atoms-0-9.safetensors": "x"}},
        {"normalisation": {"sha256": 3}},
    ],
)
def test_a_damaged_state_is_named(tmp_path: Path, change: dict):
    state = started(tmp_path)
    content = {name: value for name, value in json.loads(state.read_text()).items() if name != "checksum"}
    state.write_text(json.dumps({**content, **change}))
    with pytest.raises((BrokenFile, TypeCheckError), match=r"state\.json|trials|atoms|normalisation"):
        grown(tmp_path)


@pytest.mark.parametrize("name", ["atoms-0-*", "normalisation*"])
def test_a_flipped_bit_in_a_checkpoint_is_found(tmp_path: Path, name: str):
    path = sorted(started(tmp_path).parent.glob(name))[-1]
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)
    with pytest.raises(BrokenFile, match=path.name):
        grown(tmp_path)


def test_zero_vectors_grow_no_dictionary(tmp_path: Path):
    zeros = source(batches=lambda start: (rows(n)._replace(values=torch.zeros(BATCH, WIDTH)) for n in range(start, 4)))
    with pytest.raises(BadInput, match="zero vector"):
        grow({tmp_path: growth(normalisation="none")}, zeros, origin=ORIGIN)


def test_invalid_atoms_are_refused(tmp_path: Path):
    good = grown(tmp_path)
    parts = {name: getattr(good, name) for name in ("k", "origin", "normalisation", "atoms", "provenance")}
    changes = (
        {"k": 0},
        {"atoms": 2 * good.atoms},
        {"atoms": good.atoms * torch.nan},
        {"atoms": good.atoms[:5]},
        {"normalisation": Normalisation.identity(WIDTH + 1)},
        {"atoms": good.atoms[:0], "provenance": AtomProvenance.unknown(0)},
    )
    for change in changes:
        with pytest.raises(BadInput):
            ITDA(**{**parts, **change})


@pytest.mark.parametrize("missing", ["atoms", "provenance.shots", "provenance.known", "provenance.tokens"])
def test_a_file_with_a_missing_or_shorter_tensor_is_refused(tmp_path: Path, missing: str):
    itda = grown(tmp_path / "good")
    state, origin = itda.state(), itda.origin
    config = {"kind": "itda", "site": str(itda.site), "model": origin.model, "revision": None, "width": WIDTH, "size": itda.size}
    config |= {"k": 4, "settings": dict(state.settings), "training": {}}
    for change in ({}, {missing: state.tensors[missing][:-3]}):
        tensors = {name: tensor for name, tensor in state.tensors.items() if name != missing}
        write_files(tmp_path / "bad", config, {**tensors, **change})
        with pytest.raises(BrokenFile):
            Dictionary.load(tmp_path / "bad")


@pytest.mark.parametrize("begin", [grown, lambda folder: started(folder)])
def test_a_growth_does_not_resume_with_other_data_or_settings(tmp_path: Path, begin: Callable[[Path], object]):
    begin(tmp_path)
    with pytest.raises(StaleWork, match=r"threshold 0\.25 instead of 0\.5"):
        grown(tmp_path, threshold=0.5)
    with pytest.raises(StaleWork, match="data 'cloud' instead of 'sky'"):
        grow({tmp_path: growth()}, source(data="sky"), origin=ORIGIN)
    (tmp_path / "training" / "state.json").write_text("{")
    with pytest.raises(BrokenFile, match="not JSON"):
        grown(tmp_path)


def test_impossible_requests_are_refused(tmp_path: Path):
    for changes in ({"threshold": 1.5}, {"k": 0}, {"max_per_batch": 0}, {"holdout": 1.0}):
        with pytest.raises(BadInput):
            growth(**changes)
    with pytest.raises(BadInput, match="at least one growth"):
        grow({}, source(), origin=ORIGIN)
    with pytest.raises(BadInput, match="stream is empty"):
        grow({tmp_path: growth(normalisation="none")}, source(batches=lambda start: iter(())), origin=ORIGIN)
    with pytest.raises(BadInput, match="0 tokens"):
        grow({tmp_path: growth(threshold=None)}, source(tokens=0), origin=ORIGIN)
    bad = rows(1)
    bad.values[5] = torch.nan
    with pytest.raises(NonFinite, match="Batch 1 holds NaN or infinity in 1 rows, first that of shot 8, token 5"):
        grow({tmp_path: growth(normalisation="none")}, source(batches=lambda start: iter([rows(0), bad])), origin=ORIGIN)
    state = grown(tmp_path / "whole").state()
    with pytest.raises(UnknownName, match="orthogonal"):
        ITDA.from_state(replace(state, settings={**state.settings, "pursuit": "ortogonal"}))


def test_paper_config_has_the_settings_of_the_paper():
    assert (paper_config().pursuit, paper_config().k, paper_config().normalisation) == ("gradient", 64, "standardise")


def grow_share(folder: Path, *, rank: int = 0, count: int = 1, pause: float = 0, threshold: float | None = 0.25, size: int = 400):
    """Grow from the share of one of `count` ranks, with a pause before each batch."""

    def share(start: int) -> Iterator[ActivationBatch]:
        for batch in stream(start):
            time.sleep(pause)
            yield ActivationBatch(*(part[rank::count] for part in batch))

    settings = growth(batch=BATCH // count, threshold=threshold, size=size)
    grow({folder: settings}, source(batches=share), origin=ORIGIN, checkpoint_every=2)


def grow_rank(rank: int, count: int, meeting: Path, folder: Path) -> None:
    """Grow as one rank of a process group."""
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=count)
    grow_share(folder, rank=rank, count=count)
    dist.destroy_process_group()


@pytest.mark.parametrize(("threshold", "size"), [(0.25, 400), (None, 60)])
def test_growth_killed_at_any_moment_resumes_bit_for_bit(tmp_path: Path, threshold: float | None, size: int):
    whole = grown(tmp_path / "whole", threshold=threshold, size=size)
    folder, kills = tmp_path / "killed", 0
    for wait in (0.2, 0.5, 0.1):
        arguments = {"pause": 0.05, "threshold": threshold, "size": size}
        process = multiprocessing.get_context("fork").Process(target=grow_share, args=(folder,), kwargs=arguments)
        process.start()
        state = folder / "training" / "state.json"
        before = state.read_bytes() if state.exists() else b""
        while process.is_alive() and (state.read_bytes() if state.exists() else b"") == before:
            time.sleep(0.01)
        time.sleep(wait)
        if process.is_alive():
            process.kill()
            process.join()
            kills += not (folder / "config.json").exists()
    assert kills >= 1, "no run was killed on its way"
    resumed = grown(folder, threshold=threshold, size=size)
    assert torch.equal(resumed.atoms, whole.atoms)
    assert torch.equal(resumed.provenance.shots, whole.provenance.shots)
    assert resumed.origin.training == whole.origin.training
    assert same(tmp_path / "whole", folder)


def test_two_processes_grow_one_dictionary_with_the_same_guarantee(tmp_path: Path):
    context, places = multiprocessing.get_context("fork"), (tmp_path / "meeting", tmp_path / "two")
    processes = [context.Process(target=grow_rank, args=(rank, 2, *places)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
        assert process.exitcode == 0
    shared, alone = Dictionary.load(tmp_path / "two"), grown(tmp_path / "one")
    assert isinstance(shared, ITDA)
    assert json.loads((tmp_path / "two" / "config.json").read_text())["training"]["tokens"] == TOKENS
    # Sequentially checked: what each batch of both ranks had become part of by its end explains the batch.
    shots = shared.provenance.shots * 8 + shared.provenance.tokens
    assert shots.unique().numel() == shared.size
    assert shared.size == pytest.approx(alone.size, rel=0.15)
    z = shared.normalisation.apply(all_rows())
    torch.testing.assert_close(shared.atoms, F.normalize(z[shots], dim=1))
    for number in range(TOKENS // BATCH):
        earlier = shared.atoms[shots < (number + 1) * BATCH]
        batch = z[number * BATCH : (number + 1) * BATCH]
        assert float(unexplained_share(batch, earlier, "orthogonal").max()) <= 0.25 * (1 + 1e-4)


@pytest.mark.parametrize("size", [3, 41, 5000])
def test_a_search_tries_no_threshold_twice_whatever_the_sizes_say(size: int):
    trials = list[ThresholdTrial]()
    for _ in range(12):
        trials.append(ThresholdTrial(next_threshold(trials, 41), size, 1.0))
    thresholds = [trial.threshold for trial in trials]
    assert len(set(thresholds)) == len(thresholds) and all(0 < threshold < 1 for threshold in thresholds)
    assert thresholds == sorted(thresholds, reverse=size < 41)
