"""`fit`: one or many dictionaries from one stream of activations; stopped at any moment, it goes on where it was."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, final

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from difflex.dictionaries.base import DictionaryOrigin
from difflex.dictionaries.normalisation import Method, Normalisation
from difflex.dictionaries.sae import SAE, SAEWeights
from difflex.errors import BadInput, NonFinite
from difflex.files import Json
from difflex.records import ActivationBatch
from difflex.training.checkpoint import as_json, load_state, save_state, whole_weights
from difflex.training.config import AdamConfig, TrainingConfig
from difflex.training.feed import BatchFeed, DataPreview, non_finite
from difflex.training.learner import Learner
from difflex.training.log import Also, TrainingLog
from difflex.training.start import first_weights
from difflex.training.team import Team
from difflex.training.window import Batches

__all__ = ["FitConfig", "fit"]


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How long a run is and what it leaves on its way."""

    tokens: int
    """Activations to learn from."""
    epoch: int | None = None
    """Activations before the stream repeats itself, where it does: statistics read no further."""
    data: str = ""
    """A name for what the batches are made from: work begun on other data is not continued."""
    checkpoint_every: int = 500
    """Updates between resumable states."""
    log_every: int = 20
    """Updates between lines of the log."""
    also: tuple[Also, ...] = ()
    """Who is told the numbers besides `log.jsonl`."""
    split: Literal["data", "features"] = "data"
    """What several ranks divide: the tokens of a batch, or the features of the dictionary."""
    own_share: bool = False
    """Whether each rank's stream already is its own share of every batch."""
    progress: bool = True
    """Show a bar, where the console is one that can."""

    def __post_init__(self) -> None:
        for name, count in (("tokens", self.tokens), ("checkpoint_every", self.checkpoint_every), ("log_every", self.log_every)):
            if count <= 0:
                raise BadInput(f"A course with {name}={count} learns nothing: choose a number above 0.")


Scheme = tuple[Method, float | None]


@final
class FitMember:
    """One dictionary of a run."""

    def __init__(self, folder: Path, learner: Learner, normalisation: Normalisation, log: TrainingLog | None) -> None:
        """The member whose state goes to `folder`; only rank 0 has a log."""
        self.folder, self.learner, self.normalisation, self.log = folder, learner, normalisation, log

    @property
    def is_finite(self) -> bool:
        """Whether no weight on any rank is NaN or infinite."""
        wrong = [(~torch.isfinite(tensor)).sum() for tensor in self.learner.parameters.weights.named().values()]
        return not bool(self.learner.team.sum(torch.stack(wrong)).any())

    def dictionary(self, origin: DictionaryOrigin, data: str) -> SAE:
        """The dictionary as it stands, of all ranks' features."""
        learner, config = self.learner, self.learner.config
        record: dict[str, Json] = {
            "config": as_json(config),
            "data": data,
            "updates": learner.updates,
            "tokens": learner.tokens,
            "density": density(learner),
            "last": {} if learner.last is None else dict(asdict(learner.last)),
        }
        return SAE(
            kind=config.kind,
            k=config.k,
            origin=replace(origin, training={**origin.training, **record}),
            normalisation=self.normalisation,
            weights=whole_weights(learner),
            relu=config.relu,
        )


def fit(
    trainings: Mapping[Path, TrainingConfig],
    batches: Batches,
    *,
    origin: DictionaryOrigin,
    course: FitConfig,
    device: torch.device | str | None = None,
) -> dict[Path, SAE]:
    """The dictionaries, each saved in its folder with the log and the resumable state of its training.

    Every dictionary learns from every batch, so that a sweep costs one pass over the data. What stands half done in a folder goes
    on, bit for bit on a CPU. Under `torch.distributed` all ranks call this; rank 0 writes. Without `device`, a CUDA card is taken
    where there is one.
    """
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    run = FitRun(trainings, batches, origin=origin, course=course, device=chosen)
    run.learn()
    return run.finish()


@final
class FitRun:
    """The state of a call of `fit`."""

    def __init__(
        self,
        trainings: Mapping[Path, TrainingConfig],
        batches: Batches,
        *,
        origin: DictionaryOrigin,
        course: FitConfig,
        device: torch.device,
    ) -> None:
        """The run with every member taken up where it was, or begun."""
        if not trainings:
            raise BadInput("No training was given. Name at least one kind, size and k.")
        self.origin, self.course, self.device = origin, course, device
        self.team = Team(course.split)
        self.feed = BatchFeed(batches, self.team, device, own_share=course.own_share)
        self._normalisations: dict[Scheme, Normalisation] = {}
        resumed = {
            folder: load_state(folder / STATE, training, course.data, self.team, device) for folder, training in trainings.items()
        }
        for training, found in zip(trainings.values(), resumed.values(), strict=True):
            if found is not None:
                self._normalisations.setdefault((training.normalisation, training.clip), found[1])
        begun = {folder: training for folder, training in trainings.items() if resumed[folder] is None}
        preview = None
        if begun:
            preview = self.feed.preview(
                covariance=any(training.normalisation == "whiten" for training in begun.values()), most=course.epoch
            )
        self.members = []
        for folder, training in trainings.items():
            found = resumed[folder]
            learner = found[0] if found else self._begin(training, preview)
            self.members.append(self._member(folder, learner, preview))

    def _begin(self, training: TrainingConfig, preview: DataPreview | None) -> Learner:
        assert preview is not None
        scheme = (training.normalisation, training.clip)
        if scheme not in self._normalisations:
            preview.warn(training.normalisation)
            self._normalisations[scheme] = preview.moments.normalisation(*scheme)
        weights = first_weights(training, self._normalisations[scheme].apply(preview.vectors))
        rows = self.team.rows(training.size)
        own = {name: tensor if name == "bias" else tensor[rows].clone() for name, tensor in weights.named().items()}
        return Learner(training, SAEWeights.of(own), self.team)

    def _member(self, folder: Path, learner: Learner, preview: DataPreview | None) -> FitMember:
        training = learner.config
        log = None
        if self.team.rank == 0:
            log = TrainingLog(folder / "training", f"{self.origin.site}/{training.label}", learner.updates, self.course.also)
            if learner.updates == 0 and preview is not None:
                log.write(0, {"event": "start", "mean_over_spread": preview.off_centre(), "config": as_json(training)})
        return FitMember(folder, learner, self._normalisations[training.normalisation, training.clip], log)

    def learn(self) -> None:
        """Update all members until they have seen all tokens; those that a kill left ahead wait for the others."""
        total, seen = self.course.tokens, self._seen()
        start = min(member.learner.updates for member in self.members)
        hidden = None if self.course.progress and self.team.rank == 0 else True
        began = time.perf_counter()
        with tqdm(total=total, initial=seen, unit="tok", unit_scale=True, disable=hidden, desc="training") as bar:
            for number, rows in enumerate(self.feed.rows(start) if seen < total else (), start):
                before = self._seen()
                self._update(number, rows)
                bar.update(self._seen() - before)
                last = self._seen() >= total
                if (number + 1) % self.course.log_every == 0 or last:
                    elapsed = time.perf_counter() - began
                    bar.set_postfix_str(self._log((self._seen() - seen) / elapsed, self.feed.waited / elapsed))
                if last:
                    break
                if (number + 1) % self.course.checkpoint_every == 0:
                    self._checkpoint()
        if self._seen() < total:
            warnings.warn(f"The stream ended after {self._seen()} tokens of {total}: what was learned is kept.", stacklevel=3)

    def _seen(self) -> int:
        """Tokens that every member has learned from."""
        return min(member.learner.tokens for member in self.members)

    def finish(self) -> dict[Path, SAE]:
        """Save the last state and the dictionaries."""
        done = {}
        for member in self._well():
            save_state(member.folder / STATE, member.learner, member.normalisation, self.course.data)
            done[member.folder] = member.dictionary(self.origin, self.course.data)
            if self.team.rank == 0:
                done[member.folder].save(member.folder)
        return done

    def _update(self, number: int, rows: ActivationBatch) -> None:
        """Batch `number`, for all who have not had it."""
        measured = (number + 1) % self.course.log_every == 0
        normalised: dict[Scheme, Float[Tensor, "token width"]] = {}
        for member in self.members:
            learner, scheme = member.learner, (member.learner.config.normalisation, member.learner.config.clip)
            if learner.updates != number or learner.tokens >= self.course.tokens:
                continue
            if scheme not in normalised:
                normalised[scheme] = self._normalisations[scheme].apply(rows.values)
            lr = rate(learner.config.optimiser, number, learner.tokens / self.course.tokens)
            try:
                learner.update(normalised[scheme], lr, measured=measured)
            except NonFinite as error:
                self._checkpoint(but=member)
                raise NonFinite(self._bad_batch(number, rows, member)) from error

    def _bad_batch(self, number: int, rows: ActivationBatch, member: FitMember) -> str:
        """Which batch it was that ended a training, and what to do."""
        kept = (
            f"The state of {member.folder / STATE} before it is kept"
            if (member.folder / STATE).exists()
            else "No state was saved"
        )
        if found := non_finite(number, rows):
            return f"{found} {kept}. Harvest that shot again, then resume."
        return (
            f"The loss of {member.learner.config.label} became NaN or infinite at batch {number}, whose rows are finite: its "
            f"weights have diverged. {kept}. Lower the learning rate and train it anew."
        )

    def _well(self, but: FitMember | None = None) -> Iterator[FitMember]:
        """The members whose weights are numbers; after them, an error about those whose weights are not."""
        ill = [member for member in self.members if member is not but and not member.is_finite]
        yield from (member for member in self.members if member is not but and member not in ill)
        for member in ill:
            raise NonFinite(
                f"The weights of {member.learner.config.label} became NaN or infinite by update {member.learner.updates}: "
                f"they have diverged. What {member.folder} holds from before is kept. Lower the learning rate and train it anew."
            )

    def _log(self, speed: float, waited: float) -> str:
        """What the bar shows after a line was written for every member."""
        shown = []
        for member in self.members:
            if member.learner.last is None:
                continue
            if member.log is not None:
                tokens = member.learner.tokens
                entry = {
                    "tokens": tokens,
                    **asdict(member.learner.last),
                    "tokens_per_second": round(speed),
                    "waiting": round(waited, 4),
                }
                member.log.write(member.learner.updates, entry)
            shown.append(member.learner.last)
        if not shown:
            return ""
        loss, fvu, dead = (sum(getattr(one, name) for one in shown) / len(shown) for name in ("loss", "fvu", "dead"))
        return f"loss {loss:.4f} FVU {fvu:.3f} dead {dead:.1%}"

    def _checkpoint(self, but: FitMember | None = None) -> None:
        """Save the state of every member that is well, `but` one whose update failed."""
        for member in self._well(but):
            save_state(member.folder / STATE, member.learner, member.normalisation, self.course.data)
            found = density(member.learner)
            if member.log is not None:
                member.log.write(member.learner.updates, {"event": "checkpoint", "density": found})


def rate(settings: AdamConfig, update: int, done: float) -> float:
    """The learning rate of the given update, counted from 0, when the share `done` of all tokens has been seen."""
    rising = min(1.0, (update + 1) / max(1, settings.warmup))
    falling = 1.0 if settings.decay == 0 else min(1.0, (1 - done) / settings.decay)
    return settings.lr * rising * max(0.0, falling)


def density(learner: Learner) -> dict[str, Json]:
    """How many features of all ranks fire how often: `-3` counts those between one token in 10,000 and one in 1,000."""
    counts: dict[str, Json] = {}
    firings = learner.team.gather(learner.firings) if learner.team.shards > 1 else learner.firings
    for count in firings.tolist():
        place = "never" if count == 0 else str(math.ceil(math.log10(count / max(1, learner.tokens))))
        known = counts.get(place, 0)
        counts[place] = known + 1 if isinstance(known, int) else 1
    return dict(sorted(counts.items()))


STATE = Path("training") / "state.safetensors"
