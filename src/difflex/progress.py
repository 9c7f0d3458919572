"""`ProgressBar`: a bar in a terminal, and in a log a line every 30 seconds."""

from __future__ import annotations

import sys
from io import StringIO
from typing import Any, TextIO, final

from tqdm import tqdm

__all__ = ["ProgressBar"]

EVERY = 30.0
"""Seconds between two lines in a log."""
LINE = "{desc}: {n_fmt} of {total_fmt}{unit} in {elapsed}, {remaining} to go, {rate_fmt}{postfix}"
ENDLESS_LINE = "{desc}: {n_fmt}{unit} in {elapsed}, {rate_fmt}"
"""Where it is not known how much there is to do."""


class _Lines(StringIO):
    """Writes what tqdm draws over and over as lines of a log."""

    def __init__(self, log: TextIO) -> None:
        super().__init__()
        self._log = log

    def write(self, text: str) -> int:
        if line := text.strip():
            self._log.write(f"{line}\n")
            self._log.flush()
        return len(text)


@final
class ProgressBar(tqdm):
    """The bar of tqdm. Where the standard error is no terminal it writes a line every 30 seconds, and none for shorter work."""

    def __init__(self, *arguments: Any, show: bool = True, **options: Any) -> None:
        """Begin the bar; `show` says whether it is to be seen."""
        if not sys.stderr.isatty():
            options |= {"file": _Lines(sys.stderr), "mininterval": EVERY, "maxinterval": EVERY, "delay": EVERY, "leave": False}
            options |= {"bar_format": ENDLESS_LINE if options.get("total") is None else LINE, "ncols": None}
        super().__init__(*arguments, disable=not show, **options)

    def set_postfix_str(self, s: str = "", refresh: bool = False) -> None:
        """Say something at the end of the bar, from the next time on that it is drawn."""
        super().set_postfix_str(s, refresh)
