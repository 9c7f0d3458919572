"""`grow`: grow ITDA dictionaries from a stream of activations, one or many in a pass. Growth that was stopped resumes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import NamedTuple, final

import torch
from torch import Tensor

from difflex.choices import NormalisationMethod
from difflex.devices import find_device, free_memory
from difflex.dictionaries import ITDA, Dictionary, DictionaryOrigin, Normalisation
from difflex.dictionaries.itda import AtomProvenance, GrowthConfig
from difflex.dictionaries.normalisation import estimate_normalisation
from difflex.dictionaries.pursuit import PursuitBackend, choose_backend
from difflex.distributed import Ranks
from difflex.errors import BadInput, BrokenFile, NonFinite, OutOfMemory
from difflex.files import Json, folder_lock, parsing
from difflex.records import ActivationBatch, Shot
from difflex.store import require_split
from difflex.training.data import non_finite_message
from difflex.training.itda import state as files
from difflex.training.itda.grower import AtomGrower
from difflex.training.itda.state import (
    GrowthInterval,
    GrowthState,
    GrowthWork,
    HoldOut,
    ThresholdTrial,
    expected_over_threshold,
    expected_work,
    is_settled,
    next_threshold,
    thin_curve,
)


@dataclass(frozen=True, kw_only=True)
class GrowthData:
    """The activations that dictionaries grow from."""

    batches: Callable[[int], Iterator[ActivationBatch]]
    """This rank's share of the batches from a given number on. The batch of a number is always the same."""
    tokens: int
    """Tokens in a pass, over all ranks; a shorter stream ends the pass earlier."""
    data: str = ""
    """A name for the data; growth does not resume with other data."""
    shot: Callable[[int], Shot] | None = None
    """Returns the shot of a number; without it, only the numbers are saved with the atoms."""


class GrowthProgress(NamedTuple):
    """The progress of a dictionary after a batch."""

    threshold: float
    passes: int
    """Finished passes before this one."""
    interval: GrowthInterval
    work: Callable[[], GrowthWork]
    """Returns the work that was done and is expected of all dictionaries that grow together."""


def grow(
    growths: Mapping[Path, GrowthConfig],
    data: GrowthData,
    *,
    origin: DictionaryOrigin,
    device: torch.device | str | None = None,
    checkpoint_every: int = 50,
    on_progress: Callable[[GrowthProgress], None] = lambda progress: None,
) -> dict[Path, ITDA]:
    """Grow a dictionary for each folder, and save it there.

    All dictionaries grow in one pass over the data; for those without a threshold, one is searched, pass by pass. Work in a
    folder resumes with the same results, and finished work is loaded and not touched. Under `torch.distributed` all ranks call
    this and grow the same dictionaries; rank 0 writes and calls `on_progress`.
    """
    if not growths:
        raise BadInput("`grow` needs at least one growth: choose a threshold or a size.")
    if data.tokens < 1:
        raise BadInput(f"A pass over {data.tokens} tokens grows nothing: use 1 or more.")
    ranks, device, dictionaries = Ranks(), find_device(device), {}
    for folder, growth in growths.items():
        if (itda := load_grown(folder, growth, data.data)) is not None:
            dictionaries[folder] = itda.to(device)
    unfinished = {folder: growth for folder, growth in growths.items() if folder not in dictionaries}
    with ExitStack() as locks:
        for folder in unfinished if ranks.rank == 0 else ():
            locks.enter_context(folder_lock(folder))
        run = GrowthRun(data, ranks, device, checkpoint_every, on_progress, len(unfinished))
        members = run.members = [GrowthMember(folder, growth, origin, run) for folder, growth in unfinished.items()]
        while growing := [member for member in members if not member.state.finished]:
            run.run_pass(growing)
        dictionaries |= {member.folder: member.result() for member in members}
    return {folder: dictionaries[folder] for folder in growths}


def load_grown(folder: Path, growth: GrowthConfig, data: str) -> ITDA | None:
    """Return the dictionary that an earlier call has finished in `folder`, or None; raise an error if it is another one."""
    if not (folder / "config.json").exists():
        return None
    itda = Dictionary.load(folder)
    record, work = itda.origin.training, folder / "training"
    config = record.get("config")
    if isinstance(config, dict) and isinstance(batch := config.get("batch"), int):
        growth = replace(growth, batch=batch)  # it depends on the number of processes
    files.check_growth(folder / "config.json", config, record.get("data"), growth.as_json(), data)
    assert isinstance(itda, ITDA), "no other kind is made by a growth"
    try:
        state = files.read_state(work, growth, data)
    except BrokenFile as error:
        raise BrokenFile(f"{error} The dictionary in {folder} is finished and intact: move {work} alone away.") from error
    return itda if state is None or state.finished else None


def first_atoms(itda: ITDA, size: int) -> ITDA:
    """Return the dictionary of the first `size` atoms of a grown one: the one that growth with this size would have given."""
    record = itda.origin.training
    config, intervals = record["config"], record["curve"]
    assert isinstance(config, dict) and isinstance(intervals, list) and 0 < size <= itda.size
    curve = [GrowthInterval(*(int(str(number)) for number in interval)) for interval in intervals if isinstance(interval, list)]
    end = next(place for place, interval in enumerate(curve) if interval.size >= size)
    curve = [*curve[:end], curve[end]._replace(size=size)]
    training: dict[str, Json] = {
        **record,
        "config": {**config, "size": size},
        "tokens": curve[-1].tokens,
        "expected_over_threshold": expected_over_threshold(curve),
        "curve": [list(interval) for interval in curve],
    }
    return ITDA(
        k=itda.k,
        origin=replace(itda.origin, training=training),
        normalisation=itda.normalisation,
        atoms=itda.atoms[:size],
        provenance=itda.provenance.select(torch.arange(size)),
        pursuit=itda.pursuit,
    )


@final
class GrowthRun:
    """What the dictionaries of one call of `grow` share."""

    def __init__(
        self,
        data: GrowthData,
        ranks: Ranks,
        device: torch.device,
        checkpoint_every: int,
        on_progress: Callable[[GrowthProgress], None],
        members: int,
    ) -> None:
        self.data, self.ranks, self.device = data, ranks, device
        self._checkpoint_every, self._on_progress = checkpoint_every, on_progress
        self._holdout = HoldOut(data.shot)
        self._sharing = members * (ranks.world_size if device.type == "cpu" else 1)  # ranks on a CPU share its memory
        self.normalisations: dict[tuple[NormalisationMethod, float | None], Normalisation] = {}
        """By method and clip."""
        self.members: list[GrowthMember] = []

    def work(self) -> GrowthWork:
        """Return the work that was done and is expected of all members."""
        return reduce(GrowthWork.plus, (member.work(self.data.tokens) for member in self.members))

    def check_memory(self, growth: GrowthConfig, width: int, backend: PursuitBackend) -> None:
        """Raise an error if all dictionaries of the run, as large as they may become, do not fit the free memory."""
        need = self._sharing * (growth.size * (4 * width + 16) + backend.memory(growth.size, width))
        if need > (free := int(self.ranks.broadcast(torch.tensor([free_memory(self.device)], device=self.device)))):
            raise OutOfMemory(
                f"Growing up to {growth.size:,} atoms of width {width} by {backend.reason} takes {need / 1e9:,.1f} GB of memory, "
                f"and {free / 1e9:,.1f} GB are free on {self.device}. Choose a smaller size, or fewer thresholds at a time."
            )

    def normalisation(self, growth: GrowthConfig) -> Normalisation:
        """Return the normalisation that rank 0 estimates from its first batches."""
        scheme = (growth.normalisation, growth.clip)
        if scheme not in self.normalisations:
            values = (rows.values.to(self.device) for rows in require_split(self.data.batches(0), "train"))
            estimate = estimate_normalisation(values, *scheme)
            tensors: dict[str, Tensor] = {name: self.ranks.broadcast(tensor) for name, tensor in estimate.tensors().items()}
            self.normalisations[scheme] = Normalisation.from_saved(estimate.settings(), tensors)
        return self.normalisations[scheme]

    def run_pass(self, members: list[GrowthMember]) -> None:
        """Run one pass over the stream for `members`, each from its own batch on."""
        growing = members
        number = min(member.state.batches for member in growing)
        stream = require_split(self.data.batches(number), "train")
        while growing:
            rows = next(stream, None)
            counts = self.ranks.gather_counts(0 if rows is None else len(rows.values))
            if not sum(counts):
                break
            for member in growing:
                if member.state.batches == number:
                    self._add_batch(member, rows, max(counts), number)
                    if (number + 1) % self._checkpoint_every == 0 and not member.pass_is_done:
                        member.save()
            growing = [member for member in growing if not member.pass_is_done]
            number += 1
        for member in members:
            member.end_pass()

    def _add_batch(self, member: GrowthMember, rows: ActivationBatch | None, max_count: int, number: int) -> None:
        """Add a batch to `member` in pieces; ranks with fewer rows than `max_count` add empty pieces."""
        if rows is None:
            empty = torch.empty(0, dtype=torch.long)
            rows = ActivationBatch(torch.empty(0, member.normalisation.width), empty, empty)
        if message := non_finite_message(number, rows):
            raise NonFinite(f"{message} Harvest that shot again, then resume.")
        z = member.normalisation.apply(rows.values.to(self.device))
        holdout = self._holdout.mask(rows.shots.cpu(), member.growth.holdout).to(self.device)
        shots, tokens = rows.shots.to(self.device), rows.tokens.to(self.device)
        size = member.growth.batch
        for start in range(0, max_count, size):
            if member.grower.is_done:
                break
            piece = slice(start, start + size)
            member.grower.add_batch(ActivationBatch(z[piece], shots[piece], tokens[piece]), holdout[piece])
        member.state.batches += 1
        if self.ranks.rank == 0:
            grower, passes = member.grower, len(member.state.trials)
            self._on_progress(GrowthProgress(grower.threshold, passes, grower.curve[-1], self.work))


@final
class GrowthMember:
    """One dictionary of a run."""

    def __init__(self, folder: Path, growth: GrowthConfig, origin: DictionaryOrigin, run: GrowthRun) -> None:
        """Resume the growth in `folder`, or begin one."""
        self.folder, self.growth, self._origin, self._run = folder, growth, origin, run
        self._work = folder / "training"
        self._dictionary: ITDA | None = None
        state = files.read_state(self._work, growth, run.data.data)
        if state is None:
            self.normalisation = run.normalisation(growth)
            width = self.normalisation.width
            self._backend = choose_backend(growth.pursuit, growth.size, width, growth.k, run.device.type)
            threshold = growth.threshold or next_threshold([], growth.size)
            backend = self._backend.as_json()
            self.state = GrowthState(growth=growth.as_json(), data=run.data.data, backend=backend, threshold=threshold)
        else:
            self.state = state
            self.normalisation = files.read_normalisation(self._work, state.normalisation, run.device)
            run.normalisations[growth.normalisation, growth.clip] = self.normalisation
            with parsing(self._work / files.STATE, "the backend of a growth", files.ADVICE):
                self._backend = PursuitBackend.from_json(state.backend)
        if not self.state.finished:
            run.check_memory(growth, self.normalisation.width, self._backend)
            self.grower = self._new_grower()
            if self.state.batches:
                self._restore()
        elif not (folder / "config.json").exists():
            raise BrokenFile(f"{self._work} is of a growth that has ended, but {folder} holds no dictionary. {files.ADVICE}")

    def _new_grower(self) -> AtomGrower:
        run = self._run
        return AtomGrower(self.growth, self.state.threshold, self.normalisation.width, run.device, run.ranks, self._backend)

    def _restore(self) -> None:
        grower, state = self.grower, self.state
        for name, sha256 in state.parts.items():
            grower.restore(files.read_part(self._work / name, sha256))
        grower.curve, grower.idle_tokens = state.curve, state.idle_tokens
        if not grower.curve or grower.size != grower.curve[-1].size:
            path = self._work / files.STATE
            raise BrokenFile(f"{path} names files with {grower.size} atoms, which do not fit its curve. {files.ADVICE}")

    @property
    def pass_is_done(self) -> bool:
        """Whether this pass needs no more batches."""
        return self.grower.is_done or self.grower.token_count >= self._run.data.tokens

    def work(self, tokens: int) -> GrowthWork:
        """Return the work that was done and is expected, in passes over `tokens` tokens."""
        state = self.state
        if state.finished:
            return expected_work(self.growth, tokens, state.trials, state.threshold, ())._replace(expected=0.0)
        return expected_work(self.growth, tokens, state.trials, state.threshold, self.grower.curve)

    def save(self) -> None:
        """Save a checkpoint."""
        grower, state = self.grower, self.state
        if self._run.ranks.rank == 0:
            state.normalisation = state.normalisation or files.write_normalisation(self._work, self.normalisation)
            state.curve, state.idle_tokens = grower.curve, grower.idle_tokens
            files.write_state(self._work, state, grower.atoms_from, grower.size)

    def end_pass(self) -> None:
        """Finish the dictionary, or prepare a pass with another threshold."""
        state, grower = self.state, self.grower
        if not grower.token_count:
            raise BadInput("Growth got a stream without batches. Harvest some activations first.")
        if not grower.size:
            raise BadInput(
                f"All {grower.token_count} tokens are the zero vector once they are normalised, or are held out: no atom can be "
                "made of them. Harvest more prompts, or choose another normalisation."
            )
        until = grower.tokens_until_full if grower.is_full else grower.token_count
        share = min(1.0, until / self._run.data.tokens) if grower.is_full else 1.0
        state.trials.append(ThresholdTrial(grower.threshold, grower.size, share, files.growth_exponent(grower.curve, until)))
        state.finished = self.growth.threshold is not None or is_settled(state.trials, self.growth.size)
        if state.finished:
            self._dictionary = self._make_dictionary()
            if self._run.ranks.rank == 0:
                self._dictionary.save(self.folder)
        else:
            state.begin_pass(next_threshold(state.trials, self.growth.size))
            self.grower = self._new_grower()
        self.save()

    def result(self) -> ITDA:
        """Return the dictionary; one that was finished earlier is loaded."""
        if self._dictionary is not None:
            return self._dictionary
        loaded = Dictionary.load(self.folder, self._run.device)
        assert isinstance(loaded, ITDA)
        return loaded

    def _make_dictionary(self) -> ITDA:
        grower, data, size = self.grower, self._run.data, self.grower.size
        shots = grower.shots[:size].clone()
        metadata = {} if data.shot is None else {number: data.shot(number) for number in shots.unique().tolist()}
        record: dict[str, Json] = {
            "config": self.growth.as_json(),
            "data": data.data,
            "threshold": grower.threshold,
            "tokens": grower.token_count,
            "passes": len(self.state.trials),
            "expected_over_threshold": expected_over_threshold(grower.curve),
            "curve": [list(interval) for interval in thin_curve(grower.curve)],
        }
        return ITDA(
            k=self.growth.k,
            origin=replace(self._origin, training={**self._origin.training, **record}),
            normalisation=self.normalisation,
            atoms=grower.atoms.rows.clone(),
            provenance=AtomProvenance(shots=shots, tokens=grower.tokens[:size].clone(), details=metadata),
            pursuit=self.growth.pursuit,
        )
