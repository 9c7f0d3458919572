"""`fit`: train one or many SAEs on one stream of activations. A run that was stopped resumes where it was."""

from __future__ import annotations

import math
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from difflex.choices import NormalisationMethod
from difflex.devices import find_device, free_memory
from difflex.dictionaries import SAE, Dictionary, DictionaryOrigin, Normalisation, SAEWeights
from difflex.distributed import Ranks
from difflex.errors import BadInput, BrokenFile, NonFinite, OutOfMemory
from difflex.files import Json, folder_lock
from difflex.records import ActivationBatch
from difflex.training.checkpoint import (
    LoggerName,
    TrainingLog,
    check_same,
    check_state,
    load_state,
    save_state,
    trained_weights,
)
from difflex.training.config import AdamConfig, TrainingConfig
from difflex.training.data import Batches, BatchFeed, DataPreview, Split, TrainingRanks, non_finite_message
from difflex.training.learner import Learner, initial_weights
from difflex.training.update import VECTORS

STATE = Path("training") / "state.safetensors"


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """The length of a run, and what it writes."""

    tokens: int
    """Activations to train on."""
    epoch: int | None = None
    """Activations in one epoch of a stream that repeats; statistics are taken from no more than these."""
    data: str = ""
    """A name for the data; a training does not resume with other data."""
    checkpoint_every: int = 500
    """Updates between two checkpoints."""
    log_every: int = 20
    """Updates between two entries of the log."""
    loggers: tuple[LoggerName, ...] = ()
    """Where metrics go besides `log.jsonl`."""
    split: Split = "data"
    """What several ranks divide: the tokens of a batch, or the features of the dictionary."""
    sharded: bool = False
    """Whether the stream of each rank is already its share of every batch."""
    progress: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        for name in ("tokens", "checkpoint_every", "log_every"):
            if (count := getattr(self, name)) <= 0:
                raise BadInput(f"A training with {name}={count} learns nothing: choose a number above 0.")


def fit(
    trainings: Mapping[Path, TrainingConfig],
    batches: Batches,
    *,
    origin: DictionaryOrigin,
    config: FitConfig,
    device: torch.device | str | None = None,
) -> dict[Path, SAE]:
    """Train an SAE for each folder, and save it there with its log and its checkpoint.

    Every SAE is trained on every batch, so that a sweep costs one pass over the data. Work in a folder resumes, bit for bit on a
    CPU, and finished work is loaded and not touched. Under `torch.distributed` all ranks call this, and rank 0 writes. The
    default device is a GPU, if there is one.
    """
    if not trainings:
        raise BadInput("`fit` needs at least one training: choose a kind, a size and k.")
    device, dictionaries = find_device(device), {}
    for folder, training in trainings.items():
        if (sae := load_finished(folder, training, config)) is not None:
            dictionaries[folder] = sae.to(device)
    unfinished = {folder: training for folder, training in trainings.items() if folder not in dictionaries}
    if unfinished:
        with ExitStack() as locks:
            for folder in unfinished if Ranks().rank == 0 else ():
                locks.enter_context(folder_lock(folder))
            run = FitRun(unfinished, batches, origin, config, device)
            run.train()
            dictionaries |= run.finish()
    return {folder: dictionaries[folder] for folder in trainings}


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
        return None
    check_state(state)
    return sae


NormalisationScheme = tuple[NormalisationMethod, float | None]
"""A method and the largest absolute value."""


@final
@dataclass(frozen=True, eq=False)
class FitMember:
    """One SAE of a run."""

    folder: Path
    learner: Learner
    normalisation: Normalisation
    log: TrainingLog | None
    """Only rank 0 has a log."""

    @property
    def scheme(self) -> NormalisationScheme:
        """How its inputs are normalised."""
        return self.learner.config.normalisation, self.learner.config.clip

    def dictionary(self, origin: DictionaryOrigin, data: str) -> SAE:
        """Return the SAE with the features of all ranks."""
        learner, config = self.learner, self.learner.config
        record: dict[str, Json] = {
            "config": config.as_json(),
            "data": data,
            "updates": learner.updates,
            "tokens": learner.tokens,
            "density": density_histogram(learner),
            "metrics": {} if learner.metrics is None else dict(asdict(learner.metrics)),
        }
        return SAE(
            kind=config.kind,
            k=config.k,
            origin=replace(origin, training={**origin.training, **record}),
            normalisation=self.normalisation,
            weights=trained_weights(learner),
            relu=config.relu,
        )


@final
class FitRun:
    """The state of one call of `fit`."""

    def __init__(
        self,
        trainings: Mapping[Path, TrainingConfig],
        batches: Batches,
        origin: DictionaryOrigin,
        config: FitConfig,
        device: torch.device,
    ) -> None:
        """Load the checkpoints in the folders, and initialise the other members."""
        self._origin, self._config = origin, config
        self._ranks = TrainingRanks(config.split)
        self._feed = BatchFeed(batches, self._ranks, device, sharded=config.sharded)
        self._normalisations: dict[NormalisationScheme, Normalisation] = {}
        learners: dict[Path, Learner] = {}
        self._saved: dict[Path, int] = {}
        """The update of the checkpoint in each folder."""
        for folder, training in trainings.items():
            if state := load_state(folder / STATE, training, config.data, self._ranks, device):
                learners[folder], normalisation = state
                self._saved[folder] = learners[folder].updates
                self._normalisations.setdefault((training.normalisation, training.clip), normalisation)
        preview = None
        if new := [training for folder, training in trainings.items() if folder not in learners]:
            covariance = any(training.normalisation == "whiten" for training in new)
            preview = self._feed.preview(covariance=covariance, max_vectors=config.epoch)
            self._check_memory(new, preview.vectors.shape[1], device)
            learners |= {
                folder: self._new_learner(training, preview) for folder, training in trainings.items() if folder not in learners
            }
        self._members = [self._member(folder, learners[folder], preview) for folder in trainings]

    def _check_memory(self, trainings: Sequence[TrainingConfig], width: int, device: torch.device) -> None:
        """Raise an error if the weights of new SAEs, with the state of their optimiser, do not fit the free memory."""
        ranks = self._ranks
        needs = [training.memory(width, ranks.by_feature.world_size) for training in trainings]
        # While a checkpoint is written, it is in the memory of the CPU once more. Ranks on a CPU share its memory.
        need = sum(needs) + max(needs) * (device.type == "cpu")
        need *= ranks.world_size if device.type == "cpu" else 1
        if need > (free := int(ranks.broadcast(torch.tensor([free_memory(device)], device=device)))):
            raise OutOfMemory(
                f"Training {', '.join(training.label for training in trainings)} at width {width} takes {need / 1e9:,.1f} GB of "
                f"memory, and {free / 1e9:,.1f} GB are free on {device}. Choose a smaller size, or fewer sizes at a time."
            )

    def _new_learner(self, training: TrainingConfig, preview: DataPreview) -> Learner:
        scheme = (training.normalisation, training.clip)
        if scheme not in self._normalisations:
            preview.warn_of_dead_features(training.normalisation)
            self._normalisations[scheme] = preview.moments.normalisation(*scheme)
        weights = initial_weights(training, self._normalisations[scheme].apply(preview.vectors))
        rows = self._ranks.features(training.size)
        own = {name: tensor if name in VECTORS else tensor[rows].clone() for name, tensor in weights.tensors().items()}
        return Learner(training, SAEWeights.from_tensors(own), self._ranks)

    def _member(self, folder: Path, learner: Learner, preview: DataPreview | None) -> FitMember:
        training, log = learner.config, None
        if self._ranks.rank == 0:
            name = f"{self._origin.site}/{training.label}"
            log = TrainingLog(folder / "training", name, self._saved.get(folder, -1), self._config.loggers)
            if folder not in self._saved and preview is not None:
                log.write(0, {"event": "start", "mean_over_spread": preview.mean_over_spread, "config": training.as_json()})
        return FitMember(folder, learner, self._normalisations[training.normalisation, training.clip], log)

    def train(self) -> None:
        """Train all members on all tokens; members that are ahead after a kill wait for the others."""
        total, resumed_at = self._config.tokens, self._tokens()
        start = min(member.learner.updates for member in self._members)
        disable = None if self._config.progress and self._ranks.rank == 0 else True
        began = time.perf_counter()
        with tqdm(total=total, initial=resumed_at, unit="tok", unit_scale=True, disable=disable, desc="training") as bar:
            for number, rows in enumerate(self._feed.batches(start) if resumed_at < total else (), start):
                self._update(number, rows)
                tokens = self._tokens()
                bar.update(tokens - bar.n)
                is_last = tokens >= total
                if (number + 1) % self._config.log_every == 0 or is_last:
                    seconds = time.perf_counter() - began
                    bar.set_postfix_str(self._log((tokens - resumed_at) / seconds, self._feed.seconds_waited / seconds))
                if is_last:
                    break
                if (number + 1) % self._config.checkpoint_every == 0:
                    self._checkpoint()
        if self._tokens() < total:
            warnings.warn(f"The stream ended after {self._tokens()} of {total} tokens: training ends there.", stacklevel=3)

    def finish(self) -> dict[Path, SAE]:
        """Save the last checkpoints and the dictionaries; what has not changed is not written."""
        dictionaries = {}
        for member in self._finite_members():
            changed = self._save(member) or not (member.folder / "config.json").exists()
            dictionaries[member.folder] = member.dictionary(self._origin, self._config.data)
            if changed and self._ranks.rank == 0:
                dictionaries[member.folder].save(member.folder)
        return dictionaries

    def _tokens(self) -> int:
        """Return the number of tokens that every member was trained on."""
        return min(member.learner.tokens for member in self._members)

    def _update(self, number: int, rows: ActivationBatch) -> None:
        """Train the members that have not had batch `number`."""
        noted = any((number + 1) % every == 0 for every in (self._config.log_every, self._config.checkpoint_every))
        normalised: dict[NormalisationScheme, Float[Tensor, "token width"]] = {}
        for member in self._members:
            learner = member.learner
            if learner.updates != number or learner.tokens >= self._config.tokens:
                continue
            if member.scheme not in normalised:
                normalised[member.scheme] = member.normalisation.apply(rows.values)
            rate = learning_rate(learner.config.optimiser, number, learner.tokens / self._config.tokens)
            try:
                is_last = learner.tokens + len(rows.values) * self._ranks.world_size >= self._config.tokens
                learner.update(normalised[member.scheme], rate, measure=noted or is_last)
            except NonFinite as error:
                self._checkpoint(skip=member)
                if learner.updates != number:  # a GPU notices it when it is measured
                    rows = next(self._feed.batches(learner.updates))
                raise NonFinite(self._non_finite_loss(learner.updates, rows, member)) from error

    def _non_finite_loss(self, number: int, rows: ActivationBatch, member: FitMember) -> str:
        """Return the message about the batch that ended a training."""
        path = member.folder / STATE
        checkpoint = f"The checkpoint {path} from before that is intact." if path.exists() else "No checkpoint was saved."
        if message := non_finite_message(number, rows):
            return f"{message} {checkpoint} Harvest that shot again, then resume."
        return (
            f"The loss of {member.learner.config.label} became NaN or infinite at batch {number}, whose rows are finite: the "
            f"weights have diverged. {checkpoint} Lower the learning rate and train from the start."
        )

    def _finite_members(self, skip: FitMember | None = None) -> Iterator[FitMember]:
        """Yield the members whose weights are finite; then raise an error about the first of the others."""
        members = [member for member in self._members if member is not skip]
        diverged = [member for member in members if not member.learner.is_finite()]
        yield from (member for member in members if member not in diverged)
        if diverged:
            learner = diverged[0].learner
            raise NonFinite(
                f"The weights of {learner.config.label} became NaN or infinite by update {learner.updates}: they have diverged. "
                f"What {diverged[0].folder} holds from before is intact. Lower the learning rate and train from the start."
            )

    def _save(self, member: FitMember) -> bool:
        """Save the state of a member unless the last checkpoint has it; return whether it was saved."""
        updates = member.learner.updates
        if self._saved.get(member.folder) == updates:
            return False
        save_state(member.folder / STATE, member.learner, member.normalisation, self._config.data)
        self._saved[member.folder] = updates
        return True

    def _log(self, tokens_per_second: float, waiting: float) -> str:
        """Write an entry for every member; return the text for the progress bar."""
        metrics = [member.learner.metrics for member in self._members if member.learner.metrics is not None]
        speed = {"tokens_per_second": round(tokens_per_second), "waiting": round(waiting, 4)}
        for member in self._members:
            learner = member.learner
            is_new = learner.updates != self._saved.get(member.folder)
            if member.log is not None and learner.metrics is not None and is_new:
                member.log.write(learner.updates, {"tokens": learner.tokens, **asdict(learner.metrics), **speed})
        loss, fvu, dead = (sum(getattr(entry, name) for entry in metrics) / len(metrics) for name in ("loss", "fvu", "dead"))
        return f"loss {loss:.4f} FVU {fvu:.3f} dead {dead:.1%}"

    def _checkpoint(self, skip: FitMember | None = None) -> None:
        """Save the state of every member but `skip`; the log comes first, so that it lacks nothing of what the state has."""
        for member in self._finite_members(skip):
            learner = member.learner
            density = density_histogram(learner)
            if member.log is not None and learner.updates != self._saved.get(member.folder):
                member.log.write(learner.updates, {"event": "checkpoint", "density": density}, flush=True)
            self._save(member)


def learning_rate(config: AdamConfig, update: int, progress: float) -> float:
    """Return the learning rate of update `update`, from 0, after the share `progress` of all tokens."""
    rise = min(1.0, (update + 1) / max(1, config.warmup))
    fall = 1.0 if config.decay == 0 else min(1.0, (1 - progress) / config.decay)
    return config.learning_rate * rise * max(0.0, fall)


def density_histogram(learner: Learner) -> dict[str, Json]:
    """Count features by how often they fire: `-3` counts those that fire at between 1 in 10,000 and 1 in 1,000 tokens."""
    firings = learner.ranks.by_feature.gather(learner.firings).tolist()
    decades = Counter("never" if n == 0 else str(math.ceil(math.log10(n / max(1, learner.tokens)))) for n in firings)
    return dict(sorted(decades.items()))
