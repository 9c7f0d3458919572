"""Votes of people on explanations: a small JSON file for each feature that has any."""

from __future__ import annotations

import hashlib
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

from difflex.errors import BadInput
from difflex.files import folder_lock, parsing, read_json, write_json

__all__ = ["ExplanationVote", "read_votes", "text_fingerprint", "vote"]

FORMAT, ADVICE = 1, "Delete it: it holds only the votes on this feature."
MOST_VOTES = 1000
"""On one feature."""
_writing = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class ExplanationVote:
    """Whether a person agrees with an explanation."""

    voter: str
    """Random letters for a person's browser, which has one vote on an explanation."""
    feature: int
    backend: str
    protocol: str
    text: str
    """Fingerprint of the text that was voted on: a vote is not passed on to another text."""
    agrees: bool
    time: str
    """Date and time in UTC (ISO 8601)."""


def text_fingerprint(text: str) -> str:
    """Return the fingerprint of the text of an explanation."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_votes(path: Path) -> list[ExplanationVote]:
    """Return the votes in the file at `path`; none if there is no file."""
    if not path.is_file():
        return []
    entries = read_json(path, FORMAT, ADVICE)
    with parsing(path, "votes on explanations", ADVICE):
        votes = [ExplanationVote(**entry) for entry in entries["votes"]]
        if not all(isinstance(entry.agrees, bool) and isinstance(entry.text, str) for entry in votes):
            raise TypeError("a vote that neither agrees nor disagrees")
        return votes


def vote(path: Path, new: ExplanationVote) -> None:
    """Write a vote to the file at `path`; it replaces that of the same voter on the same text."""
    with _writing, folder_lock(path.parent):
        votes = [old for old in read_votes(path) if _key(old) != _key(new)]
        if len(votes) >= MOST_VOTES:
            raise BadInput(f"There are {MOST_VOTES:,} votes on feature {new.feature} already; no more are stored.")
        write_json(path, FORMAT, {"votes": [asdict(entry) for entry in (*votes, new)]})


def _key(entry: ExplanationVote) -> tuple[str, str, str, str]:
    return entry.voter, entry.backend, entry.protocol, entry.text
