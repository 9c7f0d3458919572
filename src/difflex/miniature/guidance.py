"""Guidance folded in: in the last part of the training the model learns to say at once what it said with and without a caption.

Guidance moves a velocity away from what the model says without a caption, and takes a second call for it. Here the targets are
moved instead, by what the captions changed in the averaged weights when this part began.
"""

import copy

import torch
from jaxtyping import Float, Int
from torch import Tensor

from difflex.miniature.flow import CaptionTokens, FlowModel

__all__ = ["GuidanceTeacher"]


class GuidanceTeacher:
    """The model as it was when guidance began."""

    def __init__(self, model: FlowModel, weights: list[Tensor], texts: CaptionTokens) -> None:
        self._model = copy.deepcopy(model).requires_grad_(False)
        for parameter, x in zip(self._model.parameters(), weights, strict=True):
            parameter.copy_(x)
        self._clip, self._t5 = texts([""])

    @torch.no_grad()
    def __call__(
        self,
        noisy: Float[Tensor, "scene token channel"],
        level: Float[Tensor, " scene"],
        clip: Int[Tensor, "scene clip_length"],
        t5: Int[Tensor, "scene text_length"],
    ) -> Float[Tensor, "scene token channel"]:
        """What the captions change in the velocity."""
        twice = (torch.cat([clip, self._clip.expand_as(clip)]), torch.cat([t5, self._t5.expand_as(t5)]))
        told, untold = self._model.velocity(noisy.repeat(2, 1, 1), level.repeat(2), *twice).float().chunk(2)
        return told - untold
