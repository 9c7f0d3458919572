"""The state of a growing dictionary: its growth curve, the search for its threshold, its hold-out, and the files to resume from.

`state.json` is replaced atomically, and the files that it names never change. Files of atoms that it does not name were left by
a kill and are written again. Rows of the Gram matrix are saved, because computed again they could differ in their last bits.
"""

from __future__ import annotations

import hashlib
import math
import re
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple, final

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from difflex.dictionaries import Normalisation
from difflex.dictionaries.itda import GrowthConfig
from difflex.errors import BrokenFile, StaleWork
from difflex.files import Json, disk_errors, parsing, read_json, stored_checksum, write_json
from difflex.records import Shot
from difflex.tensors import read_tensors, write_tensors

FORMAT = 4
PART = re.compile(r"atoms-\d+-(\d+)\.safetensors")
"""The name of a file with atoms: the number of the pass, and of the atoms up to its end."""
STATE, NORMALISATION = "state.json", "normalisation.safetensors"
ADVICE = "Move the folder away to grow from the start."

FIRST_THRESHOLD = 0.3
FILLED_LATE, AIM = 0.8, 0.9
"""The search for a threshold ends when the dictionary becomes full after at least this share of the stream; and the share that is
aimed at, so that it does become full."""
NEARLY_FULL = 0.98
"""It also ends when the whole stream fills the dictionary to at least this share."""
MAX_TRIALS = 12
SIZE_EXPONENT = 0.6
"""Sizes grow about as this power of the number of tokens at most: where a pass is too short to measure it."""
SLACK = 0.93
"""How near to good enough a pass is expected to be that a forecast takes for the last one: it knows sizes by a few percent."""
ENOUGH_HOLDOUT = 1000
"""Held-out tokens after which the estimate for a full dictionary is precise enough."""
ATOMS = 1500
"""Atoms at which the time of a token is twice that without any."""
THRESHOLD_EXPONENT = 2.1
"""Sizes fall about as this power of the threshold: used until two thresholds were tried."""


class GrowthInterval(NamedTuple):
    """An interval of growth."""

    tokens: int
    """Tokens so far, including the interval."""
    over_threshold: int
    """Tokens of the interval that were over the threshold."""
    size: int
    """Atoms at its end."""
    holdout_tokens: int = 0
    """Tokens of the interval that are held out."""
    holdout_over: int = 0
    """Those of them that were over the threshold."""


class ThresholdTrial(NamedTuple):
    """One pass over the stream."""

    threshold: float
    size: int
    """Atoms at its end."""
    share: float
    """The share of the stream after which the dictionary was full, or 1."""
    exponent: float = SIZE_EXPONENT
    """The power of the number of tokens with which its size grew in the second half of that share."""

    @property
    def whole_size(self) -> float:
        """The approximate size after the whole stream."""
        return self.size / self.share**self.exponent


class GrowthWork(NamedTuple):
    """What growing takes, in tokens of a dictionary without atoms."""

    done: float
    expected: float
    """The remaining work."""

    def plus(self, other: GrowthWork) -> GrowthWork:
        return GrowthWork(self.done + other.done, self.expected + other.expected)


@dataclass(kw_only=True)
class GrowthState:
    """`state.json`: how far a growth is."""

    growth: dict[str, Json]
    data: str
    """A name for the data; growth does not resume with other data."""
    normalisation: dict[str, Json] = field(default_factory=dict)
    """Its settings, and the checksum of its file."""
    backend: dict[str, Json]
    """The pursuit backend: another one might pick other atoms. It is noted here alone, as it depends on the device."""
    trials: list[ThresholdTrial] = field(default_factory=list)
    """Finished passes of the search for the threshold."""
    threshold: float
    batches: int = 0
    """Batches of this pass so far."""
    idle_tokens: int = 0
    curve: list[GrowthInterval] = field(default_factory=list)
    parts: dict[str, str] = field(default_factory=dict)
    """The files with the atoms so far, in order, and their checksums."""
    finished: bool = False

    def check(self) -> None:
        """Raise a ValueError or TypeError unless the entries can be those of a growth."""
        numbers = [self.threshold, self.batches, self.idle_tokens, *(x for row in (*self.trials, *self.curve) for x in row)]
        if not all(isinstance(number, int | float) and 0 <= number < 2**63 for number in numbers):
            raise ValueError("a number is negative, too large or none at all")
        if not all(map(isinstance, (self.growth, self.backend, self.parts), (dict, dict, dict))) or type(self.batches) is not int:
            raise TypeError("an entry is of the wrong type")
        if wrong := [name for name in self.parts if not PART.fullmatch(name)]:
            raise ValueError(f"{wrong[0]!r} is no file of atoms")

    def begin_pass(self, threshold: float) -> None:
        """Reset what belongs to one pass."""
        self.threshold, self.batches, self.idle_tokens, self.curve, self.parts = threshold, 0, 0, [], {}


def read_state(folder: Path, growth: GrowthConfig, data: str) -> GrowthState | None:
    """Return the state in `folder`, or None; raise an error if it is of another growth."""
    path = folder / STATE
    if not path.exists():
        return None
    entries = read_json(path, FORMAT, ADVICE)
    with parsing(path, "the state of a growth", ADVICE):
        trials = [ThresholdTrial(*row) for row in entries["trials"]]
        curve = [GrowthInterval(*row) for row in entries["curve"]]
        state = GrowthState(**{**entries, "trials": trials, "curve": curve})
        state.check()
    check_growth(path, state.growth, state.data, growth.as_json(), data)
    return state


def check_growth(path: Path, saved: object, saved_data: object, requested: Mapping[str, Json], data: str) -> None:
    """Raise an error that names the differences between the growth saved at `path` and the one requested."""
    config = saved if isinstance(saved, Mapping) else {}
    differences = {name: (config.get(name), requested[name]) for name in requested if config.get(name) != requested[name]}
    if saved_data != data:
        differences["data"] = (saved_data, data)
    if differences:
        text = ", ".join(f"{name} {before!r} instead of {now!r}" for name, (before, now) in differences.items())
        raise StaleWork(f"{path} belongs to another growth: {text}. Use the same settings to resume, or: {ADVICE}", path.parent)


def write_state(folder: Path, state: GrowthState, atoms_from: Callable[[int], dict[str, Tensor]], size: int) -> None:
    """Write the atoms that are not in `state.parts` yet, then `state.json`; remove the atoms of passes that have ended."""
    last = PART.fullmatch([*state.parts][-1]) if state.parts else None
    start = int(last[1]) if last else 0
    if size > start and not state.finished:
        name = f"atoms-{len(state.trials)}-{size}.safetensors"
        state.parts[name] = stored_checksum(write_tensors(folder / name, FORMAT, atoms_from(start)), ADVICE)
    if state.finished:
        state.parts = {}
    write_json(folder / STATE, FORMAT, asdict(state))
    with disk_errors(folder):
        for path in folder.glob("atoms-*.safetensors"):
            if path.name not in state.parts:
                path.unlink()


def write_normalisation(folder: Path, normalisation: Normalisation) -> dict[str, Json]:
    """Write the tensors of `normalisation` to `folder`; return what `read_normalisation` needs besides."""
    path = write_tensors(folder / NORMALISATION, FORMAT, normalisation.tensors())
    return {**normalisation.settings(), "sha256": stored_checksum(path, ADVICE)}


def read_normalisation(folder: Path, settings: Mapping[str, Json], device: torch.device) -> Normalisation:
    """Read a normalisation from `folder`."""
    return Normalisation.from_saved(settings, read_part(folder / NORMALISATION, settings.get("sha256"))).to(device)


def read_part(path: Path, sha256: object) -> dict[str, Tensor]:
    """Return the tensors of the file with this checksum."""
    if stored_checksum(path, ADVICE) != sha256:
        raise BrokenFile(f"{path}, a part of an unfinished growth, is not the one that {STATE} names. {ADVICE}")
    return read_tensors(path, FORMAT, ADVICE).tensors


def thin_curve(curve: Sequence[GrowthInterval], max_intervals: int = 256) -> list[GrowthInterval]:
    """Return the curve in at most `max_intervals` intervals of about equally many tokens."""
    if len(curve) <= max_intervals:
        return list(curve)
    step = curve[-1].tokens / max_intervals
    thinned: list[GrowthInterval] = []
    over = holdout_tokens = holdout_over = 0
    for place, interval in enumerate(curve):
        over, holdout_tokens = over + interval.over_threshold, holdout_tokens + interval.holdout_tokens
        holdout_over += interval.holdout_over
        if place + 1 == len(curve) or interval.tokens >= step * (len(thinned) + 1):
            thinned.append(GrowthInterval(interval.tokens, over, interval.size, holdout_tokens, holdout_over))
            over = holdout_tokens = holdout_over = 0
    return thinned


def expected_over_threshold(curve: Sequence[GrowthInterval]) -> float | None:
    """Estimate which share of the tokens of new images is over the threshold at the end of `curve`; None without a hold-out.

    Only held-out shots count: other tokens mostly belong to images that already have atoms in the dictionary. The share falls as
    a power of the dictionary's size, which is fitted to the second half of its growth.
    """
    sizes = [0, *(interval.size for interval in curve)]
    final_size = sizes[-1]
    points = [
        (math.log(max(size, 1) / max(final_size, 1)), interval.holdout_tokens, interval.holdout_over)
        for size, interval in zip(sizes, curve, strict=False)
        if interval.holdout_tokens and 2 * size >= final_size
    ]
    return _fit_share(points) if points else None


def _fit_share(points: Sequence[tuple[float, int, int]]) -> float:
    """Fit the share `exp(a + b x)`, b <= 0, by maximum Poisson likelihood with Newton's method; return its value at x = 0.

    A point holds x, which is the logarithm of a size over the final size, a number of tokens, and how many of them are hits.
    """
    count, hits = sum(tokens for _, tokens, _ in points), sum(over for _, _, over in points)
    if not hits:
        return 0.0
    constant = a = math.log(hits / count)
    b = 0.0
    for _ in range(30):
        means = [(x, tokens * math.exp(a + b * x)) for x, tokens, _ in points]
        m, mx, mxx = (sum(mean * x**power for x, mean in means) for power in range(3))
        error = hits - m
        error_x = sum((over - mean) * x for (_, mean), (x, _, over) in zip(means, points, strict=True))
        determinant = m * mxx - mx * mx
        if determinant <= 1e-9 * m * m:
            break
        a, b = a + (mxx * error - mx * error_x) / determinant, b + (m * error_x - mx * error) / determinant
    return min(1.0, math.exp(a if b < 0 else constant))


def is_settled(trials: Sequence[ThresholdTrial], size: int, slack: float = 1.0) -> bool:
    """Return whether the last trial is good enough, or no better one can be expected; a lower `slack` takes more for good."""
    if not trials:
        return False
    last = trials[-1]
    filled = last.size >= size and last.share >= slack * FILLED_LATE
    nearly_filled = last.size >= slack * NEARLY_FULL * size and last.share == 1
    return filled or nearly_filled or len(trials) == MAX_TRIALS or last.threshold < 1e-3


def next_threshold(trials: Sequence[ThresholdTrial], size: int) -> float:
    """Return the next threshold to try, between the closest ones that gave too many and too few atoms."""
    if not trials:
        return FIRST_THRESHOLD
    many = max((trial.threshold for trial in trials if trial.whole_size >= size), default=None)
    few = min((trial.threshold for trial in trials if trial.whole_size < size), default=None)
    near, exponent = _size_law(trials, size)
    guess = near.threshold * (near.whole_size * AIM**near.exponent / size) ** (1 / exponent)
    # The law may be wrong: the more thresholds were tried, the further goes the next, or the nearer to the middle.
    step = 1.01 if len(trials) < 3 else min(10.0, 1.1 ** (2 ** min(len(trials) - 3, 5)))
    if few is None:
        assert many is not None
        return min(max(guess, step * many), many + 0.5 * (1 - many))
    if many is None:
        return max(min(guess, few / step), few / 10)
    margin = min(0.5, 0.01 * 2 ** (len(trials) - 2)) * (few - many)
    return min(max(guess, many + margin), few - margin)


def _size_law(trials: Sequence[ThresholdTrial], size: int) -> tuple[ThresholdTrial, float]:
    """Return the trial that came closest to `size`, and the power of the threshold with which sizes fall around it."""
    near = sorted(trials, key=lambda trial: abs(math.log(max(1.0, trial.whole_size) / size)))
    # The size of a pass that was cut short early is a guess.
    whole = [trial for trial in near if trial.share >= 0.5 and trial.threshold != near[0].threshold and trial.size]
    if not whole or near[0].share < 0.5:
        return near[0], THRESHOLD_EXPONENT
    exponent = math.log(whole[0].whole_size / max(1.0, near[0].whole_size)) / math.log(near[0].threshold / whole[0].threshold)
    return near[0], min(max(exponent, 0.5), 10.0)


def growth_exponent(curve: Sequence[GrowthInterval], tokens: int) -> float:
    """Return the power of the number of tokens with which the size grew between half of `tokens` and `tokens`."""
    end, half = (min(bisect_left(curve, t, key=lambda interval: interval.tokens), len(curve) - 1) for t in (tokens, tokens / 2))
    if half == end or not curve[half].size:
        return SIZE_EXPONENT
    power = math.log(curve[end].size / curve[half].size) / math.log(curve[end].tokens / curve[half].tokens)
    return min(max(power, 0.05), SIZE_EXPONENT)


def expected_work(
    growth: GrowthConfig, tokens: int, trials: Sequence[ThresholdTrial], threshold: float, curve: Sequence[GrowthInterval]
) -> GrowthWork:
    """Return the work that was done and is expected of a growth in passes over `tokens` tokens, of which the last has `curve`.

    Passes to come are predicted by the rules of the search for a threshold, and the sizes that were found.
    """
    after_full = round(ENOUGH_HOLDOUT / growth.holdout) if growth.holdout else 0
    work = lambda trial: _pass_work(trial, tokens, growth.size, after_full)  # noqa: E731
    done, left, trials = sum(map(work, trials)), 0.0, [*trials]
    if curve:
        now, size = curve[-1].tokens, max(1, curve[-1].size)
        full_at = curve[bisect_left(curve, growth.size, key=lambda interval: interval.size)].tokens if size >= growth.size else 0
        exponent = growth_exponent(curve, full_at or now)
        whole = size * (tokens / (full_at or now)) ** exponent
        if trials and not full_at:  # early in a pass, other passes tell more
            whole = whole ** (weight := (now / tokens) ** 2) * _expected_size(trials, threshold, growth.size) ** (1 - weight)
        trial = _expected_trial(threshold, whole, growth.size, exponent)
        this_pass = now * (1 + size / (1 + exponent) / ATOMS)
        if full_at:
            this_pass = work(trial) - max(0, min(tokens, full_at + after_full) - now) * (1 + size / ATOMS)
        done, left, trials = done + this_pass, max(0.0, work(trial) - this_pass), [*trials, trial]
    elif growth.threshold is not None:
        left = work(ThresholdTrial(growth.threshold, growth.size, 1.0))
    while growth.threshold is None and not is_settled(trials, growth.size, SLACK):
        threshold = next_threshold(trials, growth.size)
        exponent = trials[-1].exponent if trials else SIZE_EXPONENT
        trials.append(_expected_trial(threshold, _expected_size(trials, threshold, growth.size), growth.size, exponent))
        left += work(trials[-1])
    return GrowthWork(done, left)


def _pass_work(trial: ThresholdTrial, tokens: int, size: int, after_full: int) -> float:
    """Return the work of a pass that grows to the size of `trial`, and reads `after_full` tokens more if that is full."""
    until = tokens * trial.share
    after = min(after_full, tokens - until) if trial.size >= size else 0
    return until * (1 + trial.size / (1 + trial.exponent) / ATOMS) + after * (1 + trial.size / ATOMS)


def _expected_trial(threshold: float, whole: float, size: int, exponent: float) -> ThresholdTrial:
    """Return the pass of a growth whose size would be `whole` after all tokens."""
    if whole < size:
        return ThresholdTrial(threshold, max(1, round(whole)), 1.0, exponent)
    return ThresholdTrial(threshold, size, (size / whole) ** (1 / exponent), exponent)


def _expected_size(trials: Sequence[ThresholdTrial], threshold: float, size: int) -> float:
    """Return the size after all tokens at a threshold."""
    if not trials:
        return size
    near, exponent = _size_law(trials, size)
    return near.whole_size * (near.threshold / threshold) ** exponent


@final
class HoldOut:
    """A random choice of shots whose tokens never become atoms. All shots of a prompt or image are chosen together."""

    def __init__(self, shot: Callable[[int], Shot] | None) -> None:
        """Without `shot`, which returns the shot of a number, the choice is by number."""
        self._shot = shot
        self._draws: dict[int, float] = {}

    def mask(self, shots: Int[Tensor, " token"], share: float) -> Bool[Tensor, " token"]:
        """Return which tokens, given the numbers of their shots, belong to the `share` of prompts that is held out."""
        numbers, places = shots.unique(return_inverse=True)
        return torch.tensor([self._draw(number) < share for number in numbers.tolist()], dtype=torch.bool)[places]

    def _draw(self, number: int) -> float:
        if number not in self._draws:
            shot = None if self._shot is None else self._shot(number)
            content = str(number) if shot is None else shot.image or shot.prompt
            # Another hash than that of the train split, within which the hold-out is chosen.
            digest = hashlib.sha256(f"kept out of growth: {content}".encode()).digest()
            self._draws[number] = int.from_bytes(digest[:8], "big") / 2**64
        return self._draws[number]
