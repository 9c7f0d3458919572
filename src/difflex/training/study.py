"""Make the dictionaries of a study from its stored activations: SAEs, ITDA dictionaries, and the neurons as a baseline."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from difflex.choices import NormalisationMethod, PursuitName
from difflex.devices import find_device, use_gpu_of_rank
from difflex.dictionaries import ITDA, Dictionary, Neurons
from difflex.dictionaries.itda import GrowthConfig, label_suffix, paper_config
from difflex.dictionary_config import read_config
from difflex.distributed import Ranks, process_group
from difflex.errors import BadInput, DifflexError, StaleWork
from difflex.files import Json, disk_errors
from difflex.records import Site
from difflex.store import Store
from difflex.study import Study
from difflex.training.itda import GrowthData, GrowthProgress, first_atoms, grow, load_grown
from difflex.training.sweeps import (
    PRESETS,
    SweepConfig,
    SweepCost,
    data_checked,
    open_stores,
    origin_of,
    sweep_cost,
    train_live,
    train_sweep,
)

__all__ = [
    "PRESETS",
    "GrowthSweepConfig",
    "SweepConfig",
    "SweepCost",
    "add_neurons",
    "grow_sweep",
    "sweep_cost",
    "train_live",
    "train_sweep",
]

ITDA_SIZE = 16_384
ITDA_BATCH = {"cpu": 2048, "cuda": 8192}
"""Tokens that are read at a time, by all processes together."""
ITDA_PIECE = {"cpu": 256, "cuda": 1024}
"""Tokens that are compared with a dictionary together, by all processes together: fewer leave a GPU idle."""

TAKEN = "Move the old one away, then give the same command again: nothing is grown twice."


@dataclass(frozen=True, kw_only=True)
class GrowthSweepConfig:
    """ITDA dictionaries of one k, grown in one pass over stored activations."""

    thresholds: tuple[float, ...] = ()
    """With each threshold the largest size is grown, and the smaller ones are its first atoms; by default the threshold with
    which the data fill the dictionary is searched for every size."""
    size: tuple[int, ...] = ()
    """The largest numbers of atoms: by default 16,384, but 64,000 with the settings of the paper."""
    k: int | None = None
    pursuit: PursuitName | None = None
    normalisation: NormalisationMethod | None = None
    paper: bool = False
    """Whether the other fields default to the settings of arXiv 2505.24360."""
    tokens: int | None = None
    """Tokens in a pass; by default all training tokens, once."""
    seed: int = 0
    """Of the order of the tokens."""

    def __post_init__(self) -> None:
        if not self.thresholds and not self.size and not self.paper:
            raise BadInput("An ITDA dictionary needs a threshold (--threshold 0.3) or a size (--size 8192).")
        for name, counts in (("size", self.size), ("tokens", () if self.tokens is None else (self.tokens,))):
            if wrong := [count for count in counts if count < 1]:
                raise BadInput(f"--{name} {wrong[0]} grows nothing: use 1 or more.")

    def growths(self, world_size: int, device: str) -> list[GrowthConfig]:
        """Return the config of every dictionary that is grown, rather than cut from a larger one."""
        preset = paper_config() if self.paper else GrowthConfig(size=ITDA_SIZE)
        fields = {name: getattr(self, name) for name in ("k", "pursuit", "normalisation")}
        changes = {name: value for name, value in fields.items() if value is not None}
        growth, sizes = replace(preset, batch=max(1, ITDA_PIECE[device] // world_size), **changes), self.size or (preset.size,)
        if preset.threshold is None and not self.thresholds:
            return [replace(growth, size=size) for size in dict.fromkeys(sizes)]
        thresholds = self.thresholds or (preset.threshold,)
        return [replace(growth, threshold=threshold, size=max(sizes)) for threshold in thresholds]


def grow_sweep(
    study: Study,
    site: str,
    config: GrowthSweepConfig,
    *,
    on_progress: Callable[[GrowthProgress], None] = lambda progress: None,
    on_grown: Callable[[Path, ITDA], None] = lambda folder, itda: None,
) -> list[Path]:
    """Grow the dictionaries of `config` that the study does not have yet; return the folders of all.

    A dictionary grows in a folder named after its settings, and moves to its label when its size is known. Under torchrun all
    processes grow together; rank 0 calls `on_progress` and `on_grown`.
    """
    use_gpu_of_rank()
    [store] = open_stores(study, [site])
    with process_group():
        ranks = Ranks()
        data = _growth_data(store, config, ranks)
        training: dict[str, Json] = {"seed": config.seed, **({} if config.tokens is None else {"first": config.tokens})}
        folders: list[Path] = []
        growths: dict[Path, GrowthConfig] = {}
        for growth in config.growths(ranks.world_size, find_device().type):
            suffix = label_suffix({**training, "config": growth.as_json()})
            name = f"itda-{growth.size}-k{growth.k}{suffix}"
            if (folder := _find_grown(study, store.site, growth, data)) is None:
                if growth.threshold is None and (target := study.dictionary(store.site, name)).exists():
                    raise StaleWork(f"{target} exists, with other data or settings. {TAKEN}", target)
                growths[study.growing_dictionary(store.site, name.replace("itda-", "itda-to-", 1))] = growth
                continue
            folders.append(folder)
            if (itda := load_grown(folder, growth, data.data)) is not None and ranks.rank == 0:
                folders += _finish(study, folder, itda, config.size, on_grown)
        if growths:
            with data_checked(store):
                grown = grow(growths, data, origin=origin_of(study, store, training), on_progress=on_progress)
            folders += _move_to_labels(study, grown, config.size, on_grown) if ranks.rank == 0 else []
    return folders


def _finish(study: Study, folder: Path, itda: ITDA, sizes: Sequence[int], on_grown: Callable[[Path, ITDA], None]) -> list[Path]:
    """Report a dictionary, and add those of its smaller `sizes` unless its threshold was searched; return their folders."""
    on_grown(folder, itda)
    config, folders = itda.origin.training["config"], []
    assert isinstance(config, dict)
    for size in sorted({size for size in sizes if size < itda.size and config["threshold"] is not None}):
        smaller = first_atoms(itda, size)
        target = study.dictionary(smaller.site, smaller.label)
        if not (target / "config.json").exists():
            smaller.save(target)
        elif read_config(target).training.get("data") != itda.origin.training["data"]:
            raise StaleWork(f"{target} exists, with other data. {TAKEN}", target)
        folders.append(target)
        on_grown(target, smaller)
    return folders


def _growth_data(store: Store, config: GrowthSweepConfig, ranks: Ranks) -> GrowthData:
    rows = store.count("train")
    tokens = rows if config.tokens is None else min(config.tokens, rows)
    share, rank, world_size = max(1, ITDA_BATCH[find_device().type] // ranks.world_size), ranks.rank, ranks.world_size
    return GrowthData(
        batches=lambda start: store.batches(
            share, seed=config.seed, rank=rank, world_size=world_size, start=start, device=find_device()
        ),
        tokens=tokens,
        data=f"{store.site} of {store.model}, {tokens} of {rows} tokens, seed {config.seed}, {store.fingerprint}",
        shot=store.shot,
    )


def _find_grown(study: Study, site: Site, growth: GrowthConfig, data: GrowthData) -> Path | None:
    """Return the folder of the dictionary that was grown with these settings from these data, by any number of processes."""
    for path in sorted(study.dictionary(site, "itda").parent.glob("itda-*/config.json")):
        try:
            training = read_config(path.parent).training
        except DifflexError as error:
            warnings.warn(f"A dictionary is passed over and left as it is: {error}", stacklevel=4)
            continue
        config = training.get("config")
        if isinstance(config, dict) and {**config, "batch": growth.batch} == growth.as_json() and training["data"] == data.data:
            return path.parent
    return None


def _move_to_labels(
    study: Study, grown: Mapping[Path, ITDA], sizes: Sequence[int], on_grown: Callable[[Path, ITDA], None]
) -> list[Path]:
    """Move dictionaries to their labels and return their folders; one whose label is taken stays where it is."""
    folders: list[Path] = []
    conflicts: list[Path] = []
    message = ""
    for folder, itda in grown.items():
        target = study.dictionary(itda.site, itda.label)
        if target.exists():
            conflicts.append(target)
            message += f"{target} exists, with other data or settings; the new dictionary is in {folder}. "
        else:
            with disk_errors(target):
                folders.append(folder.rename(target))
            folders += _finish(study, target, itda, sizes, on_grown)
    if conflicts:
        raise StaleWork(message + TAKEN, conflicts[0])
    return folders


def add_neurons(study: Study, sites: Sequence[str], ks: Sequence[int]) -> dict[Path, Neurons]:
    """Add the neurons of each site as a dictionary for each k, and return them by folder; existing ones stay."""
    dictionaries: dict[Path, Neurons] = {}
    for store in open_stores(study, sites):
        for k in ks:
            neurons = Neurons(width=store.width, k=k, origin=origin_of(study, store))
            folder = study.dictionary(store.site, neurons.label)
            if not (folder / "config.json").is_file():
                neurons.save(folder)
            elif Dictionary.load(folder).origin != neurons.origin:
                raise StaleWork(
                    f"{folder} holds neurons of another model. Move it away, then give the same command again.", folder
                )
            dictionaries[folder] = neurons
    return dictionaries
