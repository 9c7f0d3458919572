"""The training of the miniature: judge, autoencoder, flow. A finished stage is skipped, and the flow resumes after a kill."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TypeVar, final

import torch
from diffusers import AutoencoderKL, FluxPipeline
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from difflex.errors import StaleWork
from difflex.files import disk_errors, folder_lock, parsing, write_file
from difflex.miniature.architecture import MiniatureConfig, PatchComponents, decoder_losses, untrained_pipeline, write_encoder
from difflex.miniature.drawing import draw
from difflex.miniature.flow import (
    CaptionTokens,
    FlowBatch,
    FlowModel,
    FlowRecipe,
    GuidanceTeacher,
    make_batch,
    make_optimisers,
    train_update,
    training_batch,
)
from difflex.miniature.judge import Judge, save_judge, training_losses
from difflex.miniature.world import CONCEPTS, HELD_OUT_SEEDS, SceneMix
from difflex.tensors import read_tensors, write_tensors

FORMAT = 1
"""Of the state of the flow, and of the components."""
RESTART = "Move it away to train this stage from the start."
DECODER_UPDATES = 2200
JUDGE_UPDATES = 4000
CHECKPOINT_SECONDS = 120.0
REPORT_EVERY = 1000
"""Updates between two evaluations on held-out scenes."""
LOSS_LEVELS = (0.2, 0.35, 0.5, 0.65, 0.8, 0.95)
SWAPPED_GROUPS = ("background", "style", "colour", "size", "texture", "shape", "row", "column")
SWAP_LEVEL = 0.95
"""The noise level at which words are exchanged: there the words decide, not the image."""
T = TypeVar("T")


@final
class TrainingFolder:
    """The files of one training run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.judge = folder / "judge.safetensors"
        self.components = folder / "components.safetensors"
        self.autoencoder = folder / "vae"
        self.flow = folder / "flow.safetensors"
        """The state of the flow training: parameters, average, optimisers, number of updates."""
        self.log = folder / "log.jsonl"


def train(folder: Path, recipe: FlowRecipe, architecture: MiniatureConfig, minutes: float | None = None) -> None:
    """Train the stages that are not finished, for at most `minutes`; another call continues where it stopped."""
    deadline = time.monotonic() + 60 * minutes if minutes else float("inf")
    run = TrainingFolder(folder)
    with folder_lock(folder):
        pipeline = untrained_pipeline(architecture, recipe.seed)
        if not run.judge.exists():
            judge = Judge()
            for _ in _progress(training_losses(judge, JUDGE_UPDATES), "judge", JUDGE_UPDATES):
                pass
            save_judge(judge, run.judge)
        if not run.autoencoder.exists():
            _train_autoencoder(run, pipeline.vae)
        train_flow(run, pipeline, recipe, deadline)


def fit_components(run: TrainingFolder) -> PatchComponents:
    """Return the components of the drawn world's patches: fitted once for a run and saved, since latents depend on them."""
    if not run.components.exists():
        components = PatchComponents.of(draw(torch.arange(512)).images * 2 - 1)
        write_tensors(run.components, FORMAT, components._asdict())
    tensors = read_tensors(run.components, FORMAT, RESTART).tensors
    with parsing(run.components, "components of patches", RESTART):
        return PatchComponents(**tensors)


def _train_autoencoder(run: TrainingFolder, vae: AutoencoderKL) -> None:
    """Write the encoder, train the decoder, save both."""
    components = fit_components(run)
    write_encoder(vae, components)
    batches = (draw(torch.arange(32) + i * 32).images * 2 - 1 for i in range(DECODER_UPDATES))
    for _ in _progress(decoder_losses(vae, components, batches, DECODER_UPDATES), "autoencoder", DECODER_UPDATES):
        pass
    # Its folder appears under its name when all of its files are complete.
    unfinished = run.folder / ".vae"
    shutil.rmtree(unfinished, ignore_errors=True)
    with disk_errors(run.autoencoder):
        vae.save_pretrained(unfinished)
        unfinished.rename(run.autoencoder)


def train_flow(run: TrainingFolder, pipeline: FluxPipeline, recipe: FlowRecipe, deadline: float) -> None:
    """Train transformer and text encoders until the end of the recipe or the time `deadline`."""
    components, tokenize = fit_components(run), CaptionTokens(pipeline)
    state = FlowState(FlowModel(pipeline), recipe)
    changes = state.restore(run.flow)
    _cut_log(run, state.update)
    for name, (before, now) in changes.items():
        _log(run, update=state.update, changed=name, before=before, now=now)
    held_out: HeldOutLoss | None = None
    saved = time.monotonic()
    make: Callable[..., FlowBatch] = partial(training_batch, recipe=recipe, components=components, tokenize=tokenize)
    updates = range(state.update, recipe.updates)
    # A worker process draws the scenes. The data set may be any sequence.
    batches = DataLoader(updates, batch_size=None, collate_fn=make, num_workers=1, prefetch_factor=8)  # pyright: ignore[reportArgumentType]
    for batch in _progress(iter(batches), "flow", recipe.updates, state.update):
        start = time.monotonic()
        losses = train_update(state.model, state.average, state.optimisers, batch, recipe, state.update, state.guide(tokenize))
        state.update += 1
        if state.update % 50 == 0:
            seconds = time.monotonic() - start
            _log(run, update=state.update, flow=losses.flow.item(), concepts=losses.concepts.item(), seconds=seconds)
        if state.update % REPORT_EVERY == 0:
            held_out = held_out or HeldOutLoss(components, tokenize)
            _log(run, update=state.update, held_out=held_out.loss(state.model), rises=held_out.rises(state.model))
        if time.monotonic() - saved > CHECKPOINT_SECONDS or time.monotonic() > deadline:
            state.save(run.flow)
            saved = time.monotonic()
        if time.monotonic() > deadline:
            return
    state.save(run.flow)


class FlowState:
    """The state of the flow training."""

    def __init__(self, model: FlowModel, recipe: FlowRecipe) -> None:
        self.model, self.recipe, self.update = model, recipe, 0
        self.average = [parameter.detach().clone() for parameter in model.parameters()]
        self._guide_weights: list[Tensor] = []
        self._guide: GuidanceTeacher | None = None
        self.optimisers = make_optimisers(model, recipe)

    def guide(self, tokenize: CaptionTokens) -> GuidanceTeacher | None:
        """Return the teacher of this update, which has the average weights from when guidance began; None before."""
        if self.update < self.recipe.guided_from * self.recipe.updates:
            return None
        if self._guide is None:
            self._guide_weights = self._guide_weights or [x.clone() for x in self.average]
            self._guide = GuidanceTeacher(self.model, self._guide_weights, tokenize)
        return self._guide

    def save(self, file: Path) -> None:
        """Write the state atomically."""
        tensors = {f"model.{name}": x for name, x in self.model.named_parameters()}
        tensors |= {f"average.{i}": x for i, x in enumerate(self.average)}
        tensors |= {f"guide.{i}": x for i, x in enumerate(self._guide_weights)}
        for number, optimiser in enumerate(self.optimisers):
            for i, entry in optimiser.state_dict()["state"].items():
                tensors |= {f"optimiser.{number}.{i}.{key}": x for key, x in entry.items()}
        recipe = json.loads(json.dumps(asdict(self.recipe)))
        write_tensors(file, FORMAT, tensors, {"update": self.update, "recipe": recipe})

    def restore(self, file: Path) -> dict[str, tuple[object, object]]:
        """Load the saved state, if any; return the settings of the recipe that have changed, with old and new values."""
        if not file.exists():
            return {}
        header, tensors = read_tensors(file, FORMAT, RESTART)
        with parsing(file, "a training state", RESTART):
            changes = self._changes(header["recipe"], file)
            self.update = int(header["update"])
            with torch.no_grad():
                for i, (name, parameter) in enumerate(self.model.named_parameters()):
                    parameter.copy_(tensors[f"model.{name}"])
                    # A packed state has no average: averaging starts again.
                    self.average[i].copy_(tensors.get(f"average.{i}", parameter))
            self._guide_weights = [tensors[f"guide.{i}"].float() for i in range(len(self.average)) if "guide.0" in tensors]
            for number, optimiser in enumerate(self.optimisers):
                _restore_optimiser(optimiser, f"optimiser.{number}.", tensors)
        return changes

    def _changes(self, old: dict[str, object], file: Path) -> dict[str, tuple[object, object]]:
        new: dict[str, object] = json.loads(json.dumps(asdict(self.recipe)))
        changes = {key: (old.get(key), value) for key, value in new.items() if old.get(key) != value}
        if "batch" in changes or "seed" in changes:
            raise StaleWork(f"{file} was trained with another recipe (old, new): {changes}. Use another folder.")
        return changes


def _restore_optimiser(optimiser: torch.optim.Optimizer, prefix: str, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, x in tensors.items():
        if name.startswith(prefix):
            index, key = name.removeprefix(prefix).split(".", 1)
            state.setdefault(int(index), {})[key] = x.float()
    for entry in state.values():
        if "exp_avg_sq" in entry:  # a packed state has no first moments
            entry.setdefault("exp_avg", torch.zeros_like(entry["exp_avg_sq"]))
    optimiser.load_state_dict({**optimiser.state_dict(), "state": state})


def load_average(model: FlowModel, file: Path) -> None:
    """Load the running average of a saved state into the model."""
    tensors = read_tensors(file, FORMAT, RESTART).tensors
    with torch.no_grad(), parsing(file, "a training state with an average", RESTART):
        for i, parameter in enumerate(model.parameters()):
            parameter.copy_(tensors[f"average.{i}"])


def pack(source: TrainingFolder, target: TrainingFolder) -> None:
    """Copy a run in a small form, from which `train` continues.

    The parameters, guide and second moments of the flow are stored in bfloat16, first moments and average are left out.
    """
    target.folder.mkdir(parents=True, exist_ok=True)
    for file in (source.judge, source.components, source.log):
        if file.exists():
            shutil.copy(file, target.folder)
    if source.autoencoder.exists():
        shutil.copytree(source.autoencoder, target.autoencoder, dirs_exist_ok=True)
    header, tensors = read_tensors(source.flow, FORMAT, RESTART)
    names = [name for name in tensors if name.startswith(("model.", "guide.", "optimiser.1.")) and not name.endswith("exp_avg")]
    small = {name: tensors[name].bfloat16() if tensors[name].ndim else tensors[name] for name in names}
    write_tensors(target.flow, FORMAT, small, header)


class HeldOutLoss:
    """The loss on scenes that training never sees, and its increase when one word of a caption is wrong."""

    def __init__(self, components: PatchComponents, tokenize: CaptionTokens, scenes: int = 192) -> None:
        seeds = torch.arange(scenes) + HELD_OUT_SEEDS
        mixed, single = draw(seeds), draw(seeds + scenes, SceneMix(1, 0, 0))
        self._mixed = make_batch(mixed, components, tokenize, mixed.captions)
        self._single = make_batch(single, components, tokenize, single.captions)
        swapped = {group: [_swap_word(caption, group) for caption in single.captions] for group in SWAPPED_GROUPS}
        self._swapped = {
            group: (torch.tensor([a != b for a, b in zip(captions, single.captions, strict=True)]), tokenize(captions))
            for group, captions in swapped.items()
        }

    def loss(self, model: FlowModel) -> float:
        """Return the mean squared velocity error over all noise levels, with equal weights of tokens."""
        return sum(_errors(model, self._mixed, level).mean().item() for level in LOSS_LEVELS) / len(LOSS_LEVELS)

    def rises(self, model: FlowModel) -> dict[str, float]:
        """Return for each group the increase of the loss of a noisy scene when one word of the group is wrong."""
        base = _errors(model, self._single, SWAP_LEVEL)
        return {
            group: (_errors(model, self._single._replace(clip=clip, t5=t5), SWAP_LEVEL) - base)[changed].mean().item()
            for group, (changed, (clip, t5)) in self._swapped.items()
        }


@torch.no_grad()
def _errors(model: FlowModel, batch: FlowBatch, level: float) -> Float[Tensor, " scene"]:
    noise = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        noisy = torch.lerp(batch.latents, noise, level)
        velocity = model.velocity(noisy, torch.full((len(noise),), level), batch.clip, batch.t5)
    return (velocity.float() - (noise - batch.latents)).square().mean((1, 2))


def _swap_word(caption: str, group: str) -> str:
    """Exchange the first word of the group in the caption for another one."""
    words, names = caption.split(), CONCEPTS[group]
    index = next((i for i, word in enumerate(words) if word in names), None)
    if index is not None:
        words[index] = names[(names.index(words[index]) + 1 + len(caption) % (len(names) - 1)) % len(names)]
    return " ".join(words)


def _progress(items: Iterator[T], name: str, total: int, initial: int = 0) -> Iterator[T]:
    yield from tqdm(items, desc=name, total=total, initial=initial, unit="update", mininterval=1.0)


def _cut_log(run: TrainingFolder, update: int) -> None:
    """Drop the entries after `update`, which are made again, and what a kill left of a line."""
    if run.log.exists():
        lines = [line for line in run.log.read_text().splitlines() if line.endswith("}")]
        kept = [line for line in lines if json.loads(line).get("update", 0) <= update]
        write_file(run.log, "".join(f"{line}\n" for line in kept).encode())


def _log(run: TrainingFolder, **entry: object) -> None:
    with disk_errors(run.log), run.log.open("a") as file:
        file.write(json.dumps(entry) + "\n")
