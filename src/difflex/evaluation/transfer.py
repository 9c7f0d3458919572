"""Dictionaries at each step of a run, also of another model: explained variance, and the overlap of codes of adjacent steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import ClassVar, NamedTuple, final

import torch

from difflex.dictionaries import Dictionary, fingerprint
from difflex.errors import BadInput
from difflex.evaluation.concepts.results import ConfidenceInterval
from difflex.evaluation.reconstruction import JointMoments
from difflex.json_records import JsonRecord
from difflex.records import Activations, Codes, Shot, Site, is_same_model
from difflex.study import DictionaryRef, Study
from difflex.tables import text_table

__all__ = ["TransferInputs", "TransferResults", "TransferStep", "measure_transfer", "transfer_table", "update_transfer"]

GROUPS = 20
"""Groups of images that intervals are computed from, by leaving each out (jackknife)."""
CHUNK = 256
"""Tokens whose codes are compared at once."""


@dataclass(frozen=True, kw_only=True)
class TransferInputs:
    """What a dictionary is measured on."""

    run: Shot
    """Model and settings, without prompt, seed and timestep."""
    prompts: str
    """Identifies the prompts."""
    images: int
    seeds: tuple[int, int] | None = None
    """The first seed and the one after the last, one for each prompt in turn; None for those of the harvest."""

    @property
    def name(self) -> str:
        """The runs in a line."""
        seeds = "" if self.seeds is None else ", seeds {}:{}".format(*self.seeds)
        return f"{self.run.model}, {self.run.steps} steps{seeds}"


@dataclass(frozen=True, kw_only=True)
class TransferStep:
    """A dictionary at one step of the runs."""

    timestep: float
    tokens: int
    ev: ConfidenceInterval | None
    """1 - var(x - y) / var(x) on each axis, mean over axes, among the tokens of this step. None if x is constant."""
    fvu: float | None
    l0: float
    """Mean number of non-zero codes per token."""
    overlap: ConfidenceInterval | None
    """Cosine of the codes of a token with its codes at the step before, mean over tokens. None for the first step."""
    chance: float | None
    """The same with the codes of another image at the step before. None if images were computed one at a time."""


@dataclass(frozen=True, kw_only=True)
class TransferResults(JsonRecord):
    """A dictionary at the steps of the runs of a model."""

    FORMAT: ClassVar[int] = 1
    COMMAND: ClassVar[str] = "transfer"

    dictionary: str
    """`SITE/LABEL`."""
    fingerprint: str
    trained_on: str | None
    """The model of the dictionary."""
    inputs: TransferInputs
    steps: tuple[TransferStep, ...]
    """From noise to image."""

    @property
    def is_of_own_model(self) -> bool:
        """Whether the runs are of the model that the dictionary was trained on."""
        return self.trained_on is None or is_same_model(self.trained_on, self.inputs.run.model)


class _PreviousStep(NamedTuple):
    """The codes of a batch of images at the step before."""

    images: tuple[tuple[str, int], ...]
    """By prompt and seed."""
    codes: list[Codes]
    """Of each image."""


@dataclass
class _StepSums:
    """Sums over the images of a step."""

    moments: dict[int, JointMoments] = field(default_factory=dict)
    """By group of images."""
    active: int = 0
    images: int = 0
    overlaps: list[float] = field(default_factory=list)
    chances: list[float] = field(default_factory=list)

    def result(self, timestep: float) -> TransferStep:
        parts = list(self.moments.values())
        whole = reduce(JointMoments.merge, parts)
        without = [reduce(JointMoments.merge, parts[:i] + parts[i + 1 :]) for i in range(len(parts))] if len(parts) > 1 else []
        metrics = whole.metrics()
        means = [sum(part) / len(part) for part in (self.overlaps[i::GROUPS] for i in range(GROUPS)) if part]
        rest = [(sum(means) - mean) / (len(means) - 1) for mean in means] if len(means) > 1 else []
        overlaps, chances = self.overlaps, self.chances
        return TransferStep(
            timestep=timestep,
            tokens=whole.tokens,
            ev=None if metrics.ev is None else _interval(metrics.ev, [part.metrics().ev for part in without]),
            fvu=metrics.fvu,
            l0=self.active / whole.tokens,
            overlap=_interval(sum(overlaps) / len(overlaps), rest) if overlaps else None,
            chance=sum(chances) / len(chances) if chances else None,
        )


@final
class _TransferTally:
    """A dictionary at each step, summed over batches of images."""

    def __init__(self, dictionary: Dictionary) -> None:
        self._dictionary = dictionary
        self._steps: dict[float, _StepSums] = {}
        self._previous: _PreviousStep | None = None

    def add(self, activations: Activations) -> None:
        """Add the activations of a batch of images at a step; steps of a batch follow one another."""
        x, timestep = activations.values, activations.shots[0].timestep or 0.0
        if x.shape[-1] != self._dictionary.width:
            raise BadInput(
                f"{self._dictionary.name} is for activations of width {self._dictionary.width}, but those of "
                f"{activations.shots[0].model} are {x.shape[-1]} wide. Name a model whose site has the same width."
            )
        sums = self._steps.setdefault(timestep, _StepSums())
        images = tuple((shot.prompt, shot.seed) for shot in activations.shots)
        dictionary, codes = self._dictionary.on(x.device), []
        for tokens in x.float():
            own = dictionary.encode(tokens)
            moments = JointMoments.of(tokens.to(own.values.device), dictionary.decode(own))
            group = sums.images % GROUPS
            sums.moments[group] = sums.moments[group].merge(moments) if group in sums.moments else moments
            sums.active += int(own.values.count_nonzero())
            sums.images += 1
            codes.append(own)
        if self._previous is not None and self._previous.images == images:
            before = self._previous.codes
            sums.overlaps += [mean_cosine(own, other) for own, other in zip(codes, before, strict=True)]
            if len(codes) > 1:
                sums.chances += [mean_cosine(own, other) for own, other in zip(codes, before[1:] + before[:1], strict=True)]
        self._previous = _PreviousStep(images, codes)

    def results(self) -> tuple[TransferStep, ...]:
        return tuple(self._steps[timestep].result(timestep) for timestep in sorted(self._steps, reverse=True))


def mean_cosine(codes: Codes, others: Codes) -> float:
    """Return the mean over tokens of the cosine of two codes of each; 0 at a token where no feature fires in one of them."""
    total = torch.zeros((), dtype=torch.float64)
    for part in range(0, len(codes.values), CHUNK):
        (x, i), (y, j) = (
            (each.values[part : part + CHUNK].float(), each.indices[part : part + CHUNK]) for each in (codes, others)
        )
        products = ((i[:, :, None] == j[:, None, :]) * y[:, None, :]).sum(2)
        lengths = x.norm(dim=1) * y.norm(dim=1)
        total += ((x * products).sum(1) / lengths.clamp(min=1e-30)).double().sum().cpu()
    return float(total) / len(codes.values)


def _interval(value: float, without: Sequence[float | None]) -> ConfidenceInterval:
    """Return a value with 1.96 standard errors on each side, by the values `without` each of the groups (jackknife)."""
    values = [each for each in without if each is not None]
    if len(values) < 2:
        return ConfidenceInterval(value, value, value)
    mean = sum(values) / len(values)
    error = math.sqrt((len(values) - 1) / len(values) * sum((each - mean) ** 2 for each in values))
    return ConfidenceInterval(value, value - 1.96 * error, value + 1.96 * error)


def measure_transfer(
    activations: Iterable[Activations], dictionaries: Mapping[str, Dictionary]
) -> dict[str, tuple[TransferStep, ...]]:
    """Return for each of `dictionaries`, given by name, its results at each step of `activations`, as `harvest` yields them."""
    tallies = {name: (dictionary.site, _TransferTally(dictionary)) for name, dictionary in dictionaries.items()}
    for batch in activations:
        for site, tally in tallies.values():
            if site == batch.site:
                tally.add(batch)
    return {name: tally.results() for name, (_, tally) in tallies.items()}


def update_transfer(
    study: Study,
    refs: Sequence[DictionaryRef],
    inputs: TransferInputs,
    harvest: Callable[[Sequence[Site]], Iterable[Activations]],
) -> dict[Path, tuple[TransferResults, bool]]:
    """Measure dictionaries of `study` on `inputs` in one pass, and save the results; also return whether each was up to date.

    `harvest` yields activations at sites, all steps of a batch of images after one another.
    """
    paths = {ref: study.transfer(*ref, _file_name(inputs)) for ref in refs}
    checksums = {ref: fingerprint(study.dictionary(*ref)) for ref in refs}
    stored = {ref: TransferResults.load(path) for ref, path in paths.items() if path.is_file()}
    current = {ref: old for ref, old in stored.items() if (old.fingerprint, old.inputs) == (checksums[ref], inputs)}
    missing = {ref: Dictionary.load(study.dictionary(*ref)) for ref in refs if ref not in current}
    sites = list(dict.fromkeys(ref.site for ref in missing))
    steps = measure_transfer(harvest(sites), {str(ref): each for ref, each in missing.items()}) if missing else {}
    results = {path: (current[ref], True) for ref, path in paths.items() if ref in current}
    for ref, dictionary in missing.items():
        if not steps[str(ref)]:
            raise BadInput(f"There are no images to measure {ref} on. Give prompts with --prompts.")
        record = TransferResults(
            dictionary=str(ref),
            fingerprint=checksums[ref],
            trained_on=dictionary.origin.model,
            inputs=inputs,
            steps=steps[str(ref)],
        )
        record.save(paths[ref])
        results[paths[ref]] = record, False
    return results


def _file_name(inputs: TransferInputs) -> str:
    """Return what the file of the results is called: the name of the model, or of its folder, the steps, and the seeds."""
    model = inputs.run.model
    name = Path(model).name if Path(model).is_dir() else model.replace("/", "--")
    seeds = "" if inputs.seeds is None else "-seeds-{}-{}".format(*inputs.seeds)
    return f"{name}-{inputs.run.steps}{seeds}"


def transfer_table(results: Iterable[TransferResults]) -> str:
    """Return a text table with a line for each dictionary and step."""
    rows = [["", "runs", "timestep", "EV", "95 %", "FVU", "L0", "overlap", "95 %", "chance"]]
    for record in results:
        for step in record.steps:
            ev, overlap = map(_cells, (step.ev, step.overlap))
            fvu, chance = ("-" if value is None else f"{value:.3f}" for value in (step.fvu, step.chance))
            place = [record.dictionary, record.inputs.name, f"{step.timestep:.0f}"]
            rows.append([*place, *ev, fvu, f"{step.l0:.1f}", *overlap, chance])
    return text_table(rows, right_align=range(2, len(rows[0])))


def _cells(interval: ConfidenceInterval | None) -> tuple[str, str]:
    return ("-", "-") if interval is None else (f"{interval.value:.3f}", f"{interval.low:.3f} to {interval.high:.3f}")
