"""The commands: frozen dataclasses whose fields are flags; calling one runs it.

Here is only the table of verbs. Command modules import light modules at their top and what needs torch when a command runs, so
that `difflex VERB --help` is quick.
"""

from importlib import import_module
from typing import NamedTuple

from difflex.errors import UnknownName
from difflex.study import Command

__all__ = ["VERBS", "VerbEntry", "verb_class"]


class VerbEntry(NamedTuple):
    """A row of the table of verbs."""

    group: str
    """The step of the workflow that `difflex --help` lists it under."""
    help: str
    """What it does, in one line of `difflex --help`."""
    module: str
    """Where its class is: `steer-eval` is `SteerEvalCommand`."""


VERBS = {
    "models": VerbEntry("Explore a model", "list the models inside the package", "difflex.commands.models"),
    "generate": VerbEntry("Explore a model", "generate images from prompts, as one labelled grid", "difflex.commands.models"),
    "sites": VerbEntry("Explore a model", "list where a model can be read and edited", "difflex.commands.models"),
    "anatomy": VerbEntry(
        "Explore a model", "measure activation norms, spectra and outlier coordinates", "difflex.commands.evaluation"
    ),
    "block-roles": VerbEntry("Explore a model", "measure what each block does in images", "difflex.commands.measures"),
    "harvest": VerbEntry("Train dictionaries", "store a model's activations in a study", "difflex.commands.harvest"),
    "train": VerbEntry(
        "Train dictionaries", "train sparse autoencoders (SAEs) on stored activations", "difflex.commands.training"
    ),
    "itda": VerbEntry("Train dictionaries", "grow ITDA dictionaries, whose atoms are activations", "difflex.commands.training"),
    "neurons": VerbEntry(
        "Train dictionaries", "add the MLP neurons of a block as a baseline dictionary", "difflex.commands.training"
    ),
    "import": VerbEntry("Train dictionaries", "import a dictionary that another tool wrote", "difflex.commands.interchange"),
    "export": VerbEntry("Train dictionaries", "write a dictionary for another tool", "difflex.commands.interchange"),
    "evaluate": VerbEntry("Evaluate them", "measure reconstruction on held-out activations", "difflex.commands.evaluation"),
    "transfer": VerbEntry(
        "Evaluate them", "measure dictionaries at each step, also of another model", "difflex.commands.evaluation"
    ),
    "concepts": VerbEntry("Evaluate them", "match features with concepts known by mask", "difflex.commands.evaluation"),
    "measure": VerbEntry("Evaluate them", "measure features by their images, against random ones", "difflex.commands.measures"),
    "collect": VerbEntry(
        "Look at features", "find where each feature fires, into one book per dictionary", "difflex.commands.features"
    ),
    "features": VerbEntry("Look at features", "list features, sorted and filtered", "difflex.commands.features"),
    "search": VerbEntry("Look at features", "search features by words, such as red", "difflex.commands.features"),
    "show": VerbEntry("Look at features", "draw the sheet of one feature", "difflex.commands.features"),
    "serve": VerbEntry("Look at features", "open a study in the browser", "difflex.commands.serve"),
    "export-html": VerbEntry(
        "Look at features", "write what the browser shows as files for any web host", "difflex.commands.export"
    ),
    "explain": VerbEntry(
        "Look at features", "explain features with a VLM, and score the explanations", "difflex.commands.explain"
    ),
    "steer": VerbEntry("Steer", "generate images while features are edited", "difflex.commands.steer"),
    "erase": VerbEntry("Steer", "erase a concept from images, before and after", "difflex.commands.erase"),
    "icon": VerbEntry("Steer", "draw what a feature generates on its own", "difflex.commands.steer"),
    "contrast": VerbEntry("Steer", "find the direction between two sets of prompts", "difflex.commands.vectors"),
    "steer-eval": VerbEntry("Steer", "measure what edits change, against baselines", "difflex.commands.effects"),
    "removal": VerbEntry("Steer", "remove concepts by their features, and judge the images", "difflex.commands.effects"),
    "edit-bench": VerbEntry("Steer", "compare representations by the edits they make", "difflex.commands.effects"),
    "findings": VerbEntry("Steer", "test published findings about steering", "difflex.commands.effects"),
    "cae": VerbEntry("Steer", "steer a language model by contrasts, and test five findings", "difflex.commands.cae"),
    "run": VerbEntry("Run studies", "run a whole study from a recipe", "difflex.recipes"),
    "status": VerbEntry("Run studies", "show how far a study is", "difflex.commands.study"),
    "verify": VerbEntry("Run studies", "compare all files of a study with their checksums", "difflex.commands.verify"),
    "report": VerbEntry("Run studies", "write a study as one HTML page", "difflex.commands.study"),
    "compare": VerbEntry("Run studies", "compare two studies, or two dictionaries of one", "difflex.commands.study"),
    "pack": VerbEntry("Run studies", "put a study without its activations into one file", "difflex.commands.pack"),
    "export-activations": VerbEntry("Share", "write stored activations for other tools", "difflex.commands.activations"),
    "import-activations": VerbEntry("Share", "store activations of other tools", "difflex.commands.activations"),
    "export-contrast": VerbEntry("Share", "write a contrast as a control vector: GGUF", "difflex.commands.vectors"),
    "import-contrast": VerbEntry("Share", "read a control vector as a contrast", "difflex.commands.vectors"),
    "push": VerbEntry("Share", "push dictionaries to a repository of the hub", "difflex.commands.hub"),
    "pull": VerbEntry("Share", "copy dictionaries of the hub into a study", "difflex.commands.hub"),
}


def verb_class(verb: str) -> type[Command]:
    """Return the dataclass of `verb`."""
    if verb not in VERBS:
        raise UnknownName.among("The verb", verb, VERBS, "See difflex --help.")
    name = "".join(map(str.capitalize, verb.split("-"))) + "Command"
    return getattr(import_module(VERBS[verb].module), name)
