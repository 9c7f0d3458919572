"""Parallel training: the same result for any number of ranks, and a clear error if a rank is lost."""

import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from test_training import CONFIG, KINDS, ORIGIN, SMALL, WORLD, batches, interrupted_at

from difflex.distributed import process_group
from difflex.errors import BadInput, DifflexError
from difflex.records import ActivationBatch
from difflex.training import FitConfig, TrainingConfig, fit
from difflex.training.data import TrainingRanks

SHORT = replace(CONFIG, tokens=64 * 14, checkpoint_every=5, log_every=2)
TORCHRUN = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "test"}


def train_rank(
    rank: int, count: int, meeting: Path, folder: Path, training: TrainingConfig, config: FitConfig, stop: int | None
) -> None:
    """Train on one rank; `stop` is the batch at which the stream is interrupted, as by a kill."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=count)
    stream = batches if stop is None else interrupted_at(stop)
    try:
        fit({folder: training}, stream, origin=ORIGIN, config=config)
    except InterruptedError:
        os._exit(0)
    dist.destroy_process_group()


def train_parallel(count: int, folder: Path, training: TrainingConfig, config: FitConfig, stop: int | None = None) -> None:
    """Train in `count` processes."""
    context = multiprocessing.get_context("fork")
    meeting = folder.with_name(f"{folder.name}-meeting-{time.monotonic_ns()}")
    meeting.parent.mkdir(parents=True, exist_ok=True)
    ranks = [
        context.Process(target=train_rank, args=(rank, count, meeting, folder, training, config, stop)) for rank in range(count)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=120)
        assert process.exitcode == 0


def alike(first: Path, second: Path) -> bool:
    """Compare the weights and checkpoints of two folders within the rounding of float32."""
    for name in ("dictionary.safetensors", "training/state.safetensors"):
        a, b = load_file(first / name), load_file(second / name)
        assert a.keys() == b.keys()
        for key in a:
            torch.testing.assert_close(a[key], b[key], atol=2e-4, rtol=2e-4, msg=lambda text, key=key: f"{key}: {text}")
    return True


QUICK = {("topk", "data"), ("topk", "features"), ("jumprelu", "data"), ("matryoshka", "features")}
"""What stands for all kinds and divisions in the default run."""


@pytest.mark.parametrize(
    ("name", "split"),
    [
        pytest.param(name, split, marks=() if (name, split) in QUICK else pytest.mark.slow)
        for name in KINDS
        for split in ("data", "features")
    ],
)
def test_two_ranks_train_the_same_sae_as_one(tmp_path: Path, name: str, split: str):
    config = replace(SHORT, split=split)
    fit({tmp_path / "one": KINDS[name]}, batches, origin=ORIGIN, config=config)
    train_parallel(2, tmp_path / "two", KINDS[name], config)
    assert alike(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize(("before", "after", "split"), [(2, 1, "data"), (1, 2, "features")])
def test_a_run_resumes_with_another_number_of_ranks(tmp_path: Path, split: str, before: int, after: int):
    config = replace(SHORT, split=split)
    train_parallel(before, tmp_path / "some", SMALL, config, stop=8)
    assert not (tmp_path / "some" / "config.json").exists()
    train_parallel(after, tmp_path / "some", SMALL, config)
    fit({tmp_path / "one": SMALL}, batches, origin=ORIGIN, config=config)
    assert alike(tmp_path / "one", tmp_path / "some")


def test_a_batch_may_have_fewer_tokens_than_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def thin(start: int):
        return (
            ActivationBatch(*(part[:1] for part in rows)) if number % 4 == 3 else rows
            for number, rows in enumerate(WORLD.batches(64, start), start)
        )

    monkeypatch.setattr("test_training_parallel.batches", thin)
    config = replace(SHORT, tokens=64 * 8)
    for name in ("topk", "batchtopk"):
        fit({tmp_path / name / "one": KINDS[name]}, thin, origin=ORIGIN, config=config)
        train_parallel(2, tmp_path / name / "two", KINDS[name], config)
        assert alike(tmp_path / name / "one", tmp_path / name / "two")


def rank_dies(rank: int, meeting: Path, folder: Path, answer: Path) -> None:
    """Train until rank 1 is killed at batch 8; rank 0 writes its error to `answer`."""
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)

    def stream(start: int):
        for number, rows in enumerate(batches(start), start):
            if number == 8 and rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            yield rows

    try:
        fit({folder: SMALL}, stream, origin=ORIGIN, config=SHORT)
    except DifflexError as error:
        answer.write_text(str(error))
    os._exit(0)


def test_a_lost_rank_brings_a_clear_error_and_a_checkpoint_to_resume_from(tmp_path: Path):
    context = multiprocessing.get_context("fork")
    places = (tmp_path / "meeting", tmp_path / "run", tmp_path / "answer")
    ranks = [context.Process(target=rank_dies, args=(rank, *places)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=60)
    assert [process.exitcode for process in ranks] == [0, -signal.SIGKILL]
    assert "Another rank is gone" in places[2].read_text()
    fit({tmp_path / "run": SMALL}, batches, origin=ORIGIN, config=SHORT)
    fit({tmp_path / "one": SMALL}, batches, origin=ORIGIN, config=SHORT)
    assert alike(tmp_path / "one", tmp_path / "run")


def test_a_size_that_cannot_be_split_is_refused():
    ranks = TrainingRanks("features")
    ranks.world_size = 3
    with pytest.raises(BadInput, match="Size 64 cannot be split evenly over 3 ranks"):
        ranks.features(64)


def test_the_shares_of_the_ranks_make_up_the_batch(monkeypatch: pytest.MonkeyPatch):
    ranks, tokens = TrainingRanks(), torch.arange(65)
    ranks.world_size = 3
    shares = []
    for ranks.rank in range(3):
        shares.append(tokens[ranks.batch_share(65)])
    assert torch.equal(torch.cat(shares), tokens)


def test_without_torchrun_no_process_group_is_started():
    with process_group():
        assert not dist.is_initialized()


def test_under_torchrun_a_process_group_is_started_and_ended(monkeypatch: pytest.MonkeyPatch, free_port: int):
    for name, value in {**TORCHRUN, "MASTER_PORT": str(free_port)}.items():
        monkeypatch.setenv(name, value)
    with process_group():
        assert dist.get_world_size() == 1
    assert not dist.is_initialized()


@pytest.fixture
def free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
