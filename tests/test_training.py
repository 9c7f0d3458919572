"""Training: a resumed run ends like an uninterrupted one, sweeps share a pass, and errors are explained."""

import errno
import json
import multiprocessing
import random
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import repeat
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError

from difflex.choices import SAEKind
from difflex.dictionaries import SAE, Dictionary, DictionaryOrigin
from difflex.errors import (
    BadInput,
    BrokenFile,
    DifflexError,
    DiskError,
    MissingExtra,
    NonFinite,
    OutOfMemory,
    StaleWork,
)
from difflex.files import folder_lock
from difflex.records import ActivationBatch, Site
from difflex.store.reading import SplitBatches
from difflex.tensors import read_tensors, write_tensors
from difflex.testing import PlantedDictionary
from difflex.training import AdamConfig, AuxKLoss, FitConfig, InitConfig, TrainingConfig, fit
from difflex.training.checkpoint import FORMAT
from difflex.training.fitting import learning_rate

WORLD = PlantedDictionary(width=16, truths=48, active=3, stretched=2)
ORIGIN = DictionaryOrigin(site=Site("double.1"), model="mini-flux")
SMALL = TrainingConfig(size=64, k=4, optimiser=AdamConfig(learning_rate=1e-2, warmup=5), auxk=AuxKLoss(dead_after=500))
CONFIG = FitConfig(tokens=64 * 40, checkpoint_every=7, log_every=5, progress=False)


def batches(start: int) -> Iterator[ActivationBatch]:
    return WORLD.batches(64, start)


def trained(folder: Path, training: TrainingConfig = SMALL, config: FitConfig = CONFIG) -> SAE:
    return fit({folder: training}, batches, origin=ORIGIN, config=config)[folder]


FILES = ("config.json", "dictionary.safetensors", "training/state.safetensors")


def same(first: Path, second: Path) -> bool:
    """Return whether two folders hold the same dictionary and checkpoint, byte for byte, and the same log but for times."""
    same_log = [timeless(log(folder)) for folder in (first, second)]
    return same_log[0] == same_log[1] and all((first / name).read_bytes() == (second / name).read_bytes() for name in FILES)


def timeless(lines: list[dict]) -> list[dict]:
    return [{key: value for key, value in line.items() if key not in ("tokens_per_second", "waiting")} for line in lines]


def snapshot(folder: Path) -> dict[Path, tuple[bytes, int]]:
    """The content and the time of every file."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "training" / "log.jsonl").read_text().splitlines()]


KINDS = {
    "topk": SMALL,
    "batchtopk": replace(SMALL, kind="batchtopk"),
    "jumprelu": replace(SMALL, kind="jumprelu"),
    "matryoshka": replace(SMALL, kind="matryoshka", prefixes=(16,)),
    "lazy": replace(
        SMALL, optimiser=AdamConfig(learning_rate=1e-2, beta1=0.0, ema=0.9), normalisation="whiten", clip=5.0, pre_bias=True
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_reconstructs_planted_data_and_loads_as_it_was_saved(tmp_path: Path, name: str):
    dictionary = trained(tmp_path, KINDS[name], replace(CONFIG, tokens=64 * 400))
    x = next(batches(1000)).values
    y = dictionary.decode(dictionary.encode(x))
    assert (x - y).square().sum() < 0.5 * (x - x.mean(0)).square().sum()
    loaded = Dictionary.load(tmp_path)
    assert loaded.name == f"double.1/{KINDS[name].kind}-64-k4"
    assert torch.equal(loaded.decode(loaded.encode(x)), y)
    assert loaded.origin.training["tokens"] == 64 * 400


@pytest.mark.parametrize("name", KINDS)
def test_an_interrupted_run_ends_like_an_uninterrupted_one(tmp_path: Path, name: str):
    trained(tmp_path / "whole", KINDS[name])
    with pytest.raises(InterruptedError):
        fit({tmp_path / "parts": KINDS[name]}, interrupted_at(25), origin=ORIGIN, config=CONFIG)
    assert not (tmp_path / "parts" / "config.json").exists()
    trained(tmp_path / "parts", KINDS[name])
    assert same(tmp_path / "whole", tmp_path / "parts")


def interrupted_at(number: int):
    def stream(start: int) -> Iterator[ActivationBatch]:
        for current, rows in enumerate(batches(start), start):
            if current == number:
                raise InterruptedError
            yield rows

    return stream


def test_a_sweep_gives_the_same_saes_as_single_trainings(tmp_path: Path):
    sweep = {tmp_path / str(k): replace(SMALL, k=k, normalisation="whiten" if k == 2 else "standardise") for k in (2, 4, 6)}
    fit(sweep, batches, origin=ORIGIN, config=CONFIG)
    for folder, training in sweep.items():
        trained(tmp_path / "alone" / folder.name, training)
        assert same(folder, tmp_path / "alone" / folder.name)


def test_after_a_kill_an_sae_that_is_ahead_waits_for_the_others(tmp_path: Path):
    sweep = {tmp_path / "a": SMALL, tmp_path / "b": replace(SMALL, k=2)}
    with pytest.raises(InterruptedError):
        fit(sweep, interrupted_at(15), origin=ORIGIN, config=CONFIG)
    with pytest.raises(InterruptedError):  # as if the kill had come after the first of two states was written
        fit({tmp_path / "a": SMALL}, interrupted_at(30), origin=ORIGIN, config=CONFIG)
    fit(sweep, batches, origin=ORIGIN, config=CONFIG)
    for folder, training in sweep.items():
        trained(tmp_path / "alone" / folder.name, training)
        assert same(folder, tmp_path / "alone" / folder.name)


def test_a_finished_training_changes_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = trained(tmp_path)
    before = snapshot(tmp_path)
    monkeypatch.setattr("difflex.files._open_temporary", read_only)
    again = fit({tmp_path: SMALL}, interrupted_at(0), origin=ORIGIN, config=CONFIG)[tmp_path]
    assert snapshot(tmp_path) == before
    assert again.origin == first.origin and torch.equal(again.decoder, first.decoder)
    with pytest.raises(DiskError, match="Read-only"):  # found before the data are read
        fit({tmp_path / "new": SMALL, tmp_path: SMALL}, interrupted_at(0), origin=ORIGIN, config=CONFIG)


def test_a_training_of_a_version_without_a_bias_of_the_input_counts_as_finished(tmp_path: Path):
    trained(tmp_path)
    assert "pre_bias" not in json.loads((tmp_path / "config.json").read_text())["training"]["config"]
    assert "pre_bias" in replace(SMALL, pre_bias=True).as_json()


def read_only(path: Path) -> tuple[Path, int]:
    raise OSError(errno.EROFS, "")


def flip(path: Path, place: int = -5) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


def test_a_damaged_state_does_not_touch_a_finished_dictionary(tmp_path: Path):
    trained(tmp_path)
    state = tmp_path / "training" / "state.safetensors"
    flip(state)
    before = snapshot(tmp_path)
    with pytest.raises(BrokenFile, match=r"state\.safetensors does not match its checksum.* is finished and intact: move this"):
        trained(tmp_path)
    assert snapshot(tmp_path) == before
    state.unlink()
    fit({tmp_path: SMALL}, interrupted_at(0), origin=ORIGIN, config=CONFIG)  # nothing is trained
    del before[state]
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["config.json", "dictionary.safetensors"])
def test_a_damaged_dictionary_is_written_again_from_its_state_once_it_is_moved(tmp_path: Path, name: str):
    trained(tmp_path / "healthy")
    trained(tmp_path / "damaged")
    flip(tmp_path / "damaged" / name, 300)
    before = snapshot(tmp_path)
    with pytest.raises(BrokenFile, match=rf"{name}.*can write it again: move .*config\.json away"):
        trained(tmp_path / "damaged")
    assert snapshot(tmp_path) == before
    (tmp_path / "damaged" / "config.json").rename(tmp_path / "old.json")
    fit({tmp_path / "damaged": SMALL}, interrupted_at(0), origin=ORIGIN, config=CONFIG)
    assert same(tmp_path / "healthy", tmp_path / "damaged")


def test_a_dictionary_of_another_training_is_not_overwritten(tmp_path: Path):
    trained(tmp_path)
    (tmp_path / "training" / "state.safetensors").unlink()
    before = snapshot(tmp_path)
    with pytest.raises(StaleWork, match=r"other settings: \{'k': 4\}, not \{'k': 3\}"):
        trained(tmp_path, replace(SMALL, k=3))
    with pytest.raises(StaleWork, match="other data: , not elsewhere"):
        trained(tmp_path, SMALL, replace(CONFIG, data="elsewhere"))
    assert snapshot(tmp_path) == before


def test_a_training_in_a_folder_in_use_is_refused_at_once(tmp_path: Path):
    with folder_lock(tmp_path / "a"), pytest.raises(BadInput, match="Another process is writing"):
        fit({tmp_path / "a": SMALL}, interrupted_at(0), origin=ORIGIN, config=CONFIG)
    with folder_lock(tmp_path / "a"):
        trained(tmp_path / "b")


@pytest.mark.parametrize("kind", ["topk", "matryoshka"])
def test_an_sae_that_cannot_fit_the_memory_is_refused_with_what_it_needs(tmp_path: Path, kind: SAEKind):
    large = replace(SMALL, kind=kind, size=10**11, prefixes=(10,) if kind == "matryoshka" else ())
    with pytest.raises(OutOfMemory, match=r"at width 16 takes 8[0-9],[0-9]{3}\.\d GB of memory, and .* GB are free on cpu"):
        trained(tmp_path, large)


def test_a_training_may_go_on_after_its_end(tmp_path: Path):
    trained(tmp_path / "parts", config=replace(CONFIG, tokens=64 * 20))
    trained(tmp_path / "parts")
    assert trained(tmp_path / "whole").origin.training["tokens"] == 64 * 40
    assert [line["update"] for line in log(tmp_path / "parts") if "loss" in line] == [5, 10, 15, 20, 25, 30, 35, 40]


def test_the_log_keeps_no_line_that_was_cut_short_or_will_come_again(tmp_path: Path):
    trained(tmp_path / "whole")
    path = tmp_path / "parts" / "training" / "log.jsonl"
    path.parent.mkdir(parents=True)
    path.write_bytes(b'{"update": 0, "event": "start"}\n[[[\n{"update": 5')  # of a training that saved no state
    with pytest.raises(InterruptedError):
        fit({tmp_path / "parts": SMALL}, interrupted_at(25), origin=ORIGIN, config=CONFIG)
    path.write_bytes(path.read_bytes()[:-10])
    trained(tmp_path / "parts")
    assert same(tmp_path / "whole", tmp_path / "parts")


LONG = replace(CONFIG, tokens=64 * 400, checkpoint_every=2)


def run_killed(folder: Path, moments: random.Random, kills: int) -> int:
    """Train in a process that is killed at `kills` random moments; return how often it was killed before its end."""
    context = multiprocessing.get_context("fork")  # starts at once, unlike a new interpreter
    for kill in range(kills + 1):
        process = context.Process(target=trained, args=(folder, SMALL, LONG))
        process.start()
        if kill < kills:
            time.sleep(moments.random() * 0.2)  # in an update, in the writing of a state, or before anything
            process.kill()
        process.join(timeout=300)
        assert process.exitcode in (0, -signal.SIGKILL)
        if process.exitcode == 0:
            return kill
    raise AssertionError("training hung")


@pytest.mark.parametrize("kills", [6, pytest.param(30, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_moments_ends_with_the_same_bits(tmp_path: Path, kills: int):
    trained(tmp_path / "whole", SMALL, LONG)
    assert run_killed(tmp_path / "killed", random.Random(kills), kills) >= kills - 1
    assert same(tmp_path / "whole", tmp_path / "killed")


def test_a_batch_with_nan_is_named_and_the_last_checkpoint_stays(tmp_path: Path):
    def poisoned(start: int) -> Iterator[ActivationBatch]:
        for number, rows in enumerate(batches(start), start):
            if number == 20:
                rows.values[5, 3] = torch.nan
            yield rows

    message = rf"Batch 20 holds NaN or infinity in 1 rows, first that of shot {20 * 64 + 5}, token 0.*before that is intact"
    with pytest.raises(NonFinite, match=message):
        fit({tmp_path: SMALL}, poisoned, origin=ORIGIN, config=CONFIG)
    trained(tmp_path)
    trained(tmp_path / "healthy")
    assert same(tmp_path, tmp_path / "healthy")


def test_divergence_is_explained(tmp_path: Path):
    diverging = replace(SMALL, optimiser=AdamConfig(learning_rate=1e30, warmup=0))
    with pytest.raises(NonFinite, match=r"have diverged\. No checkpoint was saved\. Lower the learning rate"):
        trained(tmp_path, diverging)


def test_held_out_rows_are_refused(tmp_path: Path):
    with pytest.raises(BadInput, match="split 'held-out', 'train' is needed"):
        fit({tmp_path: SMALL}, lambda start: SplitBatches(batches(start), "held-out"), origin=ORIGIN, config=CONFIG)


def interrupted(folder: Path) -> Path:
    """Train until after a checkpoint and return its path."""
    with pytest.raises(InterruptedError):
        fit({folder: SMALL}, interrupted_at(25), origin=ORIGIN, config=CONFIG)
    return folder / "training" / "state.safetensors"


def test_a_training_does_not_resume_with_other_data_or_settings(tmp_path: Path):
    interrupted(tmp_path)
    with pytest.raises(StaleWork, match=r"other settings: \{'k': 4\}, not \{'k': 3\}"):
        trained(tmp_path, replace(SMALL, k=3))
    with pytest.raises(StaleWork, match="other data: , not elsewhere"):
        trained(tmp_path, SMALL, replace(CONFIG, data="elsewhere"))


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(path.read_bytes()[:-10]), flip])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, damage: Callable[[Path], object]):
    damage(interrupted(tmp_path))
    with pytest.raises(BrokenFile, match=r"state\.safetensors does not match its checksum.*Move it away"):
        trained(tmp_path)


@pytest.mark.parametrize(
    ("header", "tensors"),
    [
        ({"updates": "many"}, {}),
        ({"tokens": [1]}, {}),
        ({"metrics": {"loss": 1.0}}, {}),
        ({"normalisation": {"method": "magic"}}, {}),
        ({}, {"silence": torch.zeros(3, dtype=torch.long)}),
        ({}, {"firings": torch.zeros(64)}),
        ({}, {"decoder.weight": torch.zeros(64, 15)}),
        ({}, {"thresholds.weight": torch.zeros(64)}),
    ],
)
def test_a_checkpoint_with_wrong_entries_is_refused(tmp_path: Path, header: dict, tensors: dict):
    state = interrupted(tmp_path)
    content = read_tensors(state, FORMAT, "")
    write_tensors(state, FORMAT, {**content.tensors, **tensors}, {**content.header, **header})
    with pytest.raises(DifflexError):
        trained(tmp_path)


def test_a_checkpoint_of_an_older_format_is_refused(tmp_path: Path):
    state = interrupted(tmp_path)
    content = read_tensors(state, FORMAT, "")
    write_tensors(state, FORMAT - 1, content.tensors, content.header)
    with pytest.raises(BrokenFile, match=f"is of format {FORMAT - 1}; this version of difflex reads format {FORMAT}"):
        trained(tmp_path)


def test_data_that_need_normalisation_bring_a_warning(tmp_path: Path):
    with pytest.warns(UserWarning, match="Choose 'standardise' or 'whiten'"):
        trained(tmp_path, replace(SMALL, normalisation="none"), CONFIG)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained(tmp_path / "standardised")


def test_a_stream_that_ends_early_brings_a_warning_and_a_dictionary(tmp_path: Path):
    def short(start: int) -> Iterator[ActivationBatch]:
        return (rows for _, rows in zip(range(start, 12), batches(start), strict=False))

    with pytest.warns(UserWarning, match="ended after 768 of 2560 tokens"):
        dictionary = fit({tmp_path: SMALL}, short, origin=ORIGIN, config=CONFIG)[tmp_path]
    assert dictionary.origin.training["updates"] == 12


def test_the_log_has_all_metrics(tmp_path: Path):
    trained(tmp_path)
    lines = log(tmp_path)
    assert lines[0]["event"] == "start" and lines[0]["mean_over_spread"] > 0
    numbers = [line for line in lines if "loss" in line]
    assert [line["update"] for line in numbers] == [5, 10, 15, 20, 25, 30, 35, 40]
    names = {"tokens", "loss", "fvu", "l0", "dead", "gradient", "tokens_per_second", "waiting"}
    assert names <= numbers[0].keys() and numbers[0]["gradient"] > 0
    density = next(line["density"] for line in lines if line.get("event") == "checkpoint")
    assert sum(density.values()) == SMALL.size


def test_a_logger_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingExtra, match=r"needs the package wandb: pip install 'difflex\[logs\]'"):
        trained(tmp_path, SMALL, replace(CONFIG, loggers=("wandb",)))


def test_the_learning_rate_rises_stays_and_falls():
    settings = AdamConfig(learning_rate=1.0, warmup=10, decay=0.2)
    assert [learning_rate(settings, update, update / 100) for update in (0, 4, 9, 50, 80, 90)] == pytest.approx(
        [0.1, 0.5, 1, 1, 1, 0.5]
    )


@pytest.mark.parametrize(
    "wrong",
    [{"k": 65}, {"kind": "matryoshka"}, {"prefixes": (8,)}, {"kind": "matryoshka", "prefixes": (64,)}],
)
def test_impossible_trainings_are_refused(wrong: dict):
    with pytest.raises(BadInput):
        replace(SMALL, **wrong)


def test_seeds_differ_and_repeat(tmp_path: Path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        trained(tmp_path / name, replace(SMALL, initialisation=InitConfig(seed=seed)))
    assert same(tmp_path / "a", tmp_path / "b") and not same(tmp_path / "a", tmp_path / "c")


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: AdamConfig(learning_rate=-1.0),
        lambda: AdamConfig(learning_rate=float("nan")),
        lambda: AdamConfig(ema=2.0),
        lambda: AdamConfig(decay=-1.0),
        lambda: AuxKLoss(target="magic"),  # pyright: ignore[reportArgumentType]
        lambda: InitConfig(bias="magic"),  # pyright: ignore[reportArgumentType]
        lambda: TrainingConfig(kind="top_k", size=64, k=4),  # pyright: ignore[reportArgumentType]
        lambda: FitConfig(tokens=0),
    ],
)
def test_impossible_settings_are_refused(wrong: Callable[[], object]):
    with pytest.raises((DifflexError, TypeCheckError)):  # the latter if annotations are checked
        wrong()


def test_statistics_count_a_repeated_stream_once(tmp_path: Path):
    few = next(batches(0))

    def again(start: int) -> Iterator[ActivationBatch]:
        return repeat(few)

    with pytest.raises(BadInput, match="needs"):
        fit({tmp_path: SMALL}, again, origin=ORIGIN, config=replace(CONFIG, epoch=len(few.values)))


def test_weights_that_diverge_in_the_last_update_are_not_saved(tmp_path: Path):
    diverging = replace(SMALL, optimiser=AdamConfig(learning_rate=1e38, warmup=0, decay=0.0))
    with pytest.raises(NonFinite), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit({tmp_path: diverging}, batches, origin=ORIGIN, config=replace(CONFIG, tokens=64))
    assert not (tmp_path / "config.json").exists()


def test_when_one_sae_of_a_sweep_diverges_the_others_keep_their_checkpoint(tmp_path: Path):
    sweep = {
        tmp_path / "stable": SMALL,
        tmp_path / "diverging": replace(SMALL, optimiser=AdamConfig(learning_rate=1e38, warmup=0)),
    }
    with pytest.raises(NonFinite, match="diverged"):
        fit(sweep, batches, origin=ORIGIN, config=CONFIG)
    assert (tmp_path / "stable" / "training" / "state.safetensors").exists()


def test_when_one_sae_diverges_at_the_end_the_others_are_saved(tmp_path: Path):
    diverging = replace(SMALL, optimiser=AdamConfig(learning_rate=1e38, warmup=0, decay=0.0))
    with pytest.raises(NonFinite, match="diverged"):
        fit(
            {tmp_path / "diverging": diverging, tmp_path / "stable": SMALL},
            batches,
            origin=ORIGIN,
            config=replace(CONFIG, tokens=64),
        )
    assert Dictionary.load(tmp_path / "stable").size == SMALL.size
    assert not (tmp_path / "diverging" / "config.json").exists()
