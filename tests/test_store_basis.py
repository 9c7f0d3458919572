"""int8: its rounding adds under 1 % of its variance to every principal axis, and its basis survives kills, damage and ranks."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from fake_harvest import SITES, FakeHarvest, fake_shots
from jaxtyping import Float
from test_store_recording import contents, flip, truncate
from torch import Tensor

import difflex
from difflex.errors import BrokenFile, NonFinite, StaleWork
from difflex.files import file_sha256
from difflex.miniature.captions import endless_captions
from difflex.records import Activations, Shot, Site
from difflex.store import RecordingConfig, ShardFormat, Store, record, recorded_bytes
from difflex.store.basis import BASIS, GROUP, BasisTally, group_size, read_basis, write_basis
from difflex.store.shard import pack, unpack

SITE = SITES[0]
INT8 = RecordingConfig(batch=4, shard_bytes=2000, progress=False, dtype="int8")
WIDTH, ROWS = 192, 8192
BOUND = GROUP / (12 * 127**2)


def decaying(decades: int) -> Float[Tensor, "row width"]:
    """Rows whose variance falls by `decades` along random axes, some of whose coordinates are outliers as those of FLUX.1."""
    generator = torch.Generator().manual_seed(decades)
    axes, _ = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64))
    spread = torch.logspace(0, -decades / 2, WIDTH, dtype=torch.float64)
    x = torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64) * spread @ axes.T
    outlier = torch.arange(WIDTH) % 64 == 7
    return (torch.where(outlier, 30 * x + 100, x)).float()


def heavy(freedom: float) -> Float[Tensor, "row width"]:
    """Rows with heavy tails, and one entry in 64 rows that is a thousand times as large as the others."""
    generator = torch.Generator().manual_seed(0)
    shape = (ROWS, WIDTH)
    squares = torch._standard_gamma(torch.full(shape, freedom / 2), generator) * 2
    x = torch.randn(shape, generator=generator) / (squares / freedom).sqrt()
    x[::64, 7] += 1000
    return x


def noise(x: Float[Tensor, "row width"], stored: Float[Tensor, "row width"]) -> Float[Tensor, " width"]:
    """Return the variance of the noise along each principal axis of `x`, as a share of the variance of `x` along it."""
    variance, axes = torch.linalg.eigh(torch.cov(x.double().T, correction=0))
    return ((stored.double() - x.double()) @ axes).square().mean(0) / variance


def stored(x: Float[Tensor, "row width"], first: int = ROWS // 4) -> Float[Tensor, "row width"]:
    """Return `x` after it was stored in the units of its first rows."""
    tally = BasisTally()
    for rows in x[:first].split(1000):
        tally.add(rows)
    basis = tally.basis()
    return unpack(pack(x, "int8", basis), basis)


@pytest.mark.parametrize("decades", [3, 5])
def test_noise_on_every_whitened_axis_is_small_with_outlier_coordinates(decades: int):
    x = decaying(decades)
    scales = x.abs().amax(1, keepdim=True) / 127
    assert noise(x, (x / scales).round() * scales).max() > 1  # with a scale for each row the smallest axes drown
    assert noise(x, stored(x)).max() < 2 * BOUND < 0.01


def test_heavy_tails_and_massive_entries_keep_the_bound():
    x = heavy(2.5)
    assert noise(x, stored(x, first=ROWS)).max() < 1.1 * BOUND


def test_bf16_adds_nothing_to_activations_of_a_model_in_bf16_but_much_to_small_axes_of_others():
    x = decaying(5)
    assert noise(x.bfloat16().float(), pack(x.bfloat16().float(), "bf16", None).values.float()).max() == 0
    assert noise(x, pack(x, "bf16", None).values.float()).max() > noise(x, stored(x)).max()


@pytest.fixture(scope="module")
def real() -> Activations:
    """Activations of mini-flux at double.2 in fp32."""
    pipe = difflex.load("mini-flux", device="cpu")
    captions = endless_captions()
    shots = pipe.shots([next(captions) for _ in range(10)], steps=4)
    several = list(pipe.harvest(shots, "double.2", batch=10, progress=False))
    values = torch.cat([activations.values for activations in several])
    return replace(several[0], values=values, shots=tuple(shot for each in several for shot in each.shots))


@pytest.mark.parametrize("outlier", [1.0, 1000.0])
def test_noise_is_small_on_every_whitened_axis_of_a_real_model(real: Activations, outlier: float):
    x = real.values.flatten(0, 1).clone()
    x[:, 7] = outlier * (x[:, 7] + x.std() * (outlier > 1))
    assert noise(x, stored(x, first=len(x))).max() < 0.01


def test_a_constant_coordinate_and_a_sum_of_others_are_kept():
    x = decaying(3)
    x[:, 3], x[:, 5] = 4.0, x[:, 0] + x[:, 1]
    back = stored(x)
    torch.testing.assert_close(back[:, 3], x[:, 3])
    assert float((back[:, 5] - x[:, 5]).square().mean() / x[:, 5].var()) < BOUND


def test_groups_divide_the_width():
    assert [group_size(width) for width in (3072, 1280, 640, 320, 192, 16, 8, 131)] == [128, 128, 128, 80, 96, 16, 8, 131]


def test_few_rows_have_a_diagonal_basis_and_are_not_continued_to_many(tmp_path: Path):
    [store] = record(tmp_path, fake_shots(10), [SITE], FakeHarvest(), INT8)
    assert store.complete and json.loads((store.folder / "manifest.json").read_text())["basis"]
    before = contents(tmp_path)
    with pytest.raises(StaleWork, match=r"too few rows to fix the units of int8 for 320 rows.*another folder, or store bf16"):
        record(tmp_path, fake_shots(40), [SITE], FakeHarvest(), INT8)
    assert contents(tmp_path) == before


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed recording in int8, of two sites."""
    folder = tmp_path_factory.mktemp("whole")
    record(folder, fake_shots(48), SITES[:2], FakeHarvest(), INT8)
    return folder


def test_ranks_and_a_resumed_recording_write_the_same_bytes(tmp_path: Path, whole: Path):
    for rank in (1, 0):
        record(tmp_path / "ranks", fake_shots(48), SITES[:2], FakeHarvest(), replace(INT8, rank=rank, world_size=2))

    def breaking(shots: Sequence[Shot], sites: Sequence[Site], batch: int):
        if shots[0].prompt == "star 36":
            raise KeyboardInterrupt
        return FakeHarvest()(shots, sites, batch)

    with pytest.raises(KeyboardInterrupt):
        record(tmp_path / "resumed", fake_shots(48), SITES[:2], breaking, INT8)
    harvest = FakeHarvest()
    record(tmp_path / "resumed", fake_shots(48), SITES[:2], harvest, INT8)
    assert harvest.shot_count < 24
    assert contents(tmp_path / "ranks") == contents(tmp_path / "resumed") == contents(whole)


def test_of_ranks_that_begin_together_the_first_fixes_the_basis(tmp_path: Path):
    first, second = BasisTally(), BasisTally()
    first.add(torch.randn(10, 4))
    second.add(torch.randn(10, 4))
    for tally, keep in ((first, True), (second, True)):
        write_basis(tmp_path, tally.basis(), "rows", keep=keep)
    kept = (tmp_path / BASIS).read_bytes()
    write_basis(tmp_path, second.basis(), "other rows", keep=True)  # left over from another recording
    assert (tmp_path / BASIS).read_bytes() != kept and [path.name for path in tmp_path.iterdir()] == [BASIS]


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
def test_a_damaged_basis_is_noticed_and_made_again(tmp_path: Path, damage):
    record(tmp_path, fake_shots(48), [SITE], FakeHarvest(), INT8)
    before = contents(tmp_path)
    damage(tmp_path / SITE.folder / BASIS)
    for work in (lambda store: next(store.batches(8)), Store.verify):
        with pytest.raises(BrokenFile, match=BASIS):
            work(Store.open(tmp_path / SITE.folder))
    record(tmp_path, fake_shots(48), [SITE], FakeHarvest(), INT8)
    assert contents(tmp_path) == before


def scaled(shots: Iterable[Shot], sites: Sequence[Site], batch: int, factor: float = 2.0) -> Iterator[Activations]:
    """Harvest other values than before."""
    for activations in FakeHarvest()(shots, sites, batch):
        yield replace(activations, values=activations.values * factor)


def test_a_failed_harvest_leaves_no_wrong_basis(tmp_path: Path):
    with pytest.raises(NonFinite, match=r"'star 0' .* at the site"):
        record(tmp_path, fake_shots(48), [SITE], partial(scaled, factor=float("nan")), INT8)
    assert not (tmp_path / SITE.folder).exists()
    record(tmp_path, fake_shots(48), [SITE], FakeHarvest(), INT8)
    (tmp_path / SITE.folder / BASIS).unlink()
    with pytest.raises(StaleWork, match="is lost"):
        record(tmp_path, fake_shots(48), [SITE], scaled, INT8)
    assert not (tmp_path / SITE.folder / BASIS).exists()
    few, many = BasisTally(), BasisTally()
    few.add(torch.randn(10, 4))
    many.add(torch.randn(100, 4))
    for tally in (few, many):
        write_basis(tmp_path, tally.basis(), "rows", keep=True)
    assert not read_basis(tmp_path, 4, file_sha256(tmp_path / BASIS)).is_diagonal


def uneven(shots: Iterable[Shot], sites: Sequence[Site], batch: int) -> Iterator[Activations]:
    """Harvest fewer tokens at the second site, so that its units need more shots."""
    for activations in FakeHarvest()(shots, sites, batch):
        tokens = 2 if activations.site == SITES[1] else 8
        yield replace(activations, values=activations.values[:, :tokens], grid=None)


def test_a_lost_basis_is_made_again_whatever_was_harvested_with_it(tmp_path: Path):
    record(tmp_path, fake_shots(80), SITES[:2], uneven, INT8)
    before = contents(tmp_path)
    for site in SITES[:2]:
        (tmp_path / site.folder / BASIS).unlink()
        record(tmp_path, fake_shots(80), [site], uneven, INT8)
    assert contents(tmp_path) == before


def test_a_lost_manifest_is_written_again_with_the_basis(tmp_path: Path):
    record(tmp_path, fake_shots(48), [SITE], FakeHarvest(), INT8)
    before = contents(tmp_path)
    (tmp_path / SITE.folder / "manifest.json").unlink()
    record(tmp_path, fake_shots(48), [SITE], FakeHarvest(), INT8)
    assert contents(tmp_path) == before
    for name in ("manifest.json", BASIS):
        (tmp_path / SITE.folder / name).unlink()
    with pytest.raises(StaleWork, match=f"neither its manifest nor its {BASIS} is intact"):
        record(tmp_path, fake_shots(48), [SITE], FakeHarvest(), INT8)


def test_the_forecast_of_bytes_counts_the_basis(whole: Path):
    forms = [ShardFormat(site, "int8", 8, 16) for site in SITES[:2]]
    shots = list(fake_shots(48))
    forecast = recorded_bytes(forms, shots, 1, 48, INT8)
    taken = sum(path.stat().st_size for path in whole.rglob("*") if path.is_file())
    assert 0 <= forecast - taken < 25 * 512 * 2 + 6 * 2048


def test_int8_of_earlier_versions_is_refused(tmp_path: Path):
    [store] = record(tmp_path, fake_shots(8), [SITE], FakeHarvest(), INT8)
    manifest = store.folder / "manifest.json"
    entries = {name: value for name, value in json.loads(manifest.read_text()).items() if name not in ("basis", "checksum")}
    manifest.write_text(json.dumps(entries))
    old = r"scale for each row.*Move it away and harvest again"
    with pytest.raises(BrokenFile, match=old):  # only what can make it again may replace it
        Store.open(store.folder)
    with pytest.raises(StaleWork, match=old):
        record(tmp_path, fake_shots(8), [SITE], FakeHarvest(), INT8)
