"""Rectified flow on the drawn world: one update of the miniature's training.

Three choices suit a small budget: Muon for the matrices of the blocks; a loss with more weight on tokens of objects, at noise
levels at which the noisy image shows where they are; and, in the first part of the training, a small head on the image tokens
in the middle that predicts the drawn concepts. The plain loss teaches an object's shape last, since it explains very little of
an image's variance; the head asks for it directly.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import FluxPipeline
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from difflex.miniature.architecture import PatchComponents
from difflex.miniature.drawing import Scenes, draw
from difflex.miniature.world import COLOURS, SHAPES, TEXTURES, SceneMix

HEAD_CONCEPTS = (*SHAPES, *COLOURS, *TEXTURES)


@dataclass(frozen=True, kw_only=True)
class FlowRecipe:
    """The settings of the miniature's training."""

    updates: int = 50_000
    batch: int = 32
    seed: int = 0
    muon_rate: float = 4e-3
    """Learning rate of the matrices inside the blocks."""
    adam_rate: float = 1e-3
    """Learning rate of everything else."""
    decay_from: float = 0.5
    """The share of the updates after which the learning rates fall to zero along a cosine."""
    object_weight: float = 8.0
    """A token fully on an object weighs 1 + this times as much as one on the background, at low noise levels."""
    doubt: tuple[float, float] = (0.7, 0.85)
    """The noise levels between which that extra weight falls to zero. Where the noisy image does not show the position of an
    object, weights that depend on it would move the best prediction from the mean towards an object in every possible place."""
    concept_weight: float = 0.2
    """The weight of the concept head's loss."""
    concepts_until: float = 0.85
    """The share of the updates after which that weight is zero."""
    drop_caption: float = 0.1
    """The share of scenes with an empty caption."""
    mix: tuple[float, float, float] = (0.25, 0.45, 0.30)
    """The shares of single objects, pairs and copies."""
    level_mean: float = 1.2
    level_spread: float = 1.2
    """Noise levels are the sigmoid of normal numbers of this mean and spread: many are high, where words decide the layout."""
    layout_from: float = 0.78
    """The share of the updates after which the next three settings apply: by then most errors are positions of several objects,
    which are decided between noise levels 0.8 and 0.97."""
    layout_mix: tuple[float, float, float] = (0.10, 0.60, 0.30)
    layout_level_mean: float = 2.0
    layout_level_spread: float = 1.1
    guided_from: float = 0.94
    """The share of the updates after which guidance is distilled into the weights: targets are moved along the change of the
    velocity by the caption."""
    guidance: float = 1.75
    """The guidance scale; 1 is no guidance. It improves colours, shapes and textures of several objects."""
    ema: float = 0.999

    def trains_layout(self, update: int) -> bool:
        """Return whether this update has the settings for the layout."""
        return update >= self.layout_from * self.updates


class FlowBatch(NamedTuple):
    """Scenes as input of the model."""

    latents: Float[Tensor, "scene token channel"]
    clip: Int[Tensor, "scene clip_length"]
    t5: Int[Tensor, "scene text_length"]
    concepts: Float[Tensor, "scene token concept"]
    """The share of each token that each of `HEAD_CONCEPTS` covers."""


class CaptionTokens:
    """The tokenizers of both text encoders, with the padding of `FluxPipeline`."""

    def __init__(self, pipeline: FluxPipeline) -> None:
        self._clip, self._t5 = pipeline.tokenizer, pipeline.tokenizer_2

    def __call__(self, captions: list[str]) -> tuple[Int[Tensor, "caption clip_length"], Int[Tensor, "caption text_length"]]:
        clip, t5 = (
            tokenizer(captions, padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt")
            for tokenizer in (self._clip, self._t5)
        )
        return clip.input_ids, t5.input_ids


def make_batch(scenes: Scenes, components: PatchComponents, tokenize: CaptionTokens, captions: list[str]) -> FlowBatch:
    """Make a batch of `scenes` with `captions`."""
    latents = components.encode(scenes.images * 2 - 1)
    tokens = F.pixel_unshuffle(latents, 2).flatten(2).movedim(1, 2)
    grid = latents.shape[-1] // 2
    labels = [
        (scenes.labels(group), len(names)) for group, names in (("shape", SHAPES), ("colour", COLOURS), ("texture", TEXTURES))
    ]
    concepts = [F.adaptive_avg_pool2d(F.one_hot(label + 1, n + 1)[..., 1:].movedim(-1, 1).float(), grid) for label, n in labels]
    return FlowBatch(tokens, *tokenize(captions), torch.cat(concepts, dim=1).flatten(2).movedim(1, 2))


def training_batch(update: int, recipe: FlowRecipe, components: PatchComponents, tokenize: CaptionTokens) -> FlowBatch:
    """Make the batch of one update: new scenes, some with an empty caption."""
    mix = recipe.layout_mix if recipe.trains_layout(update) else recipe.mix
    scenes = draw(torch.arange(recipe.batch) + (recipe.seed * 100_000 + update) * recipe.batch, SceneMix(*mix))
    drop = torch.rand(recipe.batch, generator=torch.Generator().manual_seed(update)) < recipe.drop_caption
    captions = ["" if dropped else caption for dropped, caption in zip(drop.tolist(), scenes.captions, strict=True)]
    return make_batch(scenes, components, tokenize, captions)


class FlowModel(nn.Module):
    """The trained parts of the pipeline, with the concept head on the middle of the transformer."""

    def __init__(self, pipeline: FluxPipeline) -> None:
        super().__init__()
        self.transformer, self.clip, self.t5 = pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2
        width = pipeline.transformer.inner_dim
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layers = (nn.Linear(width, width), nn.GELU(), nn.Linear(width, len(HEAD_CONCEPTS)))
        self.head = nn.Sequential(nn.LayerNorm(width), *layers)
        self._middle: Tensor | None = None
        self.transformer.transformer_blocks[-1].register_forward_hook(self._keep_middle)

    def _keep_middle(self, block: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        self._middle = output[1]

    def velocity(self, noisy: Tensor, level: Tensor, clip: Tensor, t5: Tensor) -> Float[Tensor, "scene token channel"]:
        """Predict the velocity, noise - image, at noise levels in [0, 1]."""
        side = round(noisy.shape[1] ** 0.5)
        rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        positions = torch.stack([torch.zeros(side, side), rows, columns], dim=-1).view(-1, 3)
        return self.transformer(
            hidden_states=noisy,
            timestep=level,
            pooled_projections=self.clip(input_ids=clip).pooler_output,
            encoder_hidden_states=self.t5(input_ids=t5).last_hidden_state,
            txt_ids=torch.zeros(t5.shape[1], 3),
            img_ids=positions,
            return_dict=False,
        )[0]

    def concept_logits(self) -> Float[Tensor, "scene token concept"]:
        """Return the prediction of the head from the last forward pass of `velocity`."""
        middle, self._middle = self._middle, None  # a model that holds a tensor with a graph cannot be copied
        assert middle is not None
        return self.head(middle.float())


def noise_levels(scenes: int, recipe: FlowRecipe, generator: torch.Generator, update: int) -> Float[Tensor, " scene"]:
    """Draw the noise levels of one update's scenes."""
    layout = recipe.trains_layout(update)
    mean = recipe.layout_level_mean if layout else recipe.level_mean
    spread = recipe.layout_level_spread if layout else recipe.level_spread
    return torch.sigmoid(torch.randn(scenes, generator=generator) * spread + mean)


CaptionEffect = Callable[[Tensor, Tensor, Tensor, Tensor], Float[Tensor, "scene token channel"]]
"""Noisy latents, their levels, captions for both encoders -> the change of the velocity by the captions."""


class GuidanceTeacher:
    """A copy of the model from the beginning of guidance, whose caption effect moves the targets.

    Guidance moves a velocity away from the prediction without a caption, which takes a second call. With moved targets the
    model learns to make the guided prediction in one call.
    """

    def __init__(self, model: FlowModel, weights: list[Tensor], tokenize: CaptionTokens) -> None:
        self._model = copy.deepcopy(model).requires_grad_(False)
        for parameter, x in zip(self._model.parameters(), weights, strict=True):
            parameter.copy_(x)
        self._clip, self._t5 = tokenize([""])

    @torch.no_grad()
    def __call__(
        self,
        noisy: Float[Tensor, "scene token channel"],
        level: Float[Tensor, " scene"],
        clip: Int[Tensor, "scene clip_length"],
        t5: Int[Tensor, "scene text_length"],
    ) -> Float[Tensor, "scene token channel"]:
        """Return the change of the velocity by the captions."""
        texts = (torch.cat([clip, self._clip.expand_as(clip)]), torch.cat([t5, self._t5.expand_as(t5)]))
        captioned, empty = self._model.velocity(noisy.repeat(2, 1, 1), level.repeat(2), *texts).float().chunk(2)
        return captioned - empty


class FlowLosses(NamedTuple):
    """The parts of the loss."""

    flow: Tensor
    """The mean squared error of the velocity, with tokens weighted by their share of objects."""
    concepts: Tensor
    """The cross-entropy of the concept head."""


def flow_losses(
    model: FlowModel,
    batch: FlowBatch,
    recipe: FlowRecipe,
    generator: torch.Generator,
    update: int,
    guide: CaptionEffect | None = None,
) -> FlowLosses:
    """Compute both losses at random noise levels; `guide` moves the targets."""
    noise = torch.randn(batch.latents.shape, generator=generator)
    level = noise_levels(len(noise), recipe, generator, update)
    noisy = torch.lerp(batch.latents, noise, level[:, None, None])
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        velocity = model.velocity(noisy, level, batch.clip, batch.t5)
        logits = model.concept_logits()
        effect = guide(noisy, level, batch.clip, batch.t5) if guide else 0
    target = noise - batch.latents + (recipe.guidance - 1) * effect
    objects = batch.concepts[..., : len(SHAPES)].sum(-1)
    low, high = recipe.doubt
    emphasis = recipe.object_weight * ((high - level) / (high - low)).clamp(0, 1)
    weight = 1 + emphasis[:, None] * objects
    error = (velocity.float() - target).square().mean(-1)
    flow = (error * weight).sum() / weight.sum()
    return FlowLosses(flow, _concept_loss(logits.float(), batch.concepts))


def _concept_loss(logits: Tensor, shares: Tensor) -> Tensor:
    """Return the mean cross-entropy of the groups of concepts, with tokens weighted by their share of objects."""
    sizes = [len(SHAPES), len(COLOURS), len(TEXTURES)]
    parts = zip(logits.split(sizes, dim=-1), shares.split(sizes, dim=-1), strict=True)
    losses = [-(share * F.log_softmax(logit, dim=-1)).sum() / share.sum() for logit, share in parts]
    return torch.stack(losses).mean()


def make_optimisers(model: FlowModel, recipe: FlowRecipe) -> list[torch.optim.Optimizer]:
    """Make Muon for the matrices inside the transformer's blocks and AdamW for all other parameters."""
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        is_matrix = "transformer_blocks" in name and parameter.ndim == 2 and ".norm" not in name
        (matrices if is_matrix else rest).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=recipe.muon_rate, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=recipe.adam_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True),
    ]


def rate_factor(recipe: FlowRecipe, update: int) -> float:
    """Return the factor of the learning rates: a short warm-up, constant, then a cosine to zero."""
    warmup = min(1.0, (update + 1) / 200)
    progress = update / recipe.updates
    decay = max(0.0, (progress - recipe.decay_from) / (1 - recipe.decay_from))
    return warmup * (0.5 + 0.5 * float(torch.cos(torch.tensor(decay * torch.pi))))


def concept_factor(recipe: FlowRecipe, update: int) -> float:
    """Return the weight of the concept loss: constant, then falling to zero over the last third of its time."""
    remaining = 1 - update / (recipe.updates * recipe.concepts_until)
    return recipe.concept_weight * min(1.0, max(0.0, 3 * remaining))


def train_update(
    model: FlowModel,
    average: list[Tensor],
    optimisers: list[torch.optim.Optimizer],
    batch: FlowBatch,
    recipe: FlowRecipe,
    update: int,
    guide: CaptionEffect | None = None,
) -> FlowLosses:
    """Train on one batch and update the running `average` of the parameters, both in place."""
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + update)
    losses = flow_losses(model, batch, recipe, generator, update, guide)
    (losses.flow + concept_factor(recipe, update) * losses.concepts).backward()
    parameters: list[Tensor] = list(model.parameters())
    nn.utils.clip_grad_norm_(parameters, 1.0)
    for optimiser, rate in zip(optimisers, (recipe.muon_rate, recipe.adam_rate), strict=True):
        optimiser.param_groups[0]["lr"] = rate * rate_factor(recipe, update)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    decay = min(recipe.ema, (update + 1) / (update + 10))
    torch._foreach_lerp_(average, parameters, 1 - decay)
    return FlowLosses(losses.flow.detach(), losses.concepts.detach())
