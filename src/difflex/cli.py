"""The command line: finds the command of a verb, runs it and reports errors.

The module of a verb is imported when it is needed, so that `difflex --help` imports neither torch nor tyro.
"""

import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from io import TextIOWrapper
from itertools import groupby, pairwise

from difflex._version import __version__
from difflex.commands import VERBS, verb_class
from difflex.errors import BadInput, DifflexError
from difflex.study import Command

__all__ = ["main", "parse"]

SPINS = "1000"
"""What OpenMP takes itself where threads outnumber cores; see benchmarks/busy.py."""
USAGE = (
    "usage: difflex VERB [OPTIONS]\n\nSparse dictionaries for text-to-image diffusion models: train, evaluate, explain, steer."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code: 0 success, 2 an error the user can fix (without a traceback), 130 interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that a terminal cannot show stops no command
    _share_cores()
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
        # The reader closed the pipe, as in `difflex models | head -1`; what Python flushes at its end goes to /dev/null.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        # Files that others write or read for us, such as a model's; our own are explained where they are written.
        place = f"{error.filename}: " if error.filename else ""
        print(f"difflex: {place}{error.strerror or error}. Check that the file or folder can be used.", file=sys.stderr)
        return 2


def parse(words: Sequence[str]) -> Command:
    """Return the command for `words`, a verb and its flags; a wrong flag ends the process with code 2, as tyro does."""
    for word in words:
        if re.search("[\0\ud800-\udfff]", word):
            raise BadInput(f"The word {word!r} cannot be read: it is not UTF-8 text. Write it in UTF-8.")
    verb, *flags = words
    command = verb_class(verb)
    _check_flags(command, flags)
    import tyro  # here, so that `difflex --help` does without it

    return tyro.cli(command, prog=f"difflex {verb}", args=flags)


def _share_cores() -> None:
    """Let the threads of torch sleep soon when they wait for each other, unless the environment says how they wait.

    By default they spin for milliseconds: beside another busy process that takes the time of the very thread they wait for.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPINS  # read when torch is loaded


def _check_flags(command: type[Command], words: Sequence[str]) -> None:
    """Raise an error for what tyro lets pass: a flag given twice, without the value it needs, or with one it cannot take."""
    kinds = {field.name.replace("_", "-"): field.type for field in fields(command)}  # pyright: ignore[reportArgumentType]
    words = words[: words.index("--")] if "--" in words else words
    flags = [number for number, word in enumerate(words) if word.startswith("--")]
    given: dict[str, str] = {}
    for number, end in pairwise([*flags, len(words)]):
        flag, equals, value = words[number].partition("=")
        name = flag[2:].replace("_", "-")
        name = "seeds" if name == "seed" and "seeds" in kinds else name
        values, takes_none = [value] * bool(equals) + list(words[number + 1 : end]), "bool" in str(kinds.get(name))
        if equals and takes_none:
            raise BadInput(f"{flag} takes no value, but was given '{value}'. Write {flag} for yes, and leave it out for no.")
        if name in kinds and not values and not takes_none:
            raise BadInput(f"{flag} is given without a value. Write one, or leave {flag} out for its default.")
        value = " ".join(values) or "(no value)"
        if name in given:
            raise BadInput(f"--{name} is given twice: {given[name]} and {value}. Give it once, with all its values.")
        given[name] = value


def _run(words: list[str]) -> None:
    if len(words) > 1 and words[0] == "help":
        parse([*words[1:], "--help"])
    elif not words or words[0] in ("-h", "--help", "help"):
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
    """Show warnings as one line, without their place in the code."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(f"difflex: warning: {message}", file=sys.stderr)
        yield
