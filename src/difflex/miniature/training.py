"""The miniature made from nothing: judge, autoencoder, flow; each stage is skipped when done, each resumes after a kill."""

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch
from diffusers import AutoencoderKL, FluxPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm

from difflex.errors import StaleWork
from difflex.files import replacing
from difflex.miniature.architecture import MiniatureConfig, untrained_pipeline
from difflex.miniature.autoencoder import PatchComponents, decoder_losses, write_encoder
from difflex.miniature.drawing import draw
from difflex.miniature.flow import CaptionTokens, FlowBatch, FlowModel, FlowRecipe, one_update, optimisers, training_batch
from difflex.miniature.guidance import GuidanceTeacher
from difflex.miniature.heldout import HeldOutLoss
from difflex.miniature.judge import Judge, save_judge, training_losses

DECODER_UPDATES = 2200
JUDGE_UPDATES = 4000
CHECKPOINT_SECONDS = 120.0
REPORT_EVERY = 1000
"""Updates between two looks at held-out scenes."""
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class TrainingFolder:
    """The files of one training run."""

    folder: Path

    @property
    def judge(self) -> Path:
        return self.folder / "judge.safetensors"

    @property
    def components(self) -> Path:
        return self.folder / "components.safetensors"

    @property
    def autoencoder(self) -> Path:
        return self.folder / "vae"

    @property
    def flow(self) -> Path:
        """The state of the flow training: parameters, average, optimisers, number of updates."""
        return self.folder / "flow.safetensors"

    @property
    def log(self) -> Path:
        return self.folder / "log.jsonl"


def train(folder: Path, recipe: FlowRecipe, architecture: MiniatureConfig, minutes: float | None = None) -> None:
    """Trains what is not trained yet, for at most `minutes`; call it again to go on where it stopped."""
    until = time.monotonic() + 60 * minutes if minutes else float("inf")
    workshop = TrainingFolder(folder=folder)
    folder.mkdir(parents=True, exist_ok=True)
    pipeline = untrained_pipeline(architecture, recipe.seed)
    if not workshop.judge.exists():
        train_judge(workshop, JUDGE_UPDATES)
    if not workshop.autoencoder.exists():
        train_autoencoder(workshop, pipeline.vae, DECODER_UPDATES)
    train_flow(workshop, pipeline, recipe, until)


def train_judge(workshop: TrainingFolder, updates: int) -> None:
    """Trains and saves the judge."""
    judge = Judge()
    for _ in _shown(training_losses(judge, updates), "judge", updates):
        pass
    save_judge(judge, workshop.judge)


def image_components(workshop: TrainingFolder) -> PatchComponents:
    """The components of the drawn world's patches: fitted once for a run and kept, since latents mean nothing without them."""
    if not workshop.components.exists():
        components = PatchComponents.of(draw(torch.arange(512)).images * 2 - 1)
        write_tensors(workshop.components, components._asdict(), {})
    return PatchComponents(**load_file(workshop.components))


def train_autoencoder(workshop: TrainingFolder, vae: AutoencoderKL, updates: int) -> None:
    """Writes the encoder, trains the decoder, saves both."""
    components = image_components(workshop)
    write_encoder(vae, components)
    batches = (draw(torch.arange(32) + i * 32).images * 2 - 1 for i in range(updates))
    for _ in _shown(decoder_losses(vae, components, batches, updates), "autoencoder", updates):
        pass
    vae.save_pretrained(workshop.autoencoder)


def train_flow(workshop: TrainingFolder, pipeline: FluxPipeline, recipe: FlowRecipe, until: float) -> None:
    """Trains transformer and text encoders until the recipe's end or the time `until`."""
    components, texts = image_components(workshop), CaptionTokens(pipeline)
    state = FlowState(FlowModel(pipeline), recipe)
    for name, (before, now) in state.restore(workshop.flow).items():
        _log(workshop, update=state.update, changed=name, before=before, now=now)
    held_out: HeldOutLoss | None = None
    saved = time.monotonic()
    batches = _prefetched(state.update, recipe, components, texts)
    for batch in _shown(batches, "flow", recipe.updates, state.update):
        started = time.monotonic()
        losses = one_update(state.model, state.average, state.optimisers, batch, recipe, state.update, state.guide(texts))
        state.update += 1
        if state.update % 50 == 0:
            _log(
                workshop,
                update=state.update,
                flow=losses.flow.item(),
                concepts=losses.concepts.item(),
                seconds=time.monotonic() - started,
            )
        if state.update % REPORT_EVERY == 0:
            held_out = held_out or HeldOutLoss(components, texts)
            _log(workshop, update=state.update, held_out=held_out.loss(state.model), rises=held_out.rises(state.model))
        if time.monotonic() - saved > CHECKPOINT_SECONDS or time.monotonic() > until:
            state.save(workshop.flow)
            saved = time.monotonic()
        if time.monotonic() > until:
            return
    state.save(workshop.flow)


class FlowState:
    """All that flow training must remember."""

    def __init__(self, model: FlowModel, recipe: FlowRecipe) -> None:
        self.model, self.recipe, self.update = model, recipe, 0
        self.average = [parameter.detach().clone() for parameter in model.parameters()]
        self._guiding: list[Tensor] = []
        self._guide: GuidanceTeacher | None = None
        self.optimisers = optimisers(model, recipe)

    def guide(self, texts: CaptionTokens) -> GuidanceTeacher | None:
        """What guides this update: the average as it was when guidance began; None before."""
        if not self.recipe.guides(self.update):
            return None
        if self._guide is None:
            self._guiding = self._guiding or [x.clone() for x in self.average]
            self._guide = GuidanceTeacher(self.model, self._guiding, texts)
        return self._guide

    def save(self, file: Path) -> None:
        """Writes the state; a kill in the middle leaves the last one."""
        tensors = {f"model.{name}": x for name, x in self.model.named_parameters()}
        tensors |= {f"average.{i}": x for i, x in enumerate(self.average)}
        tensors |= {f"guide.{i}": x for i, x in enumerate(self._guiding)}
        for number, optimiser in enumerate(self.optimisers):
            for i, entry in optimiser.state_dict()["state"].items():
                tensors |= {f"optimiser.{number}.{i}.{key}": x for key, x in entry.items()}
        write_tensors(file, tensors, {"update": str(self.update), "recipe": json.dumps(asdict(self.recipe))})

    def restore(self, file: Path) -> dict[str, tuple[object, object]]:
        """Continues from a saved state, if there is one; gives back what of the recipe changed on the way, before and now."""
        if not file.exists():
            return {}
        with safe_open(file, "pt") as opened:
            about = opened.metadata()
        changed = self._changes(json.loads(about["recipe"]), file)
        tensors = load_file(file)
        self.update = int(about["update"])
        with torch.no_grad():
            for i, (name, parameter) in enumerate(self.model.named_parameters()):
                parameter.copy_(tensors[f"model.{name}"])
                # A packed state begins a new average.
                self.average[i].copy_(tensors.get(f"average.{i}", parameter))
        self._guiding = [tensors[f"guide.{i}"].float() for i in range(len(self.average)) if "guide.0" in tensors]
        for number, optimiser in enumerate(self.optimisers):
            _restore_optimiser(optimiser, f"optimiser.{number}.", tensors)
        return changed

    def _changes(self, before: dict[str, object], file: Path) -> dict[str, tuple[object, object]]:
        now: dict[str, object] = json.loads(json.dumps(asdict(self.recipe)))
        changes = {key: (before.get(key), value) for key, value in now.items() if before.get(key) != value}
        if "batch" in changes or "seed" in changes:
            raise StaleWork(f"{file} was trained with another recipe (before, now): {changes}. Use another folder.")
        return changes


def _restore_optimiser(optimiser: torch.optim.Optimizer, prefix: str, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, x in tensors.items():
        if name.startswith(prefix):
            index, key = name.removeprefix(prefix).split(".", 1)
            state.setdefault(int(index), {})[key] = x.float()
    for entry in state.values():
        if "exp_avg_sq" in entry:  # a packed state leaves the first moments behind
            entry.setdefault("exp_avg", torch.zeros_like(entry["exp_avg_sq"]))
    optimiser.load_state_dict({**optimiser.state_dict(), "state": state})


def write_average(model: FlowModel, file: Path) -> None:
    """Puts the running average of a saved state into the model."""
    tensors = load_file(file)
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.copy_(tensors[f"average.{i}"])


def pack(source: TrainingFolder, target: TrainingFolder) -> None:
    """Copies a run in a form small enough to travel, from which `train` goes on.

    The flow's parameters, guide and second moments are kept in bfloat16; first moments and average, soon regained, stay behind.
    """
    target.folder.mkdir(parents=True, exist_ok=True)
    for file in (source.judge, source.components, source.log):
        if file.exists():
            shutil.copy(file, target.folder)
    if source.autoencoder.exists():
        shutil.copytree(source.autoencoder, target.autoencoder, dirs_exist_ok=True)
    with safe_open(source.flow, "pt") as opened:
        about = opened.metadata()
    tensors = load_file(source.flow)
    kept = [name for name in tensors if name.startswith(("model.", "guide.", "optimiser.1.")) and not name.endswith("exp_avg")]
    small = {name: tensors[name].bfloat16() if tensors[name].ndim else tensors[name] for name in kept}
    write_tensors(target.flow, small, about)


def write_tensors(file: Path, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
    """Write a safetensors file atomically."""
    with replacing(file) as temporary:
        save_file({name: x.detach().contiguous() for name, x in tensors.items()}, temporary, metadata=about)


class _FlowBatches(IterableDataset[FlowBatch]):
    """Training batches from one update on, drawn in another process."""

    def __init__(self, first: int, recipe: FlowRecipe, components: PatchComponents, texts: CaptionTokens) -> None:
        self._first, self._recipe, self._components, self._texts = first, recipe, components, texts

    def __iter__(self) -> Iterator[FlowBatch]:
        torch.set_num_threads(1)
        for update in range(self._first, self._recipe.updates):
            yield training_batch(update, self._recipe, self._components, self._texts)


def _prefetched(first: int, recipe: FlowRecipe, components: PatchComponents, texts: CaptionTokens) -> Iterator[FlowBatch]:
    yield from DataLoader(_FlowBatches(first, recipe, components, texts), batch_size=None, num_workers=1, prefetch_factor=8)


def _shown(items: Iterator[T], what: str, total: int, done: int = 0) -> Iterator[T]:
    yield from tqdm(items, desc=what, total=total, initial=done, unit="update", mininterval=1.0)


def _log(workshop: TrainingFolder, **entry: object) -> None:
    with workshop.log.open("a") as file:
        file.write(json.dumps(entry) + "\n")
