"""How much each command takes: tokens, disk and time, from its flags and the forecasts of the commands before it."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

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
from difflex.commands.image_estimates import BATCH, IMAGE_ESTIMATORS, in_use
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

SCENE = 1e9
"""Operations that take as long as drawing a scene of the drawn world."""
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
    seeds = 1 if command.seeds is None else len(command.seeds)
    total = shots_for(command.tokens, formats, run) if command.tokens is not None else (count or 0) * seeds * run
    for shape in formats:
        forecast.stores[command.out, shape.site] = StoreForecast(total * shape.tokens, shape.tokens, shape.width, shots[0])
    last = command.keep_steps[-1] + 1 if command.keep_steps is not None else model.shot.steps
    work = harvesting(model, total // run, -(-(total // run) // seeds), last)
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
            most = max(most, *(in_use(forecast, [shape], taken) for shape in shapes))  # one after another
            host = held.host
        most = max(most, *(dictionary_bytes(forecast.machine, shape) for shape in shapes))
    count = sum(map(len, learned.values()))
    seconds = forecast.seconds(encoding=encoded, effect=effect)
    return CostEstimate(
        sites=tuple(map(str, learned)), tokens=total, bytes=count * 3600, seconds=seconds, memory=forecast.memory(most, host)
    )


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
            used = in_use(forecast, shapes, held.device + pass_bytes(profile, held, command.batch, images=True))
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
        memory=forecast.memory(in_use(forecast, shapes, taken) + sum(COLLECTED * shape.size for shape in shapes), held.host),
    )


def _explain(forecast: Forecast, command: ExplainCommand) -> CostEstimate:
    if command.vlm != "known":
        raise Unknown("how long a VLM takes to answer is not known; --dry-run counts the calls")
    names = (*command.site, *command.dictionary)
    books = sum(len(several) for study in command.studies for several in forecast.learned(study, names).values())
    features = books * (len(command.feature) or command.random_features)
    return CostEstimate(sites=command.site, bytes=features * 1_000, seconds=START + features * 0.03, memory=forecast.memory())


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
    ReportCommand: _report,
    **IMAGE_ESTIMATORS,
}


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
