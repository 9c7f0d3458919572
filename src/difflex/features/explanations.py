"""Explanations in a book: records of what a VLM answered, how it was scored and what it cost, and their SQL."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

__all__ = ["Explanation", "ExplanationScore", "Judgement", "RecordedUsage"]

EXPLANATION_COLUMNS = "feature, backend, protocol, text, descriptions, state, reason"
USAGE_COLUMNS = "explanation, backend, role, calls, tokens_in, tokens_out, cost, seconds"


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

    example: int
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


def explanation_from(row: tuple) -> Explanation:
    """Return the explanation in a row of `id` and `EXPLANATION_COLUMNS`."""
    number, *columns = row
    entries = dict(zip(EXPLANATION_COLUMNS.split(", "), columns, strict=True))
    return Explanation(**{**entries, "id": number, "descriptions": tuple(json.loads(entries["descriptions"]))})


def usage_from(row: tuple) -> RecordedUsage:
    """Return the usage in a row of `USAGE_COLUMNS`."""
    return RecordedUsage(**dict(zip(USAGE_COLUMNS.split(", "), row, strict=True)))


def insert_explanation(
    connection: sqlite3.Connection,
    explanation: Explanation,
    judgements: Sequence[Judgement],
    scores: Sequence[ExplanationScore],
) -> int:
    """Write an explanation in place of an older one of the same feature, backend and protocol; return its number."""
    key = (explanation.feature, explanation.backend, explanation.protocol)
    content = (explanation.text, json.dumps(explanation.descriptions), explanation.state, explanation.reason)
    connection.execute("DELETE FROM explanations WHERE (feature, backend, protocol) = (?, ?, ?)", key)
    insertion = f"INSERT INTO explanations ({EXPLANATION_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)"
    number = connection.execute(insertion, (*key, *content)).lastrowid
    assert number is not None
    insertion = "INSERT INTO judgements (explanation, example, fires, score) VALUES (?, ?, ?, ?)"
    connection.executemany(insertion, [(number, *judgement) for judgement in judgements])
    connection.executemany("INSERT INTO scores VALUES (?, ?, ?, ?, ?, ?)", [(number, *score) for score in scores])
    return number


def insert_usage(connection: sqlite3.Connection, usage: Iterable[RecordedUsage], explanation: int | None = None) -> None:
    """Write records of usage, for `explanation` if given, otherwise for the one each record names."""
    names = USAGE_COLUMNS.split(", ")[1:]
    rows = [(explanation or entry.explanation, *(getattr(entry, name) for name in names)) for entry in usage]
    connection.executemany(f"INSERT INTO usage ({USAGE_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)
