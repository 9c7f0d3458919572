"""Reading: every row once, in an order fixed by the seed, from any batch on, shared by ranks, in bounded memory."""

import json
import random
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from fake_harvest import SITES, FakeHarvest, activation, fake_shots
from jaxtyping import TypeCheckError

from difflex.errors import BadInput, BrokenFile, UnknownName
from difflex.records import ActivationBatch
from difflex.store import RecordingConfig, Store, manifest, record, require_split
from difflex.store.reading import BufferPool, HostRows, SplitBatches, one_ahead
from difflex.store.shard import PackedRows, block_sums

SPARSE = Path(__file__).parent / "sparse_store.py"
SITE = SITES[0]
QUICK = RecordingConfig(batch=4, shard_bytes=2000, progress=False)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """200 shots of 8 rows in 50 shards: more than are open at the same time."""
    return record(tmp_path_factory.mktemp("store"), fake_shots(200), [SITE], FakeHarvest(), QUICK)[0]


def places(rows: ActivationBatch) -> list[tuple[int, int]]:
    return list(zip(rows.shots.tolist(), rows.tokens.tolist(), strict=True))


def all_places(batches) -> list[tuple[int, int]]:
    return [place for rows in batches for place in places(rows)]


def test_each_row_of_a_split_is_read_once_with_the_values_of_its_shot(store: Store):
    for split in ("train", "held-out"):
        rows_read = []
        for rows in store.batches(100, split=split, window=64):
            rows_read += places(rows)
            for value, (shot, token) in zip(rows.values, places(rows), strict=True):
                assert store.shot(shot).split == split
                assert torch.equal(value, activation(store.shot(shot), SITE, 8, 16)[token].bfloat16())
        assert len(set(rows_read)) == len(rows_read) == store.count(split)
    assert store.count() + store.count("held-out") == 200 * 8


def test_batches_have_the_requested_split_and_the_other_one_is_refused(store: Store):
    assert [store.batches(8, split=split).split for split in ("train", "held-out")] == ["train", "held-out"]
    assert places(next(require_split(store.batches(8), "train"))) == places(next(store.batches(8)))
    with pytest.raises(BadInput, match="held-out"):
        require_split(store.batches(8, split="held-out"), "train")


def test_batches_of_another_split_than_the_required_one_are_refused():
    batches = SplitBatches(iter(()), "held-out")
    with pytest.raises(BadInput, match=r"'held-out', 'train' is needed.*split='train'"):
        require_split(batches, "train")
    assert require_split(batches, "held-out") is batches


def test_batches_without_a_split_pass():
    plain = iter(())
    assert require_split(plain, "train") is plain


def test_about_a_tenth_is_held_out(store: Store):
    assert 0.05 < store.count("held-out") / 1600 < 0.15


def test_the_seed_fixes_the_order(store: Store):
    first, again, reseeded = (all_places(store.batches(64, seed=seed)) for seed in (3, 3, 4))
    assert first == again
    assert first != reseeded
    assert sorted(first) == sorted(reseeded)


def test_each_epoch_has_its_own_order(store: Store):
    batches = list(store.batches(64, epochs=2))
    half = len(batches) // 2
    first, second = all_places(batches[:half]), all_places(batches[half:])
    assert first != second
    assert sorted(first) == sorted(second)


def test_a_batch_mixes_shots_and_shards(store: Store):
    rows = next(store.batches(256))
    assert len(set(rows.shots.tolist())) > 50
    assert len({shot // 4 for shot in rows.shots.tolist()}) == 16


def test_without_a_seed_rows_are_read_in_the_order_of_writing(store: Store):
    read = all_places(store.batches(64, seed=None, window=100))
    assert read == sorted(read)
    assert len(read) == store.count()


@pytest.mark.parametrize("start", [0, 1, 7, 21, 22, 30, 44, 50])
def test_a_reader_that_starts_in_the_middle_continues_exactly(store: Store, start: int):
    read = partial(store.batches, 64, seed=1, window=100, epochs=2)
    whole, rest = list(read()), list(read(start=start))
    assert len(rest) == max(0, len(whole) - start)
    for pair in zip(whole[start:], rest, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(*pair, strict=True))


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_each_batch_of_one_process(store: Store, world_size: int):
    together = list(store.batches(32 * world_size, window=100))
    shares = [list(store.batches(32, rank=rank, world_size=world_size, window=100)) for rank in range(world_size)]
    assert {len(share) for share in shares} == {len(together)}
    for i, rows in enumerate(together):
        assert sorted(places(rows)) == sorted(place for share in shares for place in places(share[i]))


def test_epochs_can_be_endless(store: Store):
    reader = store.batches(10**6, epochs=None)
    assert [len(next(reader).shots) for _ in range(3)] == [store.count()] * 3


def test_several_readers_do_not_disturb_each_other(store: Store):
    first, second = store.batches(64, seed=1), store.batches(64, seed=2)
    mixed = [(next(first), next(second)) for _ in range(20)]
    assert all_places(a for a, _ in mixed) == all_places(store.batches(64, seed=1))[: 20 * 64]
    assert all_places(b for _, b in mixed) == all_places(store.batches(64, seed=2))[: 20 * 64]


def test_a_batch_that_is_still_referenced_does_not_change(store: Store):
    batches = list(store.batches(64))
    first = batches[0].values.clone()
    parts = [rows.values[1:] for rows in store.batches(64)]
    assert torch.equal(batches[0].values, first)
    assert torch.equal(torch.cat(parts), torch.cat([rows.values[1:] for rows in batches]))


def test_memory_is_used_again_only_without_references_to_it():
    pool = BufferPool()
    first = pool.empty(4, 8, torch.bfloat16)
    view, address = first[1:], first.data_ptr()
    del first
    assert pool.empty(4, 8, torch.bfloat16).data_ptr() != address
    del view
    assert pool.empty(4, 8, torch.bfloat16).data_ptr() == address


def test_fp16_is_exact(tmp_path: Path):
    [store] = record(tmp_path, fake_shots(40), [SITE], FakeHarvest(), replace(QUICK, dtype="fp16"))
    [rows] = store.batches(10**6)
    activations = torch.stack([activation(store.shot(shot), SITE, 8, 16)[token] for shot, token in places(rows)])
    assert torch.equal(rows.values, activations.half())


def test_rows_of_zeros_survive_int8(tmp_path: Path):
    def zeros(shots, sites, batch):
        for activations in FakeHarvest()(shots, sites, batch):
            yield replace(activations, values=activations.values * 0)

    [store] = record(tmp_path, fake_shots(8), [SITE], zeros, replace(QUICK, dtype="int8"))
    assert next(store.batches(64)).values.abs().sum() == 0


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "int8"])
def test_statistics_are_those_of_the_training_rows(tmp_path: Path, dtype):
    [store] = record(tmp_path, fake_shots(160), [SITE], FakeHarvest(), replace(QUICK, dtype=dtype))
    x, statistics = torch.cat([rows.values.double() for rows in store.batches(100)]), store.statistics
    torch.testing.assert_close(statistics.mean, x.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(statistics.variance, x.var(0, correction=0), rtol=1e-5, atol=1e-6)
    assert statistics.count == len(x) == store.count()
    assert statistics.peak_norm == pytest.approx(float(x.norm(dim=1).max()), rel=1e-5)
    assert statistics.mean_norm == pytest.approx(float(x.norm(dim=1).mean()), rel=1e-5)
    assert statistics.sampled == 16 * 16
    in_order = torch.cat([rows.values.double() for rows in store.batches(100, seed=None)])
    sample = in_order[torch.arange(256) * len(x) // 256]
    torch.testing.assert_close(statistics.covariance, torch.cov(sample.T, correction=0), rtol=1e-9, atol=1e-9)


def test_an_axis_far_from_zero_keeps_its_variance(tmp_path: Path):
    def shifted(shots, sites, batch):
        for activations in FakeHarvest()(shots, sites, batch):
            yield replace(activations, values=(activations.values[..., :1] / 16).round() / 16 + torch.tensor([0.0, 1000.0]))

    [store] = record(tmp_path, fake_shots(160), [SITE], shifted, replace(QUICK, dtype="fp16"))
    x = torch.cat([rows.values.double() for rows in store.batches(100)])
    torch.testing.assert_close(store.statistics.variance, x.var(0, correction=0), rtol=1e-6, atol=0)


def test_an_unfinished_store_can_be_read(tmp_path: Path):
    def breaking(shots, sites, batch):
        if any(shot.prompt == "star 100" for shot in shots):
            raise KeyboardInterrupt
        return FakeHarvest()(shots, sites, batch)

    with pytest.raises(KeyboardInterrupt):
        record(tmp_path, fake_shots(200), [SITE], breaking, QUICK)
    store = Store.open(tmp_path / SITE.folder)
    assert not store.complete
    assert store.verify() == 2 * 25 + 1
    assert store.statistics.count == store.count() == len(all_places(store.batches(64)))


def test_a_flipped_bit_is_found_in_every_file(tmp_path: Path):
    [store] = record(tmp_path, fake_shots(40), [SITE], FakeHarvest(), QUICK)
    dice = random.Random(0)
    files = sorted(store.folder.iterdir())
    for path in files + dice.choices(files, k=20):
        content = bytearray(path.read_bytes())
        content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
        before = path.read_bytes()
        path.write_bytes(content)
        with pytest.raises(BrokenFile, match=path.name):
            Store.open(store.folder).verify()
        path.write_bytes(before)
    assert Store.open(store.folder).verify() == len(files)


def test_a_truncated_shard_is_named_when_it_is_read(tmp_path: Path):
    [store] = record(tmp_path, fake_shots(40), [SITE], FakeHarvest(), QUICK)
    path = store.folder / "shard-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BrokenFile, match=r"shard-00002.*Run the same harvest again"):
        list(store.batches(64))
    with pytest.raises(BrokenFile, match=r"shard-00002.*has \d+ bytes"):
        Store.open(store.folder)


@pytest.mark.parametrize("seed", [None, 0])
@pytest.mark.parametrize("fraction", [0.0, 0.4, 1.0])
def test_a_flipped_bit_is_noticed_before_the_rows_are_used(tmp_path: Path, seed: int | None, fraction: float):
    [store] = record(tmp_path, fake_shots(100), [SITE], FakeHarvest(), QUICK)
    path = store.folder / "shard-00020.safetensors"
    content = bytearray(path.read_bytes())
    content[int(fraction * (len(content) - 1))] ^= 4
    path.write_bytes(content)
    shots: list[int] = []
    with pytest.raises(BrokenFile, match=r"shard-00020.*damaged\. Run the same harvest again"):
        for batch in store.batches(16, seed=seed, window=32):
            shots += batch.shots.tolist()
    assert not {shot for shot in shots if shot // 4 == 20} and (seed is not None or len(shots) > 100)


def test_a_shard_is_compared_with_its_checksum_once_in_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    [store] = record(tmp_path, fake_shots(100), [SITE], FakeHarvest(), QUICK)
    paths: list[Path] = []
    monkeypatch.setattr(manifest, "block_sums", lambda path: paths.append(path) or block_sums(path))
    for split in ("train", "held-out", "train"):
        list(store.batches(64, split=split, epochs=2))
    assert len(set(paths)) == len(paths) == 25


def test_statistics_of_damaged_shards_are_refused(tmp_path: Path):
    [store] = record(tmp_path, fake_shots(40), [SITE], FakeHarvest(), replace(QUICK, rank=0, world_size=2))
    path = store.folder / "shard-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(BrokenFile, match="shard-00002"):
        _ = Store.open(store.folder).statistics


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"size": 0}, BadInput, "Batches of 0 rows"),
        ({"rank": 2, "world_size": 2}, BadInput, "Rank 2 of 2"),
        ({"start": -1}, BadInput, "batch -1"),
        ({"window": 0}, BadInput, "window of 0"),
    ],
)
def test_impossible_arguments_are_refused(store: Store, arguments, error, message: str):
    with pytest.raises(error, match=message):
        store.batches(**{"size": 8, **arguments})


def test_an_unknown_split_is_an_error(store: Store):
    # With shapes and types enforced, the second error comes first.
    with pytest.raises((UnknownName, TypeCheckError), match="test"):
        store.batches(8, split="test")  # pyright: ignore[reportArgumentType]


def test_a_split_without_rows_is_an_error(tmp_path: Path):
    [store] = record(tmp_path, fake_shots(4), [SITE], FakeHarvest(), QUICK)
    with pytest.raises(BadInput, match="no rows of the split 'held-out'"):
        store.batches(8, split="held-out")


def test_a_number_beyond_the_store_is_an_error(store: Store):
    for number in (200, -1, 10**9):
        with pytest.raises(UnknownName, match="holds 200 shots"):
            store.shot(number)


def test_a_folder_without_a_store_is_an_error(tmp_path: Path):
    with pytest.raises(UnknownName, match="not a store"):
        Store.open(tmp_path)


def test_memory_does_not_grow_with_a_store_of_100_gb(tmp_path: Path):
    process = subprocess.run([sys.executable, str(SPARSE), str(tmp_path)], capture_output=True, text=True, check=True)
    sizes = json.loads(process.stdout)
    assert sizes["stored"] > 100e9
    assert sizes["read"] > 4 * sizes["allowed"]
    assert sizes["growth"] < sizes["allowed"]


def test_values_are_on_the_requested_device(tmp_path: Path):
    for dtype in ("bf16", "int8"):
        [store] = record(tmp_path / dtype, fake_shots(40), [SITE], FakeHarvest(), replace(QUICK, dtype=dtype))
        there, here = next(store.batches(64, device=torch.device("meta"))), next(store.batches(64))
        assert (there.values.device.type, there.values.dtype, there.values.shape) == (
            "meta",
            here.values.dtype,
            here.values.shape,
        )
        assert places(there) == places(here)


def test_the_next_rows_are_read_while_some_are_in_use():
    read: list[int] = []

    def rows(share: range) -> HostRows:
        read.append(share.start)
        return HostRows(PackedRows(torch.zeros(1, 1), None), torch.zeros(1), torch.zeros(1))

    stream = one_ahead(rows, iter([range(4), range(4, 8), range(8, 12)]))
    next(stream)
    stream.close()  # waits for the thread
    assert read == [0, 4]
