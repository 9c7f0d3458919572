"""Recipes on the drawn world: the demo, and all that can be measured of mini-flux."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from difflex.commands.effects import FindingsCommand, RemovalCommand, SteerEvalCommand
from difflex.commands.evaluation import AnatomyCommand, ConceptsCommand, EvaluateCommand
from difflex.commands.explain import ExplainCommand
from difflex.commands.features import CollectCommand
from difflex.commands.flags import PrecisionChoice
from difflex.commands.harvest import HarvestCommand
from difflex.commands.study import ReportCommand
from difflex.commands.training import ItdaCommand, NeuronsCommand, TrainCommand
from difflex.errors import BadInput
from difflex.records import SMOOTH
from difflex.study import Command, Study

LATE = 0.5
"""The noise level of the last of mini-flux's four steps, at which most concepts are detected."""
LEVELS = (LATE, 0.75, 0.9)  # of the last three of them; the first begins at pure noise
EFFECT = 16
"""Shots at which the effect of dictionaries on mini-flux is measured."""
ImageSize = tuple[int, int] | None


def mini(
    folder: Path,
    *,
    model: str = "mini-flux",
    precision: PrecisionChoice | None = None,
    prompts: str = "captions",
    pixels: ImageSize = None,
    tokens: int = 160_000,
) -> Study:
    """Return the demo: one site of mini-flux, or of another model of the drawn world, in minutes."""
    site = f"{_blocks(model).double[-1]}:{SMOOTH}"
    loading: dict[str, Any] = {"model": model, "precision": precision, "prompts": prompts, "pixels": pixels, "out": folder}
    return Study(
        folder=folder,
        model=model,
        commands=(
            AnatomyCommand(**loading, max_prompts=16),
            HarvestCommand(**loading, site=(site,), tokens=tokens, steps=4),
            TrainCommand(study=folder, site=(site,), k=(16, 32), size=(2048,), tokens=3 * tokens),
            ItdaCommand(study=folder, site=(site,), k=16, size=(2048,), tokens=max(1, tokens // 4)),
            EvaluateCommand(study=folder, effect_shots=8),
            ConceptsCommand(studies=(folder,), images=480, held_out=0.5, noise=(LATE,)),
            CollectCommand(study=folder, drawn_world=True, images=320, noise=(LATE,), patches=0),
            ExplainCommand(studies=(folder,), random_features=32),
            ExplainCommand(studies=(folder,), random_features=32, protocol="paper"),
            SteerEvalCommand(
                study=folder, dictionary=(f"{site}/topk-2048-k32",), groups=("colour", "texture"), trials=4, strength=(1.0, 2.0)
            ),
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
    """Return the study of mini-flux in full: the comparisons of arXiv 2505.24360 at one site, and all that is known of all sites.

    The paper's dictionaries are of single tokens; what the blocks know is found, and steered with, by those of smooth sites.
    `folder/untrained` is the study of the same model with a denoiser that was never trained: the control that the paper leaves
    to the future.
    """
    blocks = _blocks(model)
    middle, sites = blocks.double[-1], (*blocks.double, *blocks.single)
    near, smooth = (*blocks.double[-2:-1], blocks.single[0]), tuple(f"{site}:{SMOOTH}" for site in sites)
    loading: dict[str, Any] = {"model": model, "precision": precision, "prompts": prompts, "pixels": pixels, "out": folder}
    harvest = HarvestCommand(**loading, site=(middle, *near, *smooth), tokens=tokens, steps=4)
    train = TrainCommand(study=folder, site=(middle,), k=(16,), size=(2048,), tokens=2 * tokens)
    itda = ItdaCommand(study=folder, site=(middle,), k=16, size=(2048,), tokens=max(1, tokens // 10))
    itda_label, neurons = f"itda-2048-k16-first{itda.tokens}", f"{middle}:neurons/neurons-{blocks.neurons}-k16"
    compared = (f"{middle}/topk-2048-k16", f"{middle}/{itda_label}", neurons)
    shown, control = {site: f"{site}:{SMOOTH}/topk-2048-k32" for site in sites}, folder / "untrained"
    concepts = ConceptsCommand(studies=(folder,), noise=LEVELS)
    explain = ExplainCommand(studies=(folder, control), dictionary=(shown[middle], *compared), random_features=320)
    collect = CollectCommand(study=folder, dictionary=explain.dictionary, drawn_world=True, images=2000, noise=(LATE,))
    steer = SteerEvalCommand(study=folder, dictionary=compared[:1], groups=("colour", "texture"), trials=12)
    removed = ",".join(shown[site] for site in (middle, *blocks.single[:2]))
    return Study(
        folder=folder,
        model=model,
        commands=(
            AnatomyCommand(**loading),
            harvest,
            replace(train, size=(512, 2048, 4096)),
            replace(train, k=(8, 32)),
            replace(train, site=near),
            replace(train, site=smooth, k=(32,)),
            *(replace(train, normalisation=normalisation) for normalisation in ("none", "whiten")),
            replace(itda, size=(512, 2048, 4096)),
            *(replace(itda, **changes) for changes in ({"k": 8}, {"site": near})),
            *neurons_of(harvest, middle, (8, 16, 32), tokens=max(1, tokens // 5)),
            EvaluateCommand(study=folder, effect_shots=EFFECT),
            *_control(control, harvest, train),
            replace(concepts, site=smooth, no_baselines=True),
            replace(concepts, dictionary=compared),
            replace(concepts, studies=(control,)),
            *(collect, replace(collect, study=control, dictionary=compared[:1])),
            *(replace(explain, protocol=protocol) for protocol in ("heldout", "paper")),
            steer,
            replace(steer, dictionary=(shown[middle],)),
            replace(steer, dictionary=(shown[near[0]],), groups=("shape",)),
            replace(steer, dictionary=(shown[near[-1]],), groups=("background", "style")),
            RemovalCommand(study=folder, dictionary=(removed,), images=16, features=(1, 2, 4), strength=(0.0, -1.0, -2.0, -4.0)),
            FindingsCommand(study=folder, site=middle, trials=6, pairs=(1, 5, 20, 80, 160)),
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


def neurons_of(harvest: HarvestCommand, site: str, ks: tuple[int, ...], tokens: int) -> tuple[Command, ...]:
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
