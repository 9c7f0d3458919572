"""Training at several sites at once, from a running harvest: groups that fit the memory, compact checkpoints, kills."""

import gc
import multiprocessing
import signal
import time
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from fake_harvest import SITES, FakeHarvest, fake_shots
from safetensors.torch import load_file
from test_training import CONFIG, ORIGIN, SMALL, batches, flip, interrupted_at, log, same, trained

from difflex.dictionaries import SAE, Dictionary
from difflex.errors import BadInput, BrokenFile, OutOfMemory
from difflex.records import ActivationBatch, Site
from difflex.store.live import LiveSites
from difflex.study import Study
from difflex.training import FitConfig, fit
from difflex.training.config import training_cost
from difflex.training.data import SiteBatch
from difflex.training.fitting import FitMember, FitRun, FitTask
from difflex.training.groups import fit_tasks
from difflex.training.learner import Learner
from difflex.training.study import SweepConfig, train_live

HERE, THERE = ORIGIN.site, Site("single.0")
STATE = Path("training") / "state.safetensors"
COMPACT = replace(CONFIG, checkpoints="compact")


def both(start: int) -> Iterator[SiteBatch]:
    """The same tokens at two sites, larger at the second."""
    for rows in batches(start):
        yield {HERE: rows, THERE: rows._replace(values=3 * rows.values + 1)}


def larger(start: int) -> Iterator[ActivationBatch]:
    return (rows[THERE] for rows in both(start))


def tasks(folder: Path) -> dict[Path, FitTask]:
    origins = {"here": ORIGIN, "there": replace(ORIGIN, site=THERE)}
    return {folder / f"{name}-{k}": FitTask(origins[name], replace(SMALL, k=k)) for name in origins for k in (2, 4)}


def train(folder: Path, config: FitConfig = CONFIG, replay: bool = True, kept: int = 0) -> dict[Path, SAE]:
    device = torch.device("cpu")
    return dict(fit_tasks(tasks(folder), both, config=config, device=device, replay=replay, prepare=lambda: kept))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The SAEs of both sites, each trained alone."""
    folder = tmp_path_factory.mktemp("alone")
    for place, (origin, training) in tasks(folder).items():
        fit({place: training}, batches if origin.site == HERE else larger, origin=origin, config=CONFIG)
    return folder


def all_same(first: Path, second: Path) -> bool:
    return all(same(place, second / place.name) for place in tasks(first))


@pytest.mark.parametrize("replay", [True, False])
def test_saes_of_several_sites_are_those_that_are_trained_alone(tmp_path: Path, alone: Path, replay: bool):
    train(tmp_path, replay=replay)
    assert all_same(alone, tmp_path)


def test_what_does_not_fit_together_is_trained_in_groups_and_said_beforehand(
    tmp_path: Path, alone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("difflex.training.config.SCORES", {"cpu": 0})
    cost = training_cost([(task.training, 16) for task in tasks(tmp_path).values()], batch=64, sites=[16, 16])
    monkeypatch.setattr("difflex.training.groups.free_memory", lambda device: cost.device)
    train(tmp_path, replace(CONFIG, batch=64, progress=True), kept=1)  # by the harvest
    assert "4 SAEs take 0.0 GB, 0.0 GB are free: trained in 2 groups of 2, one after another." in capsys.readouterr().out
    assert all_same(alone, tmp_path)


def test_a_group_that_runs_out_of_memory_is_halved_and_loses_nothing(
    tmp_path: Path, alone: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = FitRun.train

    def limited(run: FitRun) -> None:
        if len(run._members) > 2:
            monkeypatch.setattr(run, "_config", replace(run._config, tokens=64 * 10))
            whole(run)  # a checkpoint is written
            raise torch.OutOfMemoryError("CUDA out of memory")
        whole(run)

    monkeypatch.setattr(FitRun, "train", limited)
    with pytest.warns(UserWarning, match="4 SAEs at once do not fit into the memory of cpu: 2 are trained from their last check"):
        train(tmp_path)
    assert next(line["update"] for line in log(tmp_path / "here-2") if line.get("event") == "checkpoint") == 7
    assert all(
        (tmp_path / place.name / "dictionary.safetensors").read_bytes() == (place / "dictionary.safetensors").read_bytes()
        for place in tasks(alone)
    )


def test_the_state_of_a_training_is_gone_when_the_next_dictionary_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    learners: list[weakref.ref[Learner]] = []
    whole = FitMember.dictionary

    def noted(member: FitMember, *arguments: object) -> SAE:
        assert all(learner() is None for learner in learners)
        learners.append(weakref.ref(member.learner))
        return whole(member, *arguments)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(FitMember, "dictionary", noted)
    gc.disable()
    try:
        train(tmp_path)
    finally:
        gc.enable()
    assert len(learners) == 4


def test_an_sae_that_runs_out_of_memory_alone_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(run: FitRun) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(FitRun, "train", fail)
    with pytest.raises(OutOfMemory, match=r"topk-64-k4 does not fit into the memory of cpu.*is intact"):
        trained(tmp_path)


def explained(dictionary: SAE) -> float:
    x = next(batches(1000)).values
    y = dictionary.decode(dictionary.encode(x))
    return float((x - y).square().sum() / (x - x.mean(0)).square().sum())


@pytest.mark.parametrize("ema", [None, 0.9])
def test_a_compact_checkpoint_is_small_resumes_well_and_is_removed(tmp_path: Path, ema: float | None):
    lazy = replace(SMALL, size=256, optimiser=replace(SMALL.optimiser, beta1=0.0, beta2=0.99, ema=ema))
    config = replace(COMPACT, tokens=64 * 100, checkpoint_every=25)
    for kind in ("exact", "compact"):
        with pytest.raises(InterruptedError):
            fit({tmp_path / kind: lazy}, interrupted_at(60), origin=ORIGIN, config=replace(config, checkpoints=kind))
    sizes = [(tmp_path / kind / STATE).stat().st_size for kind in ("exact", "compact")]
    assert sizes[1] < 0.5 * sizes[0]
    whole = fit({tmp_path / "whole": lazy}, batches, origin=ORIGIN, config=config)[tmp_path / "whole"]
    resumed = fit({tmp_path / "compact": lazy}, batches, origin=ORIGIN, config=config)[tmp_path / "compact"]
    assert explained(resumed) < 1.15 * explained(whole)
    assert resumed.origin.training["updates"] == 100
    assert not (tmp_path / "compact" / STATE).exists() and not (tmp_path / "whole" / STATE).exists()


def test_a_finished_training_without_a_checkpoint_starts_again_for_more_tokens_and_says_so(tmp_path: Path):
    trained(tmp_path, config=replace(COMPACT, tokens=64 * 10))
    before = (tmp_path / "dictionary.safetensors").read_bytes()
    with pytest.warns(UserWarning, match="was trained on 640 tokens and kept no checkpoint: it is trained from the start"):
        trained(tmp_path, config=COMPACT)
    assert (tmp_path / "dictionary.safetensors").read_bytes() != before
    assert [line["update"] for line in log(tmp_path) if "loss" in line] == [5, 10, 15, 20, 25, 30, 35, 40]


def test_a_damaged_compact_checkpoint_is_named(tmp_path: Path):
    with pytest.raises(InterruptedError):
        fit({tmp_path: SMALL}, interrupted_at(25), origin=ORIGIN, config=COMPACT)
    flip(tmp_path / STATE)
    with pytest.raises(BrokenFile, match=r"state\.safetensors does not match its checksum"):
        trained(tmp_path, config=COMPACT)


def test_large_checkpoints_are_written_less_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("difflex.training.fitting.LARGE", 0)
    monkeypatch.setattr("difflex.training.fitting.DISK_SPEED", 1.0)  # the first would take hours
    trained(tmp_path / "slow")
    monkeypatch.setattr("difflex.training.fitting.WRITING", 1e9)
    trained(tmp_path / "fast")
    written = [
        [line["update"] for line in log(tmp_path / name) if line.get("event") == "checkpoint"] for name in ("slow", "fast")
    ]
    assert written == [[], [7, 14, 21, 28, 35]]
    assert (tmp_path / "slow" / STATE).read_bytes() == (tmp_path / "fast" / STATE).read_bytes()


def test_a_dictionary_in_bf16_takes_half_the_disk_and_loads_as_it_was_returned(tmp_path: Path):
    full, half = (trained(tmp_path / dtype, config=replace(CONFIG, weights=dtype)) for dtype in ("fp32", "bf16"))
    sizes = [(tmp_path / dtype / "dictionary.safetensors").stat().st_size for dtype in ("fp32", "bf16")]
    assert sizes[1] < 0.65 * sizes[0]
    assert load_file(tmp_path / "bf16" / "dictionary.safetensors")["encoder"].dtype == torch.bfloat16
    loaded = Dictionary.load(tmp_path / "bf16")
    assert loaded.decoder.dtype == torch.float32 and torch.equal(loaded.decoder, half.decoder)
    torch.testing.assert_close(loaded.decoder, full.decoder, rtol=2**-8, atol=1e-6)
    assert explained(half) == pytest.approx(explained(full), rel=0.01)


LIVE = SweepConfig(size=(64,), k=(2, 4), batch=64, tokens=64 * 30, window=512, live=True, checkpoints="exact")


def live(folder: Path, config: SweepConfig = LIVE, delay: float = 0.0) -> int:
    """Train from a fake harvest of endless prompts; return the number of shots that were harvested."""
    harvest = FakeHarvest(delay=delay)
    study = Study.begin(folder, "fake")
    with LiveSites(fake_shots(None), SITES, harvest, batch=4) as activations:
        train_live(study, activations, config, "fake prompts", also=[SITES[1]])
    return harvest.shot_count


def test_a_window_that_exceeds_the_memory_of_the_machine_is_refused(tmp_path: Path):
    with pytest.raises(BadInput, match=r"--window 10,000,000,000,000 takes .* Choose a smaller one, such as 65,536\."):
        live(tmp_path, replace(LIVE, window=10**13))
    assert not dictionaries(tmp_path) and not list(tmp_path.rglob("*.safetensors"))


def dictionaries(folder: Path) -> list[Path]:
    return [Path(ref.site.folder) / ref.label for ref in Study.open(folder).dictionaries()]


def test_one_pass_trains_all_sites_and_harvests_no_shot_twice(tmp_path: Path):
    assert live(tmp_path) == 1 + 64 * 30 // 4
    names = [f"{site}/topk-64-k{k}" for site in ("double.1", "double.1+text") for k in (2, 4)]
    assert {str(path) for path in dictionaries(tmp_path)} == {*names, "single.0+update/topk-64-k4"}
    assert not (tmp_path / "activations").exists()


def test_a_live_training_that_was_killed_ends_with_the_same_bits_and_harvests_at_most_a_window_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("difflex.training.sweeps.CHECKPOINT_EVERY", 5)
    live(tmp_path / "whole")
    process = multiprocessing.get_context("fork").Process(target=live, args=(tmp_path / "killed", LIVE, 0.01))
    process.start()
    states = [tmp_path / "killed" / "dictionaries" / path / STATE for path in dictionaries(tmp_path / "whole")]
    deadline = time.monotonic() + 60
    while not all(state.exists() for state in states) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL and not dictionaries(tmp_path / "killed")
    shots = live(tmp_path / "killed")
    assert shots <= 1 + 64 * 25 // 4 + 512 // 4
    for path in dictionaries(tmp_path / "whole"):
        assert same(*(tmp_path / name / "dictionaries" / path for name in ("whole", "killed")))


def live_rank(rank: int, meeting: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    shots = live(folder)
    (folder / f"shots-{rank}").write_text(str(shots))
    dist.destroy_process_group()


def test_two_processes_share_the_shots_of_a_live_training(tmp_path: Path):
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=live_rank, args=(rank, tmp_path / "meeting", tmp_path / "study")) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=120)
        assert process.exitcode == 0
    shots = [int((tmp_path / "study" / f"shots-{rank}").read_text()) for rank in range(2)]
    assert shots == [1 + 64 * 30 // 4 // 2] * 2  # and one for the shapes
    sae = Dictionary.load(tmp_path / "study" / "dictionaries" / "double.1" / "topk-64-k4")
    assert sae.origin.training["tokens"] == 64 * 30 and "2 processes" in str(sae.origin.training["data"])
