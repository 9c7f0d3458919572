"""The training of the miniature, on a CPU or a GPU, in several sizes at once: it goes on after a kill.

On a GPU the scenes are drawn there, captions come from worker processes, and each update is one CUDA graph of compiled blocks.
"""

import json
import math
import platform
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, final

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from difflex.errors import BadInput, NonFinite, StaleWork
from difflex.files import disk_errors, folder_lock, parsing, write_file
from difflex.miniature.architecture import MiniatureConfig
from difflex.miniature.captions import write_captions
from difflex.miniature.drawing import draw
from difflex.miniature.flow import SIZES, CaptionIds, CaptionTokens, FlowBatch, FlowRecipe, SceneLatents, draw_latents
from difflex.miniature.judge import Judge, save_judge, training_losses
from difflex.miniature.learner import FlowLearner
from difflex.miniature.patches import PatchComponents, decoder_losses, patch_vae, write_encoder
from difflex.miniature.world import HELD_OUT_SEEDS, SceneMix, scenes
from difflex.tensors import read_tensors, write_tensors

FORMAT = 3
"""Of the state of the flow."""
RESTART = "Move it away to train from the start."
JUDGE_UPDATES = 4000
CHECKPOINT_SECONDS = 120.0
LOG_SECONDS = 15.0
BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
T = TypeVar("T")


@final
class TrainingFolder:
    """The files of one training run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.judge = folder / "judge.safetensors"
        """Only of a training from scratch."""
        self.autoencoder = folder / "vae"
        """Only of a training from scratch."""
        self.flow = folder / "flow.safetensors"
        """Parameters, averages and moments of all sizes, and how far their training is."""
        self.log = folder / "log.jsonl"

    def load_autoencoder(self, config: MiniatureConfig) -> AutoencoderKL:
        """Return the autoencoder of the run, by default that of the package."""
        return AutoencoderKL.from_pretrained(self.autoencoder if self.autoencoder.exists() else _embedded_autoencoder(config))


def _embedded_autoencoder(config: MiniatureConfig) -> Path:
    return Path(str(resources.files("difflex"))) / "models" / config.autoencoder / "vae"


def train(
    folder: Path, sizes: list[str], recipe: FlowRecipe, device: torch.device, workers: int = 0, from_scratch: bool = False
) -> None:
    """Train `sizes`, or go on with it; `from_scratch` trains the judge and the autoencoder first, on the CPU.

    An autoencoder that the package lacks is trained in any case.
    """
    run, config = TrainingFolder(folder), _common_config(sizes)
    with folder_lock(folder):
        if from_scratch and run.flow.exists() and not run.autoencoder.exists():
            raise StaleWork(f"{run.flow} was trained with the autoencoder of the package. {RESTART}")
        if from_scratch and not run.judge.exists():
            judge = Judge()
            for _ in _progress(training_losses(judge, JUDGE_UPDATES), "judge", JUDGE_UPDATES):
                pass
            save_judge(judge, run.judge)
        if not run.autoencoder.exists() and (from_scratch or not _embedded_autoencoder(config).exists()):
            _train_autoencoder(run, config)
        train_flow(run, sizes, recipe, device, workers)


def _common_config(sizes: list[str]) -> MiniatureConfig:
    """Return the config of one of the sizes; all must take the same latents."""
    configs = [SIZES[name].config for name in sizes]
    if len({type(config) for config in configs}) > 1:
        raise BadInput(
            f"{', '.join(sizes)} take different latents and cannot be trained on the same ones. Train them in two folders."
        )
    return configs[0]


def _train_autoencoder(run: TrainingFolder, config: MiniatureConfig) -> None:
    """Write the encoder, train the decoder, save both."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = patch_vae(config.patch, config.latents)
    components = PatchComponents.of(draw(torch.arange(512)).images * 2 - 1, config.patch, config.latents)
    write_encoder(vae, components)
    updates = config.decoder_updates
    batches = (draw(torch.arange(32) + i * 32).images * 2 - 1 for i in range(updates))
    for _ in _progress(decoder_losses(vae, components, batches, updates), "autoencoder", updates):
        pass
    # Its folder appears under its name when all of its files are complete.
    unfinished = run.folder / ".vae"
    shutil.rmtree(unfinished, ignore_errors=True)
    with disk_errors(run.autoencoder):
        vae.save_pretrained(unfinished)
        unfinished.rename(run.autoencoder)


def _progress(items: Iterator[T], name: str, total: int) -> Iterator[T]:
    yield from tqdm(items, desc=name, total=total, unit="update", mininterval=1.0)


class ChunkPlan(NamedTuple):
    """The updates whose scenes are drawn together."""

    first: int
    """The number of the first update."""
    updates: int
    layout: bool
    """Whether its scenes have more pairs and higher noise levels."""

    def seeds(self, recipe: FlowRecipe) -> Tensor:
        """Return the seeds of its scenes: each seed belongs to one update alone, and none is held out."""
        first = (recipe.seed * 10_000_000 + self.first) * recipe.batch % HELD_OUT_SEEDS
        return torch.arange(first, first + self.updates * recipe.batch) % HELD_OUT_SEEDS

    def mix(self, recipe: FlowRecipe) -> SceneMix:
        """Return the mix of its scenes."""
        return SceneMix(*recipe.mixes[self.layout])


@final
class CaptionChunks(Dataset[tuple[ChunkPlan, CaptionIds]]):
    """Chunk -> the captions of its scenes, some of them empty."""

    def __init__(self, recipe: FlowRecipe, tokenize: CaptionTokens) -> None:
        self._recipe, self._tokenize = recipe, tokenize

    def __getitem__(self, plan: ChunkPlan) -> tuple[ChunkPlan, CaptionIds]:  # pyright: ignore[reportIncompatibleMethodOverride]
        seeds = plan.seeds(self._recipe)
        captions = write_captions(scenes(seeds, plan.mix(self._recipe)))
        drop = torch.rand(len(seeds), generator=torch.Generator().manual_seed(int(seeds[0]))) < self._recipe.drop_caption
        return plan, self._tokenize(["" if empty else text for empty, text in zip(drop.tolist(), captions, strict=True)])


@final
class FlowTraining:
    """The training of several sizes on the same scenes."""

    def __init__(self, sizes: list[str], recipe: FlowRecipe, device: torch.device) -> None:
        self.config = _common_config(sizes)
        pipeline = self.config.pipeline(0)
        self.tokenize = CaptionTokens(pipeline)
        self._recipe, self._device = recipe, device
        lengths = pipeline.tokenizer.model_max_length, pipeline.tokenizer_2.model_max_length
        self.batch = FlowBatch.empty(recipe.batch, self.config, lengths, device)
        self.learners = [FlowLearner(name, recipe, self.batch) for name in sizes]
        self.updates = self.plain_updates = self.guided_updates = 0
        self.plain_seconds = 0.0
        """Those before guidance, as `plain_updates`."""
        self._spent, self._began = 0.0, math.inf
        # Random numbers of a GPU are drawn there, those of any other device on the CPU.
        self._generator = torch.Generator(device if device.type == "cuda" else "cpu")

    @property
    def seconds(self) -> float:
        """The time of the training since its first scenes were there, without that of compilation."""
        return self._spent + max(0.0, time.monotonic() - self._began)

    @property
    def progress(self) -> float:
        """The share of the training that is done."""
        return self._recipe.progress(self.updates, self.seconds)

    def chunks(self, updates: int) -> Iterator[ChunkPlan]:
        """Yield the chunks to come. Workers ask for them ahead of time: by the clock they have the mix of that moment."""
        first = self.updates
        while (progress := self._recipe.progress(first, self.seconds)) < 1:
            until_end = math.ceil(self._recipe.length) - first if self._recipe.unit == "updates" else updates
            yield ChunkPlan(first, min(updates, until_end), self._recipe.trains_layout(progress))
            first += updates

    def train(self, plan: ChunkPlan, drawn: SceneLatents, ids: CaptionIds) -> None:
        """Train all sizes on a chunk."""
        self._began = min(self._began, time.monotonic())
        for parts in zip(*(x.split(self._recipe.batch) for x in (*drawn, *ids)), strict=True):
            self._load(parts, plan.layout)
            is_guided, is_one_step = self._recipe.is_guided(self.progress), self._recipe.is_one_step(self.progress)
            self._prepare(is_guided, is_one_step)
            factor = self._recipe.rate_factor(self.progress, self.updates)
            for learner in self.learners:
                learner.update(factor)
            self.updates += 1
            if not is_guided:
                self.plain_updates, self.plain_seconds = self.updates, self.seconds
            elif not is_one_step:
                self.guided_updates = self.updates - self.plain_updates

    def _prepare(self, is_guided: bool, is_one_step: bool) -> None:
        """Begin the next part if it is time, and choose how updates are computed."""
        began, ways = time.monotonic(), {}
        for learner in self.learners:
            if is_one_step and not learner.is_one_step:
                learner.begin_one_step()
            elif is_guided and not learner.is_guided:
                learner.begin_guidance(CaptionIds(*(ids.to(self._device) for ids in self.tokenize([""]))))
            if way := learner.prepare():
                ways[learner.name] = way
        if ways and self._device.type == "cuda":
            tqdm.write(f"updates: {', '.join(f'{name} {way}' for name, way in ways.items())}")
        self._began += time.monotonic() - began

    def _load(self, parts: tuple[Tensor, ...], layout: bool) -> None:
        """Write the scenes of an update to where the learners read them, with new noise."""
        self._generator.manual_seed((self._recipe.seed * 1_000_003 + self.updates) % 2**63)
        mean, spread = self._recipe.levels[layout]
        levels, noise = (torch.randn(x.shape, generator=self._generator, device=self._generator.device) for x in self.batch[-2:])
        for target, x in zip(self.batch, (*parts, torch.sigmoid(levels * spread + mean), noise), strict=True):
            target.copy_(x)

    def losses(self) -> dict[str, float]:
        """Return the loss of the last update by size."""
        losses = {learner.name: learner.loss.item() for learner in self.learners}
        if not all(map(math.isfinite, losses.values())):
            raise NonFinite(
                f"A loss is not finite after {self.updates:,} updates: {losses}. "
                "Run again to go on from the last checkpoint, or train with another seed in another folder."
            )
        return losses

    def save(self, file: Path) -> None:
        """Write the state atomically."""
        self.losses()
        tensors = {name: x for learner in self.learners for name, x in learner.state().items()}
        write_tensors(file, FORMAT, tensors, self._settings() | self._position())

    def restore(self, file: Path) -> None:
        """Load the saved state, if any; it must have the same settings."""
        if not file.exists():
            return
        header, tensors = read_tensors(file, FORMAT, RESTART)
        with parsing(file, "a training state", RESTART):
            changed = {key: (header[key], now) for key, now in self._settings().items() if header[key] != now}
            if changed:
                raise StaleWork(
                    f"{file} was trained with other settings (old, new): {changed}. Repeat the old ones, or use another folder."
                )
            self.updates, self._spent = header["updates"], header["seconds"]
            self.plain_updates, self.plain_seconds = header["plain_updates"], header["plain_seconds"]
            self.guided_updates = header["guided_updates"]
            for learner in self.learners:
                learner.restore(tensors, self.updates)

    def _settings(self) -> dict[str, Any]:
        return json.loads(json.dumps({"sizes": [learner.name for learner in self.learners], "recipe": asdict(self._recipe)}))

    def _position(self) -> dict[str, Any]:
        if self._device.type == "cuda":
            machine = f"one {torch.cuda.get_device_name(self._device)}"
        else:
            threads = torch.get_num_threads()
            machine = f"{threads} core{'s' * (threads > 1)} ({platform.machine()})"
        plain = {"plain_updates": self.plain_updates, "plain_seconds": self.plain_seconds, "guided_updates": self.guided_updates}
        now = {"updates": self.updates, "seconds": self.seconds}
        return {**plain, **now, "machine": f"{machine} with torch {torch.__version__}"}


def train_flow(run: TrainingFolder, sizes: list[str], recipe: FlowRecipe, device: torch.device, workers: int = 0) -> None:
    """Train denoiser and text encoders of all sizes until the end of the recipe."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # The backward pass of cuDNN's attention reads out of bounds at 90 tokens (torch 2.11 on an H100).
        torch.backends.cuda.enable_cudnn_sdp(False)
    training = FlowTraining(sizes, recipe, device)
    training.restore(run.flow)
    _cut_log(run, training.updates)
    components = PatchComponents(*(x.to(device) for x in PatchComponents.of_encoder(run.load_autoencoder(training.config))))
    together = 8 if device.type == "cuda" else 1
    prefetch: dict[str, Any] = {"prefetch_factor": 2, "multiprocessing_context": "spawn"} if workers else {}
    captions = CaptionChunks(recipe, training.tokenize)
    chunks = DataLoader(captions, sampler=training.chunks(together), batch_size=None, num_workers=workers, **prefetch)
    saved = logged = time.monotonic()
    losses: list[dict[str, float]] = []
    with tqdm(desc="flow", total=1.0, initial=training.progress, bar_format=BAR, mininterval=1.0) as bar:
        for plan, ids in chunks:
            drawn = draw_latents(plan.seeds(recipe).to(device), plan.mix(recipe), components, training.config)
            training.train(plan, drawn, CaptionIds(*(x.to(device) for x in ids)))
            losses.append(training.losses())
            bar.set_postfix({"update": training.updates, **losses[-1]}, refresh=False)
            bar.update(min(1.0, training.progress) - bar.n)
            now, is_finished = time.monotonic(), training.progress >= 1
            if now - logged > LOG_SECONDS or is_finished:
                _log(run, training, losses)
                logged = now
            if now - saved > CHECKPOINT_SECONDS or is_finished:
                training.save(run.flow)
                saved = now
            if is_finished:
                break


def _log(run: TrainingFolder, training: FlowTraining, losses: list[dict[str, float]]) -> None:
    """Write the mean of the losses, and forget them."""
    means = {name: sum(each[name] for each in losses) / len(losses) for name in losses[0]}
    entry = {"update": training.updates, "seconds": round(training.seconds, 1), "loss": means}
    with disk_errors(run.log), run.log.open("a") as file:
        file.write(json.dumps(entry) + "\n")
    losses.clear()


def _cut_log(run: TrainingFolder, update: int) -> None:
    """Drop the entries after `update`, which are made again, and what a kill left of a line."""
    if run.log.exists():
        lines = [line for line in run.log.read_text().splitlines() if line.endswith("}")]
        kept = [line for line in lines if json.loads(line).get("update", 0) <= update]
        write_file(run.log, "".join(f"{line}\n" for line in kept).encode())
