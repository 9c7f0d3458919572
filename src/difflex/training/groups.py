"""`fit`: train one or many SAEs on one stream of activations, as many at once as fit the device. Stopped runs resume."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from tqdm import tqdm

from difflex.devices import find_device, free_memory
from difflex.dictionaries import SAE, Dictionary, DictionaryOrigin
from difflex.dictionaries.files import stored_weights
from difflex.distributed import Ranks
from difflex.errors import BadInput, BrokenFile, OutOfMemory
from difflex.files import disk_errors, folder_lock
from difflex.records import Site
from difflex.store import require_split
from difflex.training.checkpoint import check_same, check_state, saved_width
from difflex.training.config import SweepCost, TrainingConfig, training_cost
from difflex.training.data import Batches, BatchFeed, SiteBatch, SiteBatches, TrainingRanks
from difflex.training.fitting import STATE, FitConfig, FitRun, FitTask

USABLE = 0.95
"""The share of a GPU's free memory that is planned with: some of it is lost between blocks."""


def fit(
    trainings: Mapping[Path, TrainingConfig],
    batches: Batches,
    *,
    origin: DictionaryOrigin,
    config: FitConfig,
    device: torch.device | str | None = None,
) -> dict[Path, SAE]:
    """Train an SAE for each folder, and save it there with its log and its checkpoint.

    Every SAE is trained on every batch, so that a sweep costs one pass over the data; SAEs that do not fit the device together
    are trained in groups, one after another. Work in a folder resumes, bit for bit on a CPU, and finished work is loaded and not
    touched. Under `torch.distributed` all ranks call this, and rank 0 writes. The default device is a GPU, if there is one.
    """
    if not trainings:
        raise BadInput("`fit` needs at least one training: choose a kind, a size and k.")
    device = find_device(device)

    def stream(start: int) -> Iterator[SiteBatch]:
        return ({origin.site: rows} for rows in require_split(batches(start), "train"))

    tasks = {folder: FitTask(origin, training) for folder, training in trainings.items()}
    finished = dict(fit_tasks(tasks, stream, config=config, device=device))
    return {folder: _on(finished[folder], device) for folder in trainings}


def fit_tasks(
    tasks: Mapping[Path, FitTask],
    batches: SiteBatches,
    *,
    config: FitConfig,
    device: torch.device,
    replay: bool = False,
    prepare: Callable[[], int] | None = None,
) -> Iterator[tuple[Path, SAE]]:
    """Train the SAEs of several sites, as `fit` does, and yield each on the CPU when it is finished.

    `replay`: batches are costly to read again, and those of the statistics are kept in memory until they are trained on.
    `prepare` is called if there is something to train; it returns the bytes of the device that are not for the training.
    """
    unfinished = {}
    for folder, task in tasks.items():
        if (sae := load_finished(folder, task.training, config)) is not None:
            yield folder, sae
        else:
            unfinished[folder] = task
    if not unfinished:
        return
    ranks = TrainingRanks(config.split)
    with ExitStack() as locks:
        for folder in unfinished if ranks.rank == 0 else ():
            locks.enter_context(folder_lock(folder))
        feed = BatchFeed(batches, ranks, device, sharded=config.sharded, replay=replay)
        kept = 0 if prepare is None else prepare()
        groups = _plan(unfinished, feed, config, ranks, device, kept)
        while groups:
            group, unsaved = groups.pop(0), {}
            try:
                unsaved = {folder: unfinished[folder] for folder in group}
                run = FitRun(unsaved, feed, config, ranks, device)
                run.train()
                for folder, sae in run.finish():
                    unsaved.pop(folder)
                    yield folder, sae
            except (RuntimeError, OutOfMemory) as error:
                groups = [*_halves(list(unsaved), unfinished, error, ranks, device), *groups]
            run = None  # its memory is that of the next group
            _free(device)


def load_finished(folder: Path, training: TrainingConfig, config: FitConfig) -> SAE | None:
    """Return the SAE that an earlier call has finished in `folder`, or None; raise an error if it is another or damaged one."""
    state = folder / STATE
    if not (folder / "config.json").exists():
        return None
    try:
        sae = Dictionary.load(folder)
    except BrokenFile as error:
        if not state.exists():
            raise
        repair = f"{state} can write it again: move {folder / 'config.json'} away, then give the same command again."
        raise BrokenFile(f"{error} {repair}") from error
    record = sae.origin.training
    check_same(folder, "settings", record.get("config"), training.as_json())
    check_same(folder, "data", record.get("data"), config.data)
    tokens = record.get("tokens")
    if not isinstance(sae, SAE) or not isinstance(tokens, int) or tokens < config.tokens:
        if not state.exists():
            warnings.warn(
                f"{folder} was trained on {tokens} tokens and kept no checkpoint: it is trained from the start, and replaced at "
                "the end.",
                stacklevel=4,
            )
        return None
    if config.checkpoints == "compact" and Ranks().rank == 0:  # a kill left it
        with disk_errors(state):
            state.unlink(missing_ok=True)
    check_state(state)
    if (stored := stored_weights(folder)) != config.weights:
        warnings.warn(
            f"{folder} is finished, with weights in {stored}: --weights {config.weights} changes nothing. Move it away to train "
            "it again.",
            stacklevel=4,
        )
    return sae


def _plan(
    tasks: Mapping[Path, FitTask], feed: BatchFeed, config: FitConfig, ranks: TrainingRanks, device: torch.device, kept: int
) -> list[list[Path]]:
    """Divide the SAEs into groups that fit the free memory but for `kept` bytes, and say so if there are several."""
    folders, widths = list(tasks), _widths(tasks, feed)
    cost = training_cost(
        [(task.training, widths[task.origin.site]) for task in tasks.values()],
        batch=config.batch,
        device="cuda" if device.type == "cuda" else "cpu",
        parts=ranks.by_feature.world_size,
        sites=[*widths.values()],
        checkpoints=config.checkpoints,
    )
    free = int(ranks.broadcast(torch.tensor([free_memory(device) - kept], device=device)))
    # Ranks on a CPU share its memory.
    usable = int(free * USABLE) if device.type == "cuda" else free // ranks.world_size
    if (groups := cost.groups(usable)) is None:
        largest = tasks[folders[max(range(len(folders)), key=lambda index: cost.states[index])]]
        need = cost.least * (1 if device.type == "cuda" else ranks.world_size)
        raise OutOfMemory(
            f"Training {largest.training.label} at width {widths[largest.origin.site]} takes {need / 1e9:,.1f} GB of memory, and "
            f"{free / 1e9:,.1f} GB are free on {device}. Choose a smaller size."
        )
    if len(groups) > 1 and ranks.rank == 0 and config.progress:
        tqdm.write(group_message(cost, groups, free))
    return [[folders[index] for index in group] for group in groups]


def group_message(cost: SweepCost, groups: Sequence[Sequence[int]], free: int) -> str:
    """Say in which groups SAEs are trained, and why."""
    sizes = [len(group) for group in groups]
    alike = f"{len(sizes)} groups of {sizes[0]}" if len(set(sizes)) == 1 else f"groups of {', '.join(map(str, sizes))}"
    return (
        f"{len(cost.states)} SAEs take {cost.device / 1e9:.1f} GB, {free / 1e9:.1f} GB are free: trained in {alike}, one after "
        "another."
    )


def _widths(tasks: Mapping[Path, FitTask], feed: BatchFeed) -> dict[Site, int]:
    """Return the width at each site, from a checkpoint or else from the first batch."""
    sites = {folder: task.origin.site for folder, task in tasks.items()}
    widths = {site: width for folder, site in sites.items() if (width := saved_width(folder / STATE)) is not None}
    return widths if widths.keys() == {*sites.values()} else {**feed.widths(), **widths}


def _halves(
    folders: list[Path], tasks: Mapping[Path, FitTask], error: Exception, ranks: TrainingRanks, device: torch.device
) -> list[list[Path]]:
    """Return two groups in place of one that did not fit; raise an error for a single SAE, and errors of another kind."""
    if not _is_out_of_memory(error):
        raise error
    if len(folders) < 2 or ranks.world_size > 1:
        if isinstance(error, OutOfMemory):
            raise error
        labels = ", ".join(tasks[folder].training.label for folder in folders)
        raise OutOfMemory(
            f"The training of {labels} does not fit into the memory of {device}. What its folder holds is intact. Choose a "
            "smaller --size or --batch, or end what else uses that memory, then give the same command again."
        ) from error
    error.__traceback__ = None  # it holds the tensors of the failed run
    half = -(-len(folders) // 2)
    warnings.warn(
        f"{len(folders)} SAEs at once do not fit into the memory of {device}: {half} are trained from their last checkpoint, and "
        "after them the others.",
        stacklevel=3,
    )
    return [folders[:half], folders[half:]]


def _on(sae: SAE, device: torch.device | str) -> SAE:
    moved = sae.to(device)
    assert isinstance(moved, SAE), "an SAE stays one"
    return moved


def _is_out_of_memory(error: Exception) -> bool:
    texts = ("can't allocate memory", "out of memory")  # of a CPU, and of an MPS device or the driver of a GPU
    return isinstance(error, (torch.OutOfMemoryError, OutOfMemory)) or any(text in str(error) for text in texts)


def _free(device: torch.device) -> None:
    """Give unused memory back to the device."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
