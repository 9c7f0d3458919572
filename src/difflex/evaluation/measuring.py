"""`evaluate`: how well a dictionary rebuilds held-out tokens and how sparsely, in one pass over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import reduce
from typing import NamedTuple, final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from difflex.dictionaries import Dictionary, Normalisation, NormalisedDictionary
from difflex.dictionaries.sparse import sparse_matmul
from difflex.errors import BadInput, NonFinite
from difflex.evaluation.moments import JointMoments, both, figures, joint
from difflex.evaluation.record import Evaluation, ReconstructionQuality
from difflex.records import ActivationBatch, Codes, Shot
from difflex.store import require_split

__all__ = ["TOKENS", "evaluate"]

TOKENS = 1_000_000
"""Fewer leave features that are merely rare for dead."""


def evaluate(
    dictionary: Dictionary,
    batches: Iterator[ActivationBatch],
    shot: Callable[[int], Shot],
    *,
    tokens: int = TOKENS,
    checksum: str = "",
    data: str = "",
    device: torch.device | str | None = None,
    progress: bool = False,
) -> Evaluation:
    """What `dictionary` is worth on the first `tokens` of `batches`, or on all where there are fewer; without its `Effect`.

    `batches` are of the split `held-out`, `shot` says which shot a number in them stands for. `checksum` is that of the files
    that the dictionary was loaded from, taken before, and `data` says in words what it is evaluated on: both for the record. The
    work is done on a card, where there is one and no other `device` is named.
    """
    if tokens < 1:
        raise BadInput(f"{tokens} tokens evaluate nothing: ask for 1 or more.")
    tally = _EvaluationTally(dictionary.to(device or ("cuda" if torch.cuda.is_available() else "cpu")), shot)
    with tqdm(total=tokens, unit=" tokens", unit_scale=True, disable=None if progress else True, desc=dictionary.name) as bar:
        for rows in _first(require_split(batches, "held-out"), tokens):
            tally.take(rows)
            bar.update(len(rows.values))
    if not tally.parts:
        raise BadInput(f"{dictionary.name} was given no tokens to be evaluated on. Harvest more prompts: a tenth is held out.")
    return tally.evaluation(checksum, data)


def _first(batches: Iterator[ActivationBatch], tokens: int) -> Iterator[ActivationBatch]:
    """`batches` up to `tokens` rows; what comes after is not asked for."""
    left = tokens
    while left > 0 and (rows := next(batches, None)) is not None:
        yield ActivationBatch(*(part[:left] for part in rows))
        left -= len(rows.values)


class _TokenMetrics(NamedTuple):
    """What is known of some tokens."""

    active: int
    """Codes other than 0."""
    negative: int
    spaces: tuple[JointMoments, ...]
    """Model space, then the normalised space if there is one."""

    def quality(self) -> ReconstructionQuality:
        model, *normalised = map(figures, self.spaces)
        tokens = self.spaces[0].tokens
        return ReconstructionQuality(
            tokens=tokens,
            l0=self.active / tokens,
            negative=self.negative / max(self.active, 1),
            model_space=model,
            normalised_space=normalised[0] if normalised else None,
        )


def _together(one: _TokenMetrics, other: _TokenMetrics) -> _TokenMetrics:
    spaces = tuple(map(both, one.spaces, other.spaces))
    return _TokenMetrics(one.active + other.active, one.negative + other.negative, spaces)


class _TimestepOrder(NamedTuple):
    """An order of the rows of a batch in which those of one timestep stand together."""

    rows: Int[Tensor, " token"]
    timesteps: list[float]
    counts: list[int]
    """Of the rows of each timestep."""


@final
class _EvaluationTally:
    """Takes in batches; keeps sums alone, a few numbers for each axis, timestep and feature."""

    def __init__(self, dictionary: Dictionary, shot: Callable[[int], Shot]) -> None:
        self.parts: dict[float, _TokenMetrics] = {}
        """By timestep."""
        self._dictionary = dictionary
        self._shot = shot
        self._timesteps: dict[int, float] = {}
        """Of the shots met so far, by number."""
        self._fired = torch.zeros(dictionary.size, dtype=torch.int64, device=dictionary.constant.device)

    def take(self, rows: ActivationBatch) -> None:
        order = self._by_timestep(rows.shots)
        x = rows.values[order.rows].to(self._fired.device, torch.float32)
        codes = self._dictionary.encode(x)
        self._fired += torch.bincount(codes.indices[codes.values > 0], minlength=self._dictionary.size)
        spaces, first = _spaces(self._dictionary, x, codes), 0
        for timestep, count in zip(order.timesteps, order.counts, strict=True):
            here = slice(first, first := first + count)
            values = codes.values[here]
            joints = tuple(joint(one[here], other[here]) for one, other in spaces)
            part = _TokenMetrics(int(values.count_nonzero()), int((values < 0).sum()), joints)
            self.parts[timestep] = _together(self.parts[timestep], part) if timestep in self.parts else part

    def _by_timestep(self, shots: Int[Tensor, " token"]) -> _TimestepOrder:
        numbers, places = shots.unique(return_inverse=True)
        for number in numbers.tolist():
            if number not in self._timesteps:
                self._timesteps[number] = self._shot(number).timestep or 0.0
        of_shots = [self._timesteps[number] for number in numbers.tolist()]
        timesteps = sorted(set(of_shots), reverse=True)
        of_rows = torch.tensor([timesteps.index(timestep) for timestep in of_shots])[places]
        return _TimestepOrder(of_rows.argsort(stable=True), timesteps, of_rows.bincount().tolist())

    def evaluation(self, checksum: str, data: str) -> Evaluation:
        whole = reduce(_together, self.parts.values())
        if not all(bool(torch.isfinite(space.ee).all()) for space in whole.spaces):
            raise NonFinite(f"What {self._dictionary.name} rebuilds holds NaN or infinity: train or copy it again.")
        overall = whole.quality()
        fired = self._fired[self._fired > 0].cpu()
        edges = torch.tensor(Evaluation.edges, dtype=torch.float64)
        bins = torch.bucketize((fired / overall.tokens).double().log10(), edges[1:-1], right=True)
        return Evaluation(
            dictionary=self._dictionary.name,
            checksum=checksum,
            data=data,
            size=self._dictionary.size,
            overall=overall,
            timesteps={timestep: self.parts[timestep].quality() for timestep in sorted(self.parts, reverse=True)},
            dead=self._dictionary.size - len(fired),
            density=tuple(torch.bincount(bins, minlength=len(edges) - 1).tolist()),
        )


def _spaces(
    dictionary: Dictionary, x: Float[Tensor, "token width"], codes: Codes
) -> list[tuple[Float[Tensor, "token width"], Float[Tensor, "token width"]]]:
    """Activations beside what the dictionary makes of them: in model space, and in a normalised space where it has one."""
    if not isinstance(dictionary, NormalisedDictionary) or _is_plain(dictionary.normalisation):
        return [(x, dictionary.decode(codes))]
    # What `decode` does, in two steps: the sums over features are made once.
    z = sparse_matmul(codes, dictionary.atoms) + dictionary.bias
    return [(x, dictionary.normalisation.restore(z)), (dictionary.normalisation.apply(x), z)]


def _is_plain(normalisation: Normalisation) -> bool:
    return normalisation.method == "none" and normalisation.clip is None
