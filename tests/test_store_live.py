"""Live batches: the batches of a store, with nothing on disk."""

import threading
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
from fake_harvest import SITES, FakeHarvest, activation, fake_shots

from difflex.errors import BadInput, OutOfMemory, UnknownName
from difflex.records import ActivationBatch
from difflex.store import LiveActivations, RecordingConfig, record
from difflex.store.live import LiveDtype, LiveSites

SITE = SITES[0]


def live(
    runs: int | None = 200, window: int = 200, dtype: LiveDtype = "bf16", harvest: FakeHarvest | None = None
) -> LiveActivations:
    return LiveActivations(fake_shots(runs), SITE, harvest or FakeHarvest(), window=window, dtype=dtype, batch=4)


def places(rows: ActivationBatch) -> list[tuple[int, int]]:
    return list(zip(rows.shots.tolist(), rows.tokens.tolist(), strict=True))


def all_places(batches: Iterator[ActivationBatch]) -> list[tuple[int, int]]:
    return [place for rows in batches for place in places(rows)]


def by_place(batches: Iterable[ActivationBatch]) -> dict[tuple[int, int], torch.Tensor]:
    return {place: value for rows in batches for place, value in zip(places(rows), rows.values, strict=True)}


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("split", ["train", "held-out"])
def test_live_rows_are_those_of_a_store_bit_for_bit(tmp_path: Path, dtype: LiveDtype, split):
    settings = RecordingConfig(dtype=dtype, batch=4, shard_bytes=2000, progress=False)
    [store] = record(tmp_path, fake_shots(200), [SITE], FakeHarvest(), settings)
    source = live(dtype=dtype)
    assert (source.site, source.model, source.width, source.tokens) == (store.site, store.model, store.width, store.tokens)
    assert source.grid == store.grid
    stored, live_batches = [*store.batches(64, split=split)], [*source.batches(64, split=split)]
    assert [rows.values.shape for rows in live_batches] == [rows.values.shape for rows in stored]
    stored_rows, live_rows = by_place(stored), by_place(live_batches)
    assert stored_rows.keys() == live_rows.keys()
    assert all(torch.equal(value, live_rows[place]) for place, value in stored_rows.items())


def test_live_rows_have_their_shot_and_token():
    source = live(20)
    for rows in source.batches(50):
        for value, (shot, token) in zip(rows.values, places(rows), strict=True):
            assert torch.equal(value, activation(source.shot(shot), SITE, 8, 16)[token].bfloat16())


def test_shots_of_another_split_are_not_harvested():
    harvest = FakeHarvest()
    source = live(200, harvest=harvest)
    rows = sum(len(batch.shots) for batch in source.batches(64, split="held-out"))
    assert harvest.shot_count == rows // 8 + 1  # one shot for the shape


@pytest.mark.parametrize("start", [0, 1, 3, 4, 11, 22])
def test_a_reader_that_starts_in_the_middle_continues_exactly(start: int):
    whole, rest = list(live().batches(64, seed=2)), list(live().batches(64, seed=2, start=start))
    assert len(rest) == len(whole) - start
    for pair in zip(whole[start:], rest, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(*pair, strict=True))


def test_starting_at_a_later_batch_costs_at_most_a_window():
    harvest = FakeHarvest()
    next(live(None, window=256, harvest=harvest).batches(64, start=100))
    assert harvest.shot_count <= 1 + 2 * 256 // 8


def test_endless_prompts_are_read_as_far_as_needed():
    harvest = FakeHarvest()
    batches = live(None, window=256, harvest=harvest).batches(64)
    assert len(all_places(islice(batches, 4))) == 256
    assert harvest.shot_count == 1 + 256 // 8


def test_ranks_share_the_shots_and_get_equally_many_batches():
    shares = [list(live(203).batches(32, rank=rank, world_size=3)) for rank in range(3)]
    assert len({tuple(len(rows.shots) for rows in share) for share in shares}) == 1
    shots = [{shot for shot, _ in all_places(iter(share))} for share in shares]
    train = {number for number, shot in enumerate(fake_shots(203)) if shot.split == "train"}
    assert sum(map(len, shots)) == len(set.union(*shots) & train) >= len(train) - 2


def test_a_window_is_shuffled_by_its_seed():
    first, again, reseeded = (all_places(live().batches(64, seed=seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != reseeded
    assert all_places(live().batches(64, seed=None)) == sorted(first)


def test_several_steps_of_a_run_are_several_shots():
    source = LiveActivations(fake_shots(8, steps=2), SITE, FakeHarvest(), batch=4)
    rows = next(source.batches(10**6))
    assert len(rows.shots) == 2 * 7 * 8  # one prompt of eight is held out
    for value, (shot, token) in zip(rows.values, places(rows), strict=True):
        assert torch.equal(value, activation(source.shot(shot), SITE, 8, 16)[token].bfloat16())


@pytest.mark.parametrize("split", ["train", "held-out"])
def test_batches_have_the_requested_split(split):
    assert live().batches(64, split=split).split == split


def test_a_repeated_shot_is_read_again():
    star, *others = [shot for shot in fake_shots(30) if shot.split == "train"]
    held_out = next(shot for shot in fake_shots(200) if shot.split == "held-out")
    shots = [star, held_out, star, *others[:2], star]
    source = LiveActivations(shots, SITE, FakeHarvest(), batch=4)
    assert [shot for shot, _ in all_places(source.batches(8, seed=None))][::8] == [0, 2, 3, 4, 5]
    for value, (shot, token) in by_number(source):
        assert torch.equal(value, activation(shots[shot], SITE, 8, 16)[token].bfloat16())


def by_number(source: LiveActivations) -> list[tuple[torch.Tensor, tuple[int, int]]]:
    return [(value, place) for rows in source.batches(10) for value, place in zip(rows.values, places(rows), strict=True)]


def test_further_epochs_have_the_same_rows_in_another_order():
    once, twice = all_places(live().batches(64)), all_places(live().batches(64, epochs=2))
    assert twice[: len(once)] == once
    assert twice[len(once) :] != once and sorted(twice[len(once) :]) == sorted(once)
    assert len(all_places(islice(live(20).batches(8, epochs=None), 100))) == 800


@pytest.mark.parametrize("start", [0, 22, 23, 24, 40, 46])
def test_a_reader_that_starts_in_a_later_epoch_continues_exactly(start: int):
    whole = list(live().batches(64, seed=2, epochs=2))
    rest = list(live().batches(64, seed=2, epochs=2, start=start))
    assert [places(rows) for rows in rest] == [places(rows) for rows in whole[start:]]


def test_a_reader_can_choose_its_window():
    harvest = FakeHarvest()
    next(live(None, window=4096, harvest=harvest).batches(64, window=64))
    assert harvest.shot_count == 1 + 64 // 8


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [({"size": 0}, BadInput, "0 rows"), ({"rank": 1}, BadInput, "Rank 1 of 1"), ({"start": -1}, BadInput, "batch -1")],
)
def test_impossible_arguments_are_refused(arguments, error, message: str):
    with pytest.raises(error, match=message):
        live().batches(**{"size": 8, **arguments})


def test_a_number_beyond_the_prompts_is_an_error():
    with pytest.raises(UnknownName, match="gave 20 shots"):
        live(20).shot(20)


IMAGE_AND_TEXT = (SITES[0], SITES[2])


def several(ahead: bool = True, harvest: FakeHarvest | None = None, runs: int | None = 200, batch: int = 4) -> LiveSites:
    return LiveSites(fake_shots(runs), IMAGE_AND_TEXT, harvest or FakeHarvest(), window=200, batch=batch, ahead=ahead)


def test_one_pass_gives_all_sites_with_the_same_shots_in_a_batch():
    harvest = FakeHarvest()
    with several(harvest=harvest) as live:
        batches = list(live.batches(64))
        assert live.widths == dict.fromkeys(IMAGE_AND_TEXT, 16) and live.tokens == 4  # of text, which has fewer
        assert sum(len(batch[SITE].shots) for batch in batches) == live.count()
    assert harvest.shot_count == 1 + live.count() // 4
    for batch in batches:
        assert len({len(rows.shots) for rows in batch.values()}) == 1
        for site, rows in batch.items():
            for value, (shot, token) in zip(rows.values, places(rows), strict=True):
                assert torch.equal(value, activation(live.shot(shot), site, 8 if site == SITE else 4, 16)[token].bfloat16())


@pytest.mark.parametrize("start", [0, 3, 11, 17])
def test_neither_the_thread_nor_the_batches_of_the_harvest_change_a_batch(start: int):
    with several(ahead=False) as plain, several(batch=7) as ahead:
        expected = list(plain.batches(64, seed=3, epochs=2))[start:]
        for batch, same in zip(expected, ahead.batches(64, seed=3, epochs=2, start=start), strict=True):
            assert all(torch.equal(a, b) for site in batch for a, b in zip(batch[site], same[site], strict=True))


@pytest.mark.parametrize(("stop", "shots"), [(2, 32), (4, 64), (30, None)])
def test_nothing_is_harvested_for_batches_that_are_not_read(stop: int, shots: int | None):
    harvest = FakeHarvest()
    with several(harvest=harvest) as live:
        batches = list(live.batches(64, stop=stop, epochs=None))
        assert len(batches) == stop and (shots is None or harvest.shot_count == 1 + shots)
        [rest] = live.batches(64, stop=stop, epochs=None, start=stop - 1)
    assert [places(rows) for rows in rest.values()] == [places(rows) for rows in batches[-1].values()]


def test_the_harvest_runs_ahead_by_one_window_and_no_more():
    harvest = FakeHarvest()
    with several(harvest=harvest, runs=None) as live:
        batches = live.batches(64)
        next(batches)
        deadline = time.monotonic() + 5
        while harvest.shot_count < 1 + 2 * 50 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert harvest.shot_count == 1 + 2 * 50
    assert not [thread for thread in threading.enumerate() if thread.name == "harvest"]


def test_the_memory_that_a_harvest_needs_is_that_of_two_whole_batches():
    harvest = FakeHarvest()
    with LiveSites(fake_shots(None, steps=3), SITES, harvest, batch=4) as sites:
        assert sites.fill_memory() == 0  # bytes of a GPU
    assert harvest.shot_count == 2 * 4 * 3


def test_an_error_of_the_harvest_reaches_the_reader():
    def broken(shots, sites, batch):
        yield from FakeHarvest()(shots[:1], sites, 1)
        if len(shots) > 1:
            raise OutOfMemory("No batch fits.")

    with LiveSites(fake_shots(50), IMAGE_AND_TEXT, broken) as live, pytest.raises(OutOfMemory, match="No batch"):
        next(live.batches(8))
    assert not [thread for thread in threading.enumerate() if thread.name == "harvest"]


def test_the_harvest_ends_with_its_reader_in_the_middle_of_a_window():
    with pytest.raises(KeyboardInterrupt), several(harvest=FakeHarvest(delay=0.02), runs=None) as live:
        for _ in live.batches(64):
            raise KeyboardInterrupt
    assert not [thread for thread in threading.enumerate() if thread.name == "harvest"]


def test_a_window_holds_whole_runs():
    harvest, shots = FakeHarvest(), [*fake_shots(40, steps=7)]
    with LiveSites(shots, [SITE], harvest, window=80, batch=1) as live:
        next(live.batches(16, stop=1))
        assert harvest.shot_count == 1 + 7
