"""The errors that a user can cause.

DifflexError
├── UnknownName        a model, site, feature, column ... that does not exist; lists those that do
├── BadInput           a value that cannot be used: a size, a file, a strength
├── BrokenFile         a file of difflex or of a model that is damaged, truncated or of another format
├── OutOfMemory        a model or batch that does not fit; names what would
├── OutOfSpace         a disk, or a limit for it, that is too small
├── DiskError          a file or folder that cannot be read or written: permissions, a read-only or failing disk
├── OutOfBudget        a budget for VLM calls that is too small
├── StaleWork          files that were made from other input or settings than the present ones
├── NonFinite          NaN or infinity; says where it arose
└── MissingExtra       an optional package that is not installed; says how to get it
"""

import difflib
from collections.abc import Iterable
from pathlib import Path


class DifflexError(Exception):
    """An error that says what was asked, what was found and what to do; the command line shows it without a traceback."""


class UnknownName(DifflexError, LookupError):
    """A name that does not exist."""

    @classmethod
    def among(cls, kind: str, name: str, choices: Iterable[str], advice: str = "") -> "UnknownName":
        """Make the error for `name`, with its nearest neighbours among `choices` and advice what to do."""
        names = list(choices)
        near = difflib.get_close_matches(name, names, n=5)
        listed = ", ".join(near or names[:12]) + ("" if near or len(names) <= 12 else ", ...")
        hint = f"nearest: {listed}" if near else f"known: {listed}" if names else "none are known"
        return cls(f"{kind} '{name}' is unknown; {hint}." + (f" {advice}" if advice else ""))


class BadInput(DifflexError, ValueError):
    """A value that cannot be used."""


class BrokenFile(DifflexError):
    """A file that is damaged, truncated or of another format."""


class OutOfMemory(DifflexError):
    """A model or batch that does not fit into memory."""


class OutOfSpace(DifflexError):
    """A disk, or a limit for it, that is too small."""


class DiskError(DifflexError):
    """A file or folder that cannot be read or written."""


class OutOfBudget(DifflexError):
    """A budget for VLM calls that is too small."""


class StaleWork(DifflexError):
    """Files that were made from other input or settings than the present ones."""

    def __init__(self, message: str, path: Path | None = None) -> None:
        """`path` is the stale file or folder; once it is deleted, the work can start again."""
        super().__init__(message)
        self.path = path


class NonFinite(DifflexError):
    """NaN or infinity."""


class MissingExtra(DifflexError, ImportError):
    """An optional package that is not installed."""

    @classmethod
    def of(cls, package: str, extra: str, purpose: str) -> "MissingExtra":
        """Make the error that names the extra with `package`."""
        return cls(f"{purpose} needs the package {package}: pip install 'difflex[{extra}]'.")
