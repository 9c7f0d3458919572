"""Finished concepts of a command that was interrupted: a file for each, which the next run reads in place of judging again."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Generic, TypeVar, final

from difflex.errors import BrokenFile
from difflex.files import write_file
from difflex.json_records import JsonRecord

Part = TypeVar("Part", bound=JsonRecord)
"""The results of one concept."""


@final
class FinishedConcepts(Generic[Part]):
    """The results of concepts on the way to one file of results, in a folder next to it that lasts until that is written.

    They are of `inputs` alone: with another config, dictionary or judge, others are made.
    """

    def __init__(self, results: Path, kind: type[Part], *inputs: object) -> None:
        self._root, self._kind = results.with_suffix(".unfinished"), kind
        self._folder = self._root / _digest(*inputs)

    def file(self, name: str) -> Path:
        """Return a file that belongs to a concept."""
        return self._folder / name

    def get_or(self, concept: str, make: Callable[[], tuple[Part, Mapping[str, bytes]]]) -> Part:
        """Return the results of a concept; make and write them, after the files that belong to them, if it is not finished."""
        path = self._folder / f"{_digest(concept)}.json"
        with suppress(BrokenFile):  # a damaged one is made again
            if path.is_file():
                return self._kind.load(path)
        part, files = make()
        for name, content in files.items():
            write_file(self._folder / name, content)
        part.save(path)
        return part

    def delete(self) -> None:
        """Delete the results of all concepts: call this once the file of results is written."""
        shutil.rmtree(self._root, ignore_errors=True)


def _digest(*inputs: object) -> str:
    return hashlib.sha256(repr(inputs).encode()).hexdigest()[:16]
