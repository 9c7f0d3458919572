"""Train the SAEs of a study, every size with every k: on stored activations, or on those of a running harvest."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

from difflex.choices import NormalisationMethod, SAEKind
from difflex.devices import find_device, total_memory, use_gpu_of_rank
from difflex.dictionaries import SAE, DictionaryOrigin
from difflex.dictionaries.files import WeightsDtype
from difflex.dictionaries.normalisation import VECTORS_PER_AXIS
from difflex.distributed import Ranks, process_group
from difflex.errors import BadInput, NonFinite, UnknownName
from difflex.files import Json
from difflex.records import Site
from difflex.store import Store
from difflex.store.live import LiveSites
from difflex.study import Study
from difflex.training.checkpoint import LoggerName
from difflex.training.config import (
    WINDOWS,
    CheckpointKind,
    DeviceType,
    SweepCost,
    TrainingConfig,
    default,
    paper,
    training_cost,
    unbox,
)
from difflex.training.data import SiteBatch, Split
from difflex.training.fitting import FitConfig, FitTask
from difflex.training.groups import fit_tasks

WINDOW = 65_536
"""Rows that a live training shuffles at each site: 400 MB at width 3072, twice."""
CHECKPOINT_EVERY = 500
"""Updates between two checkpoints."""
MEMORY = 0.25
"""The largest share of the memory of the machine that windows take."""

Preset = Literal["default", "paper", "paper-auxk", "unbox"]


class PresetShape(NamedTuple):
    """The size, k and batch of a preset."""

    size: int
    k: int
    batch: int


PRESETS: Mapping[Preset, PresetShape] = {
    "default": PresetShape(8192, 32, 1024),
    "paper": PresetShape(65_536, 64, 1024),
    "paper-auxk": PresetShape(65_536, 64, 1024),
    "unbox": PresetShape(5120, 10, 4096),
}


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """SAEs of every size with every k, trained in one pass over the activations. Empty fields take the preset's values."""

    size: tuple[int, ...] = ()
    k: tuple[int, ...] = ()
    preset: Preset = "default"
    kind: SAEKind = "topk"
    normalisation: NormalisationMethod | None = None
    learning_rate: float | None = None
    tokens: int | None = None
    """Tokens to train on; by default all training tokens, once. The store repeats in another order."""
    batch: int | None = None
    """Tokens per update, of all ranks together."""
    seed: int = 0
    """Of the initial weights and the order of the tokens."""
    split: Split = "data"
    loggers: tuple[LoggerName, ...] = ()
    live: bool = False
    """Whether the activations come from a running harvest."""
    window: int | None = None
    """Rows that a live training shuffles at each site; by default `WINDOW`."""
    checkpoints: CheckpointKind | None = None
    """By default exact, but compact for a live training."""
    weights: WeightsDtype = "fp32"
    """How the dictionaries are stored."""

    @property
    def checkpoint_kind(self) -> CheckpointKind:
        """The kind of checkpoint, with the default filled in."""
        return self.checkpoints or ("compact" if self.live else "exact")

    @property
    def tokens_per_update(self) -> int:
        """The batch, with the preset's filled in."""
        return PRESETS[self.preset].batch if self.batch is None else self.batch

    @property
    def variant(self) -> str:
        """The end of the labels, which names what differs from the default."""
        rate = None if self.learning_rate is None else f"lr{self.learning_rate:g}"
        preset = None if self.preset == "default" else self.preset
        seed = f"seed{self.seed}" if self.seed else None
        return "".join(f"-{part}" for part in (preset, self.normalisation, rate, seed) if part)

    def trainings(self, width: int, updates: int, only_largest: bool = False) -> list[TrainingConfig]:
        """Return the config of every SAE, or of the largest with the largest k alone."""
        shape = PRESETS[self.preset]
        sizes, ks = self.size or (shape.size,), self.k or (shape.k,)
        if only_largest:
            sizes, ks = (max(sizes),), (max(ks),)
        return [self._training(width, n, k, updates) for n in sizes for k in ks]

    def fit_config(self, tokens: int, epoch: int | None, data: str) -> FitConfig:
        """Return how they are trained on `tokens` of `data`."""
        return FitConfig(
            tokens=tokens,
            batch=self.tokens_per_update,
            epoch=epoch,
            data=data,
            checkpoint_every=CHECKPOINT_EVERY,
            checkpoints=self.checkpoint_kind,
            weights=self.weights,
            loggers=self.loggers,
            split=self.split,
            sharded=True,
        )

    def share(self, ranks: Ranks) -> int:
        """Return the tokens of a batch that each rank loads."""
        batch = self.tokens_per_update
        if batch <= 0 or batch % ranks.world_size:
            raise BadInput(f"A batch of {batch} tokens cannot be shared by {ranks.world_size} processes: choose a multiple.")
        return batch // ranks.world_size

    def _training(self, width: int, size: int, k: int, updates: int) -> TrainingConfig:
        match self.preset:
            case "default":
                training = default(width=width, size=size, k=k, updates=updates)
            case "unbox":
                training = unbox(size=size, k=k)
            case _:
                training = paper(size=size, k=k, auxk="reconstruction" if self.preset == "paper-auxk" else "none")
        prefixes = tuple(size // part for part in (16, 8, 4, 2) if size >= part) if self.kind == "matryoshka" else ()
        rate = training.optimiser.learning_rate if self.learning_rate is None else self.learning_rate
        return replace(
            training,
            kind=self.kind,
            prefixes=prefixes,
            normalisation=self.normalisation or training.normalisation,
            initialisation=replace(training.initialisation, seed=self.seed),
            optimiser=replace(training.optimiser, learning_rate=rate),
        )


def sweep_cost(config: SweepConfig, widths: Sequence[int], *, also: Sequence[int] = (), device: DeviceType = "cpu") -> SweepCost:
    """Return the memory and disk that the SAEs of `config` take at sites of these widths, trained in one process.

    At sites of the widths `also`, only the largest SAE is trained. A stored training takes one site after another: ask for one
    width at a time.
    """
    trainings = [(training, width) for width in widths for training in config.trainings(width, 1)]
    trainings += [(training, width) for width in also for training in config.trainings(width, 1, only_largest=True)]
    return training_cost(
        trainings,
        batch=config.tokens_per_update,
        device=device,
        window=_window_for(sum((*widths, *also)), config.window) if config.live else 0,
        sites=(*widths, *also),
        checkpoints=config.checkpoint_kind,
        weights=config.weights,
    )


def train_sweep(
    study: Study,
    sites: Sequence[str],
    config: SweepConfig,
    on_trained: Callable[[Path, SAE], None] = lambda folder, sae: None,
    also: Sequence[str] = (),
) -> list[Path]:
    """Train the SAEs of `config` at each of `sites`, and the largest of them at the sites `also`; return their folders.

    Work that was stopped resumes. Under torchrun all processes train together; rank 0 calls `on_trained`.
    """
    use_gpu_of_rank()
    stores = open_stores(study, (*sites, *also))
    with process_group():
        return [
            folder
            for number, store in enumerate(stores)
            for folder in _train_site(study, store, config, on_trained, only_largest=number >= len(sites))
        ]


def train_live(
    study: Study,
    activations: LiveSites,
    config: SweepConfig,
    source: str,
    on_trained: Callable[[Path, SAE], None] = lambda folder, sae: None,
    also: Collection[Site] = (),
) -> list[Path]:
    """Train the SAEs of `config` at all sites of `activations` in one pass of the model, with no activations on disk.

    At the sites `also`, only the largest is trained. `source` identifies the prompts, seeds and steps. Work that was stopped
    resumes: a batch of a number always has the same rows. Under torchrun each process harvests its share of the prompts.
    """
    with process_group():
        ranks, widths, shot, device = Ranks(), activations.widths, activations.shot(0), find_device()
        share, batch = config.share(ranks), config.tokens_per_update
        window = _window_for(sum(widths.values()), config.window)
        tokens = activations.count() if config.tokens is None else config.tokens
        most = VECTORS_PER_AXIS * max(widths.values())
        epoch = activations.count(most=most)  # of no more prompts than statistics need
        processes = f", {ranks.world_size} processes" if ranks.world_size > 1 else ""
        text = "" if shot.text_length is None else f", text length {shot.text_length}"
        model = f"{shot.model} {shot.revision or ''} in {shot.precision}"
        image = f"{shot.pixels[0]}x{shot.pixels[1]} pixels, {shot.steps} steps, guidance {shot.guidance:g}{text}"
        data = (
            f"live from {model}, {image}, {source}, {activations.tokens} rows a shot, {tokens} tokens, batches of {batch}, seed "
            f"{config.seed}, window {window}{processes}"
        )

        def batches(start: int) -> Iterator[SiteBatch]:
            return activations.batches(
                share,
                seed=config.seed,
                rank=ranks.rank,
                world_size=ranks.world_size,
                start=start,
                stop=-(-tokens // batch),
                epochs=None,
                window=window,
            )

        tasks = {
            study.dictionary(site, training.label + config.variant): FitTask(
                DictionaryOrigin(site=site, model=study.model, revision=study.revision, training={"variant": config.variant}),
                training,
            )
            for site, width in widths.items()
            for training in config.trainings(width, tokens // batch, only_largest=site in also)
        }
        fit_config = config.fit_config(tokens, epoch if epoch < most else None, data)
        prepare = activations.fill_memory if device.type == "cuda" else None
        for folder, sae in fit_tasks(tasks, batches, config=fit_config, device=device, replay=True, prepare=prepare):
            if ranks.rank == 0:
                on_trained(folder, sae)
        return list(tasks)


def _window_for(width: int, asked: int | None) -> int:
    """Return the rows of a window of sites that are `width` wide together; it depends on the machine alone, for resuming."""
    row, memory, window = 2 * WINDOWS * width, total_memory(), WINDOW
    while window > 1024 and window * row > MEMORY * memory:
        window //= 2
    if asked is not None and asked * row > memory:
        raise BadInput(
            f"--window {asked:,} takes {asked * row / 1e9:,.1f} GB of memory at sites that are {width:,} wide together, and this "
            f"machine has {memory / 1e9:,.1f} GB. Choose a smaller one, such as {window:,}."
        )
    return asked or window


@contextmanager
def data_checked(store: Store) -> Iterator[None]:
    """Check the files of `store` before NaN or infinity in a training is blamed on anything else."""
    try:
        yield
    except NonFinite:
        store.verify()
        raise


def _train_site(
    study: Study, store: Store, config: SweepConfig, on_trained: Callable[[Path, SAE], None], only_largest: bool
) -> list[Path]:
    ranks = Ranks()
    share, batch, rank, world_size = config.share(ranks), config.tokens_per_update, ranks.rank, ranks.world_size
    rows = store.count("train")
    tokens = rows if config.tokens is None else config.tokens
    data = (
        f"{store.site} of {store.model}, {tokens} of {rows} tokens, batches of {batch}, seed {config.seed}, {store.fingerprint}"
    )

    def batches(start: int) -> Iterator[SiteBatch]:
        rows = store.batches(
            share, seed=config.seed, rank=rank, world_size=world_size, start=start, epochs=None, device=find_device()
        )
        return ({store.site: batch} for batch in rows)

    origin = origin_of(study, store, {"variant": config.variant})
    tasks = {
        study.dictionary(store.site, training.label + config.variant): FitTask(origin, training)
        for training in config.trainings(store.width, tokens // batch, only_largest)
    }
    with data_checked(store):
        for folder, sae in fit_tasks(tasks, batches, config=config.fit_config(tokens, rows, data), device=find_device()):
            if ranks.rank == 0:
                on_trained(folder, sae)
    return list(tasks)


def open_stores(study: Study, sites: Sequence[str]) -> list[Store]:
    """Return the stores of these sites."""
    if not sites:
        raise BadInput("Name at least one --site.")
    folders = study.stores()
    for name in sites:
        if Site.parse(name) not in folders:
            raise UnknownName.among("The site", name, map(str, folders), "Harvest it first.")
    return [Store.open(folders[Site.parse(name)]) for name in sites]


def origin_of(study: Study, store: Store, training: Mapping[str, Json] | None = None) -> DictionaryOrigin:
    return DictionaryOrigin(site=store.site, model=study.model, revision=study.revision, training=training or {})
