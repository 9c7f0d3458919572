"""How much memory the work of a command takes: the weights of models, passes over images, dictionaries and trainings."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from difflex.choices import Precision
from difflex.commands.flags import LEFT_FREE, StudyModelCommand
from difflex.commands.forecast import CostEstimate, DictionaryForecast, Forecast, Machine, harvesting
from difflex.commands.training import HARVEST_BATCH, TrainCommand
from difflex.dictionaries.itda import GRAM_SHARE
from difflex.dictionaries.pursuit import choose_backend
from difflex.pipeline import ModelProfile
from difflex.records import Site
from difflex.study import Study, StudySettings

if TYPE_CHECKING:
    from difflex.training.study import SweepConfig, SweepCost

__all__ = [
    "COLLECTED",
    "dictionary_bytes",
    "growing_bytes",
    "hold",
    "live_training",
    "model_memory",
    "pass_bytes",
    "resolve",
    "spectra_bytes",
    "stored_training",
]

MARGIN = 1.1
"""Room for buffers and the allocator, as a factor on the weights of a model."""
COLLECTED = 12_000
"""Bytes that a collection holds for each feature."""
GROWN = 1 << 30
"""Bytes of scores and residuals that a growth on a GPU holds, and a tenth of it on a CPU."""
USABLE = 0.95
"""The share of the free memory that a training plans with."""
CHOICES: Sequence[tuple[Precision, bool]] = (("bf16", False), ("bf16", True), ("nf4", False), ("nf4", True))
"""What `--precision auto` tries on a GPU, the best first: the precision, and whether the model is offloaded."""


class ModelMemory(NamedTuple):
    """The memory that a loaded model takes."""

    device: float
    """Bytes where it computes."""
    host: float
    """Bytes in the memory of the CPU besides."""
    value: int
    """Bytes of a number that it computes."""


def resolve(machine: Machine, model: ModelProfile, precision: str | None, offload: bool) -> tuple[Precision, bool]:
    """Return the precision in which a model is held on `machine`, and whether it is offloaded."""
    if machine.gpu is None:
        return ("fp32" if precision in (None, "auto") else _known(precision)), False
    if precision != "auto":
        return ("bf16" if precision is None else _known(precision)), offload
    choices = [choice for choice in CHOICES if choice[1] or not offload]
    room = (1 - LEFT_FREE) * machine.gpu
    return next((choice for choice in choices if _weights(model, *choice, "cuda").device <= room), choices[-1])


def _known(precision: Any) -> Precision:
    return precision


def hold(forecast: Forecast, folder: Path, model: ModelProfile, precision: str | None, offload: bool) -> ModelMemory:
    """Remember how a study holds its model, and return the memory of it."""
    forecast.held[folder] = resolved = resolve(forecast.machine, model, precision, offload)
    return _weights(model, *resolved, forecast.machine.device)


def model_memory(forecast: Forecast, folder: Path, model: ModelProfile, command: StudyModelCommand) -> ModelMemory:
    """Return the memory of the model of a study, held as the study says unless the flags of `command` say otherwise."""
    if folder not in forecast.held:
        kept = Study.open(folder).settings if (folder / "study.json").is_file() else StudySettings()
        hold(forecast, folder, model, kept.precision, kept.offload)
    precision, offload = forecast.held[folder]
    offload = (offload or command.offload) and not command.no_offload
    resolved = resolve(forecast.machine, model, command.precision or precision, offload)
    return _weights(model, *resolved, forecast.machine.device)


def _weights(model: ModelProfile, precision: Precision, offload: bool, device: Literal["cpu", "cuda"]) -> ModelMemory:
    sizes = model.weights.bytes(precision, device)
    value, total = 4 if precision in ("fp32", "nf4") and device == "cpu" else 2, sum(sizes.values())
    if device == "cpu":
        return ModelMemory(model.weights.peak(precision, device), 0, value)
    # On a GPU files are read into the memory of the CPU first, but for layers in nf4, which are quantised on the GPU.
    host = total if offload or precision != "nf4" else sum(value * count for count in model.weights.dense.values())
    return ModelMemory(MARGIN * (max(sizes.values()) if offload else total), host, value)


def pass_bytes(model: ModelProfile, held: ModelMemory, batch: int, images: bool = False) -> float:
    """Return the bytes of a pass over a batch with its activations, or of decoding it if that takes more."""
    kept = sum(tokens * width for tokens, width in model.shapes.values())
    decoded = model.decoded_values if images else 0
    return held.value * batch * max(model.values + kept, decoded)


def dictionary_bytes(machine: Machine, shape: DictionaryForecast, taken: float = 0) -> float:
    """Return the bytes of a dictionary in use beside `taken` others; without the Gram matrix of an ITDA if it does not fit."""
    if shape.kind == "neurons":
        return 0
    if shape.kind != "itda":
        return shape.size * shape.width * (8 + (4 if machine.gpu else 1))  # for products a copy in 16 or 8 bits
    atoms, free = 4.0 * shape.size * shape.width, (machine.memory if machine.gpu is None else machine.gpu) - taken
    gram = _gram_bytes(machine, shape)
    return atoms + (gram if gram <= GRAM_SHARE * (free - atoms) else 0)


def growing_bytes(machine: Machine, shape: DictionaryForecast) -> float:
    """Return the bytes of the growth of an ITDA."""
    return 4.0 * shape.size * shape.width + _gram_bytes(machine, shape) + (GROWN if machine.gpu else GROWN / 10)


def _gram_bytes(machine: Machine, shape: DictionaryForecast) -> int:
    return choose_backend("orthogonal", shape.size, shape.width, shape.k, machine.device).memory(shape.size, shape.width)


def spectra_bytes(model: ModelProfile, count: int) -> float:
    """Return the bytes of matrices of moments in float64, one for each of `count` sites, and of their eigenvectors."""
    return 8.0 * (count + 3) * max(width for _, width in model.shapes.values()) ** 2


class TrainingForecast(NamedTuple):
    """What a training takes besides the work of its updates."""

    estimate: CostEstimate
    model: float = 0.0
    """Operations of the model."""


def stored_training(
    forecast: Forecast, command: TrainCommand, config: "SweepConfig", widths: Mapping[Site, int]
) -> TrainingForecast:
    """Forecast a training on stored activations: one site after another."""
    from difflex.training.study import sweep_cost

    some, device = len(command.site), forecast.machine.device
    costs = [sweep_cost(config, [width], device=device) for width in [*widths.values()][:some]]
    costs += [sweep_cost(config, [], also=[width], device=device) for width in [*widths.values()][some:]]
    used = [_group(cost, forecast.machine.gpu or forecast.machine.memory)[0] for cost in costs]
    kept, saved = sum(cost.dictionaries for cost in costs), [cost.checkpoints for cost in costs]
    exact = config.checkpoint_kind == "exact"
    memory = forecast.memory(max(used), max(cost.host for cost in costs))
    size, temporary = kept + (sum(saved) if exact else 0), 0 if exact else max(saved)
    return TrainingForecast(CostEstimate(bytes=size, temporary=temporary, memory=memory))


def live_training(
    forecast: Forecast, command: TrainCommand, config: "SweepConfig", widths: Mapping[Site, int]
) -> TrainingForecast:
    """Forecast a training while the model runs: all sites at once, in as many groups, each a run of the model, as fit."""
    from difflex.training.study import sweep_cost

    several, some = [*widths.values()], len(command.site)
    store = forecast.store(command.study, next(iter(widths)))
    model = forecast.studied(command.study, command, *widths)
    held = model_memory(forecast, command.study, model, command)
    cost = sweep_cost(config, several[:some], also=several[some:], device=forecast.machine.device)
    taken = held.device + pass_bytes(model, held, command.harvest_batch or HARVEST_BATCH)
    used, groups = _group(cost, (forecast.machine.gpu or forecast.machine.memory) - taken)
    tokens = round(0.9 * store.rows) if command.tokens is None else command.tokens
    steps = model.shot.steps
    runs = -(-tokens // (steps * min(count for count, _ in model.shapes.values())))
    exact, memory = config.checkpoint_kind == "exact", forecast.memory(taken + used, held.host + cost.host)
    kept, temporary = cost.dictionaries + (cost.checkpoints if exact else 0), 0 if exact else cost.checkpoints // groups
    return TrainingForecast(
        CostEstimate(bytes=kept, temporary=temporary, memory=memory), groups * harvesting(model, runs, runs, steps)
    )


def _group(cost: "SweepCost", free: float) -> tuple[float, int]:
    """Return the bytes of the largest of the groups in which SAEs are trained, and the number of groups."""
    groups = cost.groups(round(USABLE * free)) or [[number] for number in range(len(cost.states))]
    return cost.working + max(sum(cost.states[number] for number in group) for group in groups), len(groups)
