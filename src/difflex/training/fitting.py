"""`FitRun`: the training of SAEs at once, on the batches of one or several sites, with its checkpoints and logs."""

from __future__ import annotations

import math
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple, final

import torch
from jaxtyping import Float
from torch import Tensor

from difflex.choices import NormalisationMethod
from difflex.dictionaries import SAE, DictionaryOrigin, Normalisation, SAEWeights
from difflex.dictionaries.files import WeightsDtype
from difflex.errors import BadInput, NonFinite
from difflex.files import Json, disk_errors
from difflex.progress import ProgressBar
from difflex.records import ActivationBatch, Site
from difflex.training.checkpoint import (
    LoggerName,
    TrainingLog,
    load_state,
    save_state,
    trained_weights,
)
from difflex.training.config import AdamConfig, CheckpointKind, TrainingConfig, checkpoint_bytes
from difflex.training.data import BatchFeed, DataPreview, SiteBatch, Split, TrainingRanks, non_finite_message
from difflex.training.learner import Learner, initial_weights
from difflex.training.update import VECTORS

STATE = Path("training") / "state.safetensors"
LARGE = 1 << 30
"""Bytes of checkpoints from which their number is limited by the time that writing takes."""
WRITING = 0.05
"""The largest share of the time that is spent on writing large checkpoints."""
DISK_SPEED = 1e9
"""Bytes per second at which the first checkpoint is expected to be written."""


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """The length of a run, and what it writes."""

    tokens: int
    """Activations to train on."""
    batch: int = 4096
    """Tokens of a batch, as the forecast of its memory expects them."""
    epoch: int | None = None
    """Activations in one epoch of a stream that repeats; statistics are taken from no more than these."""
    data: str = ""
    """A name for the data; a training does not resume with other data."""
    checkpoint_every: int = 500
    """Updates between two checkpoints; more if these are large, so that writing takes at most a twentieth of the time."""
    checkpoints: CheckpointKind = "exact"
    """`exact`: a run that was killed ends with the same bits, on a CPU. `compact`: the weights in 16 bits without the state of
    the optimiser, which starts again when the run resumes; the checkpoint is removed at the end."""
    weights: WeightsDtype = "fp32"
    """How encoder and decoder are stored in the dictionary; in bf16 they take half the disk."""
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


class FitTask(NamedTuple):
    """One SAE to train."""

    origin: DictionaryOrigin
    """With the site whose activations it is trained on."""
    training: TrainingConfig


NormalisationScheme = tuple[Site, NormalisationMethod, float | None]
"""A site, a method and the largest absolute value."""


@final
@dataclass(frozen=True, eq=False)
class FitMember:
    """One SAE of a run."""

    folder: Path
    origin: DictionaryOrigin
    learner: Learner
    normalisation: Normalisation
    log: TrainingLog | None
    """Only rank 0 has a log."""

    @property
    def scheme(self) -> NormalisationScheme:
        """How its inputs are normalised."""
        return scheme_of(self.origin.site, self.learner.config)

    def dictionary(self, data: str, dtype: WeightsDtype) -> SAE:
        """Return the SAE with the features of all ranks, rounded to how it is stored, on the CPU."""
        learner, config, weights = self.learner, self.learner.config, trained_weights(self.learner)
        for matrix in (weights.encoder, weights.decoder) if dtype == "bf16" else ():
            matrix.copy_(matrix.bfloat16())
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
            origin=replace(self.origin, training={**self.origin.training, **record}),
            normalisation=self.normalisation.to("cpu"),
            weights=SAEWeights.from_tensors({name: tensor.cpu() for name, tensor in weights.tensors().items()}),
            relu=config.relu,
        )


def scheme_of(site: Site, training: TrainingConfig) -> NormalisationScheme:
    """Return how the inputs of an SAE are normalised."""
    return site, training.normalisation, training.clip


@final
class FitRun:
    """The training of some SAEs at once."""

    def __init__(
        self, tasks: Mapping[Path, FitTask], feed: BatchFeed, config: FitConfig, ranks: TrainingRanks, device: torch.device
    ) -> None:
        """Load the checkpoints in the folders, and initialise the other members."""
        self._config, self._ranks, self._feed = config, ranks, feed
        self._normalisations: dict[NormalisationScheme, Normalisation] = {}
        learners: dict[Path, Learner] = {}
        self._saved: dict[Path, int] = {}
        """The update of the checkpoint in each folder."""
        for folder, (origin, training) in tasks.items():
            if state := load_state(folder / STATE, training, config.data, ranks, device):
                learners[folder], normalisation = state
                self._saved[folder] = learners[folder].updates
                self._normalisations.setdefault(scheme_of(origin.site, training), normalisation)
        previews: Mapping[Site, DataPreview] = {}
        if new := {folder: task for folder, task in tasks.items() if folder not in learners}:
            whitened = {origin.site for origin, training in new.values() if training.normalisation == "whiten"}
            sites = dict.fromkeys(origin.site for origin, _ in new.values())
            previews = feed.preview({site: site in whitened for site in sites}, max_vectors=config.epoch)
            for folder, (origin, training) in new.items():
                learners[folder] = self._new_learner(origin.site, training, previews[origin.site])
        self._members = [self._member(folder, task, learners[folder], previews) for folder, task in tasks.items()]
        self._checkpointed = time.perf_counter()
        widths = {folder: learner.parameters.weights.encoder.shape[1] for folder, learner in learners.items()}
        self._bytes = sum(checkpoint_bytes(tasks[folder].training, width, config.checkpoints) for folder, width in widths.items())
        self._seconds_to_write = self._bytes / DISK_SPEED

    def _new_learner(self, site: Site, training: TrainingConfig, preview: DataPreview) -> Learner:
        scheme = scheme_of(site, training)
        if scheme not in self._normalisations:
            preview.warn_of_dead_features(training.normalisation)
            self._normalisations[scheme] = preview.moments.normalisation(training.normalisation, training.clip)
        weights = initial_weights(training, self._normalisations[scheme].apply(preview.vectors))
        if self._ranks.by_feature.world_size == 1:
            return Learner(training, weights, self._ranks)
        rows = self._ranks.features(training.size)
        own = {name: tensor[rows].clone() if name not in VECTORS else tensor for name, tensor in weights.tensors().items()}
        return Learner(training, SAEWeights.from_tensors(own), self._ranks)

    def _member(self, folder: Path, task: FitTask, learner: Learner, previews: Mapping[Site, DataPreview]) -> FitMember:
        (origin, training), log = task, None
        if self._ranks.rank == 0:
            name = f"{origin.site}/{training.label}"
            log = TrainingLog(folder / "training", name, self._saved.get(folder, -1), self._config.loggers)
            if folder not in self._saved and origin.site in previews:
                spread = previews[origin.site].mean_over_spread
                log.write(0, {"event": "start", "mean_over_spread": spread, "config": training.as_json()})
        return FitMember(folder, origin, learner, self._normalisations[scheme_of(origin.site, training)], log)

    def train(self) -> None:
        """Train all members on all tokens; members that are ahead after a kill wait for the others."""
        total, resumed_at = self._config.tokens, self._tokens()
        start = min(member.learner.updates for member in self._members)
        show = self._config.progress and self._ranks.rank == 0
        began, waited = time.perf_counter(), self._feed.seconds_waited
        with ProgressBar(total=total, initial=resumed_at, unit=" tokens", unit_scale=True, show=show, desc="training") as bar:
            for number, batch in enumerate(self._feed.batches(start) if resumed_at < total else (), start):
                self._update(number, batch)
                tokens = self._tokens()
                bar.update(tokens - bar.n)
                is_last = tokens >= total
                if (number + 1) % self._config.log_every == 0 or is_last:
                    seconds = time.perf_counter() - began
                    waiting = (self._feed.seconds_waited - waited) / seconds
                    bar.set_postfix_str(self._log((tokens - resumed_at) / seconds, waiting))
                if is_last:
                    break
                if (number + 1) % self._config.checkpoint_every == 0 and self._is_checkpoint_due():
                    self._checkpoint()
        if self._tokens() < total:
            warnings.warn(f"The stream ended after {self._tokens()} of {total} tokens: training ends there.", stacklevel=3)

    def finish(self) -> Iterator[tuple[Path, SAE]]:
        """Save the last checkpoints and the dictionaries, and yield these; what has not changed is not written.

        A member ends here, and its dictionary is on the CPU: neither takes memory of a GPU from what is trained next.
        """
        for member in self._finite_members():
            self._members.remove(member)
            path, learner = member.folder / STATE, member.learner
            is_over = self._config.checkpoints == "compact" and learner.tokens >= self._config.tokens
            changed = is_over or self._save(member) or not (member.folder / "config.json").exists()
            dictionary = member.dictionary(self._config.data, self._config.weights)
            if changed and self._ranks.rank == 0:
                dictionary.save(member.folder, self._config.weights)
            if is_over and self._ranks.rank == 0:
                with disk_errors(path):
                    path.unlink(missing_ok=True)
            yield member.folder, dictionary

    def _tokens(self) -> int:
        """Return the number of tokens that every member was trained on."""
        return min(member.learner.tokens for member in self._members)

    def _update(self, number: int, batch: SiteBatch) -> None:
        """Train the members that have not had batch `number`."""
        noted = any((number + 1) % every == 0 for every in (self._config.log_every, self._config.checkpoint_every))
        normalised: dict[NormalisationScheme, Float[Tensor, "token width"]] = {}
        for member in self._members:
            learner, site = member.learner, member.origin.site
            if learner.updates != number or learner.tokens >= self._config.tokens:
                continue
            if member.scheme not in normalised:
                normalised[member.scheme] = member.normalisation.apply(batch[site].values)
            rate = learning_rate(learner.config.optimiser, number, learner.tokens / self._config.tokens)
            try:
                is_last = learner.tokens + len(batch[site].values) * self._ranks.world_size >= self._config.tokens
                learner.update(normalised[member.scheme], rate, measure=noted or is_last)
            except NonFinite as error:
                with suppress(NonFinite):  # on a GPU, others have failed by the same rows
                    self._checkpoint(skip=member)
                if learner.updates != number:  # a GPU notices it when it is measured
                    batch = next(self._feed.batches(learner.updates))
                raise NonFinite(self._non_finite_loss(learner.updates, batch[site], member)) from error

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
        finite = [member for member in members if member not in diverged]
        del members  # a member that the caller drops is dropped
        while finite:
            yield finite.pop(0)
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
        save_state(member.folder / STATE, member.learner, member.normalisation, self._config.data, self._config.checkpoints)
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

    def _is_checkpoint_due(self) -> bool:
        """Whether enough time has passed since the last checkpoint for its size; the answer is that of rank 0."""
        if self._bytes < LARGE:
            return True
        due = (time.perf_counter() - self._checkpointed) * WRITING >= self._seconds_to_write
        return bool(self._ranks.broadcast(torch.tensor([due], device=self._members[0].learner.silence.device)))

    def _checkpoint(self, skip: FitMember | None = None) -> None:
        """Save the state of every member but `skip`; the log comes first, so that it lacks nothing of what the state has."""
        began = time.perf_counter()
        for member in self._finite_members(skip):
            learner = member.learner
            density = density_histogram(learner)
            if member.log is not None and learner.updates != self._saved.get(member.folder):
                member.log.write(learner.updates, {"event": "checkpoint", "density": density}, flush=True)
            self._save(member)
        self._checkpointed = time.perf_counter()
        self._seconds_to_write = self._checkpointed - began


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
