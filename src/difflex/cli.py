"""The command line: one verb per station.

Here is only the table of verbs, so that `difflex --help` imports neither torch nor tyro; the module of a verb is
imported when that verb is asked for.
"""

import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import NamedTuple

from difflex import __version__
from difflex.errors import DifflexError, UnknownName
from difflex.study import Command

__all__ = ["VERBS", "main", "parse", "verb_class"]

USAGE = "usage: difflex VERB [OPTIONS]\n\nA lexicon of what a text-to-image diffusion model knows."


class VerbEntry(NamedTuple):
    """A row of the table of verbs."""

    line: str
    """What it does, in one line of `difflex --help`."""
    home: str
    """`module:class`."""


VERBS = {
    "anatomy": VerbEntry("measure a model: norms, spectra, outliers; with figures", "difflex.commands.anatomy:Anatomy"),
    "collect": VerbEntry("write the book of every dictionary: where each feature fires", "difflex.commands.collect:Collect"),
    "compare": VerbEntry("say and draw how two studies differ", "difflex.commands.compare:Compare"),
    "concepts": VerbEntry("hold features against concepts known by mask", "difflex.commands.concepts:Concepts"),
    "contrast": VerbEntry("find the direction between two sets of prompts", "difflex.commands.contrast:Contrast"),
    "evaluate": VerbEntry("measure dictionaries on held-out activations", "difflex.commands.evaluate:Evaluate"),
    "explain": VerbEntry("say in words what features are, and judge it", "difflex.commands.explain:Explain"),
    "features": VerbEntry("list features, sorted and filtered", "difflex.commands.features:Features"),
    "findings": VerbEntry("try what papers found of steering", "difflex.commands.findings:Findings"),
    "generate": VerbEntry("draw images from prompts, as one labelled grid", "difflex.commands.generate:Generate"),
    "harvest": VerbEntry("store a model's activations in a study", "difflex.commands.harvest:Harvest"),
    "icon": VerbEntry("draw what a feature says on its own", "difflex.commands.icon:Icon"),
    "itda": VerbEntry("grow dictionaries made of data", "difflex.commands.itda:Itda"),
    "models": VerbEntry("list the models inside the package", "difflex.commands.models:Models"),
    "neurons": VerbEntry("put the neurons of a block into a study as a dictionary", "difflex.commands.neurons:Neurons"),
    "removal": VerbEntry("take concepts away by their features, and judge", "difflex.commands.removal:Removal"),
    "report": VerbEntry("write a study as one page with figures", "difflex.commands.report:Report"),
    "run": VerbEntry("run a whole study by a recipe", "difflex.recipes.command:Run"),
    "show": VerbEntry("draw one feature's sheet", "difflex.commands.show:Show"),
    "sites": VerbEntry("list where a model can be read and written", "difflex.commands.sites:Sites"),
    "status": VerbEntry("say how far a study is", "difflex.commands.status:Status"),
    "steer": VerbEntry("draw images while features are changed", "difflex.commands.steer:Steer"),
    "steer-eval": VerbEntry("judge whether edits do what they say", "difflex.commands.steer_eval:SteerEval"),
    "train": VerbEntry("train sparse autoencoders on stored activations", "difflex.commands.train:Train"),
    "verify": VerbEntry("compare stored activations with their checksums", "difflex.commands.verify:Verify"),
}


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


def verb_class(verb: str) -> type[Command]:
    """The dataclass behind `verb`."""
    if verb not in VERBS:
        raise UnknownName.among("The verb", verb, VERBS, "See difflex --help.")
    module, name = VERBS[verb].home.split(":")
    return getattr(import_module(module), name)


def _run(words: list[str]) -> None:
    if not words or words[0] in ("-h", "--help"):
        print(_help())
    elif words[0] == "--version":
        print(f"difflex {__version__}")
    else:
        parse(words)()


def _help() -> str:
    width = max(map(len, VERBS)) + 3
    verbs = "\n".join(f"  {name:<{width}}{verb.line}" for name, verb in VERBS.items())
    return f"{USAGE}\n\n{verbs}\n\ndifflex VERB --help says more about one; difflex --version says which difflex this is."


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Warnings are shown as one line for a person, without the place in the code."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(f"difflex: warning: {message}", file=sys.stderr)
        yield
