"""Rectified flow on the drawn world: the recipe, the data, the model and the loss of the miniature's training.

Two choices suit a small budget: Muon for the matrices of the blocks, and a loss with more weight on tokens of objects, at noise
levels at which the noisy image shows where they are. No loss reads concepts from the activations.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, final

import torch
import torch.nn.functional as F
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from difflex.miniature.architecture import DenoisingProblem, FlowModel, MiniatureConfig
from difflex.miniature.captions import WORDS, write_captions
from difflex.miniature.drawing import draw
from difflex.miniature.flux import MiniatureFluxConfig
from difflex.miniature.patches import PatchComponents
from difflex.miniature.sdxl import MiniatureSdxlConfig
from difflex.miniature.world import SceneMix, scenes

DRAWN_AT_ONCE = 2048
"""Scenes: drawing needs about a megabyte for each."""


@dataclass(frozen=True, kw_only=True)
class FlowRecipe:
    """The settings of the training. Shares of its length are shares of its updates, or of its minutes.

    The first part is plain: the loss alone. In the second part guidance is folded into the weights. In the third, which is
    empty by default, the model learns to draw in one step.
    """

    length: float = 10_888
    unit: Literal["updates", "minutes"] = "updates"
    """By updates the result is the same on every run; by minutes the length is known in advance."""
    batch: int = 512
    seed: int = 0
    warm_up: int = 300
    """Updates in which the learning rates rise."""
    decay_from: float = 0.45
    """The share of the plain part after which the learning rates fall to a fiftieth along a cosine."""
    object_weight: float = 8.0
    """A token fully on an object weighs 1 + this times as much as one on the background, at low noise levels."""
    doubt: tuple[float, float] = (0.7, 0.85)
    """The noise levels between which that extra weight falls to zero. Where the noisy image does not show the position of an
    object, weights that depend on it would move the best prediction from the mean towards an object in every possible place."""
    drop_caption: float = 0.1
    """The share of scenes with an empty caption."""
    mixes: tuple[tuple[float, float, float], tuple[float, float, float]] = ((0.25, 0.45, 0.30), (0.12, 0.58, 0.30))
    """The shares of single objects, pairs and copies: at first, and from `layout_from` on."""
    levels: tuple[tuple[float, float], tuple[float, float]] = ((1.2, 1.2), (2.0, 1.1))
    """Noise levels are the sigmoid of normal numbers of this mean and spread, at first and from `layout_from` on: many are high,
    where words decide the layout."""
    layout_from: float = 0.70
    """The share of the plain part after which there are more pairs and higher noise levels."""
    guided_from: float = 0.90
    """The share of the length after which guidance is folded in: targets are moved by the change that the caption makes in the
    velocity of the average weights of that moment."""
    guidance: float = 1.75
    """The guidance scale; 1 is no guidance."""
    guided_rate: float = 0.12
    """The factor of the learning rates when guidance begins; it falls to zero along a cosine."""
    averaging: tuple[float, float] = (0.9995, 0.998)
    """What the running average of the weights keeps at each update, in the plain part and after it."""
    one_step_from: float = 1.0
    """The share of the length after which the model learns to draw in one step what its average of that moment draws in
    `one_step_of`."""
    one_step_of: int = 4
    one_step_share: float = 0.75
    """The share of such scenes in a batch; of the others the velocity of that average is learned."""
    one_step_rate: float = 0.25
    """The factor of the learning rates when that begins; it falls to zero along a cosine."""

    def progress(self, updates: int, seconds: float) -> float:
        """Return the share of the length that is done."""
        return updates / self.length if self.unit == "updates" else seconds / (60 * self.length)

    def trains_layout(self, progress: float) -> bool:
        """Return whether there are more pairs and higher noise levels by now."""
        return progress >= self.layout_from * self.guided_from

    def is_guided(self, progress: float) -> bool:
        """Return whether guidance is folded in by now."""
        return progress >= self.guided_from

    def is_one_step(self, progress: float) -> bool:
        """Return whether the model learns to draw in one step by now."""
        return self.one_step_from < 1 and progress >= self.one_step_from

    def rate_factor(self, progress: float, updates: int) -> float:
        """Return the factor of the learning rates."""
        if self.is_one_step(progress):
            return self.one_step_rate * _half_cosine((progress - self.one_step_from) / (1 - self.one_step_from))
        if self.is_guided(progress):
            return self.guided_rate * _half_cosine((progress - self.guided_from) / (self.one_step_from - self.guided_from))
        fall = (progress / self.guided_from - self.decay_from) / (1 - self.decay_from)
        return min(1.0, (updates + 1) / self.warm_up) * (0.02 + 0.98 * _half_cosine(fall))


def _half_cosine(x: float) -> float:
    """Return 1 until 0, 0 from 1 on, and half a cosine between."""
    return 0.5 + 0.5 * math.cos(math.pi * min(1.0, max(0.0, x)))


@dataclass(frozen=True, kw_only=True)
class FlowSize:
    """A miniature of one size, with the learning rates that suit it."""

    config: MiniatureConfig = field(default_factory=MiniatureFluxConfig)
    muon_rate: float = 5e-3
    """Learning rate of the matrices inside the blocks."""
    adam_rate: float = 1.2e-3
    """Learning rate of everything else."""
    recipe: FlowRecipe = field(default_factory=FlowRecipe)
    """How it is trained unless flags say otherwise."""


SIZES = {
    "mini-flux": FlowSize(),
    "mini-flux-small": FlowSize(
        config=MiniatureFluxConfig(double_blocks=2, single_blocks=2, heads=2, text_width=64), muon_rate=6e-3, adam_rate=1.5e-3
    ),
    "mini-sdxl": FlowSize(
        config=MiniatureSdxlConfig(),
        muon_rate=4e-3,
        adam_rate=1e-3,
        # Small updates, for a CPU.
        recipe=FlowRecipe(
            length=13_200,
            batch=32,
            mixes=((0.4, 0.4, 0.2), (0.15, 0.55, 0.3)),
            averaging=(0.999, 0.998),
            guided_from=9 / 11,
            one_step_from=10 / 11,
        ),
    ),
}


class CaptionIds(NamedTuple):
    """Captions as input of both text encoders."""

    text: Int[Tensor, "caption length"]
    text_2: Int[Tensor, "caption length_2"]


@final
class CaptionTokens:
    """Captions of the drawn world as token ids, with the padding of the pipeline.

    Every known word is one token, so the ids of a caption are looked up word by word. The ids of 256 captions are compared with
    those of the tokenizers. Without the tokenizers themselves, an object is sent to another process quickly.
    """

    def __init__(self, pipeline: DiffusionPipeline) -> None:
        tokenizers = (pipeline.tokenizer, pipeline.tokenizer_2)
        self._text, self._text_2 = (_WordIds.of(tokenizer) for tokenizer in tokenizers)
        captions = ["", *write_captions(scenes(torch.arange(256)))]
        for ids, tokenizer in zip(self(captions), tokenizers, strict=True):
            length = tokenizer.model_max_length
            expected = tokenizer(captions, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
            assert torch.equal(ids, expected.input_ids)

    def __call__(self, captions: list[str]) -> CaptionIds:
        return CaptionIds(self._text.look_up(captions), self._text_2.look_up(captions))


class _WordIds(NamedTuple):
    """The vocabulary of one tokenizer."""

    ids: dict[str, int]
    start: list[int]
    end: int
    padding: int
    length: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "_WordIds":
        tokens = tokenizer(list(WORDS), add_special_tokens=False).input_ids
        ids = {word: token for word, [token] in zip(WORDS, tokens, strict=True)}
        *start, end = tokenizer("").input_ids
        padded = tokenizer("", padding="max_length", max_length=tokenizer.model_max_length).input_ids
        return cls(ids, start, end, padded[-1], len(padded))

    def look_up(self, captions: list[str]) -> Int[Tensor, "caption length"]:
        rows = []
        for caption in captions:
            words = [self.ids[word] for word in caption.split()]
            row = [*self.start, *words[: self.length - len(self.start) - 1], self.end]
            rows.append(row + [self.padding] * (self.length - len(row)))
        return torch.tensor(rows)


class SceneLatents(NamedTuple):
    """Scenes as targets of the model."""

    latents: Float[Tensor, "scene position channel"]
    objects: Float[Tensor, "scene position"]
    """The share of each position that objects cover."""


@torch.no_grad()
def draw_latents(
    seeds: Int[Tensor, " scene"], mix: SceneMix, components: PatchComponents, config: MiniatureConfig
) -> SceneLatents:
    """Draw the scenes of `seeds` on their device."""
    parts = []
    for some in seeds.split(DRAWN_AT_ONCE):
        drawn = draw(some, mix)
        latents = F.pixel_unshuffle(components.encode(drawn.images * 2 - 1), config.pack).flatten(2).movedim(1, 2)
        objects = F.adaptive_avg_pool2d((drawn.slots >= 0).float()[:, None], config.grid).flatten(1)
        parts.append((latents, objects))
    return SceneLatents(*(torch.cat(part) for part in zip(*parts, strict=True)))


class FlowBatch(NamedTuple):
    """All that the loss of an update depends on besides the weights."""

    latents: Float[Tensor, "scene position channel"]
    objects: Float[Tensor, "scene position"]
    text: Int[Tensor, "scene length"]
    text_2: Int[Tensor, "scene length_2"]
    level: Float[Tensor, " scene"]
    """Noise levels in [0, 1]."""
    noise: Float[Tensor, "scene position channel"]

    @classmethod
    def empty(cls, count: int, config: MiniatureConfig, lengths: tuple[int, int], device: torch.device) -> "FlowBatch":
        """Return zeros, to be overwritten; `lengths` are those of both texts in tokens."""
        places, channels = config.grid**2, config.channels
        sizes = [(places, channels), (places,), (lengths[0],), (lengths[1],), (), (places, channels)]
        dtypes = [torch.float32, torch.float32, torch.long, torch.long, torch.float32, torch.float32]
        return cls(*(torch.zeros(count, *size, dtype=each, device=device) for size, each in zip(sizes, dtypes, strict=True)))


@final
class GuidanceTeacher:
    """The model from the beginning of guidance, whose caption effect moves the targets.

    Guidance moves a velocity away from the prediction without a caption, which takes a second call. With moved targets the
    model learns to make the guided prediction in one call.
    """

    def __init__(self, model: FlowModel, empty: CaptionIds) -> None:
        self._model = model.requires_grad_(False).eval()
        self._empty = empty

    @torch.no_grad()
    def effect(
        self, noisy: Tensor, time: Tensor, text: Int[Tensor, "scene length"], text_2: Int[Tensor, "scene length_2"]
    ) -> Float[Tensor, "scene position channel"]:
        """Return the change of the velocity by the captions."""
        texts = (torch.cat([ids, empty.expand_as(ids)]) for ids, empty in zip((text, text_2), self._empty, strict=True))
        captioned, empty = self._model.velocity(noisy.repeat(2, 1, 1), time.repeat(2), *texts).float().chunk(2)
        return captioned - empty


@final
class OneStepTeacher:
    """The model from the beginning of the last part of the training.

    In one step a model draws the mean of all images that the caption allows, unless it is shown which image belongs to which
    noise. The images that the same model draws from this noise in several steps show it.
    """

    def __init__(self, model: FlowModel) -> None:
        self._model = model.requires_grad_(False).eval()

    @torch.no_grad()
    def batch(self, batch: FlowBatch, recipe: FlowRecipe) -> FlowBatch:
        """Replace the first scenes by images drawn from their noise, to be found in noise alone."""
        count = int(recipe.one_step_share * len(batch.level))
        drawn = self._model.draw(batch.noise[:count], batch.text[:count], batch.text_2[:count], recipe.one_step_of)
        return batch._replace(
            latents=torch.cat([drawn, batch.latents[count:]]),
            level=torch.cat([torch.ones_like(batch.level[:count]), batch.level[count:]]),
        )

    @torch.no_grad()
    def target(self, problem: DenoisingProblem, batch: FlowBatch, recipe: FlowRecipe) -> Tensor:
        """Return the target for the first scenes, and the velocity of the former model for the others."""
        count = int(recipe.one_step_share * len(batch.level))
        rest = (x[count:] for x in (problem.noisy, problem.time, batch.text, batch.text_2))
        return torch.cat([problem.target[:count], self._model.velocity(*rest).float()])


Teacher = GuidanceTeacher | OneStepTeacher


def flow_loss(model: FlowModel, batch: FlowBatch, recipe: FlowRecipe, teacher: Teacher | None = None) -> Tensor:
    """Compute the mean squared error of the velocity, with positions weighted by their share of objects."""
    is_one_step = isinstance(teacher, OneStepTeacher)
    if is_one_step:
        with _mixed_precision(batch.noise.device):
            batch = teacher.batch(batch, recipe)
    problem = model.problem(batch.latents, batch.noise, batch.level)
    noisy, target, time = problem
    with _mixed_precision(noisy.device):
        velocity = model.velocity(noisy, time, batch.text, batch.text_2)
        if is_one_step:
            target = teacher.target(problem, batch, recipe)
        elif teacher:
            target = target + (recipe.guidance - 1) * teacher.effect(noisy, time, batch.text, batch.text_2)
    low, high = recipe.doubt
    emphasis = recipe.object_weight * ((high - batch.level) / (high - low)).clamp(0, 1)
    weight = 1 + emphasis[:, None] * batch.objects
    error = (velocity.float() - target).square().mean(-1)
    loss = (error * weight).sum() / weight.sum()
    return loss if is_one_step else loss + model.extra_loss(batch.objects)  # a drawn image has other objects


def _mixed_precision(device: torch.device) -> AbstractContextManager[object]:
    """Return bfloat16 where the device has it, but on CPUs: some are slower in it than in float32."""
    is_possible = device.type != "cpu" and torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, torch.bfloat16) if is_possible else nullcontext()
