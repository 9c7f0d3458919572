"""Recording: the same bytes after kills and with any number of processes, and clear errors."""

import errno
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from pathlib import Path

import pytest
import torch
from fake_harvest import SITES, FakeHarvest, activation, fake_shots
from jaxtyping import TypeCheckError
from safetensors.torch import load_file

from difflex import files
from difflex.errors import BadInput, BrokenFile, DifflexError, DiskError, NonFinite, OutOfSpace, StaleWork, UnknownName
from difflex.records import Activations, Shot, Site
from difflex.store import RecordingConfig, Store, record

FORK = multiprocessing.get_context("fork")
SITE = SITES[0]
QUICK = RecordingConfig(batch=4, shard_bytes=0, progress=False)


def contents(folder: Path) -> dict[str, bytes]:
    """Return the content of every file under `folder`."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def recorder(folder: Path, delay: float, **settings: int) -> ForkProcess:
    """Start a process that records what `whole` has; a fork starts at once, unlike a new interpreter."""
    work = (folder, fake_shots(96), SITES, FakeHarvest(delay=delay), replace(QUICK, **settings))
    process = FORK.Process(target=record, args=work)
    process.start()
    return process


def killed(process: ForkProcess, after: float) -> bool:
    """Kill the process after so many seconds, and return whether it was still running."""
    time.sleep(after)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def record_until_full(folder: Path, kilobytes: int, answer: Connection) -> None:
    """Record with a limit on the size of a file, which acts like a full disk: one write is short, the next one fails."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024 * kilobytes, 1024 * kilobytes))
    try:
        record(folder, fake_shots(32), SITES, FakeHarvest(width=512), QUICK)
    except OutOfSpace as error:
        answer.send(str(error))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed recording: 24 shards at each of three sites."""
    folder = tmp_path_factory.mktemp("whole")
    record(folder, fake_shots(96), SITES, FakeHarvest(), QUICK)
    return folder


def test_a_killed_recording_continues_to_the_same_bytes(tmp_path: Path, whole: Path):
    moments = random.Random(4)
    kills = [killed(recorder(tmp_path, 0.05), moments.uniform(0, 0.5)) for _ in range(4)]
    assert any(kills)
    record(tmp_path, fake_shots(96), SITES, FakeHarvest(), QUICK)
    assert contents(tmp_path) == contents(whole)


def test_two_ranks_write_the_same_bytes_as_one_process(tmp_path: Path, whole: Path):
    ranks = [recorder(tmp_path, 0.01, rank=rank, world_size=2) for rank in range(2)]
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0, 0]
    assert contents(tmp_path) == contents(whole)


def test_another_number_of_processes_finishes_a_killed_recording(tmp_path: Path, whole: Path):
    record(tmp_path, fake_shots(96), SITES, FakeHarvest(), replace(QUICK, rank=1, world_size=3))
    assert not Store.open(tmp_path / SITE.folder).complete
    record(tmp_path, fake_shots(96), SITES, FakeHarvest(), QUICK)
    assert contents(tmp_path) == contents(whole)


def test_every_row_comes_from_its_shot(whole: Path):
    for site in SITES:
        store = Store.open(whole / site.folder)
        [rows] = store.batches(10**6, seed=None)
        expected = [
            activation(store.shot(shot), site, store.tokens, 16)[token]
            for shot, token in zip(rows.shots.tolist(), rows.tokens.tolist(), strict=True)
        ]
        assert torch.equal(rows.values, torch.stack(expected).bfloat16())


def test_other_libraries_can_read_a_shard(whole: Path):
    tensors = load_file(whole / SITE.folder / "shard-00000.safetensors")
    assert tensors["values"].shape == (4 * 8, 16)
    shots = json.loads((whole / SITE.folder / "shard-00000.json").read_text())["shots"]
    assert [shot["prompt"] for shot in shots] == [f"star {i}" for i in range(4)]


def test_a_complete_recording_is_not_harvested_again(whole: Path):
    before, harvest = contents(whole), FakeHarvest()
    record(whole, fake_shots(96), SITES, harvest, QUICK)
    assert harvest.shot_count == 0
    assert contents(whole) == before


def test_more_tokens_are_added_to_the_stored_ones(tmp_path: Path, whole: Path):
    record(tmp_path, fake_shots(None), SITES, FakeHarvest(), replace(QUICK, tokens=18 * 4))
    harvest = FakeHarvest()
    record(tmp_path, fake_shots(96), SITES, harvest, QUICK)
    assert harvest.shot_count == 96 - 16
    assert contents(tmp_path) == contents(whole)


def test_only_a_new_site_is_harvested(tmp_path: Path, whole: Path):
    record(tmp_path, fake_shots(96), SITES[1:], FakeHarvest(), QUICK)
    harvested: list[Site] = []

    def watched(shots: Sequence[Shot], sites: Sequence[Site], batch: int):
        harvested.extend(sites)
        return FakeHarvest()(shots, sites, batch)

    record(tmp_path, fake_shots(96), SITES, watched, QUICK)
    assert set(harvested) == {SITE}
    assert contents(tmp_path) == contents(whole)


def test_shards_hold_whole_batches_and_whole_runs(tmp_path: Path):
    settings = RecordingConfig(batch=3, shard_bytes=5000, progress=False, tokens=1000)
    [store] = record(tmp_path, fake_shots(None, steps=2), [SITE], FakeHarvest(), settings)
    shards = [json.loads(path.read_text())["shots"] for path in sorted(store.folder.glob("shard-*.json"))]
    assert {len(shots) % 6 for shots in shards[:-1]} == {0}
    assert sum(map(len, shards)) * 8 == 1008


@pytest.mark.parametrize("moment", ["shard", "shots"])
def test_a_deleted_shard_is_made_again_and_no_other(tmp_path: Path, whole: Path, moment: str):
    record(tmp_path, fake_shots(96), SITES, FakeHarvest(), QUICK)
    name = {"shard": "shard-00003.safetensors", "shots": "shard-00003.json"}[moment]
    (tmp_path / SITE.folder / name).unlink()
    with pytest.raises(BrokenFile, match=name):
        Store.open(tmp_path / SITE.folder)
    harvest = FakeHarvest()
    record(tmp_path, fake_shots(96), SITES, harvest, QUICK)
    assert harvest.shot_count == 4
    assert contents(tmp_path) == contents(whole)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink, lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize(
    ("name", "harvested"),
    [("shard-00003.safetensors", 4), ("shard-00003.json", 4), ("manifest.json", 1), ("statistics.safetensors", 0)],
)
@pytest.mark.filterwarnings("ignore:.*damaged")
def test_the_same_harvest_again_repairs_exactly_what_is_damaged(tmp_path: Path, whole: Path, damage, name: str, harvested: int):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    damage(tmp_path / SITE.folder / name)
    harvest = FakeHarvest()
    stores = record(tmp_path, fake_shots(96), SITES, harvest, QUICK)
    assert harvest.shot_count == harvested and all(store.complete for store in stores)
    assert contents(tmp_path) == contents(whole)


def test_a_damaged_shard_is_announced(tmp_path: Path, whole: Path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    flip(tmp_path / SITE.folder / "shard-00003.safetensors")
    with pytest.warns(UserWarning, match=r"shard-00003\.safetensors is damaged: it is made again"):
        record(tmp_path, fake_shots(96), SITES, FakeHarvest(), QUICK)


@pytest.mark.filterwarnings("ignore:.*damaged")
def test_damage_is_repaired_when_the_manifest_is_lost_too(tmp_path: Path, whole: Path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    truncate(tmp_path / SITE.folder / "shard-00003.safetensors")
    (tmp_path / SITE.folder / "manifest.json").unlink()
    record(tmp_path, fake_shots(96), SITES, FakeHarvest(), QUICK)
    assert contents(tmp_path) == contents(whole)


def test_healthy_shards_of_another_type_without_a_manifest_are_kept(tmp_path: Path, whole: Path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    (tmp_path / SITE.folder / "manifest.json").unlink()
    before = contents(tmp_path)
    with pytest.raises(StaleWork, match="other settings"):
        record(tmp_path, fake_shots(96), SITE, FakeHarvest(), replace(QUICK, dtype="int8"))
    assert contents(tmp_path) == before


def test_a_place_that_cannot_be_recorded_to_is_noticed_without_a_model(tmp_path: Path, whole: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="Not a directory"):
        QUICK.check_folder(tmp_path / "file" / "activations", ["double.1"])
    before = contents(whole)
    with files.folder_lock(whole / SITE.folder), pytest.raises(BadInput, match="Another process is writing"):
        QUICK.check_folder(whole, ["single.0", "double.*"])
    QUICK.check_folder(tmp_path / "new", ["double.1"])
    QUICK.check_folder(whole, ["double.1"])
    assert contents(whole) == before and not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["manifest.json", "statistics.safetensors"])
def test_a_deleted_summary_is_written_again_from_the_shards(tmp_path: Path, whole: Path, name: str):
    record(tmp_path, fake_shots(96), SITES, FakeHarvest(), QUICK)
    (tmp_path / SITE.folder / name).unlink()
    record(tmp_path, fake_shots(96), SITES, FakeHarvest(), QUICK)
    assert contents(tmp_path) == contents(whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "int8"}, "another dtype: 'bf16' then, 'int8' now"),
        ({"batch": 8}, "another batch: 4 then, 8 now"),
        ({"source": "other.txt"}, "The prompts have changed"),
    ],
)
def test_other_settings_are_refused_and_nothing_is_changed(whole: Path, change: dict[str, object], message: str):
    before = contents(whole)
    with pytest.raises(StaleWork, match=message):
        record(whole, fake_shots(96), SITES, FakeHarvest(), replace(QUICK, **change))
    assert contents(whole) == before


def test_changed_prompts_are_refused_with_the_old_and_the_new_one(whole: Path):
    before = contents(whole)
    prompts = [replace(shot, prompt="a moon", split="train") if i == 9 else shot for i, shot in enumerate(fake_shots(96))]
    with pytest.raises(StaleWork, match=r"made from prompt 'star 9', now .* from prompt 'a moon'"):
        record(whole, prompts, SITES, FakeHarvest(), QUICK)
    assert contents(whole) == before


def test_a_harvest_of_another_width_is_refused(tmp_path: Path):
    record(tmp_path, fake_shots(8), [SITE], FakeHarvest(), QUICK)
    with pytest.raises(StaleWork, match="of width 16; the harvest gave 8 of width 32"):
        record(tmp_path, fake_shots(96), [SITE], FakeHarvest(width=32), QUICK)
    assert Store.open(tmp_path / SITE.folder).verify() == 2 * 2 + 2


def test_another_format_is_refused_and_not_changed(tmp_path: Path):
    [store] = record(tmp_path, fake_shots(8), [SITE], FakeHarvest(), QUICK)
    manifest = store.folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 3', '"format": 1'))
    before = contents(tmp_path)
    for work in (lambda: Store.open(store.folder), lambda: record(tmp_path, fake_shots(8), [SITE], FakeHarvest(), QUICK)):
        with pytest.raises(BrokenFile, match="format 1; this version of difflex reads format 3"):
            work()
    assert contents(tmp_path) == before


@pytest.mark.parametrize("kilobytes", [1, 40])
def test_a_full_disk_is_a_clear_error_and_finished_shards_stay(tmp_path: Path, kilobytes: int):
    read, write = FORK.Pipe(duplex=False)
    process = FORK.Process(target=record_until_full, args=(tmp_path, kilobytes, write))
    process.start()
    write.close()
    assert "run the same command again" in read.recv()
    process.join()
    assert [path.name for path in tmp_path.rglob("*.tmp")] == []
    stores = [Store.open(path.parent) for path in tmp_path.rglob("manifest.json")]
    assert all(store.verify() for store in stores)
    assert all(store.complete for store in record(tmp_path, fake_shots(32), SITES, FakeHarvest(width=512), QUICK))


def test_a_disk_error_during_an_early_flush_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # The system reports such an error once: a later flush succeeds.
    failures = [OSError(errno.EIO, os.strerror(errno.EIO))]

    def fsync(_: int) -> None:
        if failures:
            raise failures.pop()

    monkeypatch.setattr(files, "FLUSH", 1)
    monkeypatch.setattr(os, "fsync", fsync)
    whole = files.AtomicFile(tmp_path / "file")
    whole.write(b"some")
    with pytest.raises(DiskError, match=os.strerror(errno.EIO)):
        whole.commit()
    assert not list(tmp_path.iterdir())


def test_a_recording_that_is_too_large_is_refused_before_anything_is_written(tmp_path: Path):
    with pytest.raises(OutOfSpace, match=r"the limit is 1 kB\. Not even one run fits: .*raise the limit.*or for int8"):
        record(tmp_path / "new", fake_shots(None), SITES, FakeHarvest(), replace(QUICK, tokens=1000, max_bytes=1000))
    with pytest.raises(OutOfSpace, match=r"the disk has [\d.]+ \w+ free"):
        record(tmp_path / "new", fake_shots(None), SITES, FakeHarvest(), replace(QUICK, tokens=10**15))
    assert list(tmp_path.iterdir()) == []


def of_one_length(runs: int, word: str = "star") -> list[Shot]:
    return [
        replace(shot, prompt=f"{word} {i:03}", split=Shot.split_of(f"{word} {i:03}")) for i, shot in enumerate(fake_shots(runs))
    ]


@pytest.mark.parametrize("limit", [60_000, 75_000, 123_456])
@pytest.mark.parametrize("tokens", [None, 2400])
def test_the_advised_number_of_tokens_fits_and_all_files_stay_below_the_limit(tmp_path: Path, limit: int, tokens: int | None):
    settings = replace(QUICK, shard_bytes=2000, max_bytes=limit, tokens=tokens)
    with pytest.raises(OutOfSpace, match=r"Ask for [1-9]") as refused:
        record(tmp_path, of_one_length(600), SITES, FakeHarvest(), settings)
    advised = int(re.findall(r"Ask for ([\d,]+) tokens", str(refused.value))[0].replace(",", ""))
    stores = record(tmp_path, of_one_length(600), SITES, FakeHarvest(), replace(settings, tokens=advised))
    taken = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert all(store.complete for store in stores) and limit / 2 < taken <= limit


def test_prompts_that_get_longer_do_not_exceed_the_limit(tmp_path: Path):
    shots = [*of_one_length(8), *of_one_length(40, word="long " * 400)]
    with pytest.raises(OutOfSpace, match=r"would exceed the limit.*What is finished is kept"):
        record(tmp_path, iter(shots), [SITE], FakeHarvest(), replace(QUICK, max_bytes=60_000, tokens=8 * 48))
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) <= 60_000
    assert Store.open(tmp_path / SITE.folder).verify() > 1
    [store] = record(tmp_path, iter(shots), [SITE], FakeHarvest(), replace(QUICK, tokens=8 * 48))
    assert store.complete


def test_a_site_can_be_given_as_text(tmp_path: Path):
    [store] = record(tmp_path, fake_shots(8), "double.1", FakeHarvest(), QUICK)
    [same] = record(tmp_path, fake_shots(8), ["double.1"], FakeHarvest(), QUICK)
    assert store.site == same.site == SITE


def test_a_file_in_the_place_of_a_store_is_an_error(tmp_path: Path):
    (tmp_path / SITE.folder).write_text("")
    with pytest.raises(DiskError, match=r"double\.1 cannot be written.*move it away"):
        record(tmp_path, fake_shots(8), [SITE], FakeHarvest(), QUICK)


@pytest.mark.parametrize(("name", "other"), [("precision", "bf16"), ("revision", "untrained-4")])
def test_activations_of_other_weights_are_refused(tmp_path: Path, name: str, other: str):
    record(tmp_path, fake_shots(8), [SITE], FakeHarvest(), QUICK)
    before = contents(tmp_path)
    with pytest.raises(StaleWork, match=f"begun with another {name}: None then, '{other}' now"):
        record(tmp_path, [replace(shot, **{name: other}) for shot in fake_shots(16)], [SITE], FakeHarvest(), QUICK)
    assert contents(tmp_path) == before


def test_shards_without_a_manifest_are_an_error(tmp_path: Path):
    record(tmp_path, fake_shots(8), [SITE], FakeHarvest(), QUICK)
    (tmp_path / SITE.folder / "manifest.json").unlink()
    with pytest.raises(BrokenFile, match=r"manifest\.json is missing, but the folder holds shards"):
        Store.open(tmp_path / SITE.folder)


def test_two_recordings_into_one_folder_are_refused(tmp_path: Path):
    def meanwhile(shots: Sequence[Shot], sites: Sequence[Site], batch: int):
        if batch > 1:  # not in the probe for the shapes, before the folder is locked
            with pytest.raises(BadInput, match="Another process is writing"):
                record(tmp_path, fake_shots(8), [SITE], FakeHarvest(), QUICK)
        return FakeHarvest()(shots, sites, batch)

    [store] = record(tmp_path, fake_shots(8), [SITE], meanwhile, QUICK)
    assert store.complete


def test_a_recording_that_another_process_began_first_changes_nothing(tmp_path: Path):
    def overtaken(shots: Sequence[Shot], sites: Sequence[Site], batch: int):
        record(tmp_path, fake_shots(8, word="moon"), [SITE], FakeHarvest(), QUICK)
        return FakeHarvest()(shots, sites, batch)

    with pytest.raises(BadInput, match="Another process has written"):
        record(tmp_path, fake_shots(8), [SITE], overtaken, QUICK)
    assert Store.open(tmp_path / SITE.folder).shot(0).prompt == "moon 0"


def test_temporary_files_of_killed_processes_are_deleted(tmp_path: Path):
    (tmp_path / SITE.folder).mkdir()
    half, unfinished = (
        tmp_path / SITE.folder / ".shard-00007.safetensors.0.tmp",
        tmp_path / SITE.folder / "shard-00008.safetensors",
    )
    half.write_text("half")
    with files.replacing(unfinished) as written:
        record(tmp_path, fake_shots(8), [SITE], FakeHarvest(), replace(QUICK, rank=1, world_size=2))
        assert [*tmp_path.rglob("*.tmp")] == [written]  # its writer lives


def test_values_beyond_fp16_are_an_error_that_names_the_shot(tmp_path: Path):
    def hot(shots: Sequence[Shot], sites: Sequence[Site], batch: int):
        for activations in FakeHarvest()(shots, sites, batch):
            yield replace(activations, values=activations.values * 1e5)

    with pytest.raises(NonFinite, match=r"'star 0' \(seed 0\) at the site 'double.1'.*bf16"):
        record(tmp_path, fake_shots(8), [SITE], hot, replace(QUICK, dtype="fp16"))
    [store] = record(tmp_path, fake_shots(8), [SITE], hot, QUICK)
    assert store.complete


def incomplete(shots: Sequence[Shot], sites: Sequence[Site], batch: int):
    yield from (part for part in FakeHarvest()(shots, sites, batch) if "star 4" not in {shot.prompt for shot in part.shots})


def empty(shots: Sequence[Shot], sites: Sequence[Site], batch: int) -> list[Activations]:
    return []


@pytest.mark.parametrize(
    ("work", "error", "message"),
    [
        (lambda to: record(to, fake_shots(8), [SITE], incomplete, QUICK), BadInput, "gave other shots"),
        (lambda to: record(to, fake_shots(8), [SITE], empty, QUICK), BadInput, "gave nothing at the site 'double.1'"),
        (lambda to: record(to, [], [SITE], FakeHarvest(), QUICK), BadInput, "no shot was given"),
        (lambda to: record(to, fake_shots(8), [], FakeHarvest(), QUICK), BadInput, "No site"),
        (lambda to: record(to, fake_shots(8), [SITE], FakeHarvest(), replace(QUICK, tokens=0)), BadInput, "0 tokens"),
        (lambda to: record(to, fake_shots(8), [SITE], FakeHarvest(), replace(QUICK, batch=0)), BadInput, "Batches of 0"),
        (
            lambda to: record(to, fake_shots(8), [SITE], FakeHarvest(), replace(QUICK, rank=2, world_size=2)),
            BadInput,
            "Rank 2 of 2",
        ),
    ],
)
def test_impossible_recordings_are_refused(tmp_path: Path, work, error: type[DifflexError], message: str):
    with pytest.raises(error, match=message):
        work(tmp_path)


def test_an_unknown_storage_type_is_refused(tmp_path: Path):
    # With shapes and types enforced, the second error comes first.
    with pytest.raises((UnknownName, TypeCheckError), match="fp32"):
        record(tmp_path, fake_shots(8), [SITE], FakeHarvest(), RecordingConfig(dtype="fp32"))  # pyright: ignore[reportArgumentType]


def test_a_shot_whose_split_is_not_that_of_its_prompt_is_refused(tmp_path: Path):
    wrong = [replace(shot, split="held-out") for shot in fake_shots(1)]
    with pytest.raises(BadInput, match="'held-out', but the hash of its prompt gives 'train'"):
        record(tmp_path, wrong, [SITE], FakeHarvest(), QUICK)


def test_a_prompt_twice_in_a_row_is_recorded_once(tmp_path: Path):
    shots = list(fake_shots(6, steps=2))
    twice = [*shots[:4], *shots[2:4], *shots[2:]]
    assert [shot.prompt for shot in twice[2:8]] == ["star 1"] * 6
    for name, repeated in (("once", shots), ("twice", twice)):
        record(tmp_path / name, repeated, [SITE], FakeHarvest(), QUICK)
    assert contents(tmp_path / "twice") == contents(tmp_path / "once")


def test_too_few_prompts_cause_a_warning(tmp_path: Path):
    with pytest.warns(UserWarning, match="gave 8 shots, fewer than the 125 to record"):
        [store] = record(tmp_path, fake_shots(8), [SITE], FakeHarvest(), replace(QUICK, tokens=1000))
    assert store.complete


def test_recording_leaves_no_thread_and_no_file_open(tmp_path: Path):
    open_before = len(os.listdir("/proc/self/fd"))
    record(tmp_path, fake_shots(32), SITES, FakeHarvest(), QUICK)
    assert len(os.listdir("/proc/self/fd")) == open_before
