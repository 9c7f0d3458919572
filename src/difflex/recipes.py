"""Recipes: functions from a folder, and options, to a `Study` with its commands.

Write one in a file of your own and run it: `difflex run my_recipe.py:study`. To vary a recipe, call it and replace what differs.
A flag of `difflex run` is passed to the argument of its name, if the function has one.
"""

import inspect
import os
import runpy
import shlex
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, final

from tyro.conf import FlagCreatePairsOff, Positional, arg

from difflex.choices import PrecisionChoice
from difflex.commands.checks import check_values
from difflex.commands.effects import FindingsCommand, RemovalCommand, SteerEvalCommand
from difflex.commands.evaluation import AnatomyCommand, ConceptsCommand, EvaluateCommand
from difflex.commands.explain import ExplainCommand
from difflex.commands.features import CollectCommand
from difflex.commands.flags import TOKENS, Bytes, Pixels
from difflex.commands.harvest import HarvestCommand
from difflex.commands.study import ReportCommand, command_words
from difflex.commands.training import ItdaCommand, NeuronsCommand, TrainCommand
from difflex.errors import BadInput, DifflexError, UnknownName
from difflex.study import Command, CommandRecord, Study, recipe_record, run_study

__all__ = ["RECIPES", "Recipe", "RunCommand", "flux_dev", "flux_schnell", "mini", "mini_full", "recipe", "sdxl_turbo"]

Recipe = Callable[..., Study]
"""A function of the folder of the study and, by keyword and as far as it takes them, of `OPTIONS`."""
OPTIONS = ("model", "precision", "prompts", "pixels", "tokens")
"""The flags of `difflex run` that are arguments of recipes."""
ImageSize = tuple[int, int] | None
CAPTIONS = "opendiffusionai/cc12m-cleaned:caption_llava_short"
"""The prompts of arXiv 2505.24360."""
AESTHETIC = "guangyil/laion-coco-aesthetic:caption"
"""The prompts of arXiv 2410.22366."""
LATE = 0.5
"""The noise level of the last of mini-flux's four steps, at which most concepts are detected."""
EFFECT = 16
"""Shots at which the effect of dictionaries on mini-flux is measured."""


def mini(
    folder: Path,
    *,
    model: str = "mini-flux",
    precision: PrecisionChoice | None = None,
    prompts: str = "captions",
    pixels: ImageSize = None,
    tokens: int = 200_000,
) -> Study:
    """Return the demo: one site of mini-flux, or of another model of the drawn world, in minutes."""
    site = "double.2"
    loading: dict[str, Any] = {"model": model, "precision": precision, "prompts": prompts, "pixels": pixels, "out": folder}
    return Study(
        folder=folder,
        model=model,
        commands=(
            AnatomyCommand(**loading, max_prompts=16),
            HarvestCommand(**loading, site=(site,), tokens=tokens, steps=4),
            TrainCommand(study=folder, site=(site,), k=(16, 32), size=(2048,), tokens=3 * tokens),
            ItdaCommand(study=folder, site=(site,), k=16, size=(2048,), tokens=max(1, tokens // 2)),
            EvaluateCommand(study=folder, effect_shots=8),
            ConceptsCommand(studies=(folder,), images=600, noise=(LATE,)),
            CollectCommand(study=folder, drawn_world=True, images=400, noise=(LATE,), patches=0),
            ExplainCommand(studies=(folder,), random_features=50),
            ExplainCommand(studies=(folder,), random_features=50, protocol="paper"),
            SteerEvalCommand(study=folder, dictionary=(f"{site}/topk-2048-k32",), trials=8, strength=(1.0, 2.0)),
            ReportCommand(study=folder),
        ),
    )


def mini_full(
    folder: Path,
    *,
    model: str = "mini-flux",
    precision: PrecisionChoice | None = None,
    prompts: str = "captions",
    pixels: ImageSize = None,
    tokens: int = 1_000_000,
) -> Study:
    """Return the study of mini-flux in full: k and size at one site, all sites at one k and size, and whatever can be measured.

    `folder/untrained` is the study of the same model with a denoiser that was never trained: the control that arXiv 2505.24360
    leaves to the future.
    """
    middle, sites = "double.2", ("double.0", "double.1", "double.2", "single.0", "single.1", "single.3")
    sizes, ks = (512, 2048, 4096), (8, 16, 32)
    elsewhere = tuple(site for site in sites if site != middle)
    loading: dict[str, Any] = {"model": model, "precision": precision, "prompts": prompts, "pixels": pixels, "out": folder}
    harvest = HarvestCommand(**loading, site=sites, tokens=tokens, steps=4)
    train = TrainCommand(study=folder, site=(middle,), k=(16,), size=(2048,), tokens=2 * tokens)
    itda = ItdaCommand(study=folder, site=(middle,), k=16, size=(2048,), tokens=max(1, tokens // 10))
    compared = (f"{middle}/topk-2048-k32", f"{middle}/itda-2048-k32-first{itda.tokens}", f"{middle}:neurons/neurons-768-k32")
    together = ",".join(f"{site}/topk-2048-k16" for site in ("double.2", "single.0", "single.1"))
    explain = ExplainCommand(studies=(folder, folder / "untrained"), dictionary=compared, random_features=2048)
    return Study(
        folder=folder,
        model=model,
        commands=(
            AnatomyCommand(**loading),
            harvest,
            replace(train, k=ks, size=sizes),
            replace(train, site=elsewhere),
            *(replace(train, normalisation=normalisation) for normalisation in ("none", "whiten")),
            replace(itda, size=sizes),
            *(replace(itda, k=k) for k in ks if k != itda.k),
            replace(itda, site=elsewhere),
            *_neurons(harvest, middle, ks, tokens=max(1, tokens // 5)),
            EvaluateCommand(study=folder, effect_shots=EFFECT),
            *_control(folder / "untrained", harvest, replace(train, k=(32,))),
            ConceptsCommand(studies=(folder, folder / "untrained"), site=(middle,), noise=(LATE, 0.9)),
            ConceptsCommand(studies=(folder,), site=elsewhere, noise=(LATE,)),
            CollectCommand(study=folder, dictionary=compared, drawn_world=True, images=2000, noise=(LATE,)),
            CollectCommand(study=folder / "untrained", dictionary=compared[:1], drawn_world=True, images=2000, noise=(LATE,)),
            replace(explain, protocol="heldout"),
            replace(explain, protocol="paper"),
            SteerEvalCommand(study=folder, dictionary=compared[:2], trials=12),
            SteerEvalCommand(study=folder, dictionary=("single.0/topk-2048-k16",), groups=("background",), trials=12),
            RemovalCommand(study=folder, dictionary=(together,)),
            FindingsCommand(study=folder, site=middle),
            ReportCommand(study=folder),
        ),
    )


def _neurons(harvest: HarvestCommand, site: str, ks: tuple[int, ...], tokens: int) -> tuple[Command, ...]:
    """Return the commands that harvest the neurons of a block, few tokens, and add them as dictionaries."""
    inner = (f"{site}:neurons",)
    return replace(harvest, site=inner, tokens=tokens), NeuronsCommand(study=harvest.out, site=inner, k=ks)


def _control(folder: Path, harvest: HarvestCommand, train: TrainCommand) -> tuple[Command, ...]:
    """Return the commands that repeat `train` on a denoiser with random weights."""
    return (
        replace(harvest, site=train.site, untrained=0, out=folder),
        replace(train, study=folder),
        EvaluateCommand(study=folder, effect_shots=EFFECT),
    )


def flux_schnell(
    folder: Path,
    *,
    model: str = "black-forest-labs/FLUX.1-schnell",
    precision: PrecisionChoice | None = None,
    prompts: str = CAPTIONS,
    pixels: ImageSize = (256, 256),
    tokens: int = 30_720_000,
) -> Study:
    """Return arXiv 2505.24360 on FLUX.1 schnell: SAEs at four sites, a sweep over k and size at the middle one, ITDA, neurons.

    The activations of 30.7 M tokens take about 390 GB in int8.
    """
    loading: dict[str, Any] = {"model": model, "precision": precision, "prompts": prompts, "pixels": pixels, "out": folder}
    return _flux(folder, {**loading, "steps": 1, "guidance": 0.0}, tokens)


def flux_dev(
    folder: Path,
    *,
    model: str = "black-forest-labs/FLUX.1-dev",
    precision: PrecisionChoice | None = None,
    prompts: str = CAPTIONS,
    pixels: ImageSize = (256, 256),
    tokens: int = 30_720_000,
) -> Study:
    """Return the same study of FLUX.1 dev, at all of its 28 steps and with its default guidance."""
    loading: dict[str, Any] = {"model": model, "precision": precision, "prompts": prompts, "pixels": pixels, "out": folder}
    return _flux(folder, {**loading, "steps": 28, "guidance": 3.5}, tokens)


def _flux(folder: Path, loading: Mapping[str, Any], tokens: int) -> Study:
    """Return a study of FLUX.1; `loading` are the flags that its commands which load it by name share."""
    middle, sites = "double.18", ("double.9", "double.18", "single.9", "single.18")
    elsewhere = tuple(site for site in sites if site != middle)
    harvest = HarvestCommand(**loading, site=sites, tokens=tokens, dtype="int8")
    return Study(
        folder=folder,
        model=loading["model"],
        commands=(
            AnatomyCommand(**loading),
            harvest,
            TrainCommand(study=folder, site=(middle,), preset="paper", k=(32, 48, 64), size=(16_384, 32_768, 65_536)),
            TrainCommand(study=folder, site=elsewhere, preset="paper", k=(64,), size=(65_536,)),
            ItdaCommand(study=folder, site=sites, preset="paper"),
            *_neurons(harvest, middle, (64,), tokens=min(1_000_000, tokens)),
            EvaluateCommand(study=folder),
            CollectCommand(study=folder, site=(middle,), images=8000),
            ReportCommand(study=folder),
        ),
    )


def sdxl_turbo(
    folder: Path,
    *,
    model: str = "stabilityai/sdxl-turbo",
    precision: PrecisionChoice | None = None,
    prompts: str = AESTHETIC,
    pixels: ImageSize = (512, 512),
    tokens: int = 38_400_000,
) -> Study:
    """Return arXiv 2410.22366 on SDXL Turbo: the updates of four blocks at one step, k 10, size 5,120.

    A tenth of its 384 M vectors for each block, which take about 200 GB in int8.
    """
    sites = ("down.2.1:update", "mid.0:update", "up.0.0:update", "up.0.1:update")
    loading: dict[str, Any] = {"model": model, "precision": precision, "prompts": prompts, "pixels": pixels, "out": folder}
    loading |= {"steps": 1, "guidance": 0.0}
    return Study(
        folder=folder,
        model=model,
        commands=(
            AnatomyCommand(**loading),
            HarvestCommand(**loading, site=sites, tokens=tokens, dtype="int8"),
            TrainCommand(study=folder, site=sites, preset="unbox", k=(10,), size=(5120,)),
            EvaluateCommand(study=folder),
            CollectCommand(study=folder, images=8000),
            ReportCommand(study=folder),
        ),
    )


RECIPES: Mapping[str, Recipe] = {
    function.__name__: function for function in (mini, mini_full, flux_schnell, flux_dev, sdxl_turbo)
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
    with _mistakes(file):
        names = runpy.run_path(file)
    if not callable(names.get(function)):
        functions = [name for name, value in names.items() if callable(value) and not name.startswith("_")]
        raise UnknownName.among(f"In {file} the function", function, functions)
    return names[function]


@contextmanager
def _mistakes(name: str) -> Iterator[None]:
    """Turn whatever the code of a recipe raises into an error that names its file and line."""
    try:
        yield
    except DifflexError:
        raise
    except (Exception, SystemExit) as error:
        file = name.rpartition(":")[0] or name
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        place = f"{file}, line {line}" if line else f"The recipe {name}"
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
        raise BadInput(f"{place}, failed with {reason.strip(': ')}. Mend it there, then give the same command again.") from error


def _checked(name: str, study: object) -> Study:
    """Return what the recipe `name` returned, if it is a study of commands that the command line would accept."""
    if not isinstance(study, Study):
        raise BadInput(f"The recipe {name} returned {study!r:.100}; return a difflex.Study.")
    if not isinstance(study.folder, Path) or not isinstance(study.model, str) or not isinstance(study.commands, (tuple, list)):
        raise BadInput(
            f"The recipe {name} returned {study!r:.200}; its folder is a Path, its model a name, its commands a tuple."
        )
    for command in study.commands:
        if not isinstance(command, Command) or not is_dataclass(command):
            raise BadInput(f"The recipe {name} names {command!r:.200} as a command; name instances, as TrainCommand(...).")
        check_values(command)
    return study


RECIPES_OWN = "(default: the recipe's own)"


@final
@dataclass(frozen=True, kw_only=True)
class RunCommand(Command):
    """Run the commands of a recipe in order. Run again, it continues, and repeats only what a change of the recipe affects."""

    recipe: Annotated[Positional[str], arg(metavar="RECIPE")]
    """mini, mini_full, flux_schnell, flux_dev, sdxl_turbo; or FILE.py:FUNCTION, a function from a folder to a Study."""
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
    out: Annotated[Path | None, arg(metavar="STUDY", help_behavior_hint="(default: a folder of the recipe's name)")] = None
    """The folder of the study; created if it does not exist."""
    until: Annotated[str | None, arg(metavar="VERB", help_behavior_hint="(default: to the end)")] = None
    """Stop after the last command with this verb: harvest, train, ..."""
    dry_run: FlagCreatePairsOff[bool] = False
    """Print the commands with their state, disk, memory and time, and run nothing."""
    gpu: Annotated[Bytes, arg(help_behavior_hint="(default: this machine's)")] = None
    """With --dry-run, plan for a GPU with so much free memory, as in 24GB."""

    def __call__(self) -> None:
        if self.gpu is not None and not self.dry_run:
            raise BadInput("--gpu is for plans: add --dry-run, or leave it out to run on the GPU that is here.")
        folder = self.out or Path(self.recipe.rpartition(":")[2])
        options = {**self._earlier(folder), **self._given()}
        function = recipe(self.recipe)
        with _mistakes(self.recipe):
            _check_options(self.recipe, function, options)
            study = function(folder, **options)
        study = _checked(self.recipe, study)
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
        from difflex.pipeline import embedded

        options = {name: value for name in OPTIONS if (value := getattr(self, name)) is not None}
        for name in {"model", "prompts"} & options.keys():
            if options[name] not in embedded() and os.path.exists(options[name]):
                options[name] = os.path.abspath(options[name])
        return options

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


def _check_options(name: str, function: Recipe, options: Mapping[str, object]) -> None:
    """Raise an error for an option that a recipe does not take."""
    parameters = inspect.signature(function).parameters if options else {}
    if any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    for option in options:
        if option not in parameters:
            known = ", ".join(f"--{known}" for known in OPTIONS if known in parameters) or "no options"
            raise BadInput(
                f"The recipe {name} takes {known}, but --{option} was given. Add an argument `{option}` to its function."
            )
