"""`grow`: ITDA dictionaries from a stream of activations, one or many in a pass; stopped, it goes on where it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import NamedTuple, final

import torch
from torch import Tensor

from difflex.devices import free_memory
from difflex.dictionaries.base import Dictionary, DictionaryOrigin
from difflex.dictionaries.itda import GrowthConfig
from difflex.dictionaries.itda.dictionary import ITDA, means_of
from difflex.dictionaries.itda.provenance import AtomProvenance
from difflex.dictionaries.normalisation import Method, Normalisation, estimate
from difflex.dictionaries.pursuit.means import PursuitBackend
from difflex.distributed import Ranks
from difflex.errors import BadInput, NonFinite
from difflex.files import Json
from difflex.records import ActivationBatch, Shot, of_split
from difflex.training.itda import checkpoint
from difflex.training.itda.checkpoint import GrowthState, trials_of
from difflex.training.itda.curve import GrowthInterval, expected_over, thinned
from difflex.training.itda.grower import AtomGrower
from difflex.training.itda.search import ThresholdTrial, next_threshold, settled
from difflex.training.itda.watch import HoldOut

__all__ = ["GrowthData", "GrowthProgress", "grow"]


@dataclass(frozen=True, kw_only=True)
class GrowthData:
    """Where the activations come from."""

    batches: Callable[[int], Iterator[ActivationBatch]]
    """The batches from a given number on, the same under the same number; each rank's own share of them."""
    tokens: int
    """Tokens in a pass, over all ranks; a stream that ends earlier ends the pass."""
    data: str = ""
    """A name for what the batches are made from: work begun on other data is not continued."""
    shot: Callable[[int], Shot] | None = None
    """The shot behind a number; without it, atoms only know the numbers."""


class GrowthProgress(NamedTuple):
    """How far a growth is, told after every batch."""

    folder: Path
    threshold: float
    passes: int
    """Finished before this one."""
    moment: GrowthInterval
    tokens: int
    """In a pass."""


def grow(
    growths: Mapping[Path, GrowthConfig],
    source: GrowthData,
    *,
    origin: DictionaryOrigin,
    device: torch.device | str | None = None,
    checkpoint_every: int = 50,
    told: Callable[[GrowthProgress], None] = lambda progress: None,
) -> dict[Path, ITDA]:
    """The dictionaries, each saved in its folder.

    XX
        `torch.distributed` all ranks call this and grow the same dictionaries; rank 0 writes. `told` is called on rank 0 alone.
    """
    if not growths:
        raise BadInput("No growth was given. Name at least one threshold or size.")
    if source.tokens < 1:
        raise BadInput(f"A pass over {source.tokens} tokens grows nothing: ask for 1 or more.")
    ranks = Ranks()
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    run = GrowthRun(source, ranks, chosen, checkpoint_every, told if ranks.rank == 0 else None, len(growths))
    members = [GrowthMember(folder, growth, origin, run) for folder, growth in growths.items()]
    run.passes([member for member in members if member.growth.threshold is not None])
    for member in members:
        while not member.finished:
            run.passes([member])
    return {member.folder: member.result() for member in members}


@final
class GrowthRun:
    """What the members of one call of `grow` share."""

    def __init__(
        self,
        source: GrowthData,
        ranks: Ranks,
        device: torch.device,
        checkpoint_every: int,
        told: Callable[[GrowthProgress], None] | None,
        members: int,
    ) -> None:
        self.source, self.ranks, self.device = source, ranks, device
        self._every, self._told = checkpoint_every, told
        self._watch = HoldOut(source.shot)
        self._free = ranks.broadcast(torch.tensor([self._share(members)], device=self.device))
        self._normalisations: dict[tuple[Method, float | None], Normalisation] = {}

    def normalisation(self, growth: GrowthConfig) -> Normalisation:
        """The one that rank 0 estimates from its first batches, on all ranks."""
        scheme = (growth.normalisation, growth.clip)
        if scheme not in self._normalisations:
            found = estimate((rows.values.to(self.device) for rows in of_split(self.source.batches(0), "train")), *scheme)
            agreed: dict[str, Tensor] = {name: self.ranks.broadcast(tensor) for name, tensor in found.tensors().items()}
            self._normalisations[scheme] = Normalisation.of(found.settings(), agreed)
        return self._normalisations[scheme]

    def means(self, growth: GrowthConfig) -> PursuitBackend:
        """What the pursuits of `growth` work with, the same on all ranks."""
        width = self.normalisation(growth).width
        return means_of(growth.pursuit, growth.size, width, growth.k, int(self._free))

    def _share(self, members: int) -> int:
        """Bytes at hand for each of the members; ranks on a CPU share its memory, too."""
        sharing = self.ranks.world_size if self.device.type == "cpu" else 1
        return free_memory(self.device) // (members * sharing)

    def know(self, growth: GrowthConfig, normalisation: Normalisation) -> None:
        """Use the `normalisation` of a growth that was begun earlier."""
        self._normalisations[growth.normalisation, growth.clip] = normalisation

    def passes(self, members: list[GrowthMember]) -> None:
        """One pass over the stream for `members`, each from the batch where it stands."""
        growing = [member for member in members if not member.finished]
        first = min((member.batches for member in growing), default=0)
        stream = of_split(self.source.batches(first), "train") if growing else iter(())
        for number in count(first):
            rows = next(stream, None) if growing else None
            counts = self.ranks.gather_counts(0 if rows is None else len(rows.values))
            if not sum(counts):
                break
            for member in growing:
                if member.batches == number:
                    self._take(member, rows, max(counts), number)
                    if (number + 1) % self._every == 0 and not member.arrived:
                        member.save()
            growing = [member for member in growing if not member.arrived]
            if not growing:
                break
        for member in members:
            member.end_pass()

    def _take(self, member: GrowthMember, rows: ActivationBatch | None, most: int, number: int) -> None:
        """Let `member` have the batch, in the pieces that are judged together; ranks with fewer rows bring empty pieces."""
        if rows is None:
            nothing = torch.empty(0, dtype=torch.long)
            rows = ActivationBatch(torch.empty(0, member.normalisation.width), nothing, nothing)
        _finite(rows, number)
        z = member.normalisation.apply(rows.values.to(self.device))
        watched = self._watch.kept_out(rows.shots, member.growth.kept_out).to(self.device)
        shots, tokens = rows.shots.to(self.device), rows.tokens.to(self.device)
        size = member.growth.batch
        for start in range(0, most, size):
            if member.grower.done:
                break
            here = slice(start, start + size)
            member.grower.take(ActivationBatch(z[here], shots[here], tokens[here]), watched[here])
        member.batches += 1
        if self._told is not None:
            moment = member.grower.curve[-1]
            self._told(GrowthProgress(member.folder, member.grower.threshold, len(member.trials), moment, self.source.tokens))


@final
class GrowthMember:
    """One dictionary of a run."""

    def __init__(self, folder: Path, growth: GrowthConfig, origin: DictionaryOrigin, run: GrowthRun) -> None:
        """The member, taken up where it was, or begun."""
        self.folder, self.growth, self._origin, self._run = folder, growth, origin, run
        self._work = folder / "training"
        self.trials: list[ThresholdTrial] = []
        self._parts: dict[str, str] = {}
        self._written: dict[str, Json] | None = None
        self._dictionary: ITDA | None = None
        state = checkpoint.read_state(self._work, growth, run.source.data)
        self.finished = state is not None and state.finished
        self.normalisation = run.normalisation(growth) if state is None else self._known(state)
        self._means = run.means(growth) if state is None else checkpoint.means_of_state(self._work, state)
        self._begin(state)

    def _known(self, state: GrowthState) -> Normalisation:
        known = checkpoint.read_normalisation(self._work, state.normalisation, self._run.device)
        self._run.know(self.growth, known)
        self._written = state.normalisation
        return known

    def _begin(self, state: GrowthState | None) -> None:
        """A pass from its start, or from where `state` stands."""
        if state is not None:
            self.trials = trials_of(state)
        threshold = self.growth.threshold or next_threshold(self.trials, self.growth.size)
        self.batches, self._parts = 0, {}
        if state is not None and state.batches:
            threshold, self.batches, self._parts = state.threshold, state.batches, state.parts
        width, run = self.normalisation.width, self._run
        if not self.finished:
            self.grower = AtomGrower(self.growth, threshold, width, run.device, run.ranks, self._means)
            if state is not None and state.batches:
                checkpoint.refill(self._work, state, self.grower)

    @property
    def arrived(self) -> bool:
        """Whether this pass need not go on."""
        return self.grower.done or self.grower.seen >= self._run.source.tokens

    def save(self) -> None:
        """Write what it takes to go on from here."""
        if self._run.ranks.rank == 0:
            if self._written is None:
                self._written = checkpoint.write_normalisation(self._work, self.normalisation)
            self._parts = checkpoint.write_state(self._work, self._state(), self.grower)

    def end_pass(self) -> None:
        """Finish, or try another threshold."""
        if self.finished:
            return
        grower = self.grower
        if not grower.seen:
            raise BadInput("Growth was given a stream without a batch. Harvest some activations first.")
        if not grower.size:
            raise BadInput(
                f"All {grower.seen} tokens are the zero vector once they are normalised, or are kept out: no atom can be made of "
                "them. Harvest more prompts, or choose another normalisation."
            )
        share = min(1.0, grower.filled / self._run.source.tokens) if grower.full else 1.0
        self.trials.append(ThresholdTrial(grower.threshold, grower.size, share))
        self.finished = self.growth.threshold is not None or settled(self.trials, self.growth.size)
        if self.finished:
            self._finish()
            return
        self._begin(None)
        self.save()
        if self._run.ranks.rank == 0:
            checkpoint.clear(self._work)

    def _finish(self) -> None:
        self._dictionary = self._made()
        if self._run.ranks.rank == 0:
            self._dictionary.save(self.folder)
            self.save()
            checkpoint.clear(self._work)

    def result(self) -> ITDA:
        """The dictionary; that of an earlier run is read from its folder."""
        if self._dictionary is not None:
            return self._dictionary
        loaded = Dictionary.load(self.folder, self._run.device)
        assert isinstance(loaded, ITDA)
        return loaded

    def _made(self) -> ITDA:
        grower, source = self.grower, self._run.source
        size = grower.size
        shots = grower.shots[:size].clone()
        known = {} if source.shot is None else {number: source.shot(number) for number in shots.unique().tolist()}
        record: dict[str, Json] = {
            "config": self.growth.as_json(),
            "data": source.data,
            "threshold": grower.threshold,
            "tokens": grower.seen,
            "passes": len(self.trials),
            "means": grower.means.reason,
            "expected_over": expected_over(grower.curve),
            "curve": [list(moment) for moment in thinned(grower.curve)],
        }
        return ITDA(
            k=self.growth.k,
            origin=replace(self._origin, training={**self._origin.training, **record}),
            normalisation=self.normalisation,
            atoms=grower.atoms.rows.clone(),
            provenance=AtomProvenance(shots=shots, tokens=grower.tokens[:size].clone(), known=known),
            way=self.growth.pursuit,
        )

    def _state(self) -> GrowthState:
        return GrowthState(
            growth=self.growth.as_json(),
            data=self._run.source.data,
            normalisation=self._written or {},
            means=self._means.as_json(),
            trials=[list(trial) for trial in self.trials],
            threshold=self.grower.threshold,
            batches=self.batches,
            idle=self.grower.idle,
            curve=[list(moment) for moment in self.grower.curve],
            parts=self._parts,
            finished=self.finished,
        )


def _finite(rows: ActivationBatch, number: int) -> None:
    bad = ~torch.isfinite(rows.values).all(1)
    if bad.any():
        row = int(bad.nonzero()[0, 0])
        raise NonFinite(
            f"Batch {number} holds NaN or infinity in {int(bad.sum())} rows, first that of shot {int(rows.shots[row])}, token "
            f"{int(rows.tokens[row])}. Harvest that shot again, then grow on."
        )
