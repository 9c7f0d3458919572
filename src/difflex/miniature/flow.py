"""Rectified flow on the drawn world: what one update of the miniature's training does.

Three things are there for a small budget: Muon for the blocks' matrices; a loss that weighs tokens on objects more, at the noise
levels where the noisy image shows where they are; and, for the first part of the training, a small head on the image tokens in
the middle that reads off the drawn concepts. The head asks directly for what the plain loss teaches last: an object's shape
explains very little of an image's variance.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import FluxPipeline
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from difflex.miniature.autoencoder import PatchComponents
from difflex.miniature.drawing import Scenes, draw
from difflex.miniature.world import COLOURS, SHAPES, TEXTURES, SceneMix

HEAD_CONCEPTS = (*SHAPES, *COLOURS, *TEXTURES)


@dataclass(frozen=True, kw_only=True)
class FlowRecipe:
    """How the miniature is trained."""

    updates: int = 50_000
    batch: int = 32
    seed: int = 0
    muon_rate: float = 4e-3
    """Learning rate of the matrices inside the blocks."""
    adam_rate: float = 1e-3
    """Learning rate of everything else."""
    decay_from: float = 0.5
    """Share of the updates after which the learning rates fall along a cosine to zero."""
    object_weight: float = 8.0
    """A token wholly on an object counts 1 + this times as much as one on the ground, where noise leaves no doubt about it."""
    doubt: tuple[float, float] = (0.7, 0.85)
    """Noise levels between which that extra weight falls to zero. Weights that depend on where the object is, while the noisy
    image does not tell, would move the best prediction from the mean towards an object in every place that is possible."""
    concept_weight: float = 0.2
    """Weight of the concept head's loss."""
    concepts_until: float = 0.85
    """Share of the updates after which the concept head has faded out; what remains is plain flow matching."""
    drop_caption: float = 0.1
    """Share of scenes shown with an empty caption."""
    mix: tuple[float, float, float] = (0.25, 0.45, 0.30)
    """Shares of single objects, pairs and copies."""
    level_mean: float = 1.2
    level_spread: float = 1.2
    """Noise levels are the sigmoid of normal numbers of this mean and spread: many high ones, where words decide the layout."""
    layout_from: float = 0.78
    """Share of the updates after which the three below hold instead: what is still wrong then is where which of several objects
    goes, and that is settled between noise 0.8 and 0.97."""
    layout_mix: tuple[float, float, float] = (0.10, 0.60, 0.30)
    layout_level_mean: float = 2.0
    layout_level_spread: float = 1.1
    guided_from: float = 0.94
    """Share of the updates after which guidance is folded in: targets are moved further in the direction that captions moved
    them until then."""
    guidance: float = 1.75
    """How far: at 1 not at all. What is gained are colours, shapes and textures of several objects."""
    ema: float = 0.999

    def settles_layout(self, update: int) -> bool:
        """Whether this update belongs to the last part of the training."""
        return update >= self.layout_from * self.updates

    def guides(self, update: int) -> bool:
        """Whether this update folds guidance in."""
        return update >= self.guided_from * self.updates


class FlowBatch(NamedTuple):
    """Scenes as the model meets them."""

    latents: Float[Tensor, "scene token channel"]
    clip: Int[Tensor, "scene clip_length"]
    t5: Int[Tensor, "scene text_length"]
    concepts: Float[Tensor, "scene token concept"]
    """Share of each token that each of `HEAD_CONCEPTS` covers."""


class CaptionTokens:
    """Captions as token ids for both text encoders, padded as `FluxPipeline` pads them."""

    def __init__(self, pipeline: FluxPipeline) -> None:
        self._clip, self._t5 = pipeline.tokenizer, pipeline.tokenizer_2

    def __call__(self, captions: list[str]) -> tuple[Int[Tensor, "caption clip_length"], Int[Tensor, "caption text_length"]]:
        clip, t5 = (
            tokenizer(captions, padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt")
            for tokenizer in (self._clip, self._t5)
        )
        return clip.input_ids, t5.input_ids


def batch_of(scenes: Scenes, components: PatchComponents, texts: CaptionTokens, captions: list[str]) -> FlowBatch:
    """These scenes as a batch, described by `captions`."""
    latents = components.encode(scenes.images * 2 - 1)
    tokens = F.pixel_unshuffle(latents, 2).flatten(2).movedim(1, 2)
    grid = latents.shape[-1] // 2
    labels = [
        (scenes.labels(group), len(names)) for group, names in (("shape", SHAPES), ("colour", COLOURS), ("texture", TEXTURES))
    ]
    concepts = [F.adaptive_avg_pool2d(F.one_hot(at + 1, n + 1)[..., 1:].movedim(-1, 1).float(), grid) for at, n in labels]
    return FlowBatch(tokens, *texts(captions), torch.cat(concepts, dim=1).flatten(2).movedim(1, 2))


def training_batch(update: int, recipe: FlowRecipe, components: PatchComponents, texts: CaptionTokens) -> FlowBatch:
    """The batch of one update: fresh scenes, some without their caption."""
    mix = recipe.layout_mix if recipe.settles_layout(update) else recipe.mix
    scenes = draw(torch.arange(recipe.batch) + (recipe.seed * 100_000 + update) * recipe.batch, SceneMix(*mix))
    drop = torch.rand(recipe.batch, generator=torch.Generator().manual_seed(update)) < recipe.drop_caption
    captions = ["" if dropped else caption for dropped, caption in zip(drop.tolist(), scenes.captions, strict=True)]
    return batch_of(scenes, components, texts, captions)


class FlowModel(nn.Module):
    """The trained parts of the pipeline together, with the concept head on the middle of the transformer."""

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
        """The predicted velocity, noise - image, at noise levels in [0, 1]."""
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
        """What the head reads in the middle of the last velocity's forward pass."""
        middle, self._middle = self._middle, None  # not kept: what a graph hangs on cannot be copied
        assert middle is not None
        return self.head(middle.float())


def noise_levels(scenes: int, recipe: FlowRecipe, generator: torch.Generator, update: int) -> Float[Tensor, " scene"]:
    """Random noise levels for one update's scenes."""
    late = recipe.settles_layout(update)
    mean = recipe.layout_level_mean if late else recipe.level_mean
    spread = recipe.layout_level_spread if late else recipe.level_spread
    return torch.sigmoid(torch.randn(scenes, generator=generator) * spread + mean)


Push = Callable[[Tensor, Tensor, Tensor, Tensor], Float[Tensor, "scene token channel"]]
"""Noisy latents, their levels, captions for both encoders -> what the captions change in the velocity."""


class FlowLosses(NamedTuple):
    """The parts of the loss."""

    flow: Tensor
    """Mean squared error of the velocity, tokens weighted by their share of objects."""
    concepts: Tensor
    """Cross-entropy of the concept head."""


def losses(
    model: FlowModel, batch: FlowBatch, recipe: FlowRecipe, generator: torch.Generator, update: int, guide: Push | None = None
) -> FlowLosses:
    """Both losses at random noise levels; with a `guide`, targets are moved along what captions change."""
    noise = torch.randn(batch.latents.shape, generator=generator)
    level = noise_levels(len(noise), recipe, generator, update)
    noisy = torch.lerp(batch.latents, noise, level[:, None, None])
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        velocity = model.velocity(noisy, level, batch.clip, batch.t5)
        logits = model.concept_logits()
        push = guide(noisy, level, batch.clip, batch.t5) if guide else 0
    target = noise - batch.latents + (recipe.guidance - 1) * push
    objects = batch.concepts[..., : len(SHAPES)].sum(-1)
    certain, doubtful = recipe.doubt
    emphasis = recipe.object_weight * ((doubtful - level) / (doubtful - certain)).clamp(0, 1)
    weight = 1 + emphasis[:, None] * objects
    error = (velocity.float() - target).square().mean(-1)
    flow = (error * weight).sum() / weight.sum()
    return FlowLosses(flow, _concept_loss(logits.float(), batch.concepts))


def _concept_loss(logits: Tensor, shares: Tensor) -> Tensor:
    """Cross-entropy within each group of concepts, a token weighted by its share of object."""
    sizes = [len(SHAPES), len(COLOURS), len(TEXTURES)]
    parts = zip(logits.split(sizes, dim=-1), shares.split(sizes, dim=-1), strict=True)
    each = [-(share * F.log_softmax(logit, dim=-1)).sum() / share.sum() for logit, share in parts]
    return torch.stack(each).mean()


def optimisers(model: FlowModel, recipe: FlowRecipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the transformer's blocks, AdamW for everything else."""
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        inside = "transformer_blocks" in name and parameter.ndim == 2 and ".norm" not in name
        (matrices if inside else rest).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=recipe.muon_rate, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=recipe.adam_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True),
    ]


def rate_factor(recipe: FlowRecipe, update: int) -> float:
    """What the learning rates are multiplied by: a short warm-up, level, then a cosine to zero."""
    warm = min(1.0, (update + 1) / 200)
    done = update / recipe.updates
    fall = max(0.0, (done - recipe.decay_from) / (1 - recipe.decay_from))
    return warm * (0.5 + 0.5 * float(torch.cos(torch.tensor(fall * torch.pi))))


def concept_factor(recipe: FlowRecipe, update: int) -> float:
    """The weight of the concept loss: level, then falling to zero over the last third of its time."""
    left = 1 - update / (recipe.updates * recipe.concepts_until)
    return recipe.concept_weight * min(1.0, max(0.0, 3 * left))


def one_update(
    model: FlowModel,
    average: list[Tensor],
    opts: list[torch.optim.Optimizer],
    batch: FlowBatch,
    recipe: FlowRecipe,
    update: int,
    guide: Push | None = None,
) -> FlowLosses:
    """Trains on one batch, in place; `average` follows the parameters."""
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + update)
    parts = losses(model, batch, recipe, generator, update, guide)
    (parts.flow + concept_factor(recipe, update) * parts.concepts).backward()
    parameters: list[Tensor] = list(model.parameters())
    nn.utils.clip_grad_norm_(parameters, 1.0)
    for optimiser, rate in zip(opts, (recipe.muon_rate, recipe.adam_rate), strict=True):
        optimiser.param_groups[0]["lr"] = rate * rate_factor(recipe, update)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    keep = min(recipe.ema, (update + 1) / (update + 10))
    torch._foreach_lerp_(average, parameters, 1 - keep)
    return FlowLosses(parts.flow.detach(), parts.concepts.detach())
