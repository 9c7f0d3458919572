"""`difflex train`, `itda` and `neurons`: dictionaries from stored activations."""

import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast, final

from tyro.conf import FlagCreatePairsOff, Positional, arg

from difflex.choices import NormalisationMethod, PursuitName, SAEKind
from difflex.commands.flags import BATCH, COUNT, POSITIVE, SEED, TOKENS, Numbers, Shares, StudyImagesCommand, number
from difflex.errors import BadInput
from difflex.files import parsing
from difflex.progress import ProgressBar
from difflex.study import Command, CommandRecord, CommandStatus, Study

if TYPE_CHECKING:
    from difflex.dictionaries import ITDA, SAE
    from difflex.training.itda import GrowthProgress
    from difflex.training.study import SweepConfig

__all__ = ["ItdaCommand", "NeuronsCommand", "TrainCommand"]

PRESET = "(default: the preset's)"
ALL_TOKENS = "(default: all training tokens, once)"
MOVE_AWAY = "Move the dictionary away (it is not deleted), then give the same command again."
HARVEST_BATCH = 16
"""Images that the model of a live training makes at a time."""
EVERY = 1.0
"""Seconds between two forecasts of a growth."""


@final
@dataclass(frozen=True, kw_only=True)
class TrainCommand(StudyImagesCommand):
    """Train sparse autoencoders (SAEs) of every size with every k in one pass over stored activations, or --live over the model.

    Given again, the command resumes, with stored activations bit for bit on a CPU. Under torchrun processes train together; their
    number may change when a training on stored activations resumes.
    """

    study: Annotated[Positional[Path], arg(metavar="STUDY")]
    """A folder with activations from `difflex harvest`."""
    site: Annotated[tuple[str, ...], arg(metavar="SITE...")]
    """The sites to train at, one after another, with --live at once: double.18, single.9:update."""
    also: Annotated[tuple[str, ...], arg(metavar="SITE...", help_behavior_hint="(default: none)")] = ()
    """Further sites, at which only the largest size is trained, with the largest k."""
    k: Annotated[Numbers, arg(help_behavior_hint=PRESET)] = ()
    """Features per token; 32 in the default preset."""
    size: Annotated[Numbers, arg(help_behavior_hint=PRESET)] = ()
    """Features of the dictionary; 8,192 in the default preset. Every size is trained with every k."""
    preset: Literal["default", "paper", "paper-auxk", "unbox"] = "default"
    """Ours, or as published: `paper` is arXiv 2505.24360 (FLUX), `paper-auxk` is its code, `unbox` is arXiv 2410.22366 (SDXL)."""
    kind: SAEKind = "topk"
    """The activation function."""
    normalisation: Annotated[NormalisationMethod | None, arg(help_behavior_hint=PRESET)] = None
    """How activations are normalised."""
    learning_rate: Annotated[float | None, POSITIVE, arg(metavar="RATE", help_behavior_hint=PRESET)] = None
    """The peak learning rate."""
    tokens: Annotated[int | None, TOKENS, arg(help_behavior_hint=ALL_TOKENS)] = None
    """Tokens to train on; if there are fewer, they are repeated in another order."""
    batch: Annotated[int | None, number(1, 131_072), arg(help_behavior_hint=PRESET)] = None
    """Tokens per update, of all processes together; 1,024 in the default preset."""
    seed: Annotated[int, SEED] = 0
    """The seed of the initial weights and of the order of the tokens."""
    split: Literal["data", "features"] = "data"
    """What several processes divide: the tokens of a batch, or the features of dictionaries that are too large for one GPU."""
    live: FlagCreatePairsOff[bool] = False
    """Run the model while training, for all sites at once; no activations are stored. The study says with which settings."""
    prompts: Annotated[str | None, arg(metavar="FILE", help_behavior_hint="(default: those of the study)")] = None
    """With --live: other prompts than those of the study."""
    prompts_column: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: prompt, caption or text)")] = None
    """The column of --prompts."""
    harvest_batch: Annotated[int | None, BATCH, arg(help_behavior_hint=f"(default: {HARVEST_BATCH})")] = None
    """With --live: images that the model makes at a time."""
    window: Annotated[int | None, number(1, 100_000_000), arg(help_behavior_hint="(default: 65536, or what fits)")] = None
    """With --live: rows that are shuffled together at each site; twice as many are in memory, in bf16."""
    checkpoints: Annotated[
        Literal["exact", "compact"] | None, arg(help_behavior_hint="(default: exact, with --live compact)")
    ] = None
    """What is saved to resume: all, or the weights in bf16, removed at the end."""
    weights: Literal["fp32", "bf16"] = "fp32"
    """How the dictionaries are stored: bf16 takes half the disk."""
    log: Annotated[tuple[Literal["wandb", "tensorboard"], ...], arg(metavar="NAME...")] = ()
    """Where metrics are logged besides log.jsonl."""
    dry_run: FlagCreatePairsOff[bool] = False
    """Print what the training takes on this machine, disk, memory and time, and train nothing."""

    def __call__(self) -> list[Path]:
        from difflex.training.study import SweepConfig, train_sweep

        if self.dry_run:
            return self._forecast()

        config = SweepConfig(
            size=self.size,
            k=self.k,
            preset=self.preset,
            kind=self.kind,
            normalisation=self.normalisation,
            learning_rate=self.learning_rate,
            tokens=self.tokens,
            batch=self.batch,
            seed=self.seed,
            split=self.split,
            live=self.live,
            window=self.window,
            checkpoints=self.checkpoints,
            weights=self.weights,
            loggers=self.log,
        )
        if self.live:
            return self._train_live(config)
        if given := [flag for flag, value in self._flags_of_live().items() if value is not None and value is not False]:
            raise BadInput(f"{', '.join(given)} needs --live: without it, activations come from the disk.")
        return train_sweep(Study.open(self.study), self.site, config, on_trained=_print_sae, also=self.also)

    def _forecast(self) -> list[Path]:
        from difflex.commands.estimates import estimate
        from difflex.commands.forecast import Forecast, PlannedCommand, plan_table, this_machine

        command, machine = replace(self, dry_run=False), this_machine()
        status = CommandStatus(command=command, record=CommandRecord(verb="train", flags={}), state="to do", changes={})
        print(plan_table([PlannedCommand(status, estimate(Forecast(machine), command))], machine))
        return []

    def _flags_of_live(self) -> dict[str, object]:
        """Return the flags that change a live training alone, with their values."""
        run = ("precision", "offload", "no_offload", "pixels", "steps", "guidance", "prompts", "prompts_column")
        return {f"--{name.replace('_', '-')}": getattr(self, name) for name in (*run, "harvest_batch", "window")}

    def _least_memory(self, config: "SweepConfig") -> int:
        """Return the bytes of a GPU that the largest SAE takes, at the widest site of the study."""
        from difflex.store import Store
        from difflex.training.study import sweep_cost

        widths = [Store.open(folder).width for folder in Study.open(self.study).stores().values()]
        return sweep_cost(config, [max(widths)], device="cuda").least if widths else 0

    def _train_live(self, config: "SweepConfig") -> list[Path]:
        """Train on the activations of the study's model while it runs."""
        from functools import partial

        from difflex.commands.inputs import load_study_model, open_study
        from difflex.devices import use_gpu_of_rank
        from difflex.explore.inputs import CAPTIONS, read_prompts, study_shots
        from difflex.store.live import LiveSites
        from difflex.training.study import train_live

        if not self.site:
            raise BadInput("Name at least one --site.")
        if self.prompts_column is not None and self.prompts is None:
            raise BadInput("--prompts-column needs --prompts: the study keeps the column of its own prompts.")
        use_gpu_of_rank()
        study = open_study(self.study, self, reserve=self._least_memory(config) if self.precision == "auto" else 0)
        settings = study.settings
        if self.prompts is not None:
            path = Path(self.prompts)
            prompts = str(path.resolve()) if path.exists() else self.prompts
            settings = replace(settings, prompts=prompts, prompts_column=self.prompts_column, prompts_revision=None)
            if self.prompts == CAPTIONS:
                settings = replace(settings, shuffle=None)
        if settings.prompts is None:
            raise BadInput(f"The study {self.study} does not say which prompts it was harvested with: name some with --prompts.")
        prompts = read_prompts(settings.prompts, settings.shuffle, settings.prompts_column, settings.prompts_revision)
        if prompts.is_endless and self.tokens is None:
            raise BadInput(f"The {CAPTIONS} are endless: say how many --tokens to train on.")
        pipe = load_study_model(study, self)
        shots, source = study_shots(pipe, settings, prompts)
        steps = "all" if settings.keep_steps is None else ":".join(map(str, settings.keep_steps))
        also = pipe.expand(self.also)
        sites = [*pipe.expand(self.site), *also]
        harvest = partial(pipe.harvest, progress=False)
        with LiveSites(shots, sites, harvest, batch=self.harvest_batch or HARVEST_BATCH) as activations:
            return train_live(study, activations, config, f"prompts {source}, steps {steps}", on_trained=_print_sae, also=also)


def _print_sae(folder: Path, sae: "SAE") -> None:
    training = sae.origin.training
    with parsing(folder / "config.json", "the record of a training", MOVE_AWAY):
        metrics = cast("dict[str, Any]", training["metrics"])
        print(
            f"{folder}: {training['tokens']:,} tokens, FVU {metrics['fvu']:.4f} in normalised space, "
            f"{metrics['l0']:.1f} features per token, {metrics['dead']:.1%} dead."
        )


@final
@dataclass(frozen=True, kw_only=True)
class ItdaCommand(Command):
    """Grow ITDA dictionaries, whose atoms are stored activations.

    A tenth of the training prompts never become atoms: how well their tokens are explained predicts it for new images. Given
    again, the command resumes. Under torchrun processes grow a dictionary together.
    """

    study: Annotated[Positional[Path], arg(metavar="STUDY")]
    """A folder with activations from `difflex harvest`."""
    site: Annotated[tuple[str, ...], arg(metavar="SITE...")]
    """The sites, one after another: double.18, single.9:update."""
    k: Annotated[int | None, COUNT, arg(help_behavior_hint="(default: 32)")] = None
    """Atoms per token."""
    threshold: Annotated[Shares, arg(help_behavior_hint="(default: searched to fill the size)")] = ()
    """A token becomes an atom if more than this share of it is unexplained; several grow in one pass over the data."""
    size: Annotated[Numbers, arg(help_behavior_hint="(default: 16384 with a threshold)")] = ()
    """The largest numbers of atoms, in one pass over the data; without a threshold, the sizes that the data should fill."""
    pursuit: Annotated[PursuitName | None, arg(help_behavior_hint="(default: orthogonal, with the smallest error)")] = None
    """How codes are found."""
    normalisation: Annotated[NormalisationMethod | None, arg(help_behavior_hint="(default: standardise)")] = None
    """How activations are normalised."""
    preset: Literal["default", "paper"] = "default"
    """Defaults of the other flags; `paper` is arXiv 2505.24360: k 64, threshold 0.6, size 64000, gradient pursuit."""
    tokens: Annotated[int | None, TOKENS, arg(help_behavior_hint=ALL_TOKENS)] = None
    """Tokens to read in a pass."""
    seed: Annotated[int, SEED] = 0
    """The seed of the order of the tokens."""

    def __call__(self) -> list[Path]:
        from difflex.training.study import GrowthSweepConfig, grow_sweep

        config = GrowthSweepConfig(
            thresholds=self.threshold,
            size=self.size,
            k=self.k,
            pursuit=self.pursuit,
            normalisation=self.normalisation,
            paper=self.preset == "paper",
            tokens=self.tokens,
            seed=self.seed,
        )
        study, folders = Study.open(self.study), list[Path]()
        with GrowthBar(len(self.site)) as bar:
            for site in self.site:
                folders += grow_sweep(study, site, config, on_progress=bar.show, on_grown=_print_itda)
                bar.end_site()
        return folders


@final
class GrowthBar(AbstractContextManager["GrowthBar"]):
    """A progress bar of the growth of dictionaries at one site after another, in percent of the expected work."""

    def __init__(self, sites: int) -> None:
        self._sites, self._ended, self._site_began = sites, 0, False
        self._bar: ProgressBar | None = None
        self._seen = 0.0

    def show(self, progress: "GrowthProgress") -> None:
        """Show the progress of a dictionary, at most once a second."""
        if time.monotonic() - self._seen < EVERY:
            return
        self._seen, self._site_began = time.monotonic(), True
        done, expected = progress.work()
        percent = 100 * (self._ended + done / (done + expected)) / self._sites
        if self._bar is None:
            options: dict[str, Any] = {"unit": "%", "unit_scale": True, "desc": "growing", "smoothing": 0, "miniters": 0}
            self._bar = ProgressBar(total=100, initial=percent, **options)
        search = f"pass {progress.passes + 1}, " if progress.passes else ""
        self._bar.set_postfix_str(f"{search}threshold {progress.threshold:.3g}, {progress.interval.size:,} atoms")
        self._bar.update(percent - self._bar.n)

    def end_site(self) -> None:
        """Go on to the next site; one at which all was grown before takes no time."""
        self._ended, self._sites = self._ended + self._site_began, self._sites - (not self._site_began)
        self._site_began = False

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._bar is not None:
            self._bar.update(0 if kind else 100 - self._bar.n)
            self._bar.close()


def _print_itda(folder: Path, itda: "ITDA") -> None:
    training = itda.origin.training
    with parsing(folder / "config.json", "the record of a growth", MOVE_AWAY):
        expected = training["expected_over_threshold"]
        new_images = "" if expected is None else f"; about {expected:.1%} of the tokens of new images are expected to be over it"
        over = f"{itda.size:,} atoms over threshold {training['threshold']:.4g}"
        ProgressBar.write(f"{folder}: {over} from {training['tokens']:,} tokens{new_images}.")


@final
@dataclass(frozen=True, kw_only=True)
class NeuronsCommand(Command):
    """Add the MLP neurons of blocks to a study as dictionaries: the baseline for trained ones."""

    study: Annotated[Positional[Path], arg(metavar="STUDY")]
    """A folder with activations from `difflex harvest`."""
    site: Annotated[tuple[str, ...], arg(metavar="SITE...")]
    """The sites of neurons: double.18:neurons, single.9:neurons."""
    k: Numbers = (32,)
    """Neurons per token: those with the largest absolute values."""

    def __call__(self) -> list[Path]:
        from difflex.training.study import add_neurons

        dictionaries = add_neurons(Study.open(self.study), self.site, self.k)
        for folder, neurons in dictionaries.items():
            print(f"{folder}: {neurons.size:,} neurons, {neurons.k} per token")
        return list(dictionaries)
