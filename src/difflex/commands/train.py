"""`difflex train`: sparse autoencoders from stored activations."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, final

from tyro.conf import Positional, arg

from difflex.choices import NormalisationMethod, SAEKind
from difflex.commands.flags import Numbers
from difflex.dictionaries import SAE, DictionaryOrigin
from difflex.distributed import process_group
from difflex.errors import BadInput, UnknownName
from difflex.records import Site
from difflex.store import Store
from difflex.study import Command, Study
from difflex.training import FitConfig, TrainingConfig, default, fit, paper, unbox
from difflex.training.parallel import TrainingRanks

__all__ = ["TrainCommand"]

Preset = Literal["default", "paper", "paper-auxk", "unbox"]
THE_PRESETS = "(default: the preset's)"


class PresetDefaults(NamedTuple):
    """What a preset is about where nothing else is asked for."""

    size: int
    k: int
    batch: int
    make: Callable[[int, int, int, int], TrainingConfig]
    """From width, size, k and the number of updates."""


USUAL: dict[Preset, PresetDefaults] = {
    "default": PresetDefaults(
        8192, 32, 1024, lambda width, size, k, updates: default(width=width, size=size, k=k, updates=updates)
    ),
    "paper": PresetDefaults(65_536, 64, 1024, lambda _, size, k, __: paper(size=size, k=k)),
    "paper-auxk": PresetDefaults(65_536, 64, 1024, lambda _, size, k, __: paper(size=size, k=k, auxk="reconstruction")),
    "unbox": PresetDefaults(5120, 10, 4096, lambda _, size, k, __: unbox(size=size, k=k)),
}


@final
@dataclass(frozen=True, kw_only=True)
class TrainCommand(Command):
    """Train sparse autoencoders, all k and sizes in one pass over stored activations; given again it goes on, bit for bit.

    Under torchrun processes train together, on any number of ranks after any other.
    """

    study: Annotated[Positional[Path], arg(metavar="STUDY")]
    """A folder that `difflex harvest` filled."""
    site: Annotated[tuple[str, ...], arg(metavar="SITE...")]
    """Whose activations: double.18, single.9:update; several are trained one after another."""
    k: Annotated[Numbers, arg(help_behavior_hint=THE_PRESETS)] = ()
    """Features per token; 32 in our preset."""
    size: Annotated[Numbers, arg(help_behavior_hint=THE_PRESETS)] = ()
    """Features of the dictionary, 8,192 in our preset; every k meets every size."""
    preset: Preset = "default"
    """Ours, or as published: `paper` is arXiv 2505.24360 (FLUX), `paper-auxk` what its code does, `unbox` arXiv 2410.22366."""
    kind: SAEKind = "topk"
    """What is kept of the scores."""
    normalisation: Annotated[NormalisationMethod | None, arg(help_behavior_hint=THE_PRESETS)] = None
    """What is done to activations first."""
    learning_rate: Annotated[float | None, arg(metavar="RATE", help_behavior_hint=THE_PRESETS)] = None
    """Learning rate."""
    tokens: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: all training tokens, once)")] = None
    """How many tokens to learn from; more than are stored are taken again, in another order."""
    batch: Annotated[int | None, arg(metavar="N", help_behavior_hint=THE_PRESETS)] = None
    """Tokens per update, of all processes together; 1,024 in our preset."""
    seed: Annotated[int, arg(metavar="SEED")] = 0
    """The first weights and the order of the tokens."""
    split: Literal["data", "features"] = "data"
    """What several processes share: the tokens of a batch, or the features of dictionaries that are too large for one card."""
    log: Annotated[tuple[Literal["wandb", "tensorboard"], ...], arg(metavar="NAME...")] = ()
    """Who is told the figures besides log.jsonl."""

    def __call__(self) -> list[Path]:
        if not self.site:
            raise BadInput("Name at least one --site.")
        from difflex.devices import use_gpu_of_rank

        use_gpu_of_rank()
        study = Study.open(self.study)
        stores = study.stores()
        for name in self.site:
            if Site.parse(name) not in stores:
                raise UnknownName.among("The site", name, map(str, stores), "Harvest it first.")
        with process_group():
            made = [self._train(study, Store.open(stores[Site.parse(name)])) for name in self.site]
        return [folder for folders in made for folder in folders]

    def _train(self, study: Study, store: Store) -> list[Path]:
        ranks, usual = TrainingRanks(), USUAL[self.preset]
        batch = usual.batch if self.batch is None else self.batch
        if batch <= 0 or batch % ranks.world_size:
            raise BadInput(f"A batch of {batch} tokens cannot be shared by {ranks.world_size} processes: choose a multiple.")
        rows = store.count("train")
        tokens = rows if self.tokens is None else self.tokens
        sizes, ks = self.size or (usual.size,), self.k or (usual.k,)
        trainings = [self._training(store.width, size, k, tokens // batch) for size in sizes for k in ks]
        trained = fit(
            {study.dictionary(store.site, training.label + self._variant()): training for training in trainings},
            lambda start: store.batches(
                batch // ranks.world_size, seed=self.seed, rank=ranks.rank, world_size=ranks.world_size, start=start, epochs=None
            ),
            origin=DictionaryOrigin(
                site=store.site,
                model=study.model,
                revision=study.revision,
                training={"variant": self._variant()},
            ),
            config=FitConfig(
                tokens=tokens,
                epoch=rows,
                data=(
                    f"{store.site} of {store.model}, {tokens} of {rows} tokens, batches of {batch}, seed {self.seed}, "
                    f"{store.fingerprint}"
                ),
                loggers=self.log,
                split=self.split,
                sharded=True,
            ),
        )
        if ranks.rank == 0:
            for folder, dictionary in trained.items():
                print(f"{folder}: {_described(dictionary)}")
        return list(trained)

    def _variant(self) -> str:
        """What sets a dictionary apart from those of the same kind, size and k that nothing special was asked of."""
        given = (
            "" if self.preset == "default" else self.preset,
            self.normalisation,
            self.learning_rate and f"lr{self.learning_rate:g}",
        )
        return "".join(f"-{word}" for word in (*given, self.seed and f"seed{self.seed}") if word)

    def _training(self, width: int, size: int, k: int, updates: int) -> TrainingConfig:
        training = USUAL[self.preset].make(width, size, k, updates)
        prefixes = tuple(size // part for part in (16, 8, 4, 2) if size >= part) if self.kind == "matryoshka" else ()
        training = replace(
            training, kind=self.kind, prefixes=prefixes, initialisation=replace(training.initialisation, seed=self.seed)
        )
        if self.normalisation is not None:
            training = replace(training, normalisation=self.normalisation)
        if self.learning_rate is not None:
            training = replace(training, optimiser=replace(training.optimiser, learning_rate=self.learning_rate))
        return training


def _described(dictionary: SAE) -> str:
    told = dictionary.origin.training
    last = told["metrics"]
    assert isinstance(last, dict)
    return (
        f"{told['tokens']:,} tokens, FVU {last['fvu']:.4f} in normalised space, {last['l0']:.1f} features per token, "
        f"{last['dead']:.1%} dead."
    )
