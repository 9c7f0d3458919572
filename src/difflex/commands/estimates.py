"""How much each command takes: tokens, disk and time, from its flags and the forecasts of the commands before it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from difflex.commands.effects import EditBenchCommand, FindingsCommand, RemovalCommand, SteerEvalCommand
from difflex.commands.evaluation import SPECTRA, AnatomyCommand, ConceptsCommand, EvaluateCommand
from difflex.commands.explain import ExplainCommand
from difflex.commands.features import CollectCommand
from difflex.commands.forecast import (
    START,
    CostEstimate,
    DictionaryForecast,
    Forecast,
    StoreForecast,
    Unknown,
    encoding,
    growing,
    harvesting,
    profile_or_unknown,
)
from difflex.commands.harvest import HarvestCommand
from difflex.commands.memory import (
    COLLECTED,
    dictionary_bytes,
    growing_bytes,
    hold,
    live_training,
    model_memory,
    pass_bytes,
    spectra_bytes,
    stored_training,
)
from difflex.commands.study import ReportCommand
from difflex.commands.training import ItdaCommand, NeuronsCommand, TrainCommand
from difflex.errors import DifflexError
from difflex.explore.inputs import CAPTIONS, UNTRAINED, read_prompts
from difflex.miniature.world import CONCEPTS
from difflex.pipeline import ModelProfile
from difflex.records import Shot, Site
from difflex.store import RecordingConfig, ShardFormat, recorded_bytes, shots_for
from difflex.study import Command

__all__ = ["estimate"]

SCENE, JUDGED = 1e9, 2.5e8
"""Operations that take as long as drawing a scene of the drawn world, and as its judge takes for an image."""
LEVELS = 3
"""Noise levels at which a steered image is compared with its unedited one."""
STRIP = 4_500
"""Bytes of an image in a strip that is kept."""
SHEET = 6_000
"""Bytes of an image in a sheet of the editing benchmark."""
BATCH = 16
"""Images that a command without a flag for it makes at a time."""
SCALED = 65_536
"""Tokens from which the units of steering are measured."""
PROMPTS, LONG = 256, 200
"""Prompts that are read to measure how long they are; the length of one that cannot be read."""


def _anatomy(forecast: Forecast, command: AnatomyCommand) -> CostEstimate:
    model = profile_or_unknown(
        command.model, command.site, command.revision, command.steps, command.pixels, command.guidance, command.text_length
    )
    tokens = command.max_prompts * model.shot.steps * sum(tokens for tokens, _ in model.shapes.values())
    held, spectra = hold(forecast, command.out, model, command.precision, command.offload), len(command.spectra) or SPECTRA
    return CostEstimate(
        sites=tuple(map(str, model.shapes)),
        tokens=tokens,
        bytes=70_000 + spectra * 22 * max(width for _, width in model.shapes.values()),
        seconds=_plus(3.0, forecast.seconds(model=harvesting(model, command.max_prompts, command.max_prompts, model.shot.steps))),
        memory=forecast.memory(held.device + pass_bytes(model, held, command.batch) + spectra_bytes(model, spectra), held.host),
    )


def _plus(more: float, seconds: float | None) -> float | None:
    return None if seconds is None else seconds + more


def _harvest(forecast: Forecast, command: HarvestCommand) -> CostEstimate:
    model = profile_or_unknown(
        command.model, command.site, command.revision, command.steps, command.pixels, command.guidance, command.text_length
    )
    formats = [ShardFormat(site, command.dtype, *shape) for site, shape in model.shapes.items()]
    run = len(command.keep_steps) if command.keep_steps is not None else model.shot.steps
    prompts, count = _prompts_of(command)
    revision = command.revision if command.untrained is None else f"{UNTRAINED}{command.untrained}"
    plain = replace(model.shot, revision=revision, precision=command.precision or "fp32", timestep=750.0)
    shots = [replace(plain, prompt=prompt, split=Shot.split_of(prompt)) for prompt in prompts]
    if command.tokens is None and count is None:
        raise Unknown(f"how many prompts {command.prompts} has is known when they are read")
    total = shots_for(command.tokens, formats, run) if command.tokens is not None else (count or 0) * len(command.seeds) * run
    for shape in formats:
        forecast.stores[command.out, shape.site] = StoreForecast(total * shape.tokens, shape.tokens, shape.width, shots[0])
    last = command.keep_steps[-1] + 1 if command.keep_steps is not None else model.shot.steps
    work = harvesting(model, total // run, -(-(total // run) // len(command.seeds)), last)
    config = RecordingConfig(dtype=command.dtype, batch=command.batch)
    held = hold(forecast, command.out, model, command.precision, command.offload)
    size = recorded_bytes(formats, shots, run, total, config)
    return CostEstimate(
        sites=tuple(map(str, model.shapes)),
        tokens=sum(total * shape.tokens for shape in formats),
        bytes=size,
        seconds=forecast.seconds(model=work),
        memory=forecast.memory(
            held.device + pass_bytes(model, held, command.batch), held.host + min(size, 2 * len(formats) * config.shard_bytes)
        ),
    )


def _prompts_of(command: HarvestCommand) -> tuple[list[str], int | None]:
    """Return some of the prompts, and their number if it is needed and can be counted."""
    if command.prompts != CAPTIONS and not Path(command.prompts).exists():  # a data set on the hub is not fetched for this
        return ["x" * LONG], None
    prompts = read_prompts(command.prompts, None, command.prompts_column, command.prompts_revision).texts
    some = list(islice(prompts, PROMPTS))
    return some, None if command.tokens is not None else len(some) + sum(1 for _ in prompts)


def _train(forecast: Forecast, command: TrainCommand) -> CostEstimate:
    from difflex.training.study import PRESETS, SweepConfig

    preset, total, work, widths = PRESETS[command.preset], 0, 0.0, dict[Site, int]()
    names = ("size", "k", "preset", "kind", "normalisation", "tokens", "batch", "live", "window", "checkpoints", "weights")
    config = SweepConfig(**{name: getattr(command, name) for name in names})
    sizes, ks = command.size or (preset.size,), command.k or (preset.k,)
    for site in map(Site.parse, (*command.site, *command.also)):
        store, only_largest = forecast.store(command.study, site), len(widths) >= len(command.site)
        tokens = round(0.9 * store.rows) if command.tokens is None else command.tokens
        shapes = [DictionaryForecast(n, k, store.width) for n in sizes for k in ks]
        forecast.add(command.study, site, [max(shapes)] if only_largest else shapes)
        total, work = total + tokens, work + sum(encoding(shape, tokens) for shape in ([max(shapes)] if only_largest else shapes))
        widths[site] = store.width
    cost = (
        live_training(forecast, command, config, widths) if command.live else stored_training(forecast, command, config, widths)
    )
    seconds = forecast.seconds(training=work, model=cost.model)
    return replace(cost.estimate, sites=tuple(map(str, widths)), tokens=total, seconds=seconds)


def _itda(forecast: Forecast, command: ItdaCommand) -> CostEstimate:
    usual_size, usual_k = (64_000, 64) if command.preset == "paper" else (16_384, 32)
    total, size, work, most = 0, 0, 0.0, 0.0
    for site in map(Site.parse, command.site):
        store = forecast.store(command.study, site)
        tokens = min(command.tokens or store.rows, round(0.9 * store.rows))
        shapes = [DictionaryForecast(size, command.k or usual_k, store.width, "itda") for size in command.size or (usual_size,)]
        # With a threshold, smaller dictionaries are the first atoms of the largest.
        grown = [max(shapes)] if command.threshold or command.preset == "paper" else shapes
        count = max(1, len(command.threshold))
        forecast.add(command.study, site, shapes * count)
        total, work = total + tokens, work + count * sum(growing(shape, tokens) for shape in grown)
        # Dictionaries whose thresholds are searched grow together.
        most = max(most, count * sum(growing_bytes(forecast.machine, shape) for shape in grown))
        size += count * sum(shape.size * (4 * shape.width + 100) + 35_000 for shape in shapes)
    seconds = forecast.seconds(growing=work)
    return CostEstimate(sites=command.site, tokens=total, bytes=size, seconds=seconds, memory=forecast.memory(most))


def _neurons(forecast: Forecast, command: NeuronsCommand) -> CostEstimate:
    size = 0
    for site in map(Site.parse, command.site):
        width = forecast.store(command.study, site).width
        forecast.add(command.study, site, [DictionaryForecast(width, k, width, "neurons") for k in command.k])
        size += len(command.k) * (600 + 4 * width)
    return CostEstimate(sites=command.site, tokens=0, bytes=size, seconds=START, memory=forecast.memory())


def _evaluate(forecast: Forecast, command: EvaluateCommand) -> CostEstimate:
    learned = forecast.learned(command.study, (*command.site, *command.dictionary), command.largest)
    total, encoded, effect, most, host = 0, 0.0, 0.0, 0.0, 0.0
    for site, shapes in learned.items():
        store = forecast.store(command.study, site)
        tokens = min(command.tokens, store.rows // 10)
        total, encoded = total + tokens * len(shapes), encoded + sum(encoding(shape, tokens) for shape in shapes)
        if command.effect_shots:
            shots = min(command.effect_shots, store.rows // 10 // store.tokens)
            model = forecast.profile(store.shot)
            effect += _replacing(model, shots, len(shapes))
            held = model_memory(forecast, command.study, model, command)
            taken = held.device + pass_bytes(model, held, min(shots, BATCH), images=True)
            most = max(most, *(_in_use(forecast, [shape], taken) for shape in shapes))  # one after another
            host = held.host
        most = max(most, *(dictionary_bytes(forecast.machine, shape) for shape in shapes))
    count = sum(map(len, learned.values()))
    seconds = forecast.seconds(encoding=encoded, effect=effect)
    return CostEstimate(
        sites=tuple(map(str, learned)), tokens=total, bytes=count * 3600, seconds=seconds, memory=forecast.memory(most, host)
    )


def _in_use(forecast: Forecast, shapes: Iterable[DictionaryForecast], taken: float) -> float:
    """Return the bytes of dictionaries in use at the same time, with `taken` others."""
    for shape in shapes:
        taken += dictionary_bytes(forecast.machine, shape, taken)
    return taken


def _concepts(forecast: Forecast, command: ConceptsCommand) -> CostEstimate:
    if command.folder is not None:
        raise Unknown("how many images the folder holds is known when they are read")
    known, levels, sites = sum(map(len, CONCEPTS.values())), len(command.noise), dict[str, None]()
    rounds = levels + (levels > 1)
    total, size, model, matched, encoded, most, host = 0, 0, 0.0, SCENE * command.images, 0.0, 0.0, 0.0
    for folder in command.studies:
        for site, shapes in forecast.learned(folder, (*command.site, *command.dictionary), command.largest).items():
            store, inner = forecast.store(folder, site), site.kind == "neurons"
            profile, ks, tokens = (
                forecast.profile(store.shot, site),
                {each.k for each in shapes},
                command.images * levels * store.tokens,
            )
            axes, neurons = (0, 0) if command.no_baselines else (2, 1 - inner)
            methods = len(shapes) + (axes + neurons) * len(ks)
            model += (1 + neurons) * command.images * levels * (profile.partial_step + profile.decode)
            matched += rounds / levels * (5e6 * tokens * methods + 300.0 * tokens * (1 + 4 * neurons) * store.width * known)
            encoded += sum(encoding(shape, tokens) for shape in shapes)
            features = sum(each.size for each in shapes)
            features += (axes > 0) * len(ks) * (max(each.size for each in shapes) + 6 * store.width)
            total, size = total + tokens * (1 + neurons), size + methods * rounds * 27_000 + features * 47
            sites[str(site)] = None
            held = model_memory(forecast, folder, profile, command)
            used = _in_use(forecast, shapes, held.device + pass_bytes(profile, held, command.batch, images=True))
            most, host = max(most, used), held.host
    seconds = forecast.seconds(model=model, concepts=matched, encoding=encoded)
    return CostEstimate(sites=tuple(sites), tokens=total, bytes=size, seconds=seconds, memory=forecast.memory(most, host))


def _collect(forecast: Forecast, command: CollectCommand) -> CostEstimate:
    learned = forecast.learned(command.study, (*command.site, *command.dictionary), command.largest)
    store = forecast.store(command.study, next(iter(learned)))
    model = forecast.profile(store.shot, *learned)
    given, steps = command.drawn_world or command.folder is not None, command.steps or store.shot.steps
    moments = len(command.noise) if given else len(command.keep_steps or range(steps))
    tokens, shapes = command.images * moments * store.tokens, [shape for several in learned.values() for shape in several]
    passes = moments * model.partial_step if given else steps * model.step
    work = command.images * (passes + model.prompt + model.decode + SCENE * command.drawn_world)
    height, width = store.shot.pixels
    held = model_memory(forecast, command.study, model, command)
    taken = held.device + pass_bytes(model, held, command.batch, images=True)
    return CostEstimate(
        sites=tuple(map(str, learned)),
        tokens=tokens * len(learned),
        bytes=round(sum(shape.size for shape in shapes) * 4000 + command.images * height * width * 1.1),
        seconds=forecast.seconds(model=work, encoding=sum(encoding(shape, tokens) for shape in shapes)),
        memory=forecast.memory(_in_use(forecast, shapes, taken) + sum(COLLECTED * shape.size for shape in shapes), held.host),
    )


def _explain(forecast: Forecast, command: ExplainCommand) -> CostEstimate:
    if command.vlm != "known":
        raise Unknown("how long a VLM takes to answer is not known; --dry-run counts the calls")
    names = (*command.site, *command.dictionary)
    books = sum(len(several) for study in command.studies for several in forecast.learned(study, names).values())
    features = books * (len(command.feature) or command.random_features)
    return CostEstimate(sites=command.site, bytes=features * 1_000, seconds=START + features * 0.03, memory=forecast.memory())


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
    command: SteerEvalCommand | RemovalCommand | EditBenchCommand | FindingsCommand,
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
        memory=forecast.memory(_in_use(forecast, (shape for _, shape in shapes), taken), held.host),
    )


def _report(forecast: Forecast, command: ReportCommand) -> CostEstimate:
    learned = forecast.learned(command.study)
    count = sum(map(len, learned.values()))
    size, seconds = 700_000 + count * 50_000, 3.0 + count * 1.5
    return CostEstimate(sites=tuple(map(str, learned)), tokens=0, bytes=size, seconds=seconds, memory=forecast.memory())


ESTIMATORS: Mapping[type[Command], Callable[[Forecast, Any], CostEstimate]] = {
    AnatomyCommand: _anatomy,
    HarvestCommand: _harvest,
    TrainCommand: _train,
    ItdaCommand: _itda,
    NeuronsCommand: _neurons,
    EvaluateCommand: _evaluate,
    ConceptsCommand: _concepts,
    CollectCommand: _collect,
    ExplainCommand: _explain,
    SteerEvalCommand: _steer_eval,
    RemovalCommand: _removal,
    EditBenchCommand: _edit_bench,
    FindingsCommand: _findings,
    ReportCommand: _report,
}


def _steered(forecast: Forecast, folder: Path, names: Sequence[str]) -> list[tuple[Site, DictionaryForecast]]:
    """Return the dictionaries to steer with; of a named one the label is not predicted: it is the largest of its site at most."""
    learned = forecast.learned(folder, [name.partition("/")[0] for name in names])
    if names:
        return [(site, max(learned[site])) for site in (Site.parse(name.partition("/")[0]) for name in names)]
    return [(site, shape) for site, shapes in learned.items() if site.kind != "neurons" for shape in shapes]


def estimate(forecast: Forecast, command: Command) -> CostEstimate:
    """Return what `command` is expected to take, and add what it will have written to `forecast`."""
    estimator = ESTIMATORS.get(type(command))
    if estimator is None:
        return CostEstimate(unknown="there is no estimate for this command")
    try:
        return estimator(forecast, command)
    except Unknown as reason:
        tokens = None
        if isinstance(command, HarvestCommand | TrainCommand) and command.tokens is not None:
            tokens = command.tokens * len(command.site)
        return CostEstimate(tokens=tokens, unknown=str(reason))
    except DifflexError as error:  # what is wrong with a command is reported when it runs
        return CostEstimate(unknown=str(error))


def _replacing(model: ModelProfile, shots: int, dictionaries: int) -> float:
    """Predictions and images under each dictionary, mean and zero ablation, and without an edit."""
    runs, passes = model.shot.steps, shots * model.step
    return passes * (runs / 2 + dictionaries + 2) + (dictionaries + 3) * (passes * runs + shots * model.decode)
