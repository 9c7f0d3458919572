"""What training is watched by: the loss on scenes it never sees, and how much each kind of word matters to it."""

import torch
from jaxtyping import Float
from torch import Tensor

from difflex.miniature.autoencoder import PatchComponents
from difflex.miniature.drawing import draw
from difflex.miniature.flow import CaptionTokens, FlowBatch, FlowModel, batch_of
from difflex.miniature.world import CONCEPTS, HELD_OUT_SEEDS, SceneMix

LEVELS = (0.2, 0.35, 0.5, 0.65, 0.8, 0.95)
WATCHED = ("background", "style", "colour", "size", "texture", "shape", "row", "column")
EARLY = 0.95
"""The noise level at which wrong words are tried: there the words decide, not the image."""


class HeldOutLoss:
    """Fixed scenes and captions, some with one word exchanged for another of its group."""

    def __init__(self, components: PatchComponents, texts: CaptionTokens, scenes: int = 192) -> None:
        seeds = torch.arange(scenes) + HELD_OUT_SEEDS
        mixed, single = draw(seeds), draw(seeds + scenes, SceneMix(1, 0, 0))
        self._mixed = batch_of(mixed, components, texts, mixed.captions)
        self._single = batch_of(single, components, texts, single.captions)
        swapped = {group: [_swapped(caption, group) for caption in single.captions] for group in WATCHED}
        self._swapped = {
            group: (torch.tensor([a != b for a, b in zip(captions, single.captions, strict=True)]), texts(captions))
            for group, captions in swapped.items()
        }

    def loss(self, model: FlowModel) -> float:
        """The mean squared velocity error over all noise levels, every token counted alike."""
        return sum(_errors(model, self._mixed, level).mean().item() for level in LEVELS) / len(LEVELS)

    def rises(self, model: FlowModel) -> dict[str, float]:
        """Group -> how much the loss of a noisy scene rises when one word of that group is wrong."""
        base = _errors(model, self._single, EARLY)
        return {
            group: (_errors(model, self._single._replace(clip=clip, t5=t5), EARLY) - base)[changed].mean().item()
            for group, (changed, (clip, t5)) in self._swapped.items()
        }


@torch.no_grad()
def _errors(model: FlowModel, batch: FlowBatch, level: float) -> Float[Tensor, " scene"]:
    noise = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        noisy = torch.lerp(batch.latents, noise, level)
        velocity = model.velocity(noisy, torch.full((len(noise),), level), batch.clip, batch.t5)
    return (velocity.float() - (noise - batch.latents)).square().mean((1, 2))


def _swapped(caption: str, group: str) -> str:
    """The caption with its first word of the group exchanged for the next one."""
    words, names = caption.split(), CONCEPTS[group]
    at = next((i for i, word in enumerate(words) if word in names), None)
    if at is not None:
        words[at] = names[(names.index(words[at]) + 1 + len(caption) % (len(names) - 1)) % len(names)]
    return " ".join(words)
