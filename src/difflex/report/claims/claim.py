"""A claim with its rule, its verdict and the numbers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["Claim", "Verdict", "decided", "listed"]

Verdict = Literal["holds here", "does not hold here", "not measured"]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What is claimed, what would make it false, and what was found."""

    name: str
    statement: str
    rule: str
    """When it holds."""
    verdict: Verdict
    evidence: tuple[str, ...]
    """The numbers, or which verb is missing."""


def decided(found: object, holds: bool) -> Verdict:
    """What is to be said of a claim: nothing where nothing was found that could speak for it or against it."""
    return "not measured" if not found else "holds here" if holds else "does not hold here"


def listed(told: Sequence[str], verb: str, summary: Sequence[str] = ()) -> tuple[str, ...]:
    """The numbers after a summary of them; where there are none, the verb that is missing."""
    if not told:
        return (f"Missing: {verb}.",)
    return (*summary, *told)
