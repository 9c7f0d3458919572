"""Training: a resumed run ends like an uninterrupted one, sweeps share a pass, and errors are explained."""

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
from safetensors.torch import load_file, save_file

from difflex.dictionaries import SAE, Dictionary, DictionaryOrigin
from difflex.errors import BadInput, BrokenFile, DifflexError, MissingExtra, NonFinite, StaleWork
from difflex.records import ActivationBatch, Site
from difflex.store.reading import SplitBatches
from difflex.testing import PlantedDictionary
from difflex.training import AdamConfig, AuxKLoss, FitConfig, InitConfig, TrainingConfig, fit
from difflex.training.fitting import learning_rate

WORLD = PlantedDictionary(width=16, truths=48, active=3, stretched=2)
ORIGIN = DictionaryOrigin(site=Site("double.1"), model="mini-flux")
SMALL = TrainingConfig(size=64, k=4, optimiser=AdamConfig(learning_rate=1e-2, warmup=5), auxk=AuxKLoss(dead_after=500))
CONFIG = FitConfig(tokens=64 * 40, checkpoint_every=7, log_every=5, progress=False)


def batches(start: int) -> Iterator[ActivationBatch]:
    return WORLD.batches(64, start)


def trained(folder: Path, training: TrainingConfig = SMALL, config: FitConfig = CONFIG) -> SAE:
    return fit({folder: training}, batches, origin=ORIGIN, config=config)[folder]


def same(first: Path, second: Path) -> bool:
    """Return whether two folders hold the same weights and the same checkpoint, bit for bit."""
    pairs = [
        (load_file(first / name), load_file(second / name)) for name in ("dictionary.safetensors", "training/state.safetensors")
    ]
    return all(a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in pairs)


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "training" / "log.jsonl").read_text().splitlines()]


KINDS = {
    "topk": SMALL,
    "batchtopk": replace(SMALL, kind="batchtopk"),
    "jumprelu": replace(SMALL, kind="jumprelu"),
    "matryoshka": replace(SMALL, kind="matryoshka", prefixes=(16,)),
    "lazy": replace(SMALL, optimiser=AdamConfig(learning_rate=1e-2, beta1=0.0, ema=0.9), normalisation="whiten", clip=5.0),
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
    lines = [{key: value for key, value in line.items() if key not in VOLATILE} for line in log(tmp_path / "parts")]
    assert lines == [{key: value for key, value in line.items() if key not in VOLATILE} for line in log(tmp_path / "whole")]


VOLATILE = ("tokens_per_second", "waiting")


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


def test_a_finished_training_is_not_repeated(tmp_path: Path):
    trained(tmp_path)
    before = [(tmp_path / name).read_bytes() for name in ("dictionary.safetensors", "config.json")]
    fit({tmp_path: SMALL}, interrupted_at(0), origin=ORIGIN, config=CONFIG)
    assert [(tmp_path / name).read_bytes() for name in ("dictionary.safetensors", "config.json")] == before


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


def test_a_training_does_not_resume_with_other_data_or_settings(tmp_path: Path):
    trained(tmp_path)
    with pytest.raises(StaleWork, match=r"other training: \{'k': 4\}, not \{'k': 3\}"):
        trained(tmp_path, replace(SMALL, k=3))
    with pytest.raises(StaleWork, match="other data: , not elsewhere"):
        trained(tmp_path, SMALL, replace(CONFIG, data="elsewhere"))


def test_a_damaged_checkpoint_is_named(tmp_path: Path):
    trained(tmp_path)
    state = tmp_path / "training" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-10])
    with pytest.raises(BrokenFile, match="damaged"):
        trained(tmp_path)


def test_a_checkpoint_of_an_older_format_is_refused(tmp_path: Path):
    trained(tmp_path)
    state = tmp_path / "training" / "state.safetensors"
    save_file(load_file(state), state, metadata={"state": json.dumps({"format": 1})})
    with pytest.raises(BrokenFile, match="is a training state of format 1; this version reads format 2"):
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
