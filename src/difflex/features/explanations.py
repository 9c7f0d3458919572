"""Records of explanations in a book: the answer of a VLM, judgements, scores and cost; importing them does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

__all__ = ["Explanation", "ExplanationScore", "Judgement", "RecordedUsage"]


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """A description of a feature in words."""

    id: int = -1
    """Number in the book; -1 before it is written."""
    feature: int
    backend: str
    """Name of the VLM that explained."""
    protocol: str
    text: str
    """What the images of the feature have in common."""
    descriptions: tuple[str, ...] = ()
    """What each of the images shows."""
    state: Literal["done", "failed"] = "done"
    reason: str = ""
    """Reason of a failure."""


class Judgement(NamedTuple):
    """How well an example fits an explanation."""

    example: int | None
    """Its number in the book; None if the images were collected again, and it is no longer among them."""
    fires: bool
    """Whether the feature fires in the example."""
    score: float
    """Between 0 and 1."""


class ExplanationScore(NamedTuple):
    """How well an explanation separates the feature's examples from others."""

    measure: str
    """accuracy, auroc, intruder ..."""
    value: float
    low: float | None
    high: float | None
    judgements: int
    """Number of judgements behind the value."""


@dataclass(frozen=True, kw_only=True)
class RecordedUsage:
    """Calls, tokens, money and time spent on an explanation or a judgement."""

    backend: str
    role: Literal["explainer", "judge"]
    calls: int = 1
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float | None = None
    """In dollars; None if unknown."""
    seconds: float = 0.0
    explanation: int | None = None
