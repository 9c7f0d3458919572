"""How much the commands take that generate images to measure what dictionaries, edits and blocks do."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from difflex.commands.effects import EditBenchCommand, FindingsCommand, RemovalCommand, SteerEvalCommand
from difflex.commands.evaluation import TransferCommand
from difflex.commands.forecast import (
    CostEstimate,
    DictionaryForecast,
    Forecast,
    Unknown,
    encoding,
    harvesting,
    profile_or_unknown,
)
from difflex.commands.measures import BlockRolesCommand, MeasureCommand
from difflex.commands.memory import dictionary_bytes, hold, model_memory, pass_bytes
from difflex.miniature.world import CONCEPTS
from difflex.records import Site
from difflex.study import Command

__all__ = ["BATCH", "IMAGE_ESTIMATORS", "in_use"]

BATCH = 16
"""Images that a command without a flag for it makes at a time."""
JUDGED = 2.5e8
"""Operations that take as long as the judge of the drawn world takes for an image."""
LEVELS = 3
"""Noise levels at which a steered image is compared with its unedited one."""
STRIP = 4_500
"""Bytes of an image in a strip that is kept."""
SHEET = 6_000
"""Bytes of an image in a sheet of the editing benchmark."""
SCALED = 65_536
"""Tokens from which the units of steering are measured."""


def _steer_eval(forecast: Forecast, command: SteerEvalCommand) -> CostEstimate:
    if command.concepts:
        raise Unknown("how long the judge takes is not known")
    shapes = _steered(forecast, command.study, command.dictionary)
    points = 3 * len(command.strength) + 1
    # A third of the concepts has a feature, before `difflex concepts` says so.
    concepts = len(shapes) * sum(len(CONCEPTS.get(group, ())) for group in command.groups) / 3
    last = command.edit_steps.stop if command.edit_steps else None
    estimate = _edited(forecast, command, shapes, concepts * command.trials * (1 + points), concepts * command.pairs * 2, last)
    strips = round(len(shapes) * len(command.groups) * (points + 4) * STRIP)
    return replace(estimate, bytes=round(concepts * points * 220) + strips)


def _removal(forecast: Forecast, command: RemovalCommand) -> CostEstimate:
    sets = [_steered(forecast, command.study, names.split(",")) for names in command.dictionary]
    if not sets:  # all sites together, once for each shape of dictionary
        steered = _steered(forecast, command.study, ())
        sets = [
            [(site, shape) for site, shape in steered if shape == alike] for alike in dict.fromkeys(each for _, each in steered)
        ]
    concepts = [len(CONCEPTS[group]) for group in command.groups]
    settings = len(command.features) * len(command.strength)
    # About as many settings are tried before one is good enough: of important features, of those matched to the concept, and
    # with several dictionaries of those of the best one alone.
    tried = [(3 if len(together) > 1 else 2) * (0.6 * settings if settings > 1 else 1) for together in sets]
    plain = sum(concepts) * (command.selection_images + command.tuning_images + command.images)
    edited = sum(2 * count * (each * command.tuning_images + command.images) for each in tried for count in concepts)
    estimate = _edited(forecast, command, [pair for together in sets for pair in together], plain + edited, scaled=False)
    return replace(estimate, bytes=len(sets) * sum(concepts) * 1_700)


def _edit_bench(forecast: Forecast, command: EditBenchCommand) -> CostEstimate:
    names = [part for name in command.dictionary for part in name.split(",")]
    learned = forecast.learned(command.study, names, largest=True).items()
    shapes = [(site, shape) for site, several in learned if not site.smooth for shape in several]
    coded = [(site, shape) for site, shape in shapes if site.kind != "neurons"]
    sets = len(command.dictionary) or len(coded) + len({shape.kind for _, shape in coded})
    settings = sets * len(command.features) + (len(shapes) - len(coded)) * len(command.neurons) + 2 + 2 * len({*dict(coded)})
    items, settings = (len(command.type) or 9) * command.count, settings * len(command.strength)
    images = items * (2 + 2 * command.pairs + settings)
    return replace(_edited(forecast, command, shapes, images, 2 * items, scaled=False), bytes=items * settings * SHEET)


def _findings(forecast: Forecast, command: FindingsCommand) -> CostEstimate:
    steered = _steered(forecast, command.study, [command.site] if command.site else ())
    if len({site for site, _ in steered}) != 1:
        raise Unknown("where to steer is not known: name a --site")
    concepts = len(command.groups) * command.concepts_per_group
    inner = max(1, len(command.strength) - 2)
    points = {"pairs": 1 + (len(command.pairs) - 1) * inner, "quality": 0, "size": 0}
    names = command.finding or ("pairs", "distribution", "adversarial", "related", "steps")
    points = 1 + len(command.strength) + sum(points.get(name, 2 * (1 + inner)) for name in names)
    images = concepts * command.trials * points
    return _edited(forecast, command, steered, images, 2 * max(command.pairs) * concepts)


def _edited(
    forecast: Forecast,
    command: SteerEvalCommand | RemovalCommand | EditBenchCommand | FindingsCommand | MeasureCommand,
    shapes: Sequence[tuple[Site, DictionaryForecast]],
    images: float,
    sides: float = 0,
    last: int | None = None,
    scaled: bool = True,
) -> CostEstimate:
    """Images that are generated and judged, and the prompts of contrasts, `sides` in all, harvested to step `last`."""
    model = forecast.studied(command.study, command, *(site for site, _ in shapes))
    steps, tokens = last or model.shot.steps, {site: model.shapes[site][0] for site, _ in shapes}
    judged = JUDGED + (model.decode + LEVELS * model.step if scaled else 0.0)
    work = images * (judged + model.prompt + model.shot.steps * model.step + model.decode)
    rows = {site: (sides or images) * steps * count for site, count in tokens.items()}
    encoded = sum(encoding(shape, SCALED if scaled else rows[site]) for site, shape in shapes)
    held = model_memory(forecast, command.study, model, command)
    taken = held.device + pass_bytes(model, held, BATCH, images=True)
    return CostEstimate(
        sites=tuple(map(str, tokens)),
        tokens=round(sum(rows.values())),
        bytes=round(images * 30),
        seconds=forecast.seconds(model=work + harvesting(model, sides, sides, steps), encoding=encoded),
        memory=forecast.memory(in_use(forecast, (shape for _, shape in shapes), taken), held.host),
    )


def _measure(forecast: Forecast, command: MeasureCommand) -> CostEstimate:
    shapes = _steered(forecast, command.study, command.dictionary)
    features = sum(min(command.sample, shape.size) for _, shape in shapes)
    # For the explanation of the feature and that of its partner, alone, and edits along it and along a random direction.
    estimate = _edited(forecast, command, shapes, 5 * command.images * features, scaled=False)
    return replace(estimate, bytes=features * 500 + len(shapes) * 1000)


def _block_roles(forecast: Forecast, command: BlockRolesCommand) -> CostEstimate:
    if command.out is None:
        raise Unknown("which blocks the model has is not known")
    model = profile_or_unknown(command.study_or_model, command.site, None, command.steps, command.pixels, command.guidance)
    blocks = {site for site in model.shapes if not command.site and site.stream == "image"} or set(command.site)
    images = command.images * (1 + 2 * len(blocks))
    held = hold(forecast, command.out, model, command.precision, command.offload)
    return CostEstimate(
        tokens=0,
        bytes=len(blocks) * command.images * 200,
        seconds=forecast.seconds(model=images * (JUDGED + model.prompt + model.shot.steps * model.step + model.decode)),
        memory=forecast.memory(held.device + pass_bytes(model, held, BATCH, images=True), held.host),
    )


def _transfer(forecast: Forecast, command: TransferCommand) -> CostEstimate:
    learned = forecast.learned(command.study, (*command.site, *command.dictionary), command.largest)
    if command.model is not None:
        raise Unknown("how many steps another model takes is not known")
    model = forecast.studied(command.study, command, *learned)
    rows = {site: command.images * model.shot.steps * model.shapes[site][0] for site in learned}
    shapes = [shape for several in learned.values() for shape in several]
    held = model_memory(forecast, command.study, model, command)
    return CostEstimate(
        sites=tuple(map(str, learned)),
        tokens=sum(rows.values()),
        bytes=2000 * len(shapes),
        seconds=forecast.seconds(
            model=harvesting(model, command.images, command.images, model.shot.steps),
            encoding=sum(encoding(shape, rows[site]) for site, several in learned.items() for shape in several),
        ),
        memory=forecast.memory(in_use(forecast, shapes, held.device + pass_bytes(model, held, command.batch)), held.host),
    )


def _steered(forecast: Forecast, folder: Path, names: Sequence[str]) -> list[tuple[Site, DictionaryForecast]]:
    """Return the dictionaries to steer with; of a named one the label is not predicted: it is the largest of its site at most."""
    learned = forecast.learned(folder, [name.partition("/")[0] for name in names])
    if names:
        return [(site, max(learned[site])) for site in (Site.parse(name.partition("/")[0]) for name in names)]
    return [(site, shape) for site, shapes in learned.items() if site.kind != "neurons" for shape in shapes]


def in_use(forecast: Forecast, shapes: Iterable[DictionaryForecast], taken: float) -> float:
    """Return the bytes of dictionaries in use at the same time, with `taken` others."""
    for shape in shapes:
        taken += dictionary_bytes(forecast.machine, shape, taken)
    return taken


IMAGE_ESTIMATORS: Mapping[type[Command], Callable[[Forecast, Any], CostEstimate]] = {
    SteerEvalCommand: _steer_eval,
    RemovalCommand: _removal,
    EditBenchCommand: _edit_bench,
    FindingsCommand: _findings,
    MeasureCommand: _measure,
    BlockRolesCommand: _block_roles,
    TransferCommand: _transfer,
}
