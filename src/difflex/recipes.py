"""Recipes: functions from a folder, and options, to a `Study` with its commands.

Write one in a file of your own and run it: `difflex run my_recipe.py:study`. To vary a recipe, call it and replace what differs.
A flag of `difflex run` is passed to the argument of its name, if the function has one.
"""

import os
import runpy
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple, final

from tyro.conf import FlagCreatePairsOff, Positional, arg

from difflex.commands.checks import check_options, check_values, checked_study, mistakes
from difflex.commands.effects import FindingsCommand, RemovalCommand, SteerEvalCommand
from difflex.commands.evaluation import AnatomyCommand, ConceptsCommand, EvaluateCommand
from difflex.commands.explain import ExplainCommand
from difflex.commands.features import CollectCommand
from difflex.commands.flags import TOKENS, GPUMemory, Pixels, PrecisionChoice, located
from difflex.commands.harvest import HarvestCommand
from difflex.commands.study import ReportCommand, command_words
from difflex.commands.training import ItdaCommand, NeuronsCommand, TrainCommand
from difflex.errors import BadInput, UnknownName
from difflex.study import Command, CommandRecord, Study, recipe_record, run_study

__all__ = ["RECIPES", "Recipe", "RunCommand", "flux_dev", "flux_schnell", "mini", "mini_full", "recipe", "sdxl_turbo"]

Recipe = Callable[..., Study]
"""A function of the folder of the study and, by keyword and as far as it takes them, of `OPTIONS`."""
OPTIONS = ("model", "precision", "prompts", "pixels", "tokens", "vlm")
"""The flags of `difflex run` that are arguments of recipes."""
ImageSize = tuple[int, int] | None
CC12M = "opendiffusionai/cc12m-cleaned:caption_llava_short"
"""The prompts of arXiv 2505.24360."""
AESTHETIC = "guangyil/laion-coco-aesthetic:caption"
"""The prompts of arXiv 2410.22366."""
DRAWN = "captions"
"""The captions of the drawn world."""
KNOWN = "known"
"""The name of what answers from known concepts, where that of a VLM is expected."""
STORED = 400_000
"""Tokens of each site of a large model that are stored: for ITDA, normalisations and evaluation."""
LATE = 0.5
"""The noise level of the last of mini-flux's four steps, at which most concepts are detected."""
LEVELS = (LATE, 0.75, 0.9)  # of the last three of them; the first begins at pure noise
NOISY = 0.9
"""A noise level at which something of an image is left, for a model whose only step begins at pure noise."""
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
    site = _blocks(model).double[-1]
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
    blocks = _blocks(model)
    middle, sites = blocks.double[-1], (*blocks.double, *blocks.single)
    sizes, ks = (512, 2048, 4096), (8, 16, 32)
    elsewhere = tuple(site for site in sites if site != middle)
    loading: dict[str, Any] = {"model": model, "precision": precision, "prompts": prompts, "pixels": pixels, "out": folder}
    harvest = HarvestCommand(**loading, site=sites, tokens=tokens, steps=4)
    train = TrainCommand(study=folder, site=(middle,), k=(16,), size=(2048,), tokens=2 * tokens)
    itda = ItdaCommand(study=folder, site=(middle,), k=16, size=(2048,), tokens=max(1, tokens // 10))
    neurons = f"{middle}:neurons/neurons-{blocks.neurons}-k32"
    compared = (f"{middle}/topk-2048-k32", f"{middle}/itda-2048-k32-first{itda.tokens}", neurons)
    together = ",".join(f"{site}/topk-2048-k16" for site in (middle, *blocks.single[:2]))
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
            ConceptsCommand(studies=(folder, folder / "untrained"), site=(middle,), noise=LEVELS),
            ConceptsCommand(studies=(folder,), site=elsewhere, noise=LEVELS),
            CollectCommand(study=folder, dictionary=compared, drawn_world=True, images=2000, noise=(LATE,)),
            CollectCommand(study=folder / "untrained", dictionary=compared[:1], drawn_world=True, images=2000, noise=(LATE,)),
            replace(explain, protocol="heldout"),
            replace(explain, protocol="paper"),
            SteerEvalCommand(study=folder, dictionary=compared[:2], trials=12),
            SteerEvalCommand(study=folder, dictionary=(f"{blocks.single[0]}/topk-2048-k16",), groups=("background",), trials=12),
            RemovalCommand(study=folder, dictionary=(together,)),
            FindingsCommand(study=folder, site=middle),
            ReportCommand(study=folder),
        ),
    )


class _Blocks(NamedTuple):
    """The blocks of a FLUX that are compared: of each kind the first, the last and one between."""

    double: tuple[str, ...]
    single: tuple[str, ...]
    neurons: int
    """Of a double block."""


@cache
def _blocks(model: str) -> _Blocks:
    """Return the blocks of `model` to compare, by its configs."""
    from difflex.pipeline.profile import config_site_rows  # imports torch

    rows = [row for row in config_site_rows(model) if row.site.stream == "image"]
    double, single = ([row.site.path for row in rows if row.site.path.startswith(kind)] for kind in ("double.", "single."))
    if not double or not single:
        blocks = ", ".join(row.site.path for row in rows) or "none that difflex knows"
        raise BadInput(f"The recipe compares double and single blocks of a FLUX, but the blocks of '{model}' are: {blocks}.")
    doubles = dict.fromkeys((double[0], double[len(double) // 2], double[-1]))
    return _Blocks(tuple(doubles), tuple(dict.fromkeys((*single[:2], single[-1]))), rows[0].neurons or 0)


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
    prompts: str = CC12M,
    pixels: tuple[int, int] = (256, 256),
    tokens: int = 30_720_000,
    vlm: str = KNOWN,
) -> Study:
    """Return arXiv 2505.24360 on FLUX.1 schnell with all its figures: SAEs and ITDA at four sites, k and size at one, neurons.

    The SAEs are trained while the model runs. A `vlm` explains features; without one they are compared with known concepts, which
    explain them if the prompts are the captions of the drawn world. The model reads 256 text tokens, as its authors' code does;
    the published code reads 512.
    """
    loading: dict[str, Any] = {"model": model, "precision": precision, "prompts": prompts, "pixels": pixels, "out": folder}
    return _flux(folder, {**loading, "steps": 1, "guidance": 0.0}, tokens, vlm)


def flux_dev(
    folder: Path,
    *,
    model: str = "black-forest-labs/FLUX.1-dev",
    precision: PrecisionChoice | None = None,
    prompts: str = CC12M,
    pixels: tuple[int, int] = (256, 256),
    tokens: int = 30_720_000,
    vlm: str = KNOWN,
) -> Study:
    """Return the same study of FLUX.1 dev, at all of its 28 steps and with its default guidance."""
    loading: dict[str, Any] = {"model": model, "precision": precision, "prompts": prompts, "pixels": pixels, "out": folder}
    return _flux(folder, {**loading, "steps": 28, "guidance": 3.5}, tokens, vlm)


def _flux(folder: Path, loading: Mapping[str, Any], tokens: int, vlm: str) -> Study:
    """Return a study of FLUX.1; `loading` are the flags that its commands which load it by name share."""
    middle, elsewhere = "double.18", ("double.9", "single.9", "single.18")
    inner, stored = f"{middle}:neurons", min(tokens, STORED)
    # An ITDA grows from several times as many tokens as it has atoms, and SAEs are compared with an ITDA of their size.
    sizes = tuple(max(16, size * stored // STORED) for size in (16_384, 32_768, 65_536))
    k = min(64, sizes[0] // 16)
    harvest = HarvestCommand(**loading, site=(middle, *elsewhere), tokens=stored, dtype="int8", batch=32)
    # Few tokens must be of many prompts, of which a tenth is held out: of a run of many steps, four are stored.
    few = harvest if loading["steps"] < 8 else replace(harvest, keep_steps=range(0, loading["steps"], loading["steps"] // 4))
    train = TrainCommand(
        study=folder,
        site=(middle,),
        preset="paper",
        k=tuple(dict.fromkeys((-(-k // 2), -(-3 * k // 4), k))),
        size=sizes,
        tokens=tokens,
        weights="bf16",
    )
    bare = replace(train, k=(k,), size=sizes[:1], tokens=min(tokens, 10 * STORED), checkpoints="compact")
    itda = ItdaCommand(study=folder, site=(middle,), k=k, pursuit="gradient")
    return Study(
        folder=folder,
        model=loading["model"],
        commands=(
            AnatomyCommand(**{**loading, "steps": max(loading["steps"], 4)}, max_prompts=min(64, max(4, tokens // 256))),
            # Before the harvest whose steps training repeats.
            *_neurons(few, middle, (k,), tokens=max(min(stored, 1024), stored // 8)),
            harvest,
            replace(train, also=elsewhere, live=True, harvest_batch=32),
            *(replace(bare, normalisation=normalisation) for normalisation in ("none", "standardise", "whiten")),
            *(replace(itda, size=(size,)) for size in sizes),
            replace(itda, site=elsewhere, size=sizes[-1:]),
            EvaluateCommand(study=folder, effect_shots=0),
            EvaluateCommand(study=folder, site=(middle,), largest=True),
            *_interpreted(folder, (middle, inner), loading, tokens, vlm),
            ReportCommand(study=folder),
        ),
    )


def _interpreted(folder: Path, sites: tuple[str, ...], loading: Mapping[str, Any], tokens: int, vlm: str) -> tuple[Command, ...]:
    """Return the commands that show what the largest dictionaries at `sites` stand for; less than `tokens` limit the images."""
    images = min(8000 if loading["steps"] == 1 else 1000, max(50, tokens // 256))
    noise, drawn = (NOISY,) if loading["steps"] == 1 else (LATE,), vlm == KNOWN and loading["prompts"] == DRAWN
    height, width = loading["pixels"]
    world: dict[str, Any] = {"noise": noise}
    if height != width or height % 64:  # the drawn world has none of these
        world["pixels"] = (max(64, min(height, width) // 64 * 64),) * 2
    run = {name: loading[name] for name in ("prompts", "steps", "pixels", "guidance")}
    given: dict[str, Any] = {"drawn_world": True, **world} if drawn else run
    explain = ExplainCommand(studies=(folder,), vlm=vlm)
    return (
        ConceptsCommand(studies=(folder,), site=sites, largest=True, images=min(500, max(200, images)), **world),
        CollectCommand(study=folder, site=sites, largest=True, images=images, patches=0, **given),
        *((explain, replace(explain, protocol="paper")) if drawn or vlm != KNOWN else ()),
    )


def sdxl_turbo(
    folder: Path,
    *,
    model: str = "stabilityai/sdxl-turbo",
    precision: PrecisionChoice | None = None,
    prompts: str = AESTHETIC,
    pixels: tuple[int, int] = (512, 512),
    tokens: int = 38_400_000,
    vlm: str = KNOWN,
) -> Study:
    """Return arXiv 2410.22366 on SDXL Turbo: the updates of four blocks at one step, k 10, size 5,120.

    A tenth of its 384 M vectors for each block, trained on while the model runs; 400,000 are stored.
    """
    sites = ("down.2.1:update", "mid.0:update", "up.0.0:update", "up.0.1:update")
    loading: dict[str, Any] = {"model": model, "precision": precision, "prompts": prompts, "pixels": pixels, "out": folder}
    loading |= {"steps": 1, "guidance": 0.0}
    return Study(
        folder=folder,
        model=model,
        commands=(
            AnatomyCommand(**loading),
            HarvestCommand(**loading, site=sites, tokens=min(tokens, STORED), dtype="int8"),
            TrainCommand(study=folder, site=sites, preset="unbox", k=(10,), size=(5120,), tokens=tokens, live=True),
            EvaluateCommand(study=folder),
            *_interpreted(folder, sites, loading, tokens, vlm),
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
