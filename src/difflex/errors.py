"""The errors a user can meet.

DifflexError
├── UnknownName        a model, site, feature, column ... that is not there; lists what is
├── BadInput           a value that cannot be used: a size, a file, a strength
├── BrokenFile         a file of ours, or of a model, that is damaged, truncated or of a foreign format
├── OutOfMemory        a model or batch that cannot fit; names what would
├── OutOfSpace         a disk, or a limit set to it, that is too small for what is asked
├── OutOfBudget        money set aside for calls that does not reach
├── StaleWork          work on disk that was made from something else than what is asked now
├── NonFinite          NaN or infinity where numbers are needed; says where it arose
└── MissingExtra       an optional package that is not installed; says how to get it
"""

import difflib
from collections.abc import Iterable
from pathlib import Path


class DifflexError(Exception):
    """What was asked, what was found, what to do: shown by the command line without a traceback."""


class UnknownName(DifflexError, LookupError):
    """A name that is not among the known ones."""

    @classmethod
    def among(cls, what: str, name: str, known: Iterable[str], advice: str = "") -> "UnknownName":
        """The error for `name`, with its nearest neighbours among `known` and an advice what to do."""
        names = list(known)
        near = difflib.get_close_matches(name, names, n=5, cutoff=0.5)
        listed = ", ".join(near or names[:12]) + ("" if near or len(names) <= 12 else ", ...")
        hint = f"nearest: {listed}" if near else f"known: {listed}" if names else "none are known"
        return cls(f"{what} '{name}' is unknown; {hint}." + (f" {advice}" if advice else ""))


class BadInput(DifflexError, ValueError):
    """A value that cannot be used."""


class BrokenFile(DifflexError):
    """A damaged, truncated or foreign file."""


class OutOfMemory(DifflexError):
    """A model or a batch that cannot fit in the memory at hand."""


class OutOfSpace(DifflexError):
    """A disk, or a limit set to it, that is too small."""


class OutOfBudget(DifflexError):
    """A budget for calls that does not reach."""


class StaleWork(DifflexError):
    """Work on disk made from other input than what is asked now."""

    def __init__(self, message: str, place: Path | None = None) -> None:
        """`place` is what stands in the way: without it the work begins anew."""
        super().__init__(message)
        self.place = place


class NonFinite(DifflexError):
    """NaN or infinity where numbers are needed."""


class MissingExtra(DifflexError, ImportError):
    """An optional package is not installed."""

    @classmethod
    def of(cls, package: str, extra: str, purpose: str) -> "MissingExtra":
        """The error that says which extra brings `package`."""
        return cls(f"{purpose} needs the package {package}: pip install 'difflex[{extra}]'.")
