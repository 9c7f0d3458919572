"""The command line: one verb per station.

Here is only the table of verbs, so that `difflex --help` imports neither torch nor tyro; the module of a verb is
imported when that verb is asked for.
"""

import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby

from difflex._version import __version__
from difflex.commands import VERBS, verb_class
from difflex.errors import DifflexError
from difflex.study import Command

__all__ = ["main", "parse"]

USAGE = "usage: difflex VERB [OPTIONS]\n\nA lexicon of what a text-to-image diffusion model knows."


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0 done, 2 something the user can mend (said without a traceback), 130 interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with _plain_warnings():
            _run(words)
        sys.stdout.flush()
        return 0
    except DifflexError as error:
        print(f"difflex: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ndifflex: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader has seen enough, as in `difflex models | head -1`; what Python still wants to flush at its end goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def parse(words: Sequence[str]) -> Command:
    """The command written as `words`, a verb and its flags; a wrong flag ends the process with code 2, as tyro does."""
    verb, *flags = words
    command = verb_class(verb)
    import tyro  # here, so that `difflex --help` does without it

    return tyro.cli(command, prog=f"difflex {verb}", args=flags)


def _run(words: list[str]) -> None:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
    elif words[0] == "--version":
        print(f"difflex {__version__}")
    else:
        parse(words)()


def _help() -> str:
    width = max(map(len, VERBS)) + 3
    groups = [
        "\n".join([f"{group}:", *(f"  {verb:<{width}}{entry.help}" for verb, entry in entries)])
        for group, entries in groupby(VERBS.items(), key=lambda item: item[1].group)
    ]
    return "\n\n".join(
        [USAGE, *groups, "difflex VERB --help explains a verb and its flags; difflex --version prints the version."]
    )


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Warnings are shown as one line for a person, without the place in the code."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(f"difflex: warning: {message}", file=sys.stderr)
        yield
