"""Find a recipe by its name, and run it: `difflex run`."""

import os
import runpy
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, final

from tyro.conf import FlagCreatePairsOff, Positional, arg

from difflex.commands.checks import check_options, check_values, checked_study, mistakes
from difflex.commands.flags import TOKENS, GPUMemory, Pixels, PrecisionChoice, located
from difflex.commands.study import command_words
from difflex.errors import BadInput, UnknownName
from difflex.recipes.drawn import mini, mini_full
from difflex.recipes.papers import flux_dev, flux_schnell, mini_sdxl, sdxl_turbo
from difflex.study import Command, CommandRecord, Study, recipe_record, run_study

Recipe = Callable[..., Study]
"""A function of the folder of the study and, by keyword and as far as it takes them, of `OPTIONS`."""
OPTIONS = ("model", "precision", "prompts", "pixels", "tokens", "vlm")
"""The flags of `difflex run` that are arguments of recipes."""
RECIPES: Mapping[str, Recipe] = {
    function.__name__: function for function in (mini, mini_full, mini_sdxl, flux_schnell, flux_dev, sdxl_turbo)
}


def recipe(name: str) -> Recipe:
    """Return the recipe `name`: one of the package, or FILE.py:FUNCTION."""
    file, _, function = name.rpartition(":")
    if not file:
        if name not in RECIPES:
            raise UnknownName.among("The recipe", name, RECIPES, "Or name a function in a file of yours: my_recipe.py:study.")
        return RECIPES[name]
    if not os.path.isfile(file):
        raise BadInput(f"There is no file {file}. Name a recipe as FILE.py:FUNCTION, or one of: {', '.join(RECIPES)}.")
    with mistakes(file):
        names = runpy.run_path(file)
    if not callable(names.get(function)):
        functions = [name for name, value in names.items() if callable(value) and not name.startswith("_")]
        raise UnknownName.among(f"In {file} the function", function, functions)
    return names[function]


RECIPES_OWN = "(default: the recipe's own)"


@final
@dataclass(frozen=True, kw_only=True)
class RunCommand(Command):
    """Run the commands of a recipe in order. Run again, it continues, and repeats only what a change of the recipe affects."""

    recipe: Annotated[Positional[str], arg(metavar="RECIPE")]
    """mini, mini_full, mini_sdxl, flux_schnell, flux_dev, sdxl_turbo; or FILE.py:FUNCTION, from a folder to a Study."""
    model: Annotated[str | None, arg(metavar="MODEL", help_behavior_hint=RECIPES_OWN)] = None
    """An embedded model, a folder, or a name on the hub."""
    precision: Annotated[PrecisionChoice | None, arg(help_behavior_hint=RECIPES_OWN)] = None
    """How the model's weights are held; auto is what fits into memory."""
    prompts: Annotated[str | None, arg(metavar="FILE", help_behavior_hint=RECIPES_OWN)] = None
    """A file or folder, a data set on the hub (OWNER/NAME:COLUMN), or `captions`."""
    pixels: Annotated[Pixels, arg(help_behavior_hint=RECIPES_OWN)] = None
    """Image size; one number for a square."""
    tokens: Annotated[int | None, TOKENS, arg(help_behavior_hint=RECIPES_OWN)] = None
    """Tokens to harvest at each site; smaller harvests of the recipe shrink with it."""
    vlm: Annotated[str | None, arg(metavar="NAME", help_behavior_hint=RECIPES_OWN)] = None
    """What explains features: the folder or hub name of a VLM for transformers, or `known`."""
    out: Annotated[Path | None, arg(metavar="STUDY", help_behavior_hint="(default: a folder of the recipe's name)")] = None
    """The folder of the study; created if it does not exist."""
    until: Annotated[str | None, arg(metavar="VERB", help_behavior_hint="(default: to the end)")] = None
    """Stop after the last command with this verb: harvest, train, ..."""
    dry_run: FlagCreatePairsOff[bool] = False
    """Print the commands with their state, disk, memory and time, and run nothing."""
    gpu: Annotated[GPUMemory, arg(help_behavior_hint="(default: this machine's)")] = None
    """With --dry-run, plan for a GPU with so much free memory, as in 24GB."""

    def __call__(self) -> None:
        if self.gpu is not None and not self.dry_run:
            raise BadInput("--gpu is for plans: add --dry-run, or leave it out to run on the GPU that is here.")
        if "://" in (self.vlm or ""):
            raise BadInput(
                "--vlm names a model that runs here: a folder or a name on the hub. For an endpoint leave it out, and at the end "
                "run difflex explain STUDY --vlm ADDRESS --model NAME."
            )
        folder = self.out or Path(self.recipe.rpartition(":")[2])
        options = {**self._earlier(folder), **self._given()}
        function = recipe(self.recipe)
        with mistakes(self.recipe):
            check_options(self.recipe, function, options, OPTIONS)
            study = function(folder, **options)
        study = checked_study(self.recipe, study)
        if self.dry_run:
            from difflex.commands.estimates import estimate
            from difflex.commands.forecast import plan, plan_table, this_machine

            machine = this_machine(self.gpu)
            print(plan_table(plan(study, machine, estimate, self.until), machine))
            return
        run_study(study, until=self.until, recipe=self.recipe, options=options)
        print(f"{study.folder.resolve()}: every command {'' if self.until is None else f'up to {self.until} '}is done")

    def _given(self) -> dict[str, Any]:
        """Return the options that were given; a file or folder by its absolute path, so that it is found from anywhere."""
        options = {name: value for name in OPTIONS if (value := getattr(self, name)) is not None}
        return options | {name: located(options[name]) for name in {"model", "prompts"} & options.keys()}

    def _earlier(self, folder: Path) -> dict[str, Any]:
        """Return the options that the recipe had when it ran in `folder` and that are not given now; print them."""
        record = recipe_record(folder)
        if record is None or record.flags.get("recipe") != self.recipe:
            return {}
        options = {name: value for name, value in record.flags.items() if name in OPTIONS and getattr(self, name) is None}
        options = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
        if options:
            check_values(replace(self, **options))
            words = command_words(CommandRecord(verb="run", flags={name: record.flags[name] for name in options}))
            print(f"As when this recipe last ran here: {shlex.join(words[1:])}")
        return options
